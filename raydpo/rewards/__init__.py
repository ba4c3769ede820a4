"""Reward functions: built-in verifiers, functions of the user, reward models and judges, applied to answers."""

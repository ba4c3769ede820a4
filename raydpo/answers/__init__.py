"""Answers of models to prompts, and verdicts on them: by a judge, a reward model, or a function of the user."""

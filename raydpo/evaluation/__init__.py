"""Evaluation of a policy against a reference: preferences, answers, drift, wins. The verb is ``raydpo eval``."""

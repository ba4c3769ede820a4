"""The verbs: what ``raydpo <verb>``, ``jobs/`` and Python callers run."""

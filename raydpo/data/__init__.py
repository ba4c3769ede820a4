"""Preferences: read records of any format, tokenise them, and plan which of them make up a step."""

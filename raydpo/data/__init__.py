"""Preferences: reading records of any format, tokenising them, and planning which of them make up a step."""

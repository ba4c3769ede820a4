"""Tokenised sets: the pairs of a source as token ids, made once, stored by content, and read by every command."""

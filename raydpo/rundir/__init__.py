"""A run directory: its file names, what is written to it and what is read back."""

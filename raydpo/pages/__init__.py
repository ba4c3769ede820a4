"""Common parts of all HTML pages. A page is one file, needs no network, and fits phones and wide screens."""

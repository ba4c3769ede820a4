"""The terminal: output, interrupts and exit statuses."""

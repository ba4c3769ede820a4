"""What a person at a terminal sees and does: output, interrupts, exit statuses."""

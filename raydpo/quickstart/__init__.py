"""The quickstart: a small model, pairs that show an effect, and the measurement of that effect."""

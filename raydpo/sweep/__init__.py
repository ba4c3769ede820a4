"""Many trainings against one cache: which, in what order, how many at once, and what came of each."""

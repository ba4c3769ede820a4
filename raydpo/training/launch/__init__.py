"""Start the workers of a training with Ray Train."""

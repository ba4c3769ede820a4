"""Training the policy against stored reference log-probs: the step, its metrics, its checkpoints, its launcher."""

"""The policy and the reference as torch modules: loading them, and the log-probs of completions."""

"""The frozen reference: its identity, its log-probs (score, build) and the cache that keeps them (store)."""

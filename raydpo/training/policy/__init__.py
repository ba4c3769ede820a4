"""The policy and its engine: weights, optimizer, ranks, export."""

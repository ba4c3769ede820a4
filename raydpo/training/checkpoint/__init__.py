"""Checkpoints: their files, their upload, and the notice of a preemption."""

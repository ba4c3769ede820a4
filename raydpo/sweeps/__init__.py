"""Sweeps: many trainings against one reference cache, in parallel where the cluster has room."""

"""Estimates of what a run takes, made before it starts: ``raydpo plan``."""

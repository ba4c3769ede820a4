"""Benchmark of raydpo against TRL on the same pairs, run by ``jobs/benchmark.py``. One process runs at a time."""

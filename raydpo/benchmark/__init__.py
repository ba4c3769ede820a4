"""raydpo against TRL on the same pairs: run by ``jobs/benchmark.py``. Each side is a process of its own, one at a time."""

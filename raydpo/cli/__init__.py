"""The command line: ``raydpo <verb>``."""

from raydpo.cli.entry import job, main

__all__ = ["job", "main"]

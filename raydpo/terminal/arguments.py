"""Types of numbers on the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

__all__ = ["at_least"]


def at_least(least: float, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """A ``type`` for argparse: finite numbers from ``least`` on. Any other is exit status 2 with the name of the option."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is given; {what} of at least {least:g} is expected")
        return value

    return parse

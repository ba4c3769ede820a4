"""Estimate of the time that tokenising takes, once for all commands."""

from __future__ import annotations

from dataclasses import dataclass

from raydpo.data.first import FirstPairs

__all__ = ["CORES", "Tokenising"]

CORES = 16
"""Cores that the estimate names beside one."""


@dataclass(frozen=True, kw_only=True)
class Tokenising:
    """The work of tokenising all sources.

    Attributes:
        pairs: well-formed pairs of all sources.
        done: whether their token ids are stored already.
        pairs_per_second: of one core of this machine, measured by tokenising; None if nothing had to be tokenised.
        cpu_minutes: of one core for all pairs; None likewise.
        minutes: on ``CORES`` cores, if each does its share; None likewise.
    """

    pairs: int
    done: bool
    pairs_per_second: float | None
    cpu_minutes: float | None
    minutes: float | None

    @classmethod
    def of(cls, first: FirstPairs) -> Tokenising:
        """The estimate from the pairs that were tokenised."""
        scales, sources = first.scales, first.sets.report.sources
        pairs = round(sum(source.pairs * scales.get(source.name, 1.0) for source in sources))
        if first.cpu_seconds is None:
            return cls(pairs=pairs, done=True, pairs_per_second=None, cpu_minutes=None, minutes=None)
        rate = sum(source.pairs for source in sources) / max(first.cpu_seconds, 1e-6)
        minutes = pairs / rate / 60
        return cls(pairs=pairs, done=False, pairs_per_second=rate, cpu_minutes=minutes, minutes=minutes / CORES)

    def line(self) -> str:
        if self.done:
            return f"tokenising: {self.pairs:,} pairs are already tokenised"
        alone, shared = (f"{float(f'{minutes:.2g}'):,.9g}" for minutes in (self.cpu_minutes, self.minutes))  # not 1.3e+02
        return (
            f"tokenising, once: {self.pairs:,} pairs at {self.pairs_per_second:,.0f} a second and core, measured here: "
            f"{alone} CPU minutes; {shared} minutes on {CORES} cores"
        )

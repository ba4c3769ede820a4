"""Writes the pages of the directories of runs, sweeps and rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raydpo.errors import ConfigError
from raydpo.rundir.directory import REPORT
from raydpo.rundir.read import RunRecord, SweepRecord, is_sweep
from raydpo.rundir.read_rounds import RoundsRecord, is_rounds
from raydpo.storage.files import Storage
from raydpo.storage.uri import redact
from raydpo.terminal.console import Console

__all__ = ["write_comparison", "write_report", "write_report_or_warn"]


def write_report(place: str) -> str:
    """Write ``report.html`` into the directory of a run, a sweep or rounds, from the files that exist so far.

    Args:
        place: local path or URI.

    Returns:
        Path or URI of the page, without secrets.

    Raises:
        ConfigError: if it is none of these.
        RaydpoError: if one of its files is damaged, naming it.
    """
    from raydpo.reports.rounds import rounds_page  # imports matplotlib, which takes half a second
    from raydpo.reports.run import run_page
    from raydpo.reports.sweep import sweep_page

    storage = Storage(place)
    if is_rounds(storage):
        page = rounds_page(RoundsRecord.read(storage))
    else:
        page = sweep_page(SweepRecord.read(storage)) if is_sweep(storage) else run_page(RunRecord.read(storage))
    storage.write(REPORT, page.encode())
    return f"{storage}/{REPORT}"


def write_comparison(places: Sequence[str], out: Path) -> None:
    """Write a page that compares runs, or runs of rounds. A sweep counts as all its trials that have begun.

    Raises:
        ConfigError: if one of the places holds none of these, if runs of rounds are among other runs, or if there are fewer
            than two runs in all.
        RaydpoError: if a file is damaged, naming it.
    """
    from raydpo.reports.compare import comparison_page
    from raydpo.reports.rounds_compared import rounds_comparison_page

    runs: list[RunRecord] = []
    rounds: list[RoundsRecord] = []
    for place in places:
        storage = Storage(place)
        if is_rounds(storage):
            rounds.append(RoundsRecord.read(storage))
        elif is_sweep(storage):
            runs += [trial.run for trial in SweepRecord.read(storage).trials if trial.run is not None]
        else:
            runs.append(RunRecord.read(storage))
    if rounds and runs:
        raise ConfigError(
            f"runs of rounds compare with each other only: {rounds[0].place} is one, {runs[0].place} is not. Name runs of "
            "rounds alone (offline rounds are rounds.offline=true), or the training of a round, its folder 'train'"
        )
    if len(runs) + len(rounds) < 2:
        raise ConfigError(
            f"a comparison needs two runs, but {', '.join(map(redact, places))} hold {len(runs) + len(rounds)} run(s) that "
            "have begun; name another"
        )
    page = rounds_comparison_page(rounds) if rounds else comparison_page(runs)
    Storage(str(out.absolute().parent)).write(out.name, page.encode())


def write_report_or_warn(place: str, console: Console) -> None:
    """Write the page of a run, a sweep or rounds. Failure is a warning: its results are stored."""
    try:
        console.say(f"report: {write_report(place)}")
    except Exception as error:
        console.warn(f"the report failed ({type(error).__name__}: {error}); 'raydpo report' tries again")

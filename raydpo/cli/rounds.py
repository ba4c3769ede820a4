"""The verbs ``raydpo rounds``, ``raydpo rounds show`` and ``raydpo rounds try``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from raydpo.cli.configured import quietly
from raydpo.terminal.arguments import at_least
from raydpo.terminal.console import Console

if TYPE_CHECKING:
    from raydpo.config import Config

__all__ = ["add_rounds", "joined"]

_WORDS = ("show", "try")
"""Words that may follow ``rounds`` instead of a configuration."""


def joined(argv: Sequence[str]) -> list[str]:
    """Join the first two words to one verb, such as ``rounds show``. A configuration named ``show`` is ``./show``."""
    if len(argv) > 1 and argv[0] == "rounds" and argv[1] in _WORDS:
        return [f"rounds {argv[1]}", *argv[2:]]
    return list(argv)


def add_rounds(
    add: Callable[[str, Callable[..., int | None], str], argparse.ArgumentParser],
    configured: Callable[[str, Callable[..., None], str], argparse.ArgumentParser],
) -> None:
    """Add the verbs to the command line.

    Args:
        add: adds a verb. configured: adds one that reads a configuration.
    """
    verb = configured(
        "rounds", _rounds, "sample answers, score them with reward functions and train on their pairs, in rounds"
    )
    verb.epilog = (
        "'raydpo rounds show' prints the answers of a round, 'raydpo rounds try' tries the rewards on a few prompts."
    )
    verb.add_argument("--fresh", action="store_true", help="start again; rename earlier rounds of this name")
    verb.add_argument(
        "--until",
        metavar="ROUND[.STAGE]",
        help="end there, such as 2 or 2.score (stages: sample, score, pair, train, measure)",
    )
    show = add("rounds show", _show, "print the answers of a round, their rewards, and which became pairs and why")
    show.add_argument("place", metavar="RUN", help="directory of rounds, or their configuration")
    show.add_argument("round", metavar="ROUND", type=at_least(0), help="number of the round; 0 = before the first")
    show.add_argument("--prompt", metavar="ID", help="id of a prompt, or its beginning; also of a held-out one")
    show.add_argument("-n", "--count", type=at_least(1), default=5, help="number of prompts (default: %(default)s)")
    tried = configured(
        "rounds try", _try, "answer a few prompts and print every reward; writes nothing into the run directory"
    )
    tried.add_argument("-n", "--count", type=at_least(1), default=8, help="number of prompts (default: %(default)s)")


def _config(args: argparse.Namespace) -> Config:
    from raydpo.config import load_config

    return load_config(args.config, args.overrides)


def _rounds(args: argparse.Namespace, console: Console) -> None:
    config = _config(args)
    from raydpo.rounds.run import rounds

    quietly(config, console, lambda: rounds(config, console, fresh=args.fresh, until=args.until))


def _show(args: argparse.Namespace, console: Console) -> None:
    from raydpo.rounds.show import show

    show(args.place, args.round, console, prompt=args.prompt, count=args.count)


def _try(args: argparse.Namespace, console: Console) -> None:
    config = _config(args)
    from raydpo.rounds.attempt import attempt

    with console.quiet():
        attempt(config, console, count=args.count)

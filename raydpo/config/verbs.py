"""Checks whether a configuration makes sense for a verb. They look at settings alone, not at files."""

from __future__ import annotations

from typing import Literal

from raydpo.config.run import Config
from raydpo.errors import ConfigError

__all__ = ["Verb", "check_verb"]

Verb = Literal["score", "train", "run", "sweep", "eval", "audit", "rounds"]
"""The verbs that read a whole configuration, by their names on the command line."""


def check_verb(config: Config, verb: Verb) -> None:
    """Refuse settings with which a verb would have nothing to do, or would not do what the settings say.

    Raises:
        ConfigError: naming the setting and the fix.
    """
    if verb in ("train", "run") and config.sweep is not None:
        raise ConfigError(
            f"section 'sweep' has no effect on 'raydpo {verb}', which trains once; run 'raydpo sweep', or set sweep=null"
        )
    if verb in ("score", "train", "run", "audit") and config.rounds is not None:
        raise ConfigError(
            f"section 'rounds' has no effect on 'raydpo {verb}'; run 'raydpo rounds', or set rounds=null and data.train"
        )
    if verb == "rounds" and config.rounds is None:
        raise ConfigError(
            "there is nothing to sample; add a section, for example rounds: {prompts: prompts.jsonl, rewards: [{use: math}]}"
        )
    if verb == "sweep" and config.sweep is None:
        raise ConfigError(
            "there is nothing to sweep over; add a section, for example sweep: {grid: {train.beta: "
            "[0.03, 0.1, 0.3]}}, or override sweep.grid='{train.beta: [0.03, 0.1, 0.3]}'"
        )
    if (
        verb == "eval"
        and config.evaluate.data is None
        and (config.data.eval is None or (config.data.eval.path is None and config.data.eval.fraction is None))
    ):
        instead = "; 'raydpo rounds' measures held-out prompts itself" if config.rounds is not None else ", or data.eval"
        raise ConfigError(f"there are no pairs to evaluate on; set evaluate.data to a file of preferences{instead}")

"""``raydpo rounds show``: the answers to the prompts of a round, their rewards, and the pairs made of them."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from raydpo.config import load_config
from raydpo.errors import ConfigError, FilesError, one_line
from raydpo.rounds.pairing import id_prefix
from raydpo.rounds.stage import stored_table
from raydpo.rundir.directory import (
    CONFIG,
    LEDGER,
    PROMPTS,
    ROUND_HELD_OUT,
    ROUND_PAIRS,
    SAMPLES,
    SCORES,
    round_folder,
)
from raydpo.rundir.rounds import CUT, GREEDY
from raydpo.storage.files import Storage
from raydpo.storage.uri import is_uri
from raydpo.terminal.console import Console, plain_text

__all__ = ["place_of", "print_answers", "show"]

Answers = list[dict[str, Any]]


def place_of(place: str) -> Storage:
    """The directory of rounds that ``place`` is, or that the configuration file ``place`` names.

    Raises:
        ConfigError: if it is neither.
    """
    if not is_uri(place) and Path(place).is_file():
        place = load_config(place).run_dir
    storage = Storage(place)
    if not storage.exists(LEDGER):
        raise ConfigError(f"{storage} holds no rounds: there is no {LEDGER}; give the directory of rounds, or their CONFIG")
    return storage


def show(place: str, number: int, console: Console, *, prompt: str | None = None, count: int = 5) -> None:
    """Print the answers of a round with their rewards, the pair that was made of them, and why.

    Of round 0 they are those to held-out prompts, before the first round. Offline rounds train on the answers of round 1.

    Args:
        place: directory of rounds, or the configuration.
        prompt: id of the prompt to print, or the beginning of it; also of a held-out one. None = the first ``count``.

    Raises:
        ConfigError: if there is no such round or prompt.
        RaydpoError: if a file is damaged, or config.yaml is missing.
    """
    storage, folder = place_of(place), round_folder(number)
    cut, margin, offline = _settings(storage)
    asked = {row["prompt_id"]: row["prompt"] for row in _rows(storage, PROMPTS) or []}
    paired = _rows(storage, f"{folder}/{ROUND_PAIRS}")
    again = offline and number > 1 and paired is not None
    trained = _trained(storage, round_folder(1) if again else folder)
    measured = _by_prompt(_rows(storage, f"{folder}/{ROUND_HELD_OUT}") or [])
    if not trained and not measured:
        there = [one for one in storage.list() if re.fullmatch("round-[0-9]+", one)]
        told = f"the last round there is {int(max(there)[6:])}" if there else "run 'raydpo rounds' first"
        raise ConfigError(f"round {number} in {storage} has no answers; {told}")
    chosen = _chosen([*trained, *(measured if prompt is not None or not trained else ())], prompt, count, number)
    if again:
        console.say(f"round {number} trains on the answers of round 1 (rounds.offline)")
    # Replayed pairs are of other answers to the same prompts.
    pairs = _by_prompt([row for row in paired or [] if row["pair_id"].startswith(id_prefix(number))])
    for key in chosen:
        answers = trained.get(key) or measured[key]
        told = _about_pairs(answers, pairs.get(key, ()), cut, margin) if key in trained and paired is not None else []
        held_out = "" if key in trained else ", held out"
        done = "keep" if cut == "drop" and held_out else cut  # held-out answers make no pairs, and all are measured
        print_answers(console, f"prompt {key.hex()[:12]}{held_out}", asked.get(key), answers, done, told)
    if why := _failed(storage):
        console.say(f"the last command failed, so these may be answers and rewards of one before it: {why}")
    left = len(trained or measured) - len(chosen)
    if prompt is None and left > 0:
        console.say(f"{left:,} more prompts; --prompt ID shows one of them, -n more")


def print_answers(
    console: Console, title: str, prompt: str | None, answers: Sequence[dict[str, Any]], cut: str, told: Sequence[str]
) -> None:
    """Print a prompt, its answers with their rewards, and lines about them.

    Args:
        prompt: text or messages, as JSON; None if it is not known.
        answers: rows with sample, reward, parts, error, end and answer.
        cut: ``rounds.cut``, which decides what becomes of cut answers.
        told: the lines.
    """
    console.say(f"{title}: {plain_text(_text(prompt))}")
    console.table(
        "",
        ("answer", "reward", "parts", "ends by", "text"),
        [
            (
                _name(row["sample"]),
                "unknown" if row["reward"] is None else f"{row['reward']:g}{_mark(row, cut)}",
                ", ".join(f"{name} {'-' if value is None else format(value, 'g')}" for name, value in row["parts"] or ()),
                "length" if row["end"] == CUT else "itself",
                plain_text(row["answer"]),
            )
            for row in answers
        ],
    )
    for row in answers:
        for line in (row["error"] or "").splitlines():
            console.say(f"  answer {_name(row['sample'])}: {plain_text(line)}")
    for line in told:
        console.say(f"  {line}")


def _mark(row: dict[str, Any], cut: str) -> str:
    """Whether ``rounds.cut`` applies to an answer. A reward below 0 stays."""
    if row["end"] != CUT or cut == "keep" or (cut == "zero" and row["reward"] < 0):
        return ""
    return " (cut)" if cut == "zero" else " (dropped)"


def _name(sample: int) -> str:
    return "greedy" if sample == GREEDY else str(sample)


def _about_pairs(answers: Answers, pairs: Sequence[dict[str, Any]], cut: str, margin: float) -> list[str]:
    """Which pairs were made of the answers to a prompt, and why; or why none was."""
    if pairs:
        return [
            f"pair: {one['good']} over {one['bad']}, whose rewards differ by {one['reward_good'] - one['reward_bad']:g}, "
            f"more than rounds.pairs.margin ({margin:g})"
            for one in pairs
        ]
    usable = [row for row in answers if row["reward"] is not None and not (cut == "drop" and row["end"] == CUT)]
    rewards = {row["reward"] for row in usable}
    if len(usable) < 2:
        return [
            f"no pair: {len(usable)} of {len(answers)} answers may be in one (they have a reward, and rounds.cut allows it)"
        ]
    if len(rewards) == 1:
        return [f"no pair: all answers have reward {rewards.pop():g}"]
    if max(rewards) - min(rewards) <= margin:
        return [f"no pair: rewards differ by {max(rewards) - min(rewards):g} at most, and rounds.pairs.margin is {margin:g}"]
    return ["no pair: the answers of different reward say the same"]


def _chosen(keys: Sequence[bytes], prompt: str | None, count: int, number: int) -> list[bytes]:
    if prompt is None:
        return list(keys)[:count]
    found = [key for key in keys if key.hex().startswith(prompt.lower())]
    if len(found) != 1:
        raise ConfigError(
            f"round {number} answered {'no prompt' if not found else f'{len(found):,} prompts'} whose id begins with "
            f"{prompt!r}; its ids begin with {', '.join(key.hex()[:12] for key in list(found or keys)[:3])}, ..."
        )
    return found


def _trained(storage: Storage, folder: str) -> dict[bytes, Answers]:
    """The answers that a round trains on, by prompt; with rewards if they are scored."""
    samples, scores = (_rows(storage, f"{folder}/{name}") for name in (SAMPLES, SCORES))
    none = {"reward": None, "parts": None, "error": None}
    scored = {(row["prompt_id"], row["sample"]): row for row in scores or []}
    return _by_prompt([none | row | scored.get((row["prompt_id"], row["sample"]), {}) for row in samples or []])


def _by_prompt(rows: Answers) -> dict[bytes, Answers]:
    found: dict[bytes, Answers] = {}
    for row in rows:
        found.setdefault(row["prompt_id"], []).append(row)
    return found


def _rows(storage: Storage, name: str) -> Answers | None:
    return stored_table(storage, name).to_pylist() if storage.exists(name) else None


def _settings(storage: Storage) -> tuple[str, float, bool]:
    """``rounds.cut``, ``rounds.pairs.margin`` and ``rounds.offline`` of stored rounds. The files that their configuration
    names need not be here: they may lie on another machine, or below another working directory."""
    try:
        rounds = yaml.safe_load(storage.read(CONFIG))["rounds"]
        return str(rounds["cut"]), float(rounds["pairs"]["margin"]), bool(rounds["offline"])
    except (KeyError, TypeError) as error:
        why = f"it is no configuration of rounds: {one_line(error, 200)}"
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = one_line(error, 200)
    raise FilesError(f"{storage}/{CONFIG} cannot be read ({why}); run 'raydpo rounds' again, which writes it")


def _failed(storage: Storage) -> str | None:
    """Why the last command failed; None if it did not, or if rounds.json does not tell."""
    with contextlib.suppress(ValueError, AttributeError):
        state = json.loads(storage.read(LEDGER))
        return state.get("why") if state.get("status") == "failed" else None
    return None


def _text(prompt: str | None) -> str:
    """A prompt as one text: of messages, each with its role."""
    if prompt is None:
        return f"(it is not in {PROMPTS})"
    value = json.loads(prompt)
    if isinstance(value, str):
        return value
    return "\n".join(f"[{message.get('role')}] {message.get('content')}" for message in value)

"""The page of on-policy rounds: what each round changed, success against drift, and answers through the rounds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from raydpo.pages.page import render
from raydpo.pages.text import shown
from raydpo.reports.rounds_findings import rounds_findings, within
from raydpo.reports.rounds_pictures import cost_pictures, rounds_curves, seconds_part
from raydpo.reports.run import SCRIPTS
from raydpo.reports.tables import Cell, Row, Table, duration, number
from raydpo.rundir.read_rounds import RoundsRecord
from raydpo.rundir.rounds import CUT, GREEDY
from raydpo.version import __version__

__all__ = ["rounds_page", "rounds_status"]

MOST_PROMPTS = 4
"""Number of held-out prompts whose answers are shown."""
MOST_ROUNDS = 6
"""Largest number of rounds whose answers to a prompt are shown."""
MOST_CHARACTERS = 400
"""Length from which an answer is cut. Its title, which a pointer shows, has more of it."""
Figures = tuple[tuple[str, str, str, str | None], ...]
"""(heading, key, format, key of the standard error) of the rows of a table."""
HELD_OUT: Figures = (
    ("success", "eval_success", ".3f", "eval_success_se"),
    ("success of the greedy answer", "eval_success_greedy", ".3f", None),
    ("prompts with a success", "eval_any", ".3f", None),
    ("reward", "eval_reward", ".3f", None),
    ("drift from the initial model, nats an answer", "eval_drift_initial", ".2f", "eval_drift_initial_se"),
    ("drift from the round before", "eval_drift_previous", ".2f", "eval_drift_previous_se"),
    ("tokens of an answer", "eval_tokens", ".1f", None),
    ("answers cut at max_tokens", "eval_cut", ".1%", None),
    ("different answers to a prompt", "eval_distinct", ".1%", None),
    ("entropy of the first token, nats", "eval_entropy", ".2f", None),
    ("answers that a reward failed on, with greedy ones", "eval_errors", ",.0f", None),
    ("answers without a reward", "eval_unknown", ",.0f", None),
    ("prompts", "eval_prompts", ",.0f", None),
    ("answers", "eval_answers", ",.0f", None),
)
TRAINING: Figures = (
    ("prompts", "prompts", ",.0f", None),
    ("answers", "answers", ",.0f", None),
    ("success", "success", ".3f", None),
    ("prompts with a success", "any", ".3f", None),
    ("reward", "reward", ".3f", None),
    ("mixed prompts", "mixed", ".1%", None),
    ("tied prompts", "ties", ",.0f", None),
    ("answers that a reward failed on", "errors", ",.0f", None),
    ("answers without a reward", "unknown", ",.0f", None),
    ("tokens of an answer", "tokens", ".1f", None),
    ("answers cut at max_tokens", "cut", ".1%", None),
    ("different answers to a prompt", "distinct", ".1%", None),
    ("entropy of the first token, nats", "entropy", ".2f", None),
    ("pairs", "pairs", ",.0f", None),
    ("pairs of earlier rounds among them", "replayed", ",.0f", None),
    ("completions that the reference scores", "wanted", ",.0f", None),
    ("of them in the cache", "cache_hits", ",.0f", None),
    ("optimizer steps", "steps", ",.0f", None),
    ("loss of the first step", "first_loss", ".4f", None),
    ("loss of the last step", "last_loss", ".4f", None),
    ("log-ratio of chosen answers, nats", "chosen_log_ratio", ".2f", None),
    ("log-ratio of rejected answers, nats", "rejected_log_ratio", ".2f", None),
)


def rounds_page(record: RoundsRecord) -> str:
    """Render the page. Where something is missing, because the rounds are under way, the page says so."""
    return render(
        "reports/rounds.html",
        scripts=SCRIPTS,
        version=__version__,
        record=record,
        status=rounds_status(record),
        facts=_facts(record),
        findings=rounds_findings(record),
        held_out=_table("Held-out prompts", record.rounds, HELD_OUT),
        training=_table("Training answers and pairs", record.trained, TRAINING),
        success=_what_success_is(record),
        costs=cost_pictures(record),
        drift=any(row["round"] and row.get("eval_drift_initial") is not None for row in record.rounds),
        curves=rounds_curves(record),
        rewards=_rewards(record),
        seconds=seconds_part(record),
        answers=_answers(record),
        settings=yaml.safe_dump(record.config, sort_keys=False, width=100, allow_unicode=True) if record.config else None,
    )


def rounds_status(record: RoundsRecord) -> str:
    """Describe in words how far the rounds are, and why they ended."""
    done = sum(row.get("eval_success") is not None for row in record.trained)
    count = record.setting("rounds.count")
    said = f" {record.why.rstrip('.')}." if record.why else ""
    if record.state == "stopped":
        return f"Ended early after {_count(done)}.{said}"
    if record.state == "done":
        return f"Finished: {_count(done)}.{said}"
    if not record.rounds and not record.why:
        return "Nothing is measured yet: the rounds are starting."
    of = "" if count is None else f" of {count:,}"
    state = " The last command failed:" if record.state == "failed" else ""
    return (
        f"Not finished: {done:,}{of} rounds are over.{state}{said} The same command continues; records are "
        "written after each round."
    )


def _count(rounds: int) -> str:
    return f"{rounds:,} round{'' if rounds == 1 else 's'}"


def _table(label: str, rows: Sequence[dict[str, Any]], figures: Figures) -> Table | None:
    """A row for each figure that a round has, a column for each round; None if there is none."""
    columns = ("", *("start" if row["round"] == 0 else f"round {row['round']}" for row in rows))
    found = [
        Row(heading, [_figure(row, *rest) for row in rows])
        for heading, *rest in figures
        if any(row.get(rest[0]) is not None for row in rows)
    ]
    return Table(label, columns, found) if found else None


def _figure(row: dict[str, Any], key: str, form: str, error: str | None) -> Cell:
    value, spread = row.get(key), row.get(error) if error else None
    cell = number(value, form)
    return cell if value is None or spread is None else Cell(within(value, spread, form), cell.value)


def _what_success_is(record: RoundsRecord) -> str:
    """What success is, as a sentence."""
    if record.only_duels:
        return (
            "Success is the win rate: the share of the judge's duels with answers of the initial model. At the start it is "
            "0.5, or less if cut answers count 0."
        )
    value = record.setting("rounds.measure.success")
    threshold = "the threshold" if value is None else f"{value:g}"
    return f"An answer succeeds if its reward is above {threshold} (rounds.measure.success)."


def _facts(record: RoundsRecord) -> list[tuple[str, str]]:
    setting, rows = record.setting, record.rounds
    sample = setting("rounds.sample") or {}
    path, reference = setting("model.path"), setting("rounds.reference")
    lora, frozen = setting("model.lora"), setting("model.freeze")
    trained = f"LoRA, r {lora['r']}" if lora else "an adapter" if setting("model.adapter") else "all weights"
    ends = [row for row in rows if row.get("eval_success") is not None]
    facts = [
        ("model", path and path.rstrip("/").rsplit("/", 1)[-1]),
        ("what trains", f"{trained} but those that model.freeze names" if frozen else trained),
        ("held-out success, start", _success(ends[0]) if ends and ends[0]["round"] == 0 else None),
        ("held-out success, last", _success(ends[-1]) if len(ends) > 1 else None),
        ("samples", "of the first round only (offline)" if setting("rounds.offline") else "of each round's policy"),
        ("reference", f"moves every {reference['every']} rounds" if isinstance(reference, dict) else reference),
        ("answers to a prompt", sample.get("n")),
        ("temperature", sample.get("temperature")),
        ("longest answer, tokens", sample.get("max_tokens")),
        ("answers sampled", f"{sum(map(record.sampled, rows)):,}" if rows else None),
        ("optimizer steps", f"{sum(row.get('steps') or 0 for row in rows):,}" if rows else None),
        ("time of all stages", duration(record.seconds) if record.seconds else None),
    ]
    return [(name, str(value)) for name, value in facts if value is not None] if record.config or rows else []


def _success(row: dict[str, Any]) -> str:
    return within(row["eval_success"], row.get("eval_success_se"), ".3f")


def _rewards(record: RoundsRecord) -> Table | None:
    """Each reward function: what it is, its mean at the start and at the end, and the answers on which it failed."""
    measured = [row for row in record.rounds if row.get("eval_rewards")]
    failed = [line.partition(":")[0] for row in record.rounds if _failed(row) for line in record.errors(row["round"])]
    rows = []
    for reward in record.rewards:
        ends = [measured[at]["eval_rewards"].get(reward.name) if measured else None for at in (0, -1)]
        kind = f"{reward.kind}, without a sandbox" if reward.unsafe else reward.kind
        cells = [
            Cell(kind, words=True),
            number(reward.weight, "g"),
            *map(number, ends),
            number(failed.count(reward.name), ",.0f"),
        ]
        rows.append(Row(reward.name, cells))
    columns = ("", "what", "weight", "held out, start", "held out, last", "errors")
    return Table("Reward functions", columns, rows) if rows else None


def _failed(row: dict[str, Any]) -> bool:
    return bool((row.get("errors") or 0) + (row.get("eval_errors") or 0))


def _answers(record: RoundsRecord) -> list[dict[str, Any]]:
    """Answers to the first held-out prompts, by id: of each round the greedy one and the first sampled one."""
    numbers = _some([row["round"] for row in record.rounds])
    tables = {number_: table for number_ in numbers if (table := record.held_out(number_)) is not None}
    if not tables:
        return []
    ids = sorted({one for table in tables.values() for one in table["prompt_id"].to_pylist()})[:MOST_PROMPTS]
    prompts = {row["prompt_id"]: row["prompt"] for row in record.prompts(ids)}
    answers = {
        (number_, row["prompt_id"], row["sample"]): row
        for number_, table in tables.items()
        for row in table.select(["prompt_id", "sample", "answer", "end", "reward", "error", "length"]).to_pylist()
        if row["prompt_id"] in ids and row["sample"] in (GREEDY, 0)
    }
    return [
        {
            "id": one.hex()[:8],
            "prompt": _prompt_text(prompts.get(one)),
            "rounds": [
                {
                    "name": "start" if number_ == 0 else f"round {number_}",
                    "answers": [
                        _answer(kind, answers[number_, one, sample])
                        for kind, sample in (("greedy", GREEDY), ("sampled", 0))
                        if (number_, one, sample) in answers
                    ],
                }
                for number_ in tables
            ],
        }
        for one in ids
    ]


def _some(numbers: Sequence[int]) -> list[int]:
    """Return at most ``MOST_ROUNDS`` of the rounds, evenly spaced, with the first and the last."""
    if len(numbers) <= MOST_ROUNDS:
        return list(numbers)
    return [numbers[round(at * (len(numbers) - 1) / (MOST_ROUNDS - 1))] for at in range(MOST_ROUNDS)]


def _answer(kind: str, row: dict[str, Any]) -> dict[str, Any]:
    text = row["answer"] or ""
    reward = "unknown" if row["reward"] is None else f"{row['reward']:.2f}"
    about = [kind, f"reward {reward}", f"{row['length']:,} tokens", *(["cut"] if row["end"] == CUT else [])]
    long = len(text) > MOST_CHARACTERS
    return {
        "about": ", ".join(about) + (f"; {shown(row['error'])}" if row["error"] else ""),
        "text": shown(text[:MOST_CHARACTERS]) + (f" [... {len(text) - MOST_CHARACTERS:,} more characters]" if long else ""),
        "title": shown(text) if long else None,
    }


def _prompt_text(prompt: str | None) -> str:
    """Return the text of a prompt from its JSON: text as it is, messages as ``role: content`` lines."""
    if prompt is None:
        return "(the prompt is not in prompts.parquet)"
    tree = json.loads(prompt)
    if isinstance(tree, str):
        return shown(tree, keep_end=True)
    return shown("\n".join(f"{each.get('role')}: {each.get('content')}" for each in tree), keep_end=True)

"""Scores answers with all reward functions of a configuration, and says on which answers they failed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.cluster.nodes import usable_cores
from raydpo.cluster.resources import Resources, resources_for
from raydpo.cluster.session import has_ray, owns_ray
from raydpo.cluster.work import do_work
from raydpo.config import Config
from raydpo.config.rewards import RewardConfig, reward_name
from raydpo.rewards.call import NO_COLUMNS
from raydpo.rewards.task import ROWS, RewardTask
from raydpo.rundir.rounds import SCORE_SCHEMA
from raydpo.storage.files import Storage
from raydpo.terminal.console import Console

__all__ = ["SCORES", "account", "apply", "too_many"]

BLOCK = 64
"""Answers of a block, at least; a block ends with the last answer to a prompt."""
RESERVED_CPUS = 2
"""CPUs of a cluster that are left to Ray Data's own tasks."""
SCORES = pa.schema([SCORE_SCHEMA.field(name) for name in ("reward", "parts", "error", "details", "seconds")])
"""Columns that ``apply`` returns."""


def apply(
    rewards: Sequence[RewardConfig],
    answers: pa.Table,
    config: Config,
    console: Console,
    *,
    round: int = 0,
    step: int = 0,
    against: pa.Table | None = None,
) -> pa.Table:
    """Score answers with all reward functions.

    The reward is the sum of weight times value over the functions that apply, as in TRL. It is null if no function with a
    weight applies, or if one with a weight failed: without its part the sum is not comparable.

    Functions run in processes of their own: of this machine, or on a cluster of Ray Data actors. Results are stored in the
    cache by content. Answers on which a function failed are tried again by the next call.

    Args:
        answers: table of ``task.ANSWERS``.
        round, step: of ``trainer_state``, which functions get.
        against: table of ``task.ANSWERS``, the opponents in the duels of judges; None = the other answers of ``answers``.

    Returns:
        A table of ``SCORES``, in the order of ``answers``.

    Raises:
        ConfigError: if a function cannot be imported.
        RaydpoError: if a worker fails. What it has stored is kept.
    """
    if not answers.num_rows:
        return SCORES.empty_table()
    results = [_scored(one, answers, config, console, round, step, against).to_pydict() for one in rewards]
    names, weights = [reward_name(one) for one in rewards], np.array([one.weight for one in rewards])
    values = np.array([[np.nan if value is None else value for value in each["reward"]] for each in results], float)
    failed = np.array([[error is not None for error in each["error"]] for each in results])
    weighted = (weights != 0)[:, None]
    known = (weighted & ~np.isnan(values)).any(0) & ~(weighted & failed).any(0)
    total = np.nansum(values * weights[:, None], 0)
    rows = range(answers.num_rows)
    errors = [_lines(f"{name}: {each['error'][row]}" for name, each in _with(names, results, "error", row)) for row in rows]
    details = [
        {name: json.loads(each["details"][row]) for name, each in _with(names, results, "details", row)} for row in rows
    ]
    return pa.table(
        {
            "reward": [float(total[row]) if known[row] else None for row in rows],
            "parts": [[(name, each["reward"][row]) for name, each in zip(names, results, strict=True)] for row in rows],
            "error": errors,
            "details": [json.dumps(one) if one else None for one in details],
            "seconds": np.sum([each["seconds"] for each in results], 0),
        },
        schema=SCORES,
    )


def _with(names: Sequence[str], results: Sequence[dict[str, Any]], column: str, row: int) -> Iterator[tuple[str, Any]]:
    """Names and results of the functions that say something in this column of an answer."""
    return ((name, each) for name, each in zip(names, results, strict=True) if each[column][row] is not None)


def _lines(lines: Iterator[str]) -> str | None:
    return "\n".join(lines) or None


def _scored(
    reward: RewardConfig,
    answers: pa.Table,
    config: Config,
    console: Console,
    round: int,
    step: int,
    against: pa.Table | None,
) -> pa.Table:
    """Results of one function, a table of ``process.RESULTS``."""
    storage, doing = Storage(config.cache_uri), f"scoring {reward_name(reward)}"
    if reward.use is None:
        from raydpo.rewards.models import model_rewards

        resources = resources_for("score", config) if reward.reward_model else None
        with console.part(doing) as progress:
            return model_rewards(reward, answers, config, storage, resources, progress, console.warn, against)
    if reward.unsafe:
        console.warn(
            f"the reward {reward_name(reward)} runs programs that a model wrote without a sandbox, with your rights "
            "(unsafe: true)"
        )
    task, tables = RewardTask.of(reward, round=round, step=step), _blocks(answers)
    resources = usable_cores() if owns_ray() or not has_ray() else _actors()
    with console.part(doing, "answers") as progress:
        results = do_work(
            task,
            tables,
            storage,
            resources,
            block=answers.num_rows,
            progress=progress,
            doing=doing,
            warn=console.warn,
            again=lambda result: result["error"].is_valid().to_numpy(),
        )
    return pa.concat_tables(results)


def _blocks(answers: pa.Table) -> list[pa.Table]:
    """Rows of ``ROWS`` in blocks that hold all answers of their prompts. All rows have the same columns."""
    columns = [json.loads(each) for each in answers["columns"].to_pylist()]
    names = sorted({name for each in columns for name in each} - set(NO_COLUMNS))
    same = [json.dumps({name: each.get(name) for name in names}) for each in columns]
    rows = answers.set_column(answers.schema.get_field_index("columns"), "columns", pa.array(same, pa.string()))
    prompts, starts = answers["prompt_id"].to_pylist(), [0]
    for row in range(1, answers.num_rows):
        if row - starts[-1] >= BLOCK and prompts[row] != prompts[row - 1]:
            starts.append(row)
    rows = rows.select(ROWS.names).cast(ROWS)
    return [rows.slice(start, end - start) for start, end in zip(starts, [*starts[1:], answers.num_rows], strict=True)]


def _actors() -> Resources:
    """Actors of a cluster that use no GPU: as many as its CPUs allow."""
    import ray

    workers = max(1, int(ray.cluster_resources().get("CPU", 1)) - RESERVED_CPUS)
    return Resources(workers, 0, None, 1)


def account(rewards: Sequence[RewardConfig], scored: pa.Table, answers: pa.Table) -> list[str]:
    """One line for each function that failed on answers, with the first of them.

    Args:
        scored: what ``apply`` returned for ``answers``.
    """
    lines = []
    for name, failed in _failures(rewards, scored).items():
        if failed:
            row, error = failed[0]
            prompt, sample = answers["prompt_id"][row].as_py().hex(), answers["sample"][row].as_py()
            lines.append(
                f"reward {name}: {len(failed):,} of {scored.num_rows:,} answers failed (first: prompt {prompt[:8]}, sample "
                f"{sample}: {error})"
            )
    return lines


def too_many(rewards: Sequence[RewardConfig], scored: pa.Table, max_errors: float) -> str | None:
    """The sentence that ends a command if a function failed on more than the share ``max_errors`` of answers; else None."""
    beyond = [
        f"{name} on {len(failed):,} of {scored.num_rows:,} answers (first error: {failed[0][1]})"
        for name, failed in _failures(rewards, scored).items()
        if failed and len(failed) / scored.num_rows > max_errors  # 0.29 * 100 would be less than 29
    ]
    if not beyond:
        return None
    return (
        f"reward functions failed on more answers than max_errors ({max_errors:g}) allows: {'; '.join(beyond)}. All other "
        "rewards are stored; correct the function and run the command again, or raise rounds.max_errors"
    )


def _failures(rewards: Sequence[RewardConfig], scored: pa.Table) -> dict[str, list[tuple[int, str]]]:
    """Name of each function -> (row, error) of the answers on which it failed."""
    found: dict[str, list[tuple[int, str]]] = {reward_name(one): [] for one in rewards}
    for row, lines in enumerate(scored["error"].to_pylist()):
        for line in lines.split("\n") if lines else ():
            name, _, error = line.partition(": ")
            found[name].append((row, error))
    return found

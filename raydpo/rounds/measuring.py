"""Stage ``measure``: the policy answers held-out prompts, which are scored as in training, and its drift is measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.errors import RaydpoError
from raydpo.evaluation.samples import answer_pairs
from raydpo.pipeline.score import fill_cache
from raydpo.reference.pairs import reference_values
from raydpo.reference.score import ReferenceSpec
from raydpo.reference.store import ReferenceCache
from raydpo.rounds.inputs import Inputs
from raydpo.rounds.prompts import held_out_of, round_seed, rows_of
from raydpo.rounds.sampling import Asked, answer, sample_settings
from raydpo.rounds.scoring import score
from raydpo.rounds.stage import Content, stored_table
from raydpo.rundir.directory import ROUND_HELD_OUT, round_folder
from raydpo.rundir.rounds import GREEDY, HELD_OUT_SCHEMA

__all__ = ["measure", "measure_settings"]


_OF_TRAINING = ("rounds.sample.n", "rounds.per_round")
"""Settings of sampling that a measurement does not depend on."""


def measure_settings(inputs: Inputs) -> dict[str, Any]:
    """Settings that decide the measurement, by their keys."""
    measured = inputs.rounds.measure.model_dump(mode="json")
    answers = {key: value for key, value in sample_settings(inputs).items() if key not in _OF_TRAINING}
    return {f"rounds.measure.{name}": value for name, value in measured.items()} | answers | inputs.reward_settings


def measure(inputs: Inputs, number: int, *, step: int, ahead: bool) -> Content:
    """Measure the policy after round ``number``, which is 0 for the initial model. In the duels of a judge its answers meet
    those of the initial model.

    Each measurement uses the same random numbers, so a difference between two is not chance of sampling alone.

    Args:
        step: number of steps that were trained before.
        ahead: whether the workers that answer also sample for the next round. The answers are stored in the cache.

    Returns:
        Rows of ``rundir.rounds.HELD_OUT_SCHEMA``, all answers of the first prompt first.
    """
    rounds = inputs.rounds
    held_out = Asked(
        held_out_of(inputs.prompts, rounds), rounds.measure.n, round_seed(rounds.sample.seed, 0), rounds.measure.greedy
    )
    following = Asked.in_round(inputs, number + 1) if ahead else None
    samples, seconds = answer(inputs, inputs.policy(number), held_out, number=number, following=following)
    initial = samples
    if number and any(one.judge is not None and one.scale == "duels" for one in rounds.rewards):
        # Among each other, the answers of one policy win half of their duels, however good they are.
        initial = stored_table(inputs.storage, f"{round_folder(0)}/{ROUND_HELD_OUT}")
    scored = score(inputs, samples, number=number, step=step, against=initial)
    if scored.failed is None and scored.table["reward"].null_count == len(samples):
        inputs.console.warn(
            f"round {number}: no answer to a held-out prompt has a reward, so that none counts as a success: no reward "
            "function applies to them; correct rounds.rewards, or the columns of the held-out prompts that they read"
        )
    ratios = _log_ratios(inputs, number, samples)
    columns = {name: samples[name] for name in samples.column_names}
    columns |= {name: scored.table[name] for name in scored.table.column_names}
    columns |= {name: pa.array(values, from_pandas=True) for name, values in ratios.items()}  # NaN is null
    table = pa.table({name: columns[name] for name in HELD_OUT_SCHEMA.names}, schema=HELD_OUT_SCHEMA)
    return Content(table, scored.failed, seconds)


def _log_ratios(inputs: Inputs, number: int, samples: pa.Table) -> dict[str, np.ndarray]:
    """Log-ratios of the policy and the initial model, and of the policy and the one before the round, of each sampled
    answer: float64 [answers], nats. NaN for greedy answers, and if the samples are not of the policy's own distribution."""
    sample = inputs.rounds.sample
    drawn = samples["sample"].to_numpy() != GREEDY
    found = {name: np.full(samples.num_rows, np.nan) for name in ("log_ratio", "log_ratio_previous")}
    if sample.temperature != 1 or sample.top_p < 1:
        return found
    if number == 0:  # it is both the initial model and the one before
        for values in found.values():
            values[drawn] = 0.0
        return found
    chosen = samples.filter(pa.array(drawn))
    prompts = inputs.prompts["prompt_ids"].take(rows_of(inputs.prompts, chosen["prompt_id"]))
    columns = (prompts, chosen["answer_ids"])
    pairs = answer_pairs(*([np.array(ids, np.int32) for ids in column.to_pylist()] for column in columns))
    sums: dict[int, np.ndarray] = {}
    for other in dict.fromkeys((number, 0, number - 1)):
        words = {number: "trained policy", 0: "initial model"}.get(other, "policy before the round")
        inputs.console.say(f"log-probs of the {words}, for the drift:")
        sums[other] = _log_probs(inputs, inputs.policy(other), pairs)
    found["log_ratio"][drawn] = sums[number] - sums[0]
    found["log_ratio_previous"][drawn] = sums[number] - sums[number - 1]
    return found


def _log_probs(inputs: Inputs, spec: ReferenceSpec, pairs: pa.Table) -> np.ndarray:
    """Log-prob of each answer under a model, float64 [answers], nats. What the cache lacks is scored."""
    config = inputs.config
    cache = ReferenceCache.open(config.cache_uri, spec.identity, unverified=config.cache.allow_unverified)
    fill_cache([pairs], spec, cache, config, inputs.console)
    sums = reference_values(pairs, cache)[0].sums
    if np.isnan(sums).any():
        raise RaydpoError(
            f"the cache {cache.storage} lacks log-probs of {int(np.isnan(sums).sum()):,} answers that were just scored; run "
            "the same command again"
        )
    return sums

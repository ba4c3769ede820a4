"""Fill the cache: plan what is missing, score it with Ray Data actors, commit part by part."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from raydpo.errors import CacheError, RaydpoError
from raydpo.model.layout import PromptGroup
from raydpo.model.selfcheck import CHECK_ROWS
from raydpo.ray_runtime import Resources, original_error
from raydpo.reference.score import ReferenceSpec, Scorer
from raydpo.reference.shards import Completion, Shard, plan_shards, still_missing, wanted_completions
from raydpo.reference.store import ReferenceCache

__all__ = ["BuildReport", "build"]

SHARDS_PER_WORKER = 8
"""A small job is cut finer than tokens_per_part says, so that every actor has work to the end and progress is seen."""
MIN_SHARD_TOKENS = 2048


@dataclass(frozen=True)
class BuildReport:
    """What a build did. Hits and scored count completions."""

    identity: str
    wanted: int
    hits: int
    scored: int
    tokens: int
    seconds: float
    parts: int
    problems: tuple[str, ...]

    @property
    def hit_rate(self) -> float:
        return self.hits / self.wanted if self.wanted else 1.0


def build(pairs: list[pa.Table], spec: ReferenceSpec, cache: ReferenceCache, resources: Resources, *,
          tokens_per_batch: int | Literal["auto"], tokens_per_part: int, progress: Callable[[int, int], None],
          note: Callable[[str], None] = lambda line: None) -> BuildReport:
    """Score what ``cache`` lacks of ``pairs``; kill it at any moment and only uncommitted parts are scored again.

    Args:
        pairs: tokenised pairs, of training and of evaluation.
        resources: of each actor, and how many.
        progress: called with (completions done, completions to do), at the start and after each part.
        note: called with each line that an actor has for the user, once.

    Raises:
        RaydpoError: whatever an actor found wrong, or CacheError if rows are missing after all.
    """
    start = time.perf_counter()
    cache.prepare({"model": spec.path, "adapter": spec.adapter})
    wanted = wanted_completions(pairs)
    shards = plan_shards(wanted, _shard_tokens(wanted, tokens_per_part, resources.workers))
    missing = still_missing(shards, cache)
    problems = tuple(cache.problems)
    to_do = sum(len(shard.completions) for shard in missing)
    tokens = parts = done = 0
    told: set[str] = set()
    if missing:
        progress(0, to_do)
        for row in _score_on_ray(missing, spec, cache, resources, tokens_per_batch):
            done += row["completions"]
            tokens += row["tokens"]
            parts += 1
            for line in row["notes"]:
                if line not in told:
                    told.add(line)
                    note(line)
            progress(done, to_do)
        lacking = still_missing(shards, cache)
        if lacking:
            first = lacking[0].completions[0].key.hex()
            raise CacheError(f"after scoring, {sum(len(shard.completions) for shard in lacking)} completions are still "
                             f"missing from {cache.storage.uri} (first key {first}); {'; '.join(cache.problems)}")
    return BuildReport(cache.identity.digest, len(wanted), len(wanted) - to_do, done, tokens,
                       time.perf_counter() - start, parts, problems)


def _shard_tokens(wanted: list[Completion], tokens_per_part: int, workers: int) -> int:
    total = sum(completion.length for completion in wanted)
    return min(tokens_per_part, max(MIN_SHARD_TOKENS, total // (SHARDS_PER_WORKER * workers)))


def _score_on_ray(shards: list[Shard], spec: ReferenceSpec, cache: ReferenceCache, resources: Resources,
                  tokens_per_batch: int | Literal["auto"]) -> Any:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # One row a shard and one block a row: a task is exactly one shard, whatever Ray Data thinks of block sizes.
    blocks = [_to_block(shard) for shard in shards]
    dataset = ray.data.from_arrow(blocks).map_batches(
        _ScoreShard,
        fn_constructor_args=(spec, cache.storage.uri, resources, tokens_per_batch, shards[0].prompt_groups()[:CHECK_ROWS]),
        batch_size=1, batch_format="pyarrow", zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=min(resources.workers, len(shards))),
        num_cpus=1, num_gpus=resources.gpus_per_worker,
        # Ray would otherwise restart an actor that a poisonous shard kills for ever.
        max_restarts=3, max_task_retries=3,
        # While one shard is computed, the one before it is written and the next one is unpacked.
        max_concurrency=2,
    )
    try:
        yield from dataset.iter_rows()
    except RaydpoError:
        raise
    except Exception as error:
        raise original_error(error, "scoring the reference") from error


_COMPLETION = pa.struct([("key", pa.binary(16)), ("tokens", pa.list_(pa.int32()))])
_BLOCK_SCHEMA = pa.schema([("groups", pa.list_(pa.struct([
    ("prompt", pa.list_(pa.int32())), ("completions", pa.list_(_COMPLETION))])))])


def _to_block(shard: Shard) -> pa.Table:
    return pa.table({"groups": pa.array([[
        {"prompt": group[0].prompt, "completions": [{"key": one.key, "tokens": one.tokens} for one in group]}
        for group in shard.groups]], _BLOCK_SCHEMA.field("groups").type)}, schema=_BLOCK_SCHEMA)


def _from_block(block: pa.Table) -> Shard:
    import numpy as np

    def array(scalar: pa.ListScalar) -> np.ndarray:
        return scalar.values.to_numpy()

    return Shard(tuple(
        tuple(Completion(one["key"].as_py(), array(group["prompt"]), array(one["tokens"])) for one in group["completions"])
        for group in block["groups"][0]))


class _ScoreShard:
    """A Ray Data actor: holds the reference, scores one shard a call and commits it as one part."""

    def __init__(self, spec: ReferenceSpec, cache_uri: str, resources: Resources,
                 tokens_per_batch: int | Literal["auto"], check_rows: Sequence[PromptGroup]) -> None:
        import torch

        if resources.threads is not None:
            torch.set_num_threads(resources.threads)
        self.threads = resources.threads
        self.cache = ReferenceCache.open(cache_uri, spec.identity)
        self.scorer = Scorer(spec, device=resources.device, tokens_per_batch=tokens_per_batch,
                             memory_share=resources.memory_share, check_rows=check_rows)
        self.computing = threading.Lock()

    def __call__(self, block: pa.Table) -> pa.Table:
        import torch

        shard = _from_block(block)
        with self.computing:
            if self.threads is not None:
                torch.set_num_threads(self.threads)  # OpenMP counts threads for each calling thread
            scored = self.scorer.score(shard.prompt_groups())
        logps = [values for group in scored for values in group]
        name = self.cache.commit([one.key for one in shard.completions], logps, self.scorer.provenance)
        return pa.table({"part": [name], "completions": [len(logps)], "tokens": [shard.tokens],
                         "notes": pa.array([self.scorer.notes], pa.list_(pa.string()))})

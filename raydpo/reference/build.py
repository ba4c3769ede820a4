"""Fill the cache: plan what is missing, score it with Ray Data actors, and commit each shard as one part."""

from __future__ import annotations

import pickle
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raydpo.cluster.actors import over_actors
from raydpo.cluster.resources import Resources
from raydpo.cluster.watch import loading
from raydpo.data.index import KeyIndex
from raydpo.data.mismatch import MismatchedTokens
from raydpo.data.rows import TokenSource
from raydpo.data.select import TokenTables
from raydpo.errors import CacheError, ModelError
from raydpo.model.layout import PromptGroup
from raydpo.model.partition import Partition
from raydpo.model.selfcheck import CHECK_ROWS
from raydpo.reference.claims import Claims
from raydpo.reference.identity import on_this_machine
from raydpo.reference.part import builder_of
from raydpo.reference.score import ReferenceSpec, refuse_difference
from raydpo.reference.shards import Plan, Shard, Wanted, prompt_groups, read_groups, still_missing
from raydpo.reference.store import ReferenceCache
from raydpo.reference.team import open_scorer

__all__ = ["BuildReport", "build"]

SHARDS_PER_WORKER = 8
"""Shards per actor of a small job, and of the beginning of a large one. Shards are then smaller than ``tokens_per_part``, so
that all actors have work at once, finish at about the same time, and progress is visible."""
MIN_SHARD_TOKENS = 2048
CHECK_COMPLETIONS = 64
"""Completions of the first shard that are read for the check of the layout, which takes a few prompts of them."""
PATIENCE_SHARDS, PATIENCE_SECONDS = 2, 10.0
"""How long a build waits for the next part of another build that claimed the remaining completions: this many times the
duration of its own longest shard, and at least this many seconds."""


@dataclass(frozen=True)
class BuildReport:
    """Result of a build.

    Attributes:
        identity: digest of the reference's identity.
        wanted: distinct completions of the pairs.
        hits: completions that were in the cache at the start.
        scored: completions that this build scored.
        by_others: completions that another build of the same cache scored meanwhile.
        twice: completions that this build and another one scored at the same time.
        tokens: tokens that this build scored, a prompt counted once for each of its completions.
        seconds: duration of the build, the start of its workers included.
        parts: parts that this build committed.
        problems: one sentence for each damaged file that was found at the start.
        again: log-probs of the groups ``again`` of ``build``, one after another: float32 [tokens]; None without any, or if
            nothing was scored.
    """

    identity: str
    wanted: int
    hits: int
    scored: int
    by_others: int
    twice: int
    tokens: int
    seconds: float
    parts: int
    problems: tuple[str, ...]
    again: np.ndarray | None = None

    def followed_by(self, other: BuildReport) -> BuildReport:
        """Both builds as one, where ``other`` wanted all that this one did, and more."""
        added = ("scored", "by_others", "twice", "tokens", "seconds", "parts", "problems")
        both = {name: getattr(self, name) + getattr(other, name) for name in added}
        return replace(other, hits=max(0, other.hits - self.scored - self.by_others), **both)

    @property
    def hit_rate(self) -> float:
        return self.hits / self.wanted if self.wanted else 1.0


def build(
    pairs: Iterable[pa.Table],
    spec: ReferenceSpec,
    cache: ReferenceCache,
    resources: Resources,
    *,
    tokens_per_batch: int | Literal["auto"],
    tokens_per_part: int,
    progress: Callable[[int, int], None],
    note: Callable[[str], None] = lambda line: None,
    tokens: TokenSource | None = None,
    light: Sequence[pa.Table] | None = None,
    again: Sequence[PromptGroup] = (),
) -> BuildReport:
    """Score the completions of ``pairs`` that ``cache`` lacks.

    A build may be killed at any moment; only uncommitted parts are scored again. Any number of builds may fill the same
    cache at once. Each build takes its shards in its own order. Before each shard it looks at what others have committed or
    claimed (see ``claims``). At the end it waits for the completions that others have claimed, and scores them if they do
    not arrive. So at most the shards in progress when another build started are scored twice.

    Args:
        pairs: tables of tokenised pairs, for training and evaluation: a list of all, in any order; or an iterator that
            yields one table for each window (see ``shards.WINDOWS``) as soon as it is known, while earlier ones are scored.
            Both give the same shards.
        resources: number of actors and the resources of each.
        progress: called with (completions done, completions to do), at the start and after each part. With an iterator the
            second number grows.
        note: called once for each message of an actor to the user.
        tokens: source of the pairs' tokens, which actors read. None = the tables themselves, which then travel once.
        light: for each set its rows of ``data.rows.LIGHT_SCHEMA``, see ``heads.Heads``; only with ``tokens``.
        again: groups of completions that the cache holds, for the actors to score again. They are not stored.

    Raises:
        RaydpoError: what an actor raised.
        CacheError: if rows are still missing after scoring.
    """
    start = time.perf_counter()
    cache.prepare({"model": spec.path, "adapter": spec.adapter})
    work = _Work(pairs, cache, tokens, light)
    waiting = work.next_missing()
    cache.set_aside()
    before = _parts(cache)
    here = version("transformers")
    others = sorted(one for one in cache.transformers if one.split(".")[:2] != here.split(".")[:2])
    if work.hits and others:
        note(
            f"warning: stored log-probs were computed with transformers {', '.join(others)}, here is {here}: a release may "
            f"change what a model computes; 'raydpo cache verify {cache.storage} --config CONFIG' scores a sample again"
        )
    parts = scored_tokens = scored = found = 0  # found: scored by other builds
    told: set[str] = set()
    values: np.ndarray | None = None
    if waiting is not None:
        progress(0, work.to_do)
    try:
        while waiting is not None:
            left, longest, first = 0, 0.0, None  # first: the sample of the first worker that answers
            known = _parts(cache) | {*Claims.names(cache)}
            # Each replica of a team needs some micro-batches of every shard.
            shards = work.shards(waiting, tokens_per_part * resources.replicas, resources.teams)
            source = work.source
            for row in _score_on_ray(shards, source, spec, cache, known, resources, tokens_per_batch, note, again):
                values = np.array(row["again"], np.float32) if again else None
                sample = np.array(row["sample"], np.float32)
                first = sample if first is None else first
                _compare_workers(spec, cache, first, sample)
                scored += row["completions"]
                found += row["by_others"]
                left += row["left"]
                scored_tokens += row["tokens"]
                parts += row["part"] is not None
                longest = max(longest, row["seconds"])
                for line in row["notes"]:
                    if line not in told:
                        told.add(line)
                        note(line)
                progress(scored + found, work.to_do)
            waiting = work.look_again()
            if waiting is not None:
                lacking, key = work.lacking()
                if not left:
                    raise CacheError(
                        f"after scoring, {lacking:,} completions are still missing from {cache.storage} "
                        f"(first key {key}); run it again"
                        f"{''.join(f'; {problem}' for problem in cache.problems)}"
                    )
                note(f"waiting for another build that is scoring {lacking:,} of the completions")
                waiting = _wait_for_others(work, waiting, max(PATIENCE_SECONDS, PATIENCE_SHARDS * longest))
            found = work.to_do - work.lacking()[0] - scored
            progress(scored + found, work.to_do)
    finally:
        if work.to_do:
            Claims(cache, frozenset()).clear()
    counts = work.wanted, work.hits, scored, work.to_do - scored, cache.stored_twice(cache.builder, since=before)
    seconds = time.perf_counter() - start
    return BuildReport(cache.identity.digest, *counts, scored_tokens, seconds, parts, tuple(work.problems), values)


class _Work:
    """The windows of a build, and which of their completions the cache holds.

    Args:
        pairs, tokens, light: as those of ``build``.

    Attributes:
        wanted, hits: completions of the windows that are known, and those that the cache held when they became known.
        problems: one sentence for each damaged file that was found before something was scored.
        source: where the tokens are read.
    """

    def __init__(
        self,
        pairs: Iterable[pa.Table],
        cache: ReferenceCache,
        tokens: TokenSource | None,
        light: Sequence[pa.Table] | None,
    ) -> None:
        self._cache = cache
        self._known: list[Wanted] = []
        self._tokens: list[int] = []  # of each window and all before it
        self._covered: list[np.ndarray] = []
        self.wanted = self.hits = 0
        self.problems: list[str] = []
        self.source: TokenSource | None = tokens
        if isinstance(pairs, list):
            everything = Wanted(pairs, tokens, light)
            self.source = everything.source
            self._coming: Iterator[Wanted] = iter(())
            for window in everything.windows():
                self._add(window)
        elif tokens is None:
            raise ValueError("pairs that become known one by one need tokens, where they are read; found None")
        else:
            self._coming = _distinct(Wanted([table], tokens, light) for table in pairs)

    def _add(self, window: Wanted) -> None:
        covered = self._cache.covers(window.keys, window.tokens)
        self._known.append(window)
        self._covered.append(covered)
        tokens = window.tokens.sum(dtype=np.int64) + window.prompt_tokens.sum(dtype=np.int64)
        self._tokens.append(int(tokens) + (self._tokens[-1] if self._tokens else 0))
        self.wanted += len(window)
        self.hits += int(covered.sum())
        self.problems += [problem for problem in self._cache.problems if problem not in self.problems]

    @property
    def to_do(self) -> int:
        """Completions of the known windows that the cache lacked."""
        return self.wanted - self.hits

    def next_missing(self) -> int | None:
        """Number of the first window that lacks something; windows are taken until there is one. None = there is none."""
        number = 0
        while number < len(self._known) or self._take():
            if not self._covered[number].all():
                return number
            number += 1
        return None

    def _take(self) -> bool:
        """Wait for the next window. False = there is none."""
        window = next(self._coming, None)
        if window is not None:
            self._add(window)
        return window is not None

    def look_again(self) -> int | None:
        """Ask the cache again what it holds. Returns the number of the first window that lacks something."""
        for number, window in enumerate(self._known):
            if not self._covered[number].all():
                self._covered[number] = self._cache.covers(window.keys, window.tokens)
        return self.next_missing()

    def lacking(self) -> tuple[int, str]:
        """Number of completions that the cache lacked when it was last asked, and the key of the first one."""
        keys = [window.key_bytes(np.flatnonzero(~covered)[:1]) for window, covered in self._both()]
        return sum(int((~covered).sum()) for _, covered in self._both()), next((one[0].hex() for one in keys if one), "")

    def _both(self) -> Iterator[tuple[Wanted, np.ndarray]]:
        return zip(self._known, self._covered, strict=True)

    def shards(self, first: int, tokens_per_part: int, teams: int) -> Iterator[Shard]:
        """Shards of what is missing, from window ``first`` on. Windows are planned, and taken, when their turn comes.

        Every builder takes the shards of a window in an order of its own.
        """
        number = first
        while number < len(self._known) or self._take():
            window, covered = self._known[number], self._covered[number]
            if not covered.all():
                # Completions of one prompt are only split where they exceed a part, even if shards are smaller.
                tokens = _shard_tokens(self._tokens[number], tokens_per_part, teams)
                plan = Plan(window, tokens, tokens_per_part)
                yield from plan.missing(covered, random.Random(f"{self._cache.builder} {number}"))
            number += 1


def _distinct(windows: Iterable[Wanted]) -> Iterator[Wanted]:
    """The windows without the completions that an earlier one has."""
    earlier = KeyIndex()
    for window in windows:
        new = window.beyond(earlier)
        new.add_to(earlier)
        if len(new):
            yield new


def _compare_workers(spec: ReferenceSpec, cache: ReferenceCache, one: np.ndarray, other: np.ndarray) -> None:
    """Refuse the model if two workers have computed different log-probs, and delete the parts that this build committed."""
    try:
        refuse_difference(spec, one, other, "scored by two workers")
    except ModelError:
        cache.refresh()
        for path in cache.paths():
            if builder_of(path.rsplit("/", 1)[-1]) == cache.builder:
                cache.storage.delete(path)
        raise


def _parts(cache: ReferenceCache) -> set[str]:
    """Names of the parts in use as of the last refresh."""
    return {path.rsplit("/", 1)[-1] for path in cache.paths()}


def _wait_for_others(work: _Work, waiting: int | None, patience: float) -> int | None:
    """Wait until others have committed all or added nothing for ``patience`` seconds.

    Args:
        waiting: first window that lacks something.

    Returns:
        The first window that still does, or None.
    """
    since, lacking = time.monotonic(), work.lacking()[0]
    while waiting is not None and time.monotonic() - since < patience:
        time.sleep(1)
        waiting = work.look_again()
        if (now := work.lacking()[0]) < lacking:
            since, lacking = time.monotonic(), now
    return waiting


def _shard_tokens(total: int, tokens_per_part: int, actors: int) -> int:
    """Tokens of the shards of a window. ``total``: all tokens up to its end, since later windows may not be known yet."""
    return min(tokens_per_part, max(MIN_SHARD_TOKENS, total // (SHARDS_PER_WORKER * actors)))


def _score_on_ray(
    shards: Iterator[Shard],
    source: TokenSource,
    spec: ReferenceSpec,
    cache: ReferenceCache,
    known: set[str],
    resources: Resources,
    tokens_per_batch: int | Literal["auto"],
    tell: Callable[[str], None],
    again: Sequence[PromptGroup],
) -> Any:
    import ray

    first = list(islice(shards, 2))
    if not first:
        return
    check_rows = prompt_groups(read_groups(first[0].take(slice(CHECK_COMPLETIONS)), source))[:CHECK_ROWS]
    alone = min(resources.teams, len(first)) == 1
    tokens = ray.put(source) if isinstance(source, (TokenTables, MismatchedTokens)) else source
    arguments = (spec, cache.storage.uri, cache.builder, frozenset(known), resources, tokens_per_batch, check_rows, alone)
    arguments += (again,)
    # Two calls at once: while one shard is computed, the previous one is written, or the next one is read and claimed.
    given = {"calls_at_once": 2, "environment": resources.environment, "tell": tell}
    blocks = (pa.table({"shard": [pickle.dumps(shard)]}) for shard in chain(first, shards))
    yield from over_actors(_ScoreShard, (tokens, *arguments), blocks, resources, "scoring the reference", **given)


class _ScoreShard:
    """Ray Data actor that holds the reference, alone or in a team. Each call scores one shard and commits one part."""

    def __init__(
        self,
        tokens: Any,
        spec: ReferenceSpec,
        cache_uri: str,
        builder: str,
        known: frozenset[str],
        resources: Resources,
        tokens_per_batch: int | Literal["auto"],
        check_rows: Sequence[PromptGroup],
        alone: bool = False,
        again: Sequence[PromptGroup] = (),
    ) -> None:
        import ray
        import torch

        # Whether another process was this actor before, which may have died between committing a shard and saying so.
        self.repeated = ray.is_initialized() and ray.get_runtime_context().was_current_actor_reconstructed
        if not hasattr(tokens, "rows"):  # a reference to an object in Ray's store
            tokens = ray.get(tokens)
        self.tokens: TokenSource = tokens
        if resources.threads is not None:
            torch.set_num_threads(resources.threads)
        self.threads = resources.threads
        self.cache = ReferenceCache.open(cache_uri, spec.identity)
        self.cache.builder = builder
        self.known = known  # claims and parts that existed when the shards were planned
        self.claims = Claims(self.cache, known)
        spec = on_this_machine(spec)
        settings = {"tokens_per_batch": tokens_per_batch, "memory_share": resources.memory_share, "check_rows": check_rows}
        settings |= {"alone": alone, "progress": loading}
        settings |= {"threads": resources.threads, "sequence": resources.sequence}
        partition = Partition(resources.partition, resources.offload)
        self.scorer = open_scorer(spec, device=resources.device, partition=partition, **settings)
        values = [one for group in self.scorer.score(list(again)) for one in group] if again else []
        self.values = np.concatenate([np.empty(0, np.float32), *values])
        self.planning, self.computing = threading.Lock(), threading.Lock()

    def __call__(self, block: pa.Table) -> pa.Table:
        import torch

        planned: Shard = pickle.loads(block["shard"][0].as_buffer())
        with self.planning:  # asks the storage, while the other call computes
            # Another build may have scored it meanwhile. Parts of this build can contain it only if this call is repeated;
            # otherwise they are skipped.
            known, builder = self.known, "" if self.repeated else self.cache.builder
            open_ = still_missing(planned, self.cache, skip=lambda name: name in known or builder_of(name) == builder)
            earlier = self._committed(planned) if self.repeated else []
            shard, claim = self.claims.take(open_)
            groups = read_groups(shard, self.tokens)
        with self.computing:
            if self.threads is not None:
                torch.set_num_threads(self.threads)  # OpenMP keeps this number per calling thread
            started = time.perf_counter()
            scored = self.scorer.score(prompt_groups(groups))
            seconds = time.perf_counter() - started
        logps = [values for group in scored for values in group]
        keys = [one.key for group in groups for one in group]
        name = self.cache.commit(keys, logps, self.scorer.provenance) if logps else next(iter(earlier), None)
        if claim is not None:
            self.claims.release(claim)
        return pa.table(
            {
                "part": pa.array([name], pa.string()),
                "completions": [len(logps) + len(earlier)],
                "by_others": [len(planned) - len(open_) - len(earlier)],
                "left": [len(open_) - len(logps)],
                "tokens": [shard.tokens],
                "seconds": [seconds],
                "sample": pa.array([self.scorer.sample], pa.list_(pa.float32())),
                "again": pa.array([self.values], pa.list_(pa.float32())),
                "notes": pa.array([self.scorer.notes], pa.list_(pa.string())),
            }
        )

    def __del__(self) -> None:
        """End a team when Ray Data is done with the actor, so that its GPUs are free when Ray says they are."""
        if hasattr(self, "scorer"):
            self.scorer.close()

    def _committed(self, shard: Shard) -> list[str]:
        """Names of the parts of this build, as of the last refresh, one for each completion of ``shard`` that one has."""
        paths, (parts, _) = self.cache.paths(), self.cache.locate(shard.keys, shard.needed)
        names = [paths[number].rsplit("/", 1)[-1] for number in parts[parts >= 0]]
        return [name for name in names if builder_of(name) == self.cache.builder]

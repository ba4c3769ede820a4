"""The training of a round: which policy it begins with, which reference it compares with, and what it takes over from the
rounds before it."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from raydpo.cluster.resources import dtypes
from raydpo.config import Config
from raydpo.data.select import PAIR_SCHEMA, PairSets
from raydpo.data.tally import DataReport, SourceReport
from raydpo.errors import ConfigError, FilesError
from raydpo.model.limits import check_limits
from raydpo.pipeline.prepare import Prepared
from raydpo.pipeline.score import score_prepared
from raydpo.pipeline.tokenised import Tokenised, limits_of, open_tokeniser
from raydpo.pipeline.train import train_prepared
from raydpo.reference.identity import identify, origin_of, resolve_model
from raydpo.reference.score import ReferenceSpec
from raydpo.reference.shards import Wanted
from raydpo.rounds.stored import compare_stored, groups_of, stored_pairs
from raydpo.rundir.directory import (
    CACHE_HITS,
    CHECKPOINTS,
    FINAL,
    ROUND_PAIRS,
    TRAIN,
    RunDirectory,
    round_folder,
)
from raydpo.rundir.earlier import finished_summary
from raydpo.storage.files import Storage
from raydpo.storage.uri import redact
from raydpo.terminal.console import Console
from raydpo.training.job import SCHEDULE_STEPS, Continued

__all__ = ["Start", "check_reference", "check_training", "policy_spec", "round_config", "start_of", "train_round"]

_REFERENCE = "reference identity"
"""The key of a run's fingerprint with the identity of its reference."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """The policy that a round begins with, and its reference. Paths are local directories, hub names or URIs.

    Attributes:
        number: of the round, from 1.
        path, adapter: the policy.
        policy: digest of the identity that the policy must have, as the round before recorded it; None in round 1.
        reference_path, reference_adapter: the reference; both None = the policy as it begins.
        reference: digest of the identity that the reference must have, as the first round with the same reference recorded
            it; None if this is that round.
    """

    number: int
    path: str
    adapter: str | None
    policy: str | None
    reference_path: str | None
    reference_adapter: str | None
    reference: str | None


def start_of(config: Config, number: int) -> Start:
    """The policy and the reference with which round ``number`` begins.

    Raises:
        FilesError: if an earlier round is not trained yet.
    """
    path, adapter = _policy_paths(config, number - 1)
    base = _reference_round(config, number)
    if number == 1:
        reference = config.reference.path, config.reference.adapter
    elif base == number - 1:
        reference = None, None
    elif base:
        reference = _policy_paths(config, base)
    else:
        reference = config.reference_path, config.reference_adapter
    policy = None if number == 1 else _recorded(config, number - 1)
    known = None if number == base + 1 else (RunDirectory(_train_storage(config, base + 1)).fingerprint() or {})
    return Start(
        number=number,
        path=path,
        adapter=adapter,
        policy=policy,
        reference_path=reference[0],
        reference_adapter=reference[1],
        reference=None if known is None else known.get(_REFERENCE),
    )


def policy_spec(config: Config, number: int) -> ReferenceSpec:
    """How to load the policy after round ``number``; 0 = the policy before the first round. Its identity is in it.

    Raises:
        FilesError: if the round is not trained yet, or the files of its policy are not those that it wrote.
    """
    model, (path, adapter) = config.model, _policy_paths(config, number)
    dtype, _ = dtypes(config)
    base, adapter_dir, length = resolve_model(path), adapter and resolve_model(adapter), config.data.max_length
    identity = identify(base, dtype, adapter_dir, model.quantization, model.trust_remote_code, max_length=length)
    if number:
        _check_policy(config, number, identity.digest, _recorded(config, number))
    return ReferenceSpec(
        path=base,
        adapter=adapter_dir,
        identity=identity,
        quantization=model.quantization,
        trust_remote_code=model.trust_remote_code,
        layout=model.layout,
        fused=model.fused,
        origin=origin_of(adapter or path),
    )


def round_config(config: Config, number: int, start: Start) -> Config:
    """The configuration of the training of round ``number``, whose run directory is ``round-00N/train``.

    Args:
        start: result of ``start_of``.
    """
    model = config.model
    trained = {"lora": None, "adapter": start.adapter} if number > 1 and model.adapts else {}
    return config.model_copy(
        update={
            "name": TRAIN,
            "output": f"{config.run_dir}/{round_folder(number)}",
            "cache": config.cache.model_copy(update={"uri": config.cache_uri}),
            # A trained policy has the tokenizer with it; the first one's files are the same, and stay where they are.
            "model": model.model_copy(
                update={"path": start.path, "tokenizer": model.tokenizer or model.path} | trained,
            ),
            "reference": config.reference.model_copy(
                update={"path": start.reference_path, "adapter": start.reference_adapter}
            ),
            "train": config.train.model_copy(update={"seed": _seed(config, number)}),
        }
    )


def train_round(config: Config, number: int, pairs: pa.Table, start: Start, console: Console) -> dict[str, Any]:
    """Score the pairs of round ``number`` with its reference and train on them, within a Ray session.

    A finished training is not repeated, and an interrupted one continues from its newest checkpoint. Checkpoints that no
    later call can need are removed once the training has finished.

    Args:
        pairs: rows of ``data.select.PAIR_SCHEMA``; further columns are ignored.
        start: result of ``start_of``.

    Returns:
        The content of summary.json, with ``wanted``, the distinct completions of the pairs, ``hits``, how many of them
        the cache held before, and ``seconds`` of scoring and training, of all calls but those that were killed.

    Raises:
        FilesError: if the files of policy or reference are not those that earlier rounds recorded.
        ConfigError: if the round was begun with other pairs or settings.
        RaydpoError: if scoring or training fails.
        KeyboardInterrupt: if the training was stopped, after its checkpoint.
    """
    check_training(config)
    own = round_config(config, number, start)
    storage = Storage(own.run_dir)
    sets = PairSets(pairs.select(PAIR_SCHEMA.names), None, _report(own, number, pairs))
    for line in check_limits([sets.train], limits_of(own)):
        console.warn(line)
    prepared = Prepared.of(own, console, Tokenised(open_tokeniser(own), sets))
    _check_identities(config, prepared, start)
    prepared = replace(prepared, continued=_continued(config, number))
    began = time.monotonic()
    summary = finished_summary(storage, prepared.fingerprint(), sets.train)
    counts = _count_hits(prepared, storage)
    if summary is None:
        rate = counts["hits"] / counts["wanted"] if counts["wanted"] else None
        try:
            train_prepared(_scored(prepared, console), console, rate, followed=True)
        finally:
            counts["seconds"] = round(counts["seconds"] + time.monotonic() - began, 2)
            storage.write(CACHE_HITS, json.dumps(counts, indent=2).encode())
        summary = _summary(config, number)
    _remove_checkpoints(config, number)
    took = counts["seconds"] or round(summary["train_seconds"], 2)  # of a call that was killed right after it
    return summary | {"wanted": counts["wanted"], "hits": counts["hits"], "seconds": took}


def check_training(config: Config) -> None:
    """Refuse what the training of a round would refuse, before the first round or before further ones.

    Raises:
        ConfigError: if section reference contradicts ``rounds.reference``; or if ``rounds.optimizer`` is carry, and the
            number of steps of all rounds is not the one with which the first rounds were trained.
    """
    check_reference(config)
    if config.rounds.optimizer != "carry":
        return
    total = config.rounds.count * config.train.steps
    for number in range(1, config.rounds.count + 1):
        fingerprint = RunDirectory(_train_storage(config, number)).fingerprint()
        if fingerprint is None:
            return
        before = fingerprint.get(SCHEDULE_STEPS, total)
        if before != total:
            raise ConfigError(
                f"rounds.count {config.rounds.count} and train.steps {config.train.steps} make a schedule of {total:,} "
                f"steps, but round {number} was trained by one of {before:,}, which rounds.optimizer carry continues; set "
                "them back, or begin other rounds (name=...). Only train.schedule constant, with a train.warmup that is a "
                "number of steps and a train.beta that is a number, can be prolonged"
            )


def check_reference(config: Config) -> None:
    """Refuse a section reference that contradicts ``rounds.reference``.

    Raises:
        ConfigError: if it does.
    """
    policy, reference = (config.model.path, config.model.adapter), (config.reference_path, config.reference_adapter)
    if config.rounds.reference != "initial" and reference != policy:
        raise ConfigError(
            f"section reference names {' + '.join(filter(None, reference))}, but by rounds.reference "
            f"{config.rounds.model_dump(mode='json')['reference']} the policy of a round becomes the reference; drop one"
        )


def _policy_paths(config: Config, number: int) -> tuple[str, str | None]:
    """Model and adapter of the policy after round ``number``; 0 = before the first one."""
    model = config.model
    if not number:
        return model.path, model.adapter
    final = f"{_train_dir(config, number)}/{FINAL}"
    return (model.path, final) if model.adapts else (final, None)


def _reference_round(config: Config, number: int) -> int:
    """The round whose policy is the reference of round ``number``; 0 = the reference of the first round."""
    wish = config.rounds.reference
    if wish == "initial":
        return 0
    every = 1 if wish == "previous" else wish.every
    return (number - 1) // every * every


def _train_dir(config: Config, number: int) -> str:
    return f"{config.run_dir}/{round_folder(number)}/{TRAIN}"


def _train_storage(config: Config, number: int) -> Storage:
    return Storage(_train_dir(config, number))


def _summary(config: Config, number: int) -> dict[str, Any]:
    summary = RunDirectory(_train_storage(config, number)).summary()
    if summary is None:
        raise FilesError(
            f"round {number} has no trained policy yet: there is no summary.json in {redact(_train_dir(config, number))}; "
            "run 'raydpo rounds' again, which continues it"
        )
    return summary


def _recorded(config: Config, number: int) -> str:
    """Digest of the identity of the policy that round ``number`` wrote."""
    return _summary(config, number)["policy"]


def _check_policy(config: Config, number: int, found: str, recorded: str) -> None:
    if found != recorded:
        raise FilesError(
            f"the policy in {redact(_train_dir(config, number))}/{FINAL} has identity {found}, but round {number} wrote "
            f"{recorded}: its files, those of model.path, model.dtype or data.max_length were changed since. Restore them, "
            "or start again with --fresh"
        )


def _check_identities(config: Config, prepared: Prepared, start: Start) -> None:
    """Refuse a policy or a reference whose files changed since earlier rounds."""
    if start.policy is not None:
        _check_policy(config, start.number - 1, prepared.policy_identity().digest, start.policy)
    found = prepared.reference.identity.digest
    if start.reference is not None and prepared.config.needs_reference and found != start.reference:
        first = _reference_round(config, start.number) + 1
        raise FilesError(
            f"the reference of round {start.number} has identity {found}, but that of round {first} had {start.reference}, "
            "and both must be the same: its files, score.dtype, model.dtype or data.max_length were changed since. Restore "
            "them, or start again with --fresh"
        )


def _scored(prepared: Prepared, console: Console) -> Prepared:
    """Fill the cache. If the step-0 gate will not be able to compare it with the policy, compare some of what it held."""
    if _begins_as_reference(prepared):
        score_prepared(prepared, console, prepared.tables)
        return prepared
    stored = stored_pairs(prepared)
    report = score_prepared(prepared, console, prepared.tables, again=groups_of(stored))
    compared = "none of its pairs was scored before this round"
    if not report.scored:
        compared = "all of its pairs were scored before, and nothing was scored again"
    elif report.again is not None:
        compared = compare_stored(prepared, stored, report.again)
    return replace(prepared, continued=replace(prepared.continued, compared=compared))


def _begins_as_reference(prepared: Prepared) -> bool:
    """Whether the step-0 gate can compare policy and cache; also without a reference, where there is nothing to compare."""
    identity = prepared.reference.identity
    return not prepared.config.needs_reference or prepared.policy_identity().same_model(identity)


def _continued(config: Config, number: int) -> Continued:
    """What round ``number`` takes over from those before it."""
    rounds = config.rounds
    steps = sum(_summary(config, each)["steps"] for each in range(1, number))
    begins_as = "the policy before round 1" if number == 1 else f"the policy of round {number - 1}"
    carried: dict[str, Any] = {}
    if rounds.optimizer == "carry":
        carried = {"first": steps, "total": rounds.count * config.train.steps}
        carried["checkpoint"] = None if number == 1 else _last_checkpoint(config, number - 1)
    return Continued(
        name=f"{config.run_name}, round {number}",
        begins_as=begins_as,
        position=steps if rounds.offline else 0,
        **carried,
    )


def _last_checkpoint(config: Config, number: int) -> str:
    """Folder of the checkpoint with which round ``number`` ended, and with which the next one begins."""
    storage, step = _train_storage(config, number), _summary(config, number)["steps"]
    name = f"{CHECKPOINTS}/step-{step:08d}"
    finished = RunDirectory(_train_storage(config, number + 1)).summary() is not None  # and has removed it
    if not finished and not storage.exists(name):
        raise FilesError(
            f"rounds.optimizer is carry, but {storage}/{name}, with the moments that round {number} ended with, is not "
            "there; restore it, or start again with --fresh"
        )
    return f"{_train_dir(config, number)}/{name}"


def _seed(config: Config, number: int) -> int:
    """train.seed of a round. Offline rounds have the same pairs, whose order goes on from round to round."""
    if number == 1 or config.rounds.offline:
        return config.train.seed
    digest = hashlib.sha256(f"round {number} of {config.train.seed}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _report(config: Config, number: int, pairs: pa.Table) -> DataReport:
    """The account of the pairs, one source for each that their prompts came from."""
    path = f"{config.output}/{ROUND_PAIRS}"
    counts = Counter(pairs["source"].to_pylist())
    return DataReport(
        [SourceReport(name, redact(path), records=count, pairs=count, kept=count) for name, count in counts.items()]
    )


def _count_hits(prepared: Prepared, storage: Storage) -> dict[str, Any]:
    """``wanted``, ``hits`` and ``seconds`` of ``train_round``, and what they are of. They are stored before anything is
    scored, so that a repeated call does not count what the first one scored."""
    cache = prepared.cache
    of = {"identity": cache.identity.digest, "pairs": prepared.pairs_digest()}
    if storage.exists(CACHE_HITS):
        stored = json.loads(storage.read(CACHE_HITS))
        if {name: stored.get(name) for name in of} == of:
            return {"seconds": 0.0} | stored
    counts = of | {"wanted": 0, "hits": 0, "seconds": 0.0}
    if prepared.config.needs_reference:
        wanted = Wanted(prepared.tables)
        counts |= {"wanted": len(wanted), "hits": int(cache.covers(wanted.keys, wanted.tokens).sum())}
    storage.write(CACHE_HITS, json.dumps(counts, indent=2).encode())
    return counts


def _remove_checkpoints(config: Config, number: int) -> None:
    """Remove the checkpoints of round ``number``, whose training has finished, or with carried moments those of the round
    before, which nothing continues any more. final/ has the policy."""
    done = number - 1 if config.rounds.optimizer == "carry" else number
    if done and (storage := _train_storage(config, done)).exists(CHECKPOINTS):
        storage.delete_directory(CHECKPOINTS)

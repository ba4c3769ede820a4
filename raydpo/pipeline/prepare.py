"""Pairs, policy, reference and cache of a configuration, prepared once for all stages."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.cluster.preflight import check_nodes
from raydpo.cluster.resources import Resources, dtypes
from raydpo.cluster.waiting import wait_for
from raydpo.config import Config, Verb, is_hub_name
from raydpo.config.filter import PairFilter
from raydpo.data.counting import all_count, mask_digests
from raydpo.data.imbalance import label_doubts
from raydpo.data.index import as_bytes
from raydpo.data.lists import all_pairs, begins
from raydpo.data.mismatch import as_trained, mismatched_run, uncounted
from raydpo.data.rows import PAIR_MARGIN, PAIR_WEIGHT
from raydpo.data.select import LABEL, LIST_COLUMNS, PairSets
from raydpo.data.tokenise import Tokeniser
from raydpo.losses import own_sources
from raydpo.model.rotary import ROTARY, rope_line
from raydpo.model.router import router_loss_coef
from raydpo.pipeline.checks import check, check_labels, check_models
from raydpo.pipeline.tokenised import Tokenised
from raydpo.reference.identity import ReferenceIdentity, earlier_identity, identify, origin_of, resolve_model
from raydpo.reference.score import ReferenceSpec
from raydpo.reference.store import ReferenceCache
from raydpo.rundir.fingerprint import TRAINING_PAIRS
from raydpo.terminal.console import Console
from raydpo.training.job import Continued

__all__ = [
    "Prepared",
    "checked",
    "measured_pairs",
    "open_reference",
    "reference_line",
    "training_settings",
    "wait_for_workers",
]

_DECIDING = {
    *("pairs_per_step", "epochs", "steps", "lr", "schedule", "warmup", "weight_decay", "clip", "loss", "beta"),
    *("label_smoothing", "seed", "optimizer", "optimizer_states"),
}
"""Settings of section ``train`` that decide the result of every training; those of some losses come on top."""


def wait_for_workers(stage: Literal["score", "train"], config: Config, resources: Resources, console: Console) -> None:
    """Wait for the workers of a stage, and check the nodes that an autoscaler has added."""
    wait_for(stage, resources, console, autoscaling=config.ray.autoscaling)
    if config.ray.autoscaling:
        check_nodes(config, [stage], console)


def checked(config: Config, verb: Verb, console: Console) -> Tokenised | None:
    """Make the checks of ``verb`` that need no Ray. Returns what ``Tokenised.before_ray`` gives."""
    console.begin("checks")
    check(config, verb, console)
    console.begin("reading pairs")
    tokenised = Tokenised.before_ray(config, console)
    if tokenised is not None and (verb != "score" or config.data.ranked == "lists"):
        check_labels(config, [tokenised.sets.train, tokenised.sets.eval])
    console.begin("checking model files")
    check_models(config, verb, console)
    console.begin("Ray")
    return tokenised


@dataclass(frozen=True)
class Prepared:
    """Inputs of both stages: pairs as token ids, the reference and its cache.

    Attributes:
        dtype: precision of the policy.
        policy_dir: local directory of the policy as it starts.
        own: the pairs.
        sets: ``own``, with the mismatched completions that the loss needs.
        pairs_digest: digest of the training pairs. Computed once; copies made with ``dataclasses.replace`` share it.
        continued: what the training of a round takes over from earlier ones; None outside of rounds.
    """

    config: Config
    dtype: str
    policy_dir: str
    tokeniser: Tokeniser
    own: PairSets
    sets: PairSets
    reference: ReferenceSpec
    cache: ReferenceCache
    pairs_digest: Callable[[], str]
    continued: Continued | None = None

    @classmethod
    def of(cls, config: Config, console: Console, tokenised: Tokenised | None = None) -> Prepared:
        """Identify the reference of a configuration and open the cache, within the Ray session.

        Args:
            tokenised: its pairs, if they were read before.
        """
        console.begin("pairs, reference and cache")
        model = config.model
        dtype, _ = dtypes(config)
        policy_dir = resolve_model(model.path)
        tokeniser, own = (both := tokenised or Tokenised.of(config, console)).tokeniser, both.sets
        sets = as_trained(own, config)
        for line in label_doubts(own.train, config.train, mismatched_run(config.train)):
            console.warn(line)
        if mismatched_run(config.train) is not None and (silent := uncounted(sets.train)):
            console.warn(
                f"of {silent:,} mismatched completions no token counts after data.max_length {config.data.max_length}, so "
                "they are left out of KTO's estimate of the drift; raise data.max_length, or set data.train_on to count more"
            )
        spec, cache = open_reference(config)
        if config.needs_reference:
            console.say(reference_line(config, spec))
            earlier, change = earlier_identity(spec.identity)
            old, new = (f"{directory}/identity.json" for directory in (earlier.digest, cache.directory))
            if change and cache.storage.exists(old) and not cache.storage.exists(new):
                console.say(
                    f"scored again, not read from {earlier.digest} of this cache: {change}; delete that directory "
                    "to free its space"
                )
        if spec.identity.rope_length is not None:
            console.say(rope_line(spec.identity.rope_length, config.data.max_length))
        digest = functools.cache(lambda: _digest(sets.train))
        return cls(config, dtype, policy_dir, tokeniser, own, sets, spec, cache, digest)

    def trained_by(self, config: Config) -> Prepared:
        """The same pairs and models for another configuration, whose loss may need other mismatched completions."""
        sets = as_trained(self.own, config)
        digest = functools.cache(lambda: _digest(sets.train))
        return replace(self, config=config, sets=sets, pairs_digest=digest)

    @property
    def name(self) -> str:
        """Name of the run for people."""
        return self.config.run_name if self.continued is None else self.continued.name

    @property
    def filter_by_reference(self) -> PairFilter | None:
        """The condition on training pairs, if it reads log-probs of the reference."""
        if not self.config.data.filter:
            return None
        pair_filter = PairFilter(self.config.data.filter)
        return pair_filter if pair_filter.needs_reference else None

    @property
    def tables(self) -> list[pa.Table]:
        """The training pairs, and the held-out pairs if there are any."""
        return [self.sets.train] + ([self.sets.eval] if self.sets.eval is not None else [])

    def policy_identity(self) -> ReferenceIdentity:
        """Identity of the policy as it starts. New adapters do not change it."""
        model = self.config.model
        files, length = (self.policy_dir, self.dtype, self.policy_adapter), self.config.data.max_length
        return identify(*files, model.quantization, model.trust_remote_code, max_length=length)

    @property
    def policy_adapter(self) -> str | None:
        """Local directory of the adapter that training starts from, or None."""
        return self.config.model.adapter and resolve_model(self.config.model.adapter)

    @property
    def router_loss_coef(self) -> float:
        """Weight of the router loss: the configuration's, or the model's own."""
        config = self.config
        return router_loss_coef(self.policy_dir, config.train.router_aux_loss_coef, config.model.trust_remote_code)

    @property
    def base_name(self) -> str:
        """Name of the base model in an exported adapter: its hub name, else its directory."""
        path = self.config.model.path
        return path if is_hub_name(path) else self.policy_dir

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the trained policy depends on, by the name of the setting."""
        config, policy = self.config, self.policy_identity()
        train = training_settings(config)
        router = {"router_aux_loss_coef": coef} if (coef := self.router_loss_coef) else {}
        train = {key: value for key, value in train.items() if key != "router_aux_loss_coef"} | router
        lora = config.model.lora.model_dump(mode="json") if config.model.lora else None
        return (
            {
                "model.path (weights)": policy.weights,
                "model.path (architecture)": policy.architecture,
                "model.adapter": policy.adapter,
                "model.quantization": policy.quantisation,
                "model.freeze": list(config.model.freeze),
                "model.dtype": self.dtype,
                "model.lora": lora,
                "reference identity": self.reference.identity.digest if config.needs_reference else None,
                TRAINING_PAIRS: self.pairs_digest(),
                "data.shuffle": config.data.shuffle,
            }
            | ({ROTARY: policy.rope_length} if policy.rope_length else {})
            | ({"data.filter": config.data.filter} if self.filter_by_reference else {})
            | {f"train.{key}": value for key, value in train.items()}
            | {f"train.loss (source of {name})": digest for name, digest in own_sources(config.train).items()}
            | ({} if self.continued is None else self.continued.deciding(config.train))
        )


def training_settings(config: Config) -> dict[str, Any]:
    """Settings of section ``train`` that decide the result of a training, by name."""
    return config.train.model_dump(mode="json", include=_DECIDING) | config.train.shaped()


def open_reference(config: Config) -> tuple[ReferenceSpec, ReferenceCache]:
    """Find and identify the reference of a configuration, and open its cache."""
    _, dtype = dtypes(config)
    directory, quantization = resolve_model(config.reference_path), config.reference_quantization
    adapter, trusted = config.reference_adapter and resolve_model(config.reference_adapter), config.model.trust_remote_code
    identity = identify(directory, dtype, adapter, quantization, trusted, max_length=config.data.max_length)
    spec = ReferenceSpec(
        path=directory,
        adapter=adapter,
        identity=identity,
        quantization=quantization,
        trust_remote_code=trusted,
        layout=config.model.layout,
        fused=config.model.fused,
        origin=origin_of(config.reference_adapter or config.reference_path),
    )
    return spec, ReferenceCache.open(config.cache_uri, identity, unverified=config.cache.allow_unverified)


def reference_line(config: Config, spec: ReferenceSpec) -> str:
    """Describe the reference in one line."""
    identity = spec.identity
    return (
        f"reference: {' + '.join(filter(None, (config.reference_path, config.reference_adapter)))} in "
        f"{', '.join(filter(None, (identity.dtype, identity.quantisation)))}, identity {identity.digest}"
    )


def measured_pairs(table: pa.Table | None) -> str | None:
    """Digest of the keys and truncated lengths of held-out pairs and of the tokens that count, in any order; None without
    pairs."""
    if table is None:
        return None
    table = all_pairs(table)  # as they are compared
    masked = not all_count(table)
    kind = np.dtype([*_KEY_AND_TOKENS.descr, ("mask", "<u8")]) if masked else _KEY_AND_TOKENS
    pairs = np.empty((table.num_rows, 2), kind)
    for column, side in enumerate(("chosen", "rejected")):
        found = np.concatenate([np.empty(0, _KEY_AND_TOKENS), *_keys_and_tokens(table, side)])
        for name in _KEY_AND_TOKENS.names:
            pairs[name][:, column] = found[name]
        if masked:
            pairs["mask"][:, column] = mask_digests(table, side)
    return hashlib.sha256(np.sort(pairs.view(f"V{2 * kind.itemsize}").ravel()).tobytes()).hexdigest()[:32]


_KEY_AND_TOKENS = np.dtype([("key", "V16"), ("tokens", "<u4")])


def _keys_and_tokens(table: pa.Table, side: str) -> Iterator[np.ndarray]:
    """Keys and truncated lengths of the completions of one side, batch by batch: [batch] of ``_KEY_AND_TOKENS``."""
    for batch in table.select([f"{side}_key", f"{side}_ids"]).to_batches():
        rows = np.empty(batch.num_rows, _KEY_AND_TOKENS)
        rows["key"] = as_bytes(batch[0]).view("V16").ravel()
        rows["tokens"] = pc.list_value_length(batch[1]).to_numpy()
        yield rows


def _digest(table: pa.Table) -> str:
    """Digest of the pairs in their order: keys, truncated lengths, ranks, sources and weights, and which tokens count."""
    digest = hashlib.sha256()
    for side in ("chosen", "rejected"):
        for rows in _keys_and_tokens(table, side):
            digest.update(rows.tobytes())
    for column in (PAIR_WEIGHT, PAIR_MARGIN, LABEL, *LIST_COLUMNS[1:]):
        if column in table.column_names:
            digest.update(f"{column}\0".encode() + np.ascontiguousarray(table[column].to_numpy()).tobytes())
    for side in () if all_count(table) else ("chosen", "rejected"):
        digest.update(f"{side} mask\0".encode() + mask_digests(table, side).tobytes())
    if LIST_COLUMNS[0] in table.column_names:
        digest.update(begins(table[LIST_COLUMNS[0]]).tobytes())
    for batch in table.select(["source", "weight"]).to_batches():
        names, weights = batch[0].dictionary_encode(), batch[1].to_numpy()
        numbers = names.indices.to_numpy()
        starts = np.flatnonzero((np.diff(numbers, prepend=-1) != 0) | (np.diff(weights, prepend=np.nan) != 0))
        for start, stop in pairwise([*starts.tolist(), len(numbers)]):
            each = f"{names.dictionary[int(numbers[start])]}\0{float(weights[start])}\0"
            digest.update(each.encode() * (stop - start))
    return digest.hexdigest()[:32]

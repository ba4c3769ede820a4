"""The verbs score, train, run and audit, as the command line, ``jobs/`` and Python callers run them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.checks import check
from raydpo.cluster.preflight import check_cluster, check_nodes
from raydpo.cluster.resources import Resources, bfloat16_pays, resources_for
from raydpo.cluster.session import session
from raydpo.cluster.waiting import coming_up, wait_for
from raydpo.config import Config, is_hub_name
from raydpo.data.facts import pair_facts
from raydpo.data.filter import PairFilter, filtered_by_tokens
from raydpo.data.index import as_bytes
from raydpo.data.pairs import PAIR_MARGIN, PAIR_WEIGHT, SAME, PairSets, load_pairs
from raydpo.data.tokenise import Tokeniser, load_tokenizer
from raydpo.errors import ConfigError
from raydpo.losses import own_sources
from raydpo.model.cost import ModelCost
from raydpo.model.rotary import ROTARY, rope_line
from raydpo.reference.build import BuildReport, build
from raydpo.reference.identity import ReferenceIdentity, earlier_identity, identify, resolve_model
from raydpo.reference.pairs import join_reference, reference_values
from raydpo.reference.score import ReferenceSpec
from raydpo.reference.store import ReferenceCache
from raydpo.rundir.card import model_card
from raydpo.rundir.display import TrainingDisplay
from raydpo.rundir.earlier import begin_again, earlier_result, harmless_changes
from raydpo.rundir.fingerprint import changed_settings
from raydpo.rundir.records import finite, read_rows
from raydpo.rundir.summary import print_summary
from raydpo.rundir.trackers import export_pass
from raydpo.storage.files import Storage
from raydpo.storage.uri import redact
from raydpo.terminal.console import Console, ProgressLine
from raydpo.training.job import TrainJob
from raydpo.training.launch.hooks import Payload
from raydpo.training.launch.launch import launch
from raydpo.training.policy.engine import PolicySpec
from raydpo.version import __version__

if TYPE_CHECKING:
    from raydpo.audits import Audit

__all__ = ["Joined", "Prepared", "Shared", "audit", "fill_cache", "find_reference", "join_sets", "measured_pairs",
           "reference_line", "report_on", "run", "score", "score_prepared", "train", "train_prepared"]


def score(config: Config, console: Console | None = None) -> BuildReport:
    """Score the pairs of a configuration that the reference cache lacks, and store their log-probs.

    Raises:
        RaydpoError: if it fails. Committed log-probs stay in the cache.
    """
    console = console or Console()
    check(config, "score", console)
    with session(config):
        check_cluster(config, ["score"], console)
        return score_prepared(Prepared.of(config, console), console)


def train(config: Config, console: Console | None = None, *, fresh: bool = False) -> dict[str, Any]:
    """Train the policy with the stored log-probs, or continue an interrupted run of the same name.

    Args:
        fresh: start again; an earlier run of the same name is renamed to ``NAME~1``.

    Returns:
        The content of summary.json.

    Raises:
        CacheMissError: if log-probs are missing; ``score`` computes them.
        RaydpoError: if anything else fails.
    """
    console = console or Console()
    check(config, "train", console)
    with session(config):
        check_cluster(config, ["train"], console)
        prepared = Prepared.of(config, console)
        if fresh:
            begin_again(Storage(config.run_dir), console)
        return train_prepared(prepared, console)


def run(config: Config, console: Console | None = None, *, fresh: bool = False) -> dict[str, Any]:
    """Call ``score``, then ``train``, in one Ray session. Arguments and result are those of ``train``."""
    console = console or Console()
    check(config, "run", console)
    with session(config):
        check_cluster(config, ["score", "train"], console)
        with coming_up(config, wanted=fresh or not Storage(config.run_dir).exists("summary.json")):
            prepared = Prepared.of(config, console)
            # Before scoring, which writes the audit into the run directory.
            storage = Storage(config.run_dir)
            if fresh:
                begin_again(storage, console)
            if earlier_result(storage, prepared.fingerprint()) is not None:
                return train_prepared(prepared, console)
            built = score_prepared(prepared, console)
            return train_prepared(prepared, console, built.hit_rate if built.wanted else None)


def _wait_for(stage: Literal["score", "train"], config: Config, resources: Resources, console: Console) -> None:
    """Wait for the workers of a stage, and check the nodes that an autoscaler has added."""
    wait_for(stage, resources, console, autoscaling=config.ray.autoscaling)
    if config.ray.autoscaling:
        check_nodes(config, [stage], console)


def audit(config: Config, console: Console | None = None) -> Audit:
    """Measure what the training pairs teach, from their lengths and cached log-probs, and write it to the run directory.

    Pairs without cached log-probs are counted, not refused.

    Raises:
        RaydpoError: if it fails.
    """
    console = console or Console()
    check(config, "audit", console)
    return _audit(Prepared.of(config, console), console)


@dataclass(frozen=True)
class Prepared:
    """Inputs of both stages: pairs as token ids, the reference and its cache.

    Attributes:
        dtype: precision of the policy.
        policy_dir: local directory of the policy as it starts.
        pairs_digest: digest of the training pairs. Computed once; copies made with ``dataclasses.replace`` share it.
    """

    config: Config
    dtype: str
    policy_dir: str
    tokeniser: Tokeniser
    sets: PairSets
    reference: ReferenceSpec
    cache: ReferenceCache
    pairs_digest: Callable[[], str]

    @classmethod
    def of(cls, config: Config, console: Console) -> Prepared:
        """Tokenise the pairs of a configuration, identify its reference and open the cache, within the Ray session."""
        model = config.model
        native = "bfloat16" if bfloat16_pays() else "float32"
        dtype = native if model.dtype == "auto" else model.dtype
        policy_dir = resolve_model(model.path)
        tokeniser = Tokeniser(load_tokenizer(resolve_model(model.tokenizer) if model.tokenizer else policy_dir,
                                             chat_template=config.data.chat_template,
                                             trust_remote_code=model.trust_remote_code))
        started = time.perf_counter()
        sets = load_pairs(config.data, tokeniser, console.counter("reading", "records"))
        for line in sets.report.lines():
            console.say(line)
        sets, line = filtered_by_tokens(sets, config.data)
        if line:
            console.say(line)
        held_out = 0 if sets.eval is None else sets.eval.num_rows
        console.say(f"pairs: {sets.train.num_rows:,} to train on, {held_out:,} held out, tokenised in "
                    f"{time.perf_counter() - started:.1f} s")
        spec, cache = find_reference(config, native)
        if config.needs_reference:
            console.say(reference_line(config, spec))
            earlier, change = earlier_identity(spec.identity)
            if change and cache.storage.exists(f"{earlier.digest}/identity.json") \
                    and not cache.storage.exists(f"{cache.directory}/identity.json"):
                console.say(f"scored again, not read from {earlier.digest} of this cache: {change}; delete that directory "
                            "to free its space")
        if spec.identity.rope_length is not None:
            console.say(rope_line(spec.identity.rope_length, config.data.max_length))
        return cls(config, dtype, policy_dir, tokeniser, sets, spec, cache, functools.cache(lambda: _digest(sets.train)))

    @property
    def filter_by_reference(self) -> PairFilter | None:
        """The condition on training pairs, if it reads log-probs of the reference."""
        pair_filter = PairFilter(self.config.data.filter) if self.config.data.filter else None
        return pair_filter if pair_filter is not None and pair_filter.needs_reference else None

    @property
    def tables(self) -> list[pa.Table]:
        """The training pairs, and the held-out pairs if there are any."""
        return [self.sets.train] + ([self.sets.eval] if self.sets.eval is not None else [])

    def policy_identity(self) -> ReferenceIdentity:
        """Identity of the policy as it starts. New adapters do not change it."""
        model = self.config.model
        return identify(self.policy_dir, self.dtype, self.policy_adapter, model.quantization, model.trust_remote_code,
                        max_length=self.config.data.max_length)

    @property
    def policy_adapter(self) -> str | None:
        """Local directory of the adapter that training starts from, or None."""
        return self.config.model.adapter and resolve_model(self.config.model.adapter)

    @property
    def base_name(self) -> str:
        """Name of the base model in an exported adapter: its hub name, else its directory."""
        path = self.config.model.path
        return path if is_hub_name(path) and not Path(path).is_dir() else self.policy_dir

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the trained policy depends on, by the name of the setting."""
        config, policy = self.config, self.policy_identity()
        train = config.train.model_dump(mode="json", include={
            "pairs_per_step", "epochs", "steps", "lr", "schedule", "warmup", "weight_decay", "clip", "loss", "beta",
            "label_smoothing", "seed", "optimizer", "optimizer_states"}) | config.train.shaped()
        lora = config.model.lora.model_dump(mode="json") if config.model.lora else None
        return {"model.path (weights)": policy.weights, "model.path (architecture)": policy.architecture,
                "model.adapter": policy.adapter, "model.quantization": policy.quantisation,
                "model.freeze": list(config.model.freeze), "model.dtype": self.dtype, "model.lora": lora,
                "reference identity": self.reference.identity.digest if config.needs_reference else None,
                "data.train (pairs)": self.pairs_digest(), "data.shuffle": config.data.shuffle,
                } | ({ROTARY: policy.rope_length} if policy.rope_length else {}
                     ) | ({"data.filter": config.data.filter} if self.filter_by_reference else {}
                     ) | {f"train.{key}": value for key, value in train.items()} | {
                         f"train.loss (source of {name})": digest for name, digest in own_sources(config.train).items()}


def find_reference(config: Config, native: str) -> tuple[ReferenceSpec, ReferenceCache]:
    """Find and identify the reference of a configuration, and open its cache.

    Args:
        native: precision for dtype ``auto``.
    """
    wish = config.model.dtype if config.score.dtype is None else config.score.dtype
    dtype = native if wish == "auto" else wish
    directory = resolve_model(config.reference_path)
    adapter = config.reference_adapter and resolve_model(config.reference_adapter)
    identity = identify(directory, dtype, adapter, config.reference_quantization, config.model.trust_remote_code,
                        max_length=config.data.max_length)
    spec = ReferenceSpec(path=directory, adapter=adapter, identity=identity, quantization=config.reference_quantization,
                         trust_remote_code=config.model.trust_remote_code, layout=config.model.layout)
    return spec, ReferenceCache.open(config.cache_uri, identity, unverified=config.cache.allow_unverified)


def reference_line(config: Config, spec: ReferenceSpec) -> str:
    """Describe the reference in one line."""
    identity = spec.identity
    return (f"reference: {' + '.join(filter(None, (config.reference_path, config.reference_adapter)))} in "
            f"{', '.join(filter(None, (identity.dtype, identity.quantisation)))}, identity {identity.digest}")


def score_prepared(prepared: Prepared, console: Console, tables: list[pa.Table] | None = None) -> BuildReport:
    """Score what the cache lacks, then write the audit.

    Args:
        tables: pairs to score; None = those of ``prepared``.
    """
    config, cache = prepared.config, prepared.cache
    if config.needs_reference:
        report = fill_cache(tables or prepared.tables, prepared.reference, cache, config, console)
    else:
        console.say(f"reference: none; loss {config.train.loss_text} needs none, so nothing is scored")
        report = BuildReport(cache.identity.digest, wanted=0, hits=0, scored=0, by_others=0, twice=0, tokens=0, seconds=0.0,
                             parts=0, problems=())
    try:
        _audit(prepared, console)
    except Exception as error:  # the log-probs are stored, so scoring has succeeded
        console.warn(f"the audit failed ({type(error).__name__}: {error}); 'raydpo audit' tries again")
    return report


def fill_cache(tables: list[pa.Table], spec: ReferenceSpec, cache: ReferenceCache, config: Config,
               console: Console) -> BuildReport:
    """Score what ``cache`` lacks of tokenised pairs, with the workers of section ``score``."""
    resources = resources_for("score", config)
    line: ProgressLine | None = None
    with contextlib.ExitStack() as stack:  # the progress line begins once build knows what is missing
        def progress(done: int, to_do: int) -> None:
            nonlocal line
            if line is None:
                console.say(f"scoring {to_do:,} completions on {resources.workers} {resources.device} worker(s)")
                _wait_for("score", config, resources, console)
                line = stack.enter_context(console.progress("scoring", to_do, "completions"))
            line.update(done)

        report = build(tables, spec, cache, resources, progress=progress, note=console.note,
                       tokens_per_batch=config.score.tokens_per_batch, tokens_per_part=config.score.tokens_per_part)
    for problem in report.problems:
        console.warn(problem)
    rate = f", {report.tokens / report.seconds:,.0f} tokens/s" if report.scored else ""
    console.say(f"cache: {report.hits:,} of {report.wanted:,} completions were there ({report.hit_rate:.0%} hits), "
                f"{report.scored:,} scored in {report.parts} part(s){rate}; {cache.storage}")
    export_pass(config.track, config.run_name, report.hit_rate, report.tokens / report.seconds if report.scored else 0.0,
                console.warn)
    if report.by_others or report.twice:
        console.say(f"another build filled the same cache: {report.by_others:,} completions were left to it, "
                    f"{report.twice:,} were scored twice")
    return report


def _audit(prepared: Prepared, console: Console) -> Audit:
    from raydpo.audits import audit_pairs, summary_lines, write_audit

    storage = Storage(prepared.config.run_dir)
    _refuse_other_pairs(storage, prepared)
    pairs = prepared.sets.train
    facts = pair_facts(pairs, *(found.sums for found in reference_values(pairs, prepared.cache)))
    decode = prepared.tokeniser.tokenizer.batch_decode
    done = audit_pairs(
        facts, pairs, lambda ids: decode(ids, skip_special_tokens=False),
        meta={"name": prepared.config.run_name, "model": prepared.config.reference_path, "raydpo": __version__,
              "identity": prepared.reference.identity.digest, "cache": str(prepared.cache.storage)},
        identical={source.name: source.dropped.counts[SAME] for source in prepared.sets.report.sources
                   if source.dropped.counts[SAME]}, objective=prepared.config.train)
    write_audit(done, storage)
    for line in summary_lines(done):
        console.say(line)
    console.say(f"audit: {storage}/audit.html")
    return done


def _refuse_other_pairs(storage: Storage, prepared: Prepared) -> None:
    """Refuse to replace the audit of a run by that of other pairs.

    Raises:
        ConfigError: if a run of this name has other pairs or another reference.
    """
    if not storage.exists("run.json"):
        return
    earlier, now = json.loads(storage.read("run.json"))["fingerprint"], prepared.fingerprint()
    changes = changed_settings(*({key: each.get(key) for key in ("data.train (pairs)", "reference identity")}
                                 for each in (earlier, now)))
    if changes:
        raise ConfigError(f"{storage} is a run of other pairs or another reference ({'; '.join(changes)}), and its audit is "
                          "kept. Give this one another name (name=...)")


@dataclass(frozen=True)
class Joined:
    """Pairs joined with the reference's log-probs, ready for training.

    Attributes:
        pairs, held_out: tables, or references to them in Ray's object store; ``held_out`` is None if nothing is held out.
        training_pairs: number of ``pairs``.
    """

    pairs: Any
    held_out: Any
    training_pairs: int


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What a sweep gives to the training of one trial.

    Attributes:
        joined: result of ``join_sets``, in Ray's object store.
        at_once: number of trainings that share the cluster.
        board: result of ``launch.new_board``.
        display: receives the events of the training.
        until: step after which the training pauses; None = train to the end.
    """

    joined: Joined
    at_once: int
    board: Any
    display: TrainingDisplay
    until: int | None = None


def join_sets(prepared: Prepared, console: Console) -> Joined:
    """Join training and held-out pairs with the reference's log-probs, and filter the training pairs by them.

    Raises:
        CacheMissError: if log-probs are missing.
    """
    compares = prepared.config.needs_reference
    pairs = join_reference(prepared.sets.train, prepared.cache, "training") if compares else prepared.sets.train
    if prepared.filter_by_reference is not None:
        sums = (pairs[f"ref_{side}_sum"].to_numpy() for side in ("chosen", "rejected"))
        pairs, line = prepared.filter_by_reference.apply(pairs, *sums)
        console.say(line)
    held_out = prepared.sets.eval
    if held_out is not None and compares:
        held_out = join_reference(held_out, prepared.cache, "held-out")
    return Joined(pairs, held_out, pairs.num_rows)


def _finished_before(prepared: Prepared, console: Console) -> dict[str, Any] | None:
    """The summary of this run if it is already finished, else None.

    Raises:
        ConfigError: if a run of this name has other settings.
    """
    config = prepared.config
    finished = earlier_result(Storage(config.run_dir), prepared.fingerprint())
    if finished is not None:
        console.say(f"run {config.run_name} is already complete: {redact(config.run_dir)} (--fresh trains it again)")
    return finished


def _begin_run(prepared: Prepared, job: TrainJob, console: Console) -> None:
    """Write config.yaml and run.json before the training."""
    config, storage = prepared.config, Storage(prepared.config.run_dir)
    storage.probe()
    for line in harmless_changes(storage, config):
        console.note(line)
    if config.train.merge_adapter and config.model.quantization:
        console.warn(f"train.merge_adapter merges into the unquantized weights of {config.model.path}, but training uses "
                     f"model.quantization {config.model.quantization}: final/merged is not exactly the policy that is "
                     "trained and measured. The adapter in final/ on the quantized model is")
    storage.write("config.yaml", config.to_yaml().encode())
    described = {"fingerprint": dict(job.fingerprint), "held_out": measured_pairs(prepared.sets.eval)}
    storage.write("run.json", json.dumps(described, indent=2).encode())


def _training_job(prepared: Prepared, resources: Resources, until: int | None = None) -> TrainJob:
    """Describe the training to its workers.

    Args:
        until: step after which the training pauses; None = train to the end.
    """
    config = prepared.config
    policy, reference = prepared.policy_identity(), prepared.reference.identity
    return TrainJob(
        train=config.train, shuffle=config.data.shuffle, fingerprint=prepared.fingerprint(),
        policy=PolicySpec(path=prepared.policy_dir, dtype=prepared.dtype, lora=config.model.lora,
                          adapter=prepared.policy_adapter, quantization=config.model.quantization,
                          freeze=config.model.freeze, rope_length=policy.rope_length,
                          trust_remote_code=config.model.trust_remote_code, layout=config.model.layout),
        work=ModelCost.of(prepared.policy_dir).work, memory_share=resources.memory_share,
        policy_identity=policy.digest, reference_identity=reference.digest,
        starts_as_reference=policy.same_model(reference),
        coarser_dtype="bfloat16" if "bfloat16" in (policy.dtype, reference.dtype) else "float32",
        stop_after=until, sample_prompts=_sample_prompts(prepared), sample_stop=prepared.tokeniser.stop_ids)


def _end_run(prepared: Prepared, job: TrainJob, trained: dict[str, Any], hit_rate: float | None,
             training_pairs: int) -> dict[str, Any]:
    """Write the model card and summary.json after the training; returns the content of summary.json."""
    storage = Storage(prepared.config.run_dir)
    summary = _summarise(prepared, storage, trained, hit_rate, job, training_pairs)
    storage.write("final/README.md", model_card(prepared.config, summary).encode())
    storage.write("summary.json", json.dumps(finite(summary), indent=2, allow_nan=False).encode())
    return summary


def train_prepared(prepared: Prepared, console: Console, hit_rate: float | None = None, *,
                   shared: Shared | None = None) -> dict[str, Any] | None:
    """Train, unless the run is already finished.

    Args:
        hit_rate: share of the completions that were cached when the run began, 0 to 1; None if unknown.
        shared: given by a sweep to each of its trials.

    Returns:
        The content of summary.json, or None if the training paused at ``shared.until``.

    Raises:
        KeyboardInterrupt: if the training was stopped, after its checkpoint.
        CacheMissError: if log-probs are missing.
    """
    config = prepared.config
    summary = _finished_before(prepared, console)
    if summary is None:
        joined = join_sets(prepared, console) if shared is None else shared.joined
        resources = resources_for("train", config, 1 if shared is None else shared.at_once)
        if shared is None:
            _wait_for("train", config, resources, console)
        job = _training_job(prepared, resources, None if shared is None else shared.until)
        _begin_run(prepared, job, console)
        with TrainingDisplay(console) if shared is None else shared.display as display:
            payload = Payload(job=job, pairs=joined.pairs, held_out=joined.held_out, run_dir=config.run_dir,
                              run_name=config.run_name, track=config.track, base_name=prepared.base_name,
                              tokenizer=prepared.tokeniser.tokenizer, board=None if shared is None else shared.board)
            trained = launch(payload, resources, display.listen)
        if trained["interrupted"]:
            if trained["steps"] == job.stop_after:
                return None
            console.say(f"stopped after step {trained['steps']:,}; its checkpoint is in {redact(config.run_dir)}")
            raise KeyboardInterrupt
        summary = _end_run(prepared, job, trained, hit_rate, joined.training_pairs)
    print_summary(console, summary)
    report_on(config.run_dir, console)
    return summary


def report_on(place: str, console: Console) -> None:
    """Write the page of a run or sweep that has ended. Failure is a warning: its results are stored."""
    from raydpo.reports import write_report

    try:
        console.say(f"report: {write_report(place)}")
    except Exception as error:
        console.warn(f"the report failed ({type(error).__name__}: {error}); 'raydpo report' tries again")


def _sample_prompts(prepared: Prepared) -> tuple[tuple[str, Any], ...]:
    """(text, token ids) of the first held-out prompts; of training prompts if nothing is held out."""
    count = prepared.config.train.sample_prompts
    table = prepared.sets.eval if prepared.sets.eval is not None else prepared.sets.train
    distinct = dict.fromkeys(tuple(ids) for ids in table["prompt_ids"].slice(0, 8 * count).to_pylist())
    return tuple((prepared.tokeniser.tokenizer.decode(ids, skip_special_tokens=True), ids) for ids in list(distinct)[:count])


def _summarise(prepared: Prepared, storage: Storage, trained: dict[str, Any], hit_rate: float | None,
               job: TrainJob, training_pairs: int) -> dict[str, Any]:
    """The content of summary.json."""
    config, decode = prepared.config, prepared.tokeniser.tokenizer.decode
    steps, evals = read_rows(storage, "metrics.parquet"), read_rows(storage, "eval.parquet")
    answers = zip(job.sample_prompts, trained["samples_before"], trained["samples_after"], strict=False)
    return {
        "name": config.run_name, "run_dir": redact(config.run_dir), "raydpo": __version__,
        "steps": trained["steps"], "pairs_seen": trained["pairs"], "train_seconds": trained["seconds"],
        "load_seconds": trained["load_seconds"], "load_host_bytes": trained["load_bytes"],
        "checkpoint_seconds": trained["checkpoint_seconds"],
        "checkpoint_bytes": trained["checkpoint_bytes"], "skipped_steps": trained["skipped"],
        "tokens_per_second": trained["tokens_per_second"], "gate": trained["gate"],
        "first_loss": steps[0]["loss"], "last_loss": steps[-1]["loss"],
        "training_pairs": training_pairs,
        "held_out_pairs": 0 if prepared.sets.eval is None else prepared.sets.eval.num_rows,
        "eval_before": evals[0] if evals else None, "eval_after": evals[-1] if evals else None,
        "reference": {"path": config.reference_path, "adapter": config.reference_adapter,
                      "identity": prepared.reference.identity.digest, "cache": redact(config.cache_uri)}
        if config.needs_reference else dict.fromkeys(("path", "adapter", "identity", "cache")),
        "cache_hit_rate": hit_rate,
        "data": prepared.sets.report.to_dict(),
        "samples": [{"prompt": text, "before": decode(before, skip_special_tokens=True),
                     "after": decode(after, skip_special_tokens=True)} for (text, _), before, after in answers],
        "fingerprint": dict(job.fingerprint),
    }


def measured_pairs(table: pa.Table | None) -> str | None:
    """Digest of the keys and truncated lengths of held-out pairs, in any order; None without pairs."""
    if table is None:
        return None
    pairs = np.empty((table.num_rows, 2), _KEY_AND_TOKENS)
    for column, side in enumerate(("chosen", "rejected")):
        pairs[:, column] = np.concatenate([pairs[:0, column], *_keys_and_tokens(table, side)])
    return hashlib.sha256(np.sort(pairs.view(f"V{2 * _KEY_AND_TOKENS.itemsize}").ravel()).tobytes()).hexdigest()[:32]


_KEY_AND_TOKENS = np.dtype([("key", "V16"), ("tokens", "<u4")])


def _keys_and_tokens(table: pa.Table, side: str) -> Iterator[np.ndarray]:
    """Keys and truncated lengths of the completions of one side, batch by batch: [batch] of ``_KEY_AND_TOKENS``."""
    for batch in table.select([f"{side}_key", f"{side}_ids"]).to_batches():
        rows = np.empty(batch.num_rows, _KEY_AND_TOKENS)
        rows["key"] = as_bytes(batch[0]).view("V16").ravel()
        rows["tokens"] = pc.list_value_length(batch[1]).to_numpy()
        yield rows


def _digest(table: pa.Table) -> str:
    """Digest of the pairs in their order: keys, truncated lengths, sources and weights."""
    digest = hashlib.sha256()
    for side in ("chosen", "rejected"):
        for rows in _keys_and_tokens(table, side):
            digest.update(rows.tobytes())
    for column in (PAIR_WEIGHT, PAIR_MARGIN):
        if column in table.column_names:
            digest.update(f"{column}\0".encode() + np.ascontiguousarray(table[column].to_numpy()).tobytes())
    for batch in table.select(["source", "weight"]).to_batches():
        for source, weight in zip(batch[0].to_pylist(), batch[1].to_pylist(), strict=True):
            digest.update(f"{source}\0{weight}\0".encode())
    return digest.hexdigest()[:32]

"""The verbs: score the reference, train the policy, or both. What ``raydpo <verb>``, ``jobs/`` and Python callers run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import raydpo
from raydpo.config import Config, is_hub_name
from raydpo.console import Console, ProgressLine
from raydpo.cost import ModelCost
from raydpo.data.facts import pair_facts
from raydpo.data.filter import PairFilter, filtered_by_tokens
from raydpo.data.pairs import SAME, PairSets, load_pairs
from raydpo.data.tokenise import Tokeniser, load_tokenizer
from raydpo.ray_runtime import bfloat16_pays, resources_for, session
from raydpo.reference.build import BuildReport, build
from raydpo.reference.identity import ReferenceIdentity, identify, resolve_model
from raydpo.reference.index import as_bytes
from raydpo.reference.score import ReferenceSpec
from raydpo.reference.store import ReferenceCache
from raydpo.storage import Storage
from raydpo.training.card import model_card
from raydpo.training.earlier import earlier_result, harmless_changes, set_aside
from raydpo.training.engine import PolicySpec
from raydpo.training.launch import launch
from raydpo.training.loop import TrainJob
from raydpo.training.pairs import join_reference, reference_values
from raydpo.training.records import read_rows
from raydpo.training.report import TrainingDisplay, print_summary

if TYPE_CHECKING:
    from raydpo.audit import Audit

__all__ = ["Prepared", "audit", "run", "score", "train"]


def score(config: Config, console: Console | None = None) -> BuildReport:
    """Fill the reference cache with whatever this configuration's pairs need and it lacks.

    Raises:
        RaydpoError: of the kind that fits; everything committed stays.
    """
    console = console or Console()
    with session(config):
        return _score(Prepared.of(config, console), console)


def train(config: Config, console: Console | None = None, *, fresh: bool = False) -> dict[str, Any]:
    """Train against the stored log-probs; continues where an interrupted run of the same name stopped.

    Args:
        fresh: begin again, setting an earlier run of the same name aside as ``NAME~1``.

    Returns:
        What summary.json holds.

    Raises:
        CacheMissError: if log-probs are missing; ``score`` fills them.
        RaydpoError: of the kind that fits.
    """
    console = console or Console()
    with session(config):
        return _train(Prepared.of(config, console), console, None, fresh=fresh)


def run(config: Config, console: Console | None = None, *, fresh: bool = False) -> dict[str, Any]:
    """``score``, then ``train``."""
    console = console or Console()
    with session(config):
        prepared = Prepared.of(config, console)
        return _train(prepared, console, _score(prepared, console), fresh=fresh)


def audit(config: Config, console: Console | None = None) -> Audit:
    """What the training pairs will teach, from their lengths and the log-probs that are cached; written to the run
    directory.

    Raises:
        RaydpoError: of the kind that fits. Pairs that are not scored yet are no error.
    """
    console = console or Console()
    return _audit(Prepared.of(config, console), console)


@dataclass(frozen=True)
class Prepared:
    """Everything both stages need, found out once."""

    config: Config
    dtype: str
    policy_dir: str
    tokeniser: Tokeniser
    sets: PairSets
    reference: ReferenceSpec
    cache: ReferenceCache

    @classmethod
    def of(cls, config: Config, console: Console) -> Prepared:
        model = config.model
        if model.trust_remote_code:
            console.warn(f"model.trust_remote_code is on: Python code in {model.path} runs with your rights")
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
        spec, cache = find_reference(config, native, console)
        return cls(config, dtype, policy_dir, tokeniser, sets, spec, cache)

    @property
    def filter_by_reference(self) -> PairFilter | None:
        """The condition on training pairs that can be evaluated only now that they are scored."""
        pair_filter = PairFilter(self.config.data.filter) if self.config.data.filter else None
        return pair_filter if pair_filter is not None and pair_filter.needs_reference else None

    @property
    def tables(self) -> list[pa.Table]:
        return [self.sets.train] + ([self.sets.eval] if self.sets.eval is not None else [])

    def policy_identity(self) -> ReferenceIdentity:
        """Of the policy as it starts: fresh adapters add nothing."""
        return identify(self.policy_dir, self.dtype, self.policy_adapter, self.config.model.quantization)

    @property
    def policy_adapter(self) -> str | None:
        """Local directory of the adapter that is trained further."""
        return self.config.model.adapter and resolve_model(self.config.model.adapter)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the trained policy depends on, by the name of its setting."""
        config, policy = self.config, self.policy_identity()
        train = config.train.model_dump(mode="json", include={
            "pairs_per_step", "epochs", "steps", "lr", "schedule", "warmup", "weight_decay", "clip", "loss", "beta",
            "label_smoothing", "seed", "optimizer", "optimizer_states"})
        lora = config.model.lora.model_dump(mode="json") if config.model.lora else None
        return {"model.path (weights)": policy.weights, "model.path (architecture)": policy.architecture,
                "model.adapter": policy.adapter, "model.quantization": policy.quantisation,
                "model.freeze": list(config.model.freeze), "model.dtype": self.dtype, "model.lora": lora,
                "reference identity": self.reference.identity.digest,
                "data.train (pairs)": _digest(self.sets.train), "data.shuffle": config.data.shuffle,
                } | ({"data.filter": config.data.filter} if self.filter_by_reference else {}
                     ) | {f"train.{key}": value for key, value in train.items()}


def find_reference(config: Config, native: str, console: Console) -> tuple[ReferenceSpec, ReferenceCache]:
    """The reference of a configuration, and its cache.

    Args:
        native: the precision that pays here, for those that are ``auto``.
    """
    wish = config.model.dtype if config.score.dtype is None else config.score.dtype
    dtype = native if wish == "auto" else wish
    directory = resolve_model(config.reference_path)
    adapter = config.reference_adapter and resolve_model(config.reference_adapter)
    identity = identify(directory, dtype, adapter, config.reference_quantization)
    console.say(f"reference: {' + '.join(filter(None, (config.reference_path, config.reference_adapter)))} in "
                f"{', '.join(filter(None, (dtype, identity.quantisation)))}, identity {identity.digest}")
    spec = ReferenceSpec(path=directory, adapter=adapter, identity=identity, quantization=config.reference_quantization,
                         trust_remote_code=config.model.trust_remote_code, layout=config.model.layout)
    return spec, ReferenceCache.open(config.cache_uri, identity, unverified=config.cache.allow_unverified)


def _score(prepared: Prepared, console: Console) -> BuildReport:
    report = fill_cache(prepared.tables, prepared.reference, prepared.cache, prepared.config, console)
    try:
        _audit(prepared, console)
    except Exception as error:  # the log-probs are stored; a picture that cannot be drawn must not say otherwise
        console.warn(f"the audit failed ({type(error).__name__}: {error}); 'raydpo audit' tries again")
    return report


def fill_cache(tables: list[pa.Table], spec: ReferenceSpec, cache: ReferenceCache, config: Config,
               console: Console) -> BuildReport:
    """Score what ``cache`` lacks of tokenised pairs with the workers of section ``score``, and say so."""
    resources = resources_for("score", config)
    line: ProgressLine | None = None
    with contextlib.ExitStack() as stack:  # there is nothing to show before build knows what is missing
        def progress(done: int, to_do: int) -> None:
            nonlocal line
            if line is None:
                console.say(f"scoring {to_do:,} completions on {resources.workers} {resources.device} worker(s)")
                line = stack.enter_context(console.progress("scoring", to_do, "completions"))
            line.update(done)

        report = build(tables, spec, cache, resources, progress=progress, note=console.note,
                       tokens_per_batch=config.score.tokens_per_batch, tokens_per_part=config.score.tokens_per_part)
    for problem in report.problems:
        console.warn(problem)
    rate = f", {report.tokens / report.seconds:,.0f} tokens/s" if report.scored else ""
    console.say(f"cache: {report.hits:,} of {report.wanted:,} completions were there ({report.hit_rate:.0%} hits), "
                f"{report.scored:,} scored in {report.parts} part(s){rate}; {cache.storage}")
    if report.by_others or report.twice:
        console.say(f"another build filled the same cache: {report.by_others:,} completions were left to it, "
                    f"{report.twice:,} were scored twice")
    return report


def _audit(prepared: Prepared, console: Console) -> Audit:
    from raydpo.audit import audit_pairs, summary_lines, write_audit

    pairs = prepared.sets.train
    facts = pair_facts(pairs, *(found.sums for found in reference_values(pairs, prepared.cache)))
    decode = prepared.tokeniser.tokenizer.batch_decode
    done = audit_pairs(
        facts, pairs, lambda ids: decode(ids, skip_special_tokens=False),
        meta={"name": prepared.config.run_name, "model": prepared.config.reference_path, "raydpo": raydpo.__version__,
              "identity": prepared.reference.identity.digest, "cache": str(prepared.cache.storage)},
        identical={source.name: source.dropped.counts[SAME] for source in prepared.sets.report.sources
                   if source.dropped.counts[SAME]})
    storage = Storage(prepared.config.run_dir)
    write_audit(done, storage)
    for line in summary_lines(done):
        console.say(line)
    console.say(f"audit: {storage}/audit.html")
    return done


def _train(prepared: Prepared, console: Console, built: BuildReport | None, *, fresh: bool) -> dict[str, Any]:
    config = prepared.config
    fingerprint = prepared.fingerprint()
    storage = Storage(config.run_dir)
    if fresh:
        set_aside(storage, console)
    finished = earlier_result(storage, fingerprint)
    if finished is not None:
        console.say(f"run {config.run_name} is already complete: {config.run_dir} (--fresh trains it again)")
        print_summary(console, finished)
        return finished
    pairs = join_reference(prepared.sets.train, prepared.cache, "training")
    if prepared.filter_by_reference is not None:
        sums = (pairs[f"ref_{side}_sum"].to_numpy() for side in ("chosen", "rejected"))
        pairs, line = prepared.filter_by_reference.apply(pairs, *sums)
        console.say(line)
    held_out = None
    if prepared.sets.eval is not None:
        held_out = join_reference(prepared.sets.eval, prepared.cache, "held-out")
    resources = resources_for("train", config)
    storage.probe()
    for line in harmless_changes(storage, config):
        console.note(line)
    storage.write("config.yaml", config.to_yaml().encode())
    storage.write("run.json", json.dumps({"fingerprint": fingerprint}, indent=2).encode())

    policy, reference = prepared.policy_identity(), prepared.reference.identity
    samples = _sample_prompts(prepared)
    job = TrainJob(
        train=config.train, shuffle=config.data.shuffle, fingerprint=fingerprint,
        policy=PolicySpec(path=prepared.policy_dir, dtype=prepared.dtype, lora=config.model.lora,
                          adapter=prepared.policy_adapter, quantization=config.model.quantization,
                          freeze=config.model.freeze,
                          trust_remote_code=config.model.trust_remote_code, layout=config.model.layout),
        work=ModelCost.of(prepared.policy_dir).work, memory_share=resources.memory_share,
        policy_identity=policy.digest, reference_identity=reference.digest,
        starts_as_reference=policy.same_model(reference),
        coarser_dtype="bfloat16" if "bfloat16" in (policy.dtype, reference.dtype) else "float32",
        sample_prompts=samples, sample_stop=prepared.tokeniser.stop_ids)
    base_name = config.model.path if is_hub_name(config.model.path) and not Path(config.model.path).is_dir() \
        else prepared.policy_dir
    with TrainingDisplay(console) as display:
        trained = launch(job, pairs, held_out, resources, run_dir=config.run_dir, run_name=config.run_name,
                         track=config.track, base_name=base_name,
                         tokenizer=prepared.tokeniser.tokenizer, listener=display.listen)
    if trained["interrupted"]:
        console.say(f"stopped after step {trained['steps']:,}; its checkpoint is in {config.run_dir}")
        raise KeyboardInterrupt
    summary = _summarise(prepared, storage, trained, built, samples)
    storage.write("final/README.md", model_card(config, summary).encode())
    storage.write("summary.json", json.dumps(summary, indent=2).encode())
    print_summary(console, summary)
    return summary


def _sample_prompts(prepared: Prepared) -> tuple[tuple[str, Any], ...]:
    """(text, token ids) of the first held-out prompts, or training prompts where nothing is held out."""
    count = prepared.config.train.sample_prompts
    table = prepared.sets.eval if prepared.sets.eval is not None else prepared.sets.train
    distinct = dict.fromkeys(tuple(ids) for ids in table["prompt_ids"].slice(0, 8 * count).to_pylist())
    return tuple((prepared.tokeniser.tokenizer.decode(ids, skip_special_tokens=True), ids) for ids in list(distinct)[:count])


def _summarise(prepared: Prepared, storage: Storage, trained: dict[str, Any], built: BuildReport | None,
               samples: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    config, decode = prepared.config, prepared.tokeniser.tokenizer.decode
    steps, evals = read_rows(storage, "metrics.parquet"), read_rows(storage, "eval.parquet")
    answers = zip(samples, trained["samples_before"], trained["samples_after"], strict=False)
    return {
        "name": config.run_name, "run_dir": config.run_dir, "raydpo": raydpo.__version__,
        "steps": trained["steps"], "pairs_seen": trained["pairs"], "train_seconds": trained["seconds"],
        "load_seconds": trained["load_seconds"], "load_host_bytes": trained["load_bytes"],
        "checkpoint_seconds": trained["checkpoint_seconds"],
        "checkpoint_bytes": trained["checkpoint_bytes"], "skipped_steps": trained["skipped"],
        "tokens_per_second": trained["tokens_per_second"], "gate": trained["gate"],
        "first_loss": steps[0]["loss"], "last_loss": steps[-1]["loss"],
        "training_pairs": prepared.sets.train.num_rows,
        "held_out_pairs": 0 if prepared.sets.eval is None else prepared.sets.eval.num_rows,
        "eval_before": evals[0] if evals else None, "eval_after": evals[-1] if evals else None,
        "reference": {"path": config.reference_path, "adapter": config.reference_adapter,
                      "identity": prepared.reference.identity.digest, "cache": config.cache_uri},
        "cache_hit_rate": None if built is None else built.hit_rate,
        "data": prepared.sets.report.to_dict(),
        "samples": [{"prompt": text, "before": decode(before, skip_special_tokens=True),
                     "after": decode(after, skip_special_tokens=True)} for (text, _), before, after in answers],
        "fingerprint": prepared.fingerprint(),
    }


def _digest(table: pa.Table) -> str:
    """Of the pairs in their order, as used: keys, truncated lengths, sources and weights."""
    digest = hashlib.sha256()
    for side in ("chosen", "rejected"):
        for batch in table.select([f"{side}_key", f"{side}_ids"]).to_batches():
            rows = np.empty(batch.num_rows, [("key", "V16"), ("tokens", "<u4")])
            rows["key"] = as_bytes(batch[0]).view("V16").ravel()
            rows["tokens"] = pc.list_value_length(batch[1]).to_numpy()
            digest.update(rows.tobytes())
    for batch in table.select(["source", "weight"]).to_batches():
        for source, weight in zip(batch[0].to_pylist(), batch[1].to_pylist(), strict=True):
            digest.update(f"{source}\0{weight}\0".encode())
    return digest.hexdigest()[:32]

"""``raydpo train``: train the policy against stored log-probs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.cluster.preflight import check_cluster
from raydpo.cluster.resources import Resources, resources_for
from raydpo.cluster.session import owns_ray, session
from raydpo.config import Config
from raydpo.data.filter import kept_rows
from raydpo.data.lists import count_of
from raydpo.data.ragged import tokens_in_use
from raydpo.model.cost import ModelCost
from raydpo.pipeline.checks import check_labels
from raydpo.pipeline.prepare import Prepared, checked, measured_pairs, wait_for_workers
from raydpo.reference.identity import ReferenceIdentity, identify, origin_of, resolve_model
from raydpo.reference.pairs import SIDES, place_reference
from raydpo.reports.write import write_report_or_warn
from raydpo.rundir.card import model_card
from raydpo.rundir.directory import CONFIG, EVAL, FINAL, METRICS, PAIRS, RUN, SUMMARY
from raydpo.rundir.display import TrainingDisplay
from raydpo.rundir.earlier import begin_again, finished_summary, neutral_changes, other_held_out
from raydpo.rundir.pairs import pairs_record
from raydpo.rundir.records import finite, read_rows
from raydpo.rundir.summary import print_summary
from raydpo.storage.files import Storage
from raydpo.storage.uri import redact
from raydpo.terminal.console import Console
from raydpo.tokens.local import StoredTokens
from raydpo.training.job import TrainJob
from raydpo.training.launch.hooks import WorkerInput
from raydpo.training.launch.launch import launch
from raydpo.training.pair_files import PairFiles, PairFolder
from raydpo.training.policy.engine import PolicySpec
from raydpo.version import __version__

__all__ = ["Joined", "TrialContext", "join_sets", "train", "train_prepared"]


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
    tokenised = checked(config, "train", console)
    with session(config):
        check_cluster(config, ["train"], console)
        prepared = Prepared.of(config, console, tokenised)
        if fresh:
            begin_again(Storage(config.run_dir), console)
        return train_prepared(prepared, console)


@dataclass(frozen=True)
class Joined:
    """Pairs joined with the reference's log-probs, ready for training.

    Attributes:
        pairs, held_out: their files; ``held_out`` is None if nothing is held out.
        training_pairs: number of ``pairs``, or of ranked lists.
        fused: whether fused functions computed the log-probs; empty if that is not known.
    """

    pairs: PairFiles
    held_out: PairFiles | None
    training_pairs: int
    fused: frozenset[bool]


@dataclass(frozen=True, kw_only=True)
class TrialContext:
    """Input that a sweep gives to the training of one trial.

    Attributes:
        joined: result of ``join_sets``.
        at_once: number of trainings that share the cluster.
        board: result of ``launch.board.start_mailbox``.
        display: receives the events of the training.
        until: step after which the training pauses; None = train to the end.
    """

    joined: Joined
    at_once: int
    board: Any
    display: TrainingDisplay
    until: int | None = None


def join_sets(prepared: Prepared, folder: PairFolder, console: Console) -> Joined:
    """Join training and held-out pairs with the reference's log-probs, filter the training pairs by them, and write both
    into ``folder``.

    Raises:
        ConfigError: if the loss needs pairs, and some are completions alone.
        CacheMissError: if log-probs are missing.
        RaydpoError: if the disk has no room for them.
    """
    check_labels(prepared.config, prepared.tables)
    compares, cache = prepared.config.needs_reference, prepared.cache
    pairs, logps = place_reference(prepared.sets.train, cache, "training") if compares else (prepared.sets.train, ())
    if prepared.filter_by_reference is not None:
        own, condition = prepared.own.train, prepared.filter_by_reference  # no condition on mismatched completions
        sums = (np.where(tokens_in_use(own, side) > 0, pairs[f"ref_{side}_sum"], 0.0) for side in SIDES)
        keep, line = kept_rows(condition, own, *sums)
        pairs = pairs.filter(pa.array(keep))
        console.say(line)
    held_out = prepared.sets.eval
    held_logps: Sequence[np.ndarray] = ()
    if held_out is not None and compares:
        held_out, held_logps = place_reference(held_out, cache, "held-out")
    # Workers read stored sets by themselves. What is in memory here is written for them.
    tokens = prepared.sets.tokens if isinstance(prepared.own.tokens, StoredTokens) else None
    return Joined(
        folder.write(pairs, logps, tokens),
        None if held_out is None else folder.write(held_out, held_logps, tokens, prompts=True),
        count_of(pairs),
        frozenset(cache.fused if compares else ()),
    )


def _begin_run(prepared: Prepared, job: TrainJob, console: Console) -> None:
    """Write config.yaml and run.json before the training."""
    config, storage = prepared.config, Storage(prepared.config.run_dir)
    storage.probe()
    for line in neutral_changes(storage, config):
        console.say(line)
    if config.train.merge_adapter and config.model.quantization:
        console.warn(
            f"train.merge_adapter merges into the unquantized weights of {config.model.path}, but training uses "
            f"model.quantization {config.model.quantization}: final/merged is not exactly the policy that is "
            "trained and measured. The adapter in final/ on the quantized model is"
        )
    storage.write(CONFIG, config.to_yaml().encode())
    described = {"fingerprint": dict(job.fingerprint), "held_out": measured_pairs(prepared.own.eval)}
    storage.write(PAIRS, pairs_record(prepared.sets.train))
    storage.write(RUN, json.dumps(described, indent=2).encode())


def _training_job(prepared: Prepared, resources: Resources, fused: frozenset[bool], until: int | None = None) -> TrainJob:
    """Describe the training to its workers. It pauses after step ``until``, if that is given.

    Args:
        fused: as of ``Joined``.
    """
    config = prepared.config
    policy, reference = prepared.policy_identity(), prepared.reference.identity
    return TrainJob(
        train=config.train.model_copy(update={"router_aux_loss_coef": prepared.router_loss_coef}),
        shuffle=config.data.shuffle,
        fingerprint=prepared.fingerprint(),
        policy=PolicySpec(
            path=prepared.policy_dir,
            dtype=prepared.dtype,
            lora=config.model.lora,
            adapter=prepared.policy_adapter,
            quantization=config.model.quantization,
            freeze=config.model.freeze,
            rope_length=policy.rope_length,
            trust_remote_code=config.model.trust_remote_code,
            layout=config.model.layout,
            fused=config.model.fused,
            identity=policy.digest,
            origin=origin_of(config.model.adapter or config.model.path),
        ),
        work=ModelCost.of(prepared.policy_dir).work,
        memory_share=resources.memory_share,
        reference_identity=reference.digest,
        starts_as_reference=policy.same_model(reference),
        reference_fused=fused if policy.dtype == reference.dtype else frozenset(),
        coarser_dtype="bfloat16" if "bfloat16" in (policy.dtype, reference.dtype) else "float32",
        stop_after=until,
        sample_prompts=_sample_prompts(prepared),
        sample_stop=prepared.tokeniser.stop_ids,
        continued=prepared.continued,
    )


def train_prepared(
    prepared: Prepared,
    console: Console,
    hit_rate: float | None = None,
    *,
    shared: TrialContext | None = None,
    followed: bool = False,
) -> dict[str, Any] | None:
    """Train, unless the run is already finished.

    Args:
        hit_rate: share of the completions that were cached when the run began, 0 to 1; None if unknown.
        shared: given by a sweep to each of its trials.
        followed: whether the command goes on after the training, so that it must end here if the user asked to stop during
            the last step.

    Returns:
        The content of summary.json, or None if the training paused at ``shared.until``.

    Raises:
        KeyboardInterrupt: if the user stopped it, after its checkpoint or, if ``followed``, after its end.
        CacheMissError: if log-probs are missing.
        ConfigError: if a run of this name has other settings.
    """
    config, storage = prepared.config, Storage(prepared.config.run_dir)
    summary, asked = finished_summary(storage, prepared.fingerprint(), prepared.sets.train), False
    if told := other_held_out(storage, measured_pairs(prepared.own.eval)):
        console.warn(told)
    if summary is not None:
        console.say(f"run {config.run_name} is already complete: {redact(config.run_dir)} (--fresh trains it again)")
    else:
        with contextlib.ExitStack() as stack:
            console.begin("joining pairs with log-probs")
            folder = PairFolder(storage, one_machine=owns_ray())
            joined = join_sets(prepared, stack.enter_context(folder), console) if shared is None else shared.joined
            resources = resources_for("train", config, 1 if shared is None else shared.at_once)
            if shared is None:
                wait_for_workers("train", config, resources, console)
            job = _training_job(prepared, resources, joined.fused, None if shared is None else shared.until)
            _begin_run(prepared, job, console)
            with TrainingDisplay(console) if shared is None else shared.display as display:
                payload = WorkerInput(
                    job=job,
                    pairs=joined.pairs,
                    held_out=joined.held_out,
                    run_dir=config.run_dir,
                    run_name=prepared.name,
                    track=config.track,
                    base_name=prepared.base_name,
                    tokenizer=prepared.tokeniser.tokenizer,
                    board=None if shared is None else shared.board,
                )
                console.begin("training: workers")
                trained, asked = launch(payload, resources, display.listen, console.say)
        if trained["interrupted"]:
            if trained["steps"] == job.stop_after:
                return None
            console.say(f"stopped after step {trained['steps']:,}; its checkpoint is in {redact(config.run_dir)}")
            raise KeyboardInterrupt
        summary = _summarise(prepared, storage, trained, hit_rate, job, joined.training_pairs)
        if prepared.continued is not None:
            summary["policy"] = trained_policy(prepared, storage).digest
        summary["startup_seconds"] = {name: round(seconds, 2) for name, seconds in console.phases.seconds.items()}
        storage.write("final/README.md", model_card(config, summary).encode())
        storage.write(SUMMARY, json.dumps(finite(summary), indent=2, allow_nan=False).encode())
    print_summary(console, summary)
    write_report_or_warn(config.run_dir, console)
    if asked and followed:
        raise KeyboardInterrupt
    return summary


def trained_policy(prepared: Prepared, storage: Storage) -> ReferenceIdentity:
    """Identity of the policy in ``final/`` of the run directory ``storage``."""
    model, final = prepared.config.model, resolve_model(f"{storage.uri}/{FINAL}")
    base, adapter = (prepared.policy_dir, final) if model.adapts else (final, None)
    length = prepared.config.data.max_length
    return identify(base, prepared.dtype, adapter, model.quantization, model.trust_remote_code, max_length=length)


def _sample_prompts(prepared: Prepared) -> tuple[tuple[str, Any], ...]:
    """(text, token ids) of the first held-out prompts; of training prompts if nothing is held out."""
    count = prepared.config.train.sample_prompts
    table = prepared.sets.eval if prepared.sets.eval is not None else prepared.sets.train
    first = table.slice(0, 8 * count)
    if "prompt_ids" in first.column_names:
        prompts = first["prompt_ids"].to_pylist()
    else:
        read = prepared.sets.tokens.rows(first["set"].to_numpy(), first["place"].to_numpy())
        prompts = [prompt.tolist() for prompt, _, _ in read]
    distinct = dict.fromkeys(map(tuple, prompts))
    return tuple((_readable(prepared.tokeniser.tokenizer, ids), ids) for ids in list(distinct)[:count])


def _readable(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a prompt, with a line break in place of special tokens: without any, roles and words would join."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    for token in sorted(tokenizer.all_special_tokens, key=len, reverse=True):
        text = text.replace(token, "\n")
    return "\n".join(filter(None, map(str.strip, text.split("\n"))))


def _summarise(
    prepared: Prepared, storage: Storage, trained: dict[str, Any], hit_rate: float | None, job: TrainJob, training_pairs: int
) -> dict[str, Any]:
    """The content of summary.json."""
    config, decode = prepared.config, prepared.tokeniser.tokenizer.decode
    steps, evals = read_rows(storage, METRICS), read_rows(storage, EVAL)
    reference: tuple[str | None, ...] = (None,) * 4
    if config.needs_reference:
        identity = prepared.reference.identity.digest
        reference = config.reference_path, config.reference_adapter, identity, redact(config.cache_uri)
    prompts = [text for text, _ in job.sample_prompts]
    answers = ([decode(ids, skip_special_tokens=True) for ids in trained[f"samples_{when}"]] for when in ("before", "after"))
    return {
        "name": prepared.name,
        "run_dir": redact(config.run_dir),
        "raydpo": __version__,
        "steps": trained["steps"],
        "pairs_seen": trained["pairs"],
        "train_seconds": trained["seconds"],
        "load_seconds": trained["load_seconds"],
        "load_host_bytes": trained["load_bytes"],
        "checkpoint_seconds": trained["checkpoint_seconds"],
        "checkpoint_bytes": trained["checkpoint_bytes"],
        "skipped_steps": trained["skipped"],
        "tokens_per_second": trained["tokens_per_second"],
        "gate": trained["gate"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "training_pairs": training_pairs,
        "held_out_pairs": count_of(prepared.sets.eval),
        "unit": prepared.sets.report.unit,
        "eval_before": evals[0] if evals else None,
        "eval_after": evals[-1] if evals else None,
        "reference": dict(zip(("path", "adapter", "identity", "cache"), reference, strict=True)),
        "cache_hit_rate": hit_rate,
        "data": prepared.sets.report.to_dict(),
        "samples": [
            {"prompt": text, "before": before, "after": after}
            for text, before, after in zip(prompts, *answers, strict=False)
        ],
        "fingerprint": dict(job.fingerprint),
    }

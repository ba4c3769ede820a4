"""The verb ``raydpo plan``: estimates a run and prints tables. Starts no Ray; loads weights only with ``--measure``."""

from __future__ import annotations

import dataclasses

import numpy as np

from raydpo.config import Config
from raydpo.data.first import FirstPairs
from raydpo.data.mismatch import as_trained
from raydpo.data.pairs import PairSets
from raydpo.data.shapes import Shapes
from raydpo.data.simulate import NAIVE_PAIRS, Simulation
from raydpo.errors import ConfigError
from raydpo.estimate.cards import MEMORY, PER_MACHINE, is_card, link_of
from raydpo.estimate.checked import CheckedDevice, read_check
from raydpo.estimate.modes import Fit, Modes, Question, compare_modes
from raydpo.estimate.plan import PAIRS_PER_RANK, Plan, Rates, Stage, check_numbers, make_plan, sample_pairs
from raydpo.estimate.rate import measured_rates, stated_rates
from raydpo.estimate.tokenising import Tokenising
from raydpo.estimate.work import lengths_of
from raydpo.model.cost import ModelCost
from raydpo.model.memory.activations import Batch
from raydpo.model.memory.anatomy import Anatomy, model_cost
from raydpo.model.memory.scoring import Choice, Links, ScoringRoom, adapter_bytes, choose_partition
from raydpo.model.router import router_loss_coef
from raydpo.reference.identity import resolve_model
from raydpo.terminal.console import Console

__all__ = ["plan_run", "print_memory", "print_plan", "stage_row"]


def plan_run(
    config: Config,
    sets: PairSets,
    *,
    first: FirstPairs | None = None,
    measure: bool = False,
    measured: str | None = None,
    device: str | None = None,
    mfu_score: float | None = None,
    mfu_train: float | None = None,
    workers: int | None = None,
    price: float | None = None,
    runs: int | None = None,
    memory: float | None = None,
) -> Plan:
    """Estimate ``config`` on its pairs. Arguments that are None have the defaults of ``stated_rates`` and ``make_plan``.

    Args:
        first: how ``sets`` were read. What is known of the first records of a source then stands for all of it.
        measure: measure the rates on this machine. The two MFUs are then ignored; ``device`` only decides the memory.
        measured: report of ``raydpo gpu check`` with the rates, instead. The memory is that GPU's unless one is named.
        memory: GiB of a device; None = that of ``device``.

    Raises:
        ConfigError: if an argument is out of range or a device is unknown.
        ModelError: if a model's files do not tell its sizes.
    """
    check_numbers(workers, price, runs)
    model, reference = (
        model_cost(resolve_model(path), config.model.trust_remote_code)
        for path in (config.model.path, config.reference_path)
    )
    sets = as_trained(sets, config)
    checked = None if measured is None else _checked(measured, measure=measure, mfu_score=mfu_score, mfu_train=mfu_train)
    if device is not None and device not in MEMORY:
        raise ConfigError(
            f"--device {device!r} is not known; name one of {', '.join(MEMORY)}, or leave it out and say --memory GIB"
        )
    if checked is not None:
        rates = checked.rates(config)
        if device is not None and not is_card(device, checked.name):
            told = f"--device is {device}, but the rates of --measured are those of {checked.name}; drop --device"
            rates = dataclasses.replace(rates, warnings=(told, *rates.warnings))
    elif measure:
        rates = measured_rates(config, sample_pairs(config, sets.train), model, reference)
    else:
        rates = stated_rates(**_given(device=device, mfu_score=mfu_score, mfu_train=mfu_train))
        if device is None:
            on_cpus = config.score.gpus_per_worker == 0 and config.train.gpus_per_worker == 0
            told = (_ON_CPUS,) if on_cpus else ()
            rates = dataclasses.replace(rates, origin=f"{rates.origin}; --device names another", warnings=told)
    named = device or (DEVICE if memory is None else "device")
    if checked is not None and device is None and memory is None:
        named, memory = checked.name, checked.memory
    placed = _reference(config, sets, reference, rates, named, memory, workers) if config.needs_reference else None
    choice = placed if isinstance(placed, Choice) else None
    given = {"workers": workers, "price": price, "runs": runs, "choice": choice}
    given["scales"] = None if first is None else first.scales
    plan = make_plan(config, sets, model, reference, rates, **_given(**given))
    if first is not None:
        plan = dataclasses.replace(plan, tokenising=Tokenising.of(first), first=first.to_dict())
    return dataclasses.replace(plan, reference=placed, memory=_modes(config, sets, plan, named, memory))


def _checked(path: str, **others: object) -> CheckedDevice:
    """The GPU of a report.

    Args:
        others: options that also decide the rates; all must be None or False.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in others.items() if value is not None and value is not False]
    if given:
        raise ConfigError(f"--measured {path} and {' and '.join(given)} both decide the rates; keep one")
    return read_check(path)


_ON_CPUS = (
    "score.gpus_per_worker and train.gpus_per_worker are 0, so this configuration runs on CPUs, but the estimate is for "
    "GPUs; --measure estimates for this machine"
)
DEVICE = "H100"
"""Device whose memory is assumed if none is named."""


def _reference(
    config: Config,
    sets: PairSets,
    cost: ModelCost,
    rates: Rates,
    device: str,
    memory: float | None,
    workers: int | None,
) -> Choice | str:
    """How the reference is put on the devices that score, or why it fits in no way."""
    wish = config.score if workers is None else config.score.model_copy(update={"workers": workers})
    if wish.gpus_per_worker == 0:
        return "reference: scored on CPUs, where score.partition and score.offload are not decided automatically"
    kind, gather, host = link_of(DEVICE if device == "device" else device)
    longest = max(
        int((prompts + np.max(answers, axis=0)).max())
        for prompts, *answers in (lengths_of(table) for table in (sets.train, sets.eval) if table is not None)
    )
    adapter = config.reference_adapter and resolve_model(config.reference_adapter)
    dtype = config.model.dtype if wish.dtype is None else wish.dtype
    width = "bfloat16" if dtype == "auto" else dtype
    share = min(1.0, wish.gpus_per_worker or 1.0)
    room = ScoringRoom(
        name=device,
        device_bytes=(MEMORY[device] if memory is None else memory) * 2**30 * share,
        per_machine=min(PER_MACHINE, wish.workers) if share == 1 else 1,  # workers that share a GPU are no team
        links=Links(name=kind, gather=gather, host=host, seconds=cost.position_flops / rates.score),
    )
    try:
        return choose_partition(
            Anatomy.of(resolve_model(config.reference_path), config.model.trust_remote_code),
            wish,
            room,
            dtype=width,
            longest=longest,
            quantization=config.reference_quantization,
            adapter_bytes=adapter_bytes(adapter, width),
        )
    except ConfigError as error:
        return f"warning: {error}"


def _modes(config: Config, sets: PairSets, plan: Plan, device: str, memory: float | None) -> Modes:
    """The modes in which the training of ``config`` fits."""
    layout = plan.data["layout"]
    lengths = lengths_of(sets.train)
    pairs = [tuple(filter(None, each)) for each in np.stack([each[:SAMPLE] for each in lengths], axis=1).tolist()]
    model = config.model
    if model.adapter is not None:
        model = model.model_copy(update={"adapter": resolve_model(model.adapter)})
    budget = config.train.tokens_per_batch
    step = plan.data["positions"][layout] / plan.steps / plan.train_workers
    batch = Batch.of_pairs(pairs, layout, micro_batches=1 if step <= plan.data["tokens_per_batch"] else 2)
    path, trusted = resolve_model(config.model.path), config.model.trust_remote_code
    coef = router_loss_coef(path, config.train.router_aux_loss_coef, trusted)
    question = Question(
        anatomy=Anatomy.of(path, trusted),
        model=model,
        train=config.train.model_copy(update={"router_aux_loss_coef": coef}),
        workers=plan.train_workers,
        memory=(MEMORY[device] if memory is None else memory) * 2**30,
        dtype="bfloat16" if config.model.dtype == "auto" else config.model.dtype,
        batch=batch,
        longest=-(-int(Shapes.of_lengths(*lengths).positions(layout).max()) // config.train.sequence_parallel),
        budget=None if budget == "auto" else budget,
    )
    return compare_modes(question, device)


SAMPLE = 4096
"""Largest number of pairs that are read for the proportions of all pairs."""


def print_plan(plan: Plan, console: Console) -> None:
    """Print the estimate as lines and tables."""
    data, model, unit = plan.data, plan.model, plan.data["unit"]
    console.say(
        f"{unit}: {data['training_pairs']:,} to train on, {data['held_out_pairs']:,} held out, "
        f"{data['completions']:,} distinct completions to score"
    )
    console.say(
        f"tokens of the training {unit}: {data['prompt_tokens']:,} of prompts, {data['completion_tokens']:,} of "
        f"completions, longest row {data['longest']:,}"
    )
    if plan.tokenising is not None:
        console.say(plan.tokenising.line())
    sampled = [
        f"{data['planned'][name]:,} of {data[name]:,} {what}"
        for name, what in (("completions", "completions"), ("held_out_pairs", f"held-out {unit}"))
        if data["planned"][name] < data[name]
    ]
    if sampled:
        console.say(f"estimated from a part that was planned: {' and '.join(sampled)}; training from sampled steps")
    console.say(
        f"policy: {model['parameters']:,} parameters, {model['active']:,} of them multiply every token; the "
        f"vocabulary projection is {model['head_share']:.0%} of a forward pass"
    )
    console.say(
        f"training: {plan.steps:,} steps, {plan.epochs:.3g} epochs, {data['pairs_per_step']:,} {unit} a step, "
        f"{data['layout']} layout, {data['tokens_per_batch']:,} positions a micro-batch, "
        f"{plan.imbalance.imbalance:.2%} of the time waiting ({plan.imbalance.lockstep:.2%} if ranks wait for "
        "each other after every micro-batch)"
    )
    console.say(
        f"rate of a device: {plan.rates.score / 1e12:.4g} TFLOP/s scoring, {plan.rates.train / 1e12:.4g} training "
        f"({plan.rates.origin})"
    )
    for line in plan.rates.warnings:
        console.say(f"warning: {line}")
    layouts = {
        "dealt": f"padded, {NAIVE_PAIRS} pairs at a time as they come",
        "padded": "padded, sorted by length",
        "packed": "packed",
        "tree": "prefix tree",
    }
    counts, dealt = data["positions"], data["positions"]["dealt"]
    rows = [(name, f"{counts[kind]:,}", f"{1 - counts[kind] / dealt:.1%}") for kind, name in layouts.items()]
    console.table("token positions that a training computes", ("layout", "positions", "saved"), rows)
    stages = [
        stage_row("reference pass, once", plan.score_workers, plan.score),
        stage_row("one training", plan.train_workers, plan.training),
        stage_row("its held-out evaluations", plan.train_workers, plan.evaluation),
        stage_row(f"pass and {plan.runs:,} training(s)", "", plan.total),
        stage_row(f"{plan.runs:,} with an online reference, padded", plan.train_workers, plan.online),
        stage_row(f"{plan.runs:,} with an online reference, packed", plan.train_workers, plan.online_packed),
    ]
    console.table("estimate", ("part", "GPUs", "PFLOP", "time", "GPU hours", "dollars"), stages)
    if plan.reference is not None:
        console.say(plan.reference.line if isinstance(plan.reference, Choice) else plan.reference)
    if plan.memory is not None:
        print_memory(plan.memory, console)
    console.say(
        "online reference: forward passes of reference and policy in every step. padded: in rows of "
        f"{NAIVE_PAIRS} pairs at a time as they come. packed: without padding, as if no rank ever waited"
    )
    title = f"share of time lost to imbalance, {data['pairs_per_step']:,} {unit} a step"
    console.table(title, _COLUMNS, [_simulation(one) for one in plan.fixed])
    console.table(f"the same with {PAIRS_PER_RANK} pairs a rank", _COLUMNS, [_simulation(one) for one in plan.scaled])
    console.say(
        "bound: the least that any plan loses, since a pair is never split. Ranks without pairs count as lost. "
        "lockstep: ranks wait for each other after every micro-batch (ZeRO 2, 3). repeated: share of the work that "
        "is a prefix computed on several ranks. dealt in turn: lost if ranks took the pairs in turn, in padded "
        f"micro-batches of {NAIVE_PAIRS}; its time: that of such a step, as a multiple of ours. If a step has more pairs "
        "than the data, pairs repeat."
    )


def print_memory(modes: Modes, console: Console) -> None:
    """Print in which modes a training fits."""
    columns = ("mode", "weights", "grads", "optimizer", "activ.", "head", "comm.", "total", "host", "fits", "positions")
    devices = f"{modes.workers:,} x {modes.device} ({modes.memory / 2**30:g}), {modes.dtype}"
    title = f"GiB on one of {devices}; the fastest mode first, * = as configured"
    console.table(title, columns, [_fit(row) for row in modes.rows])
    console.say(
        "total: at the peak, with 1.5 GiB of CUDA context and NCCL. comm.: buckets, and weights gathered under "
        "ZeRO 3. host: host memory of one worker. positions: the largest train.tokens_per_batch that fits"
    )
    for line in modes.lines():
        console.say(line)


def _fit(row: Fit) -> tuple[str, ...]:
    name = f"* {row.name}" if row.configured else row.name
    sizes = [f"{size / 2**30:,.1f}" for size in (*row.parts.values(), row.total, row.host)]
    return name, *sizes, "fits" if row.fits else "no", f"{row.largest:,}" if row.largest else "-"


_COLUMNS = ("ranks", "pairs", "mean", "worst step", "bound", "lockstep", "repeated", "dealt in turn", "its time")


def _simulation(one: Simulation) -> tuple[str, ...]:
    shares = (one.imbalance, one.worst, one.bound, one.lockstep, one.repeated, one.naive)
    return f"{one.world_size:,}", f"{one.pairs_per_step:,}", *(f"{share:.2%}" for share in shares), f"x{one.naive_time:.2f}"


def stage_row(name: str, workers: int | str, stage: Stage) -> tuple[str, ...]:
    """The row of a stage in a table of parts, GPUs, PFLOP, time, GPU hours and dollars."""
    figures = f"{stage.flops / 1e15:,.4g}", _duration(stage.seconds), f"{stage.gpu_hours:,.4g}"
    return name, str(workers), *figures, "no --price" if stage.dollars is None else f"{stage.dollars:,.2f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _given(**settings: object) -> dict[str, object]:
    return {name: value for name, value in settings.items() if value is not None}

"""Self-check at load: which layouts are exact for a model, found by trying them instead of by a list of names.

The prefix tree is exact if tokens affect each other only in attention, and if attention uses the positions and the window it
is given. Recurrent layers, ALiBi, or a window built into a mask break that without an error. So at load each layout is
compared with the plain model, one completion at a time, on rows chosen to show a difference. On a GPU each kernel of
attention is compared with its definition first, in values and gradients (``model.bodycheck``).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from raydpo.data.shapes import LayoutName
from raydpo.errors import ModelError, one_line
from raydpo.model.attention import Demand, available_bodies, lacking_kernels, watch_demands
from raydpo.model.bodycheck import why_wrong
from raydpo.model.budget import is_out_of_memory
from raydpo.model.layout import PADDED, Method, PromptGroup
from raydpo.model.limits import longest_sequence
from raydpo.model.logps import LogpModel
from raydpo.model.package import placeholder_ids, shrink_others
from raydpo.model.recall import Recall
from raydpo.model.recurrent import find_mixers
from raydpo.model.rotary import fix_rotary
from raydpo.model.segments import Body
from raydpo.model.sliced import not_partitioned
from raydpo.model.ulysses import SequenceGroup

__all__ = [
    "CHECK_ROWS",
    "CheckReport",
    "Wish",
    "check_training_mode",
    "choose_layout",
    "flat",
    "logps_by_definition",
    "share_positions",
    "small_copy",
    "without_placeholders",
]

Wish = Literal["auto", "tree", "packed", "padded"]
"""``model.layout``."""

TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 0.25}
"""Largest mean difference over the tokens of a case, in nats a token, by precision. Rounding was 1e-5 and 0.08 with a
trained model of 30 layers. A small float32 copy of the model (the twin) shows differences that bfloat16 would hide."""
TWIN_LAYERS = 4
TWIN_WIDTH = 64
TWIN_VOCABULARY = 128
TWIN_GAIN = 3.0
"""Factor on the twin's initial weights, which are so small that layers hardly matter. With this factor, a wrong layout
differs by 0.1 nats."""
CHECK_ROWS = 2
"""Groups of the data to check, besides the built-in ones."""
CHECK_WINDOW = 12
"""Sliding windows are narrowed to this many tokens during the check, so that short rows are longer than the window."""


@dataclass(frozen=True)
class CheckReport:
    """The chosen layout, and a line for the log with the difference of each layout that was tried."""

    method: Method
    line: str


@torch.no_grad()
def choose_layout(
    model: LogpModel,
    device: torch.device,
    wish: Wish = "auto",
    rows: Sequence[PromptGroup] = (),
    recall: Recall | None = None,
) -> CheckReport:
    """Check the layouts and make ``model`` use the fastest exact one.

    Args:
        wish: ``auto``, or the layout to use.
        rows: groups of the data; ``CHECK_ROWS`` of them are checked, shortened, besides the built-in cases.
        recall: what is known of the model. If this check is, it is not made again.

    Raises:
        ModelError: if the requested layout is wrong for this model, or if even padded rows differ from the model's own
            logits.
    """
    recall = recall or Recall(None, device)
    known = recall.known(f"layout {wish}")
    if known is None:
        report = _try_layouts(model, device, wish, rows)
        found = [report.line, model.float32_stream, model.mixers.kinds]
        recall.keep(f"layout {wish}", [*dataclasses.astuple(report.method), *found])
        return report
    layout, body, line, model.float32_stream, mixers = known
    model.wrap_mixers(mixers)
    model.use(method := Method(layout, body))
    return CheckReport(method, f"{line} (checked earlier on this machine)")


def _try_layouts(model: LogpModel, device: torch.device, wish: Wish, rows: Sequence[PromptGroup]) -> CheckReport:
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    tolerance = TOLERANCES[dtype]
    twin = None if dtype == torch.float32 else _twin(model.causal_lm)
    model.wrap_mixers(())
    oracle = _Oracle(model, _cases(model, rows), device)
    if dtype == torch.bfloat16:
        # Some norms fail on a float32 stream with bfloat16 weights.
        model.float32_stream = True
        model.float32_stream = not isinstance(oracle.worst_gap(PADDED), str)
    gaps: dict[str, float | str] = {}

    def first_exact(layouts: Sequence[LayoutName]) -> CheckReport | None:
        bodies, demands = _bodies(model, device)
        wrong: dict[Body, str | None] = {}
        for method in [Method(layout, body) for layout in layouts for body in bodies]:
            if demands and method.body not in wrong:
                wrong[method.body] = why_wrong(method.body, demands, device)
            gap = wrong.get(method.body) or oracle.worst_gap(method)
            if dtype != torch.float32 and not isinstance(gap, str):
                in_twin = twin if isinstance(twin, str) else twin.worst_gap(Method(method.layout, "sdpa"))
                if isinstance(in_twin, str) or in_twin > TOLERANCES[torch.float32]:
                    gap = f"a small float32 copy with random weights: {_say(in_twin)}"
            gaps[str(method)] = gap
            if isinstance(gap, float) and gap <= tolerance:
                return found(method, demands)
        return None

    def found(method: Method, demands: set[Demand]) -> CheckReport:
        model.use(method)
        line = _line(model, method, gaps, tolerance, demands)
        if untried and method != PADDED:
            line = (
                f"warning: {line.removeprefix('warning: ')}; whether a layer carries a state from token to token could not "
                f"be tried ({untried}): if one does, set model.layout=padded"
            )
        return CheckReport(method, line)

    report, untried = None, ""
    if wish != "padded":
        # Before any layout is tried: with weights as small as those of a new model, the check hardly sees what the state of
        # one completion does to the next.
        mixers, untried = _mixers(model, twin)
        for each in [model, *([twin.model] if isinstance(twin, _Oracle) else [])]:
            each.wrap_mixers(mixers)
        report = first_exact(["tree", "packed"] if wish == "auto" else [wish])
    if report is None and wish in ("auto", "padded"):
        model.wrap_mixers(())
        gaps[str(PADDED)] = gap = oracle.worst_gap(PADDED)
        report = found(PADDED, set()) if isinstance(gap, float) and gap <= tolerance else None
    if report is not None:
        return report
    model.use(PADDED)
    told = "; ".join(f"{name}: {_say(gap)}" for name, gap in gaps.items())
    if wish in ("auto", "padded"):
        raise ModelError(
            f"{type(model.causal_lm).__name__} cannot be scored exactly: log-probs from its hidden states and "
            f"head differ from its own logits ({told}; tolerance {tolerance:g}). Please report it"
        )
    raise ModelError(
        f"model.layout={wish} is wrong for {type(model.causal_lm).__name__}: {told} (tolerance {tolerance:g} "
        "nats a token against one completion at a time). Use model.layout=auto"
    )


@torch.no_grad()
def share_positions(model: LogpModel, device: torch.device, group: SequenceGroup, rows: Sequence[PromptGroup] = ()) -> str:
    """Let the ranks of ``group`` share the positions of every micro-batch of ``model``, after checking the log-probs.

    All ranks call it, after ``choose_layout``, with the same ``rows``.

    Returns:
        A line for the log.

    Raises:
        ModelError: if the layout cannot be divided, or the log-probs differ from those of one device.
    """
    if model.mixers.kinds:
        raise ModelError(
            f"sequence_parallel {group.size} divides the positions of a sequence among devices, but "
            f"{', '.join(model.mixers.kinds)} of this model carries a state along the whole sequence; set "
            "sequence_parallel to 1"
        )
    if model.method.layout == "padded":
        raise ModelError(
            f"sequence_parallel {group.size} divides the positions of a prefix tree or a pack, but this model "
            "is computed in padded rows, because it mixes positions outside attention or because of "
            "model.layout; set sequence_parallel to 1"
        )
    gap = 0.0
    with _narrow_windows(model.causal_lm):
        for groups in _cases(model, rows).values():
            model.group = None
            alone = model.score(groups, device)
            model.group = group
            together = model.score(groups, device)
            gap = max(gap, float(np.abs(flat(together) - flat(alone)).mean()))
    tolerance = TOLERANCES[next(one.dtype for one in model.parameters() if one.is_floating_point())]
    if not gap <= tolerance:
        raise ModelError(
            f"sequence_parallel {group.size} is wrong for {type(model.causal_lm).__name__}: its log-probs "
            f"differ by {gap:.2g} nats a token from those of one device (tolerance {tolerance:g}); set it to 1"
        )
    return f"sequence parallel: {group.size} devices compute each micro-batch together, {_say(gap)} from one alone"


@torch.no_grad()
def check_training_mode(model: LogpModel, device: torch.device, recall: Recall | None = None) -> None:
    """Check that a pass in training mode gives the same log-probs as in evaluation mode, in which the reference is scored.

    Leaves the model in training mode.

    Args:
        recall: what is known of the model. If this check is, it is not made again.

    Raises:
        ModelError: if they differ, naming the module that causes it.
    """
    recall = recall or Recall(None, device)
    if recall.known("training mode"):
        model.train()
        return
    groups = [group for case in _cases(model, ()).values() for group in case]

    def score(mode: bool, quiet: tuple[nn.Module, ...] = ()) -> np.ndarray:
        model.train(mode)
        for module in quiet:
            module.training = False
        return flat(model.score(groups, device))

    wanted = score(False)

    def gap(mode: bool, quiet: tuple[nn.Module, ...] = ()) -> float:
        return float(np.abs(score(mode, quiet) - wanted).mean())

    differs = gap(True)
    # Kernels with a random summation order differ between two passes of the same mode, too.
    if differs > 0 and not differs <= 4 * gap(False):
        model.train()
        kinds: dict[type[nn.Module], dict[str, nn.Module]] = {}
        for name, module in model.named_modules():
            if module is not model and module.training:
                kinds.setdefault(type(module), {})[name] = module
        found = [
            f"{kind.__name__} ({next(iter(modules))})"
            for kind, modules in kinds.items()
            if gap(True, tuple(modules.values())) < 0.1 * differs
        ]
        raise ModelError(
            f"{type(model.causal_lm).__name__} computes other log-probs in training mode than in evaluation "
            f"mode, in which the reference is scored: {found[0] if found else 'one of its modules'} adds noise "
            "or dropout; set that to 0 in config.json"
        )
    model.train()
    recall.keep("training mode", True)


def flat(scored: Sequence[tuple[np.ndarray, ...]]) -> np.ndarray:
    """The log-probs of all completions of all groups, one after the other: [tokens]."""
    return np.concatenate([logps for group in scored for logps in group])


def _bodies(model: LogpModel, device: torch.device) -> tuple[tuple[Body, ...], set[Demand]]:
    """Bodies of attention to try, and what the layers ask of them. On a CPU there is one, so they are not asked; nor are
    models without attention."""
    if device.type != "cuda" or not hasattr(model.causal_lm.config.get_text_config(), "num_attention_heads"):
        return available_bodies(torch.device("cpu"), ()), set()
    demands = _demands(model, device)
    return available_bodies(device, demands), demands


def _demands(model: LogpModel, device: torch.device) -> set[Demand]:
    """What the layers ask of attention. Nothing if they cannot compute a tree, as trying the layouts will tell."""
    model.use(Method("tree", "sdpa"))
    with watch_demands() as found:
        try:
            model.score(_cases(model, ())["a long prompt"], device)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            found.clear()
    return found


def _mixers(model: LogpModel, twin: _Oracle | str | None) -> tuple[set[str], str]:
    """Names of the classes of layers that mix positions outside attention, and why that could not be tried, or nothing."""
    try:
        small = twin.model if isinstance(twin, _Oracle) else small_copy(model.causal_lm, TWIN_LAYERS)
        small.use(Method("tree", "sdpa"))
        return find_mixers(small.backbone), ""
    except Exception as error:  # a model's own code may fail in any way; the model is then computed as if it had none
        if is_out_of_memory(error):
            raise
        return set(), f"{type(error).__name__}: {one_line(error, 160)}"


def _line(model: LogpModel, method: Method, gaps: dict[str, float | str], tolerance: float, demands: set[Demand]) -> str:
    refused = [f"{name} refused, {_say(gap)}" for name, gap in gaps.items() if name != str(method)]
    others = f"; {'; '.join(refused)} (tolerance {tolerance:g})" if refused else ""
    rows = f", {', '.join(model.mixers.kinds)} in rows" if model.mixers.kinds else ""
    line = f"layout: {method}{rows}, {_say(gaps[str(method)])} from one completion at a time{others}"
    lacking = lacking_kernels(demands) if demands and method.body in ("flex", "sdpa") else []
    if lacking:
        return f"warning: {line}; attention would be faster in one variable-length call: {'; or '.join(lacking)}"
    return line


def _say(gap: float | str) -> str:
    return gap if isinstance(gap, str) else f"{gap:.2g} nats a token"


class _Oracle:
    """Expected log-probs: the plain model on the cases, one completion at a time, with narrowed sliding windows."""

    def __init__(self, model: LogpModel, cases: dict[str, list[PromptGroup]], device: torch.device) -> None:
        self.model, self.cases, self.device = model, cases, device
        model.use(PADDED)
        with _narrow_windows(model.causal_lm):
            self.expected = {
                case: np.concatenate([logps_by_definition(model.causal_lm, group, device) for group in groups])
                for case, groups in cases.items()
            }

    def worst_gap(self, method: Method) -> float | str:
        """Largest mean absolute difference of a case, in nats a token; or the error, if the layout cannot run."""
        worst = 0.0
        try:
            self.model.use(method)
            with _narrow_windows(self.model.causal_lm):
                for case, groups in self.cases.items():
                    found = flat(self.model.score(groups, self.device))
                    gap = float(np.abs(found - self.expected[case]).mean())
                    worst = max(worst, gap if np.isfinite(gap) else float("inf"))
        except Exception as error:
            if is_out_of_memory(error) or _broke(error):
                raise
            # Architectures fail in any way on an unknown layout. Any error means that the layout is not supported.
            return f"{type(error).__name__}: {one_line(error, 160)}"
        return worst


def _broke(error: Exception) -> bool:
    """Whether another rank has ended, or does not answer: that says nothing of the layout."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _twin(causal_lm: nn.Module) -> _Oracle | str:
    """A small float32 copy and what it computes, or the reason why there is none."""
    try:
        model = small_copy(causal_lm, TWIN_LAYERS)
        return _Oracle(model, _cases(model, ()), torch.device("cpu"))
    except Exception as error:
        return f"cannot be made ({type(error).__name__}: {one_line(error, 160)})"


@torch.no_grad()
def small_copy(causal_lm: nn.Module, layers: int) -> LogpModel:
    """A model of the same architecture with random float32 weights, a small vocabulary and a narrow feed-forward part.

    Args:
        layers: its layers, or more if there are more kinds of layers.
    """
    config = copy.deepcopy(causal_lm.config)
    text = config.get_text_config()
    for name, value in vars(text).copy().items():
        if isinstance(value, int) and not isinstance(value, bool) and ("intermediate" in name or "ffn" in name):
            setattr(text, name, min(value, TWIN_WIDTH))
        elif name.endswith("_token_id") and value is not None:
            setattr(text, name, 0)
    whole = text.num_hidden_layers
    layers = min(layers, whole)
    if kinds := getattr(text, "layer_types", None):
        # Enough layers to have one of each kind.
        layers = max(layers, max(kinds.index(kind) + 1 for kind in set(kinds)))
    text.vocab_size = TWIN_VOCABULARY
    if getattr(text, "vocab_size_per_layer_input", None):  # Gemma 3n and 4 have a second table of embeddings
        text.vocab_size_per_layer_input = TWIN_VOCABULARY
    shrink_others(config)
    # In a package transformers makes the text model by a way of its own, which partitions weights under ZeRO-3
    # (transformers 5.23, ``modeling_utils.py``, ``_from_config``).
    with torch.random.fork_rng(devices=[]), not_partitioned():
        torch.manual_seed(0)
        while True:
            try:
                small = type(causal_lm)(_shortened(config, layers)).float().eval()
                break
            except (ValueError, IndexError):  # such as a layer that is shared by several, of which one is left
                if layers == whole:
                    raise
                layers = min(2 * layers, whole)
        fix_rotary(small, getattr(causal_lm, "rope_length", None))
        model = LogpModel(small)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(TWIN_GAIN)
    return model


def _shortened(config: Any, layers: int) -> Any:
    """A copy of ``config`` with its first ``layers`` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    whole = text.num_hidden_layers
    for name, value in vars(text).copy().items():
        if isinstance(value, list) and len(value) == whole and "token_id" not in name:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return config


def logps_by_definition(causal_lm: nn.Module, group: PromptGroup, device: torch.device) -> np.ndarray:
    """Log-probs of all completions of ``group``, one after the other, from the logits of ``causal_lm``: [tokens]."""
    logps, length = [], len(group.prompt)
    for sequence in group.sequences:
        ids = torch.from_numpy(sequence.astype(np.int64))[None].to(device)
        logits = causal_lm(input_ids=ids, use_cache=False).logits[0, length - 1 : -1]
        logps.append(logits.float().log_softmax(-1).gather(1, ids[0, length:, None])[:, 0].cpu().numpy())
    return np.concatenate(logps)


def _cases(model: LogpModel, rows: Sequence[PromptGroup]) -> dict[str, list[PromptGroup]]:
    rng, vocabulary, longest = np.random.default_rng(0), model.vocabulary, longest_sequence(model.causal_lm)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, vocabulary, count).astype(np.int32)

    system = tokens(17)
    cases = {
        "a long prompt": [PromptGroup(tokens(64), (tokens(9), tokens(5)))],
        "completions of one token": [PromptGroup(tokens(20), (tokens(1), tokens(1)))],
        "two prompts in a row": [
            PromptGroup(tokens(11), (tokens(7), tokens(12))),
            PromptGroup(tokens(23), (tokens(14), tokens(3))),
        ],
        "a shared system prompt": [
            PromptGroup(np.concatenate([system, tokens(8)]), (tokens(10), tokens(6))) for _ in range(2)
        ],
    }
    if rows:
        cases["rows of the data"] = [
            PromptGroup(group.prompt[-96:], tuple(one[:48] for one in group.completions)) for group in rows[:CHECK_ROWS]
        ]
    cases = {case: without_placeholders(model.causal_lm, groups) for case, groups in cases.items()}
    if longest is None:
        return cases
    room = {case: longest - max(len(one) for group in groups for one in group.completions) for case, groups in cases.items()}
    return {
        case: [PromptGroup(group.prompt[: max(1, room[case])], group.completions) for group in groups]
        for case, groups in cases.items()
    }


def without_placeholders(causal_lm: nn.Module, groups: Sequence[PromptGroup]) -> list[PromptGroup]:
    """``groups`` with another token in place of a package's placeholders for images, for comparisons with the package's own
    logits: some packages compute no text at those tokens."""
    placeholders = placeholder_ids(causal_lm)
    if not placeholders:
        return list(groups)
    plain = np.int32(next(number for number in range(len(placeholders) + 1) if number not in placeholders))

    def replaced(ids: np.ndarray) -> np.ndarray:
        return np.where(np.isin(ids, placeholders), plain, ids)

    return [PromptGroup(replaced(group.prompt), tuple(map(replaced, group.completions))) for group in groups]


@contextlib.contextmanager
def _narrow_windows(causal_lm: nn.Module) -> Iterator[None]:
    """Shrink every sliding window and attention chunk of the model to ``CHECK_WINDOW``."""
    owners: list[Any] = [causal_lm.config, causal_lm.config.get_text_config(), *causal_lm.modules()]
    narrowed: dict[tuple[int, str], tuple[Any, str, int]] = {}
    for owner in owners:
        for name in ("sliding_window", "attention_chunk_size", "window_size"):
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > CHECK_WINDOW:
                narrowed.setdefault((id(owner), name), (owner, name, value))
    for owner, name, _ in narrowed.values():
        setattr(owner, name, CHECK_WINDOW)
    try:
        yield
    finally:
        for owner, name, value in narrowed.values():
            setattr(owner, name, value)

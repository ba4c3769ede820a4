"""Fused norms, gated feed-forward parts and rotary embeddings in a loaded model (``model.kernels``), after a check.

Nothing is decided by a model's name. A module is replaced if its class computes the same formula, which is tried on random
numbers. Its new class is a subclass that overrides ``forward``, so names, weights, hooks and adapters stay as they are.
Outside ``LogpModel.hidden``, in generation for example, modules compute as before.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raydpo.errors import one_line
from raydpo.model.budget import is_out_of_memory, probe_group, probe_groups
from raydpo.model.kernels import Activation, gated, rms_norm, rotate
from raydpo.model.layout import Method
from raydpo.model.limits import longest_sequence
from raydpo.model.logps import LogpModel
from raydpo.model.recall import Recall
from raydpo.model.selfcheck import TOLERANCES, flat, small_copy

__all__ = ["find_parts", "fuse_layers", "switch"]

EXACT, ROUNDED = 1e-4, 0.05
"""Largest norms of the difference between fused and plain gradients of a small copy of the model, relative to the gradients,
in float32 and in bfloat16. With SmolLM2-135M's layers the second was 0.013. The fused model rounds in fewer places. Its
log-probs of real text were 0.022 nats a token from the plain model's, and both 0.019 from those of a float32 model."""
PROBE_PAIRS, PROBE_TOKENS = 4, 160
"""Random pairs whose log-probs are compared, and positions of each."""
COPY_LAYERS, COPY_TOKENS = 2, 96
"""Fewest layers of the small copy, and positions of its pair."""
SAME = 1e-5
"""Largest relative difference between two formulas in float32."""
SCALES = torch.tensor([1e-3, 1.0, 30.0, 1e3])[:, None]
"""Sizes of the numbers on which formulas are tried. The small ones tell another epsilon, the large ones a limit."""
_EPS = ("variance_epsilon", "eps", "epsilon")
_ROTARY = "apply_rotary_pos_emb"
_MLP = ("gate_proj", "up_proj", "down_proj")
FEED_FORWARD = "feed-forward"
Parts = Sequence[tuple[nn.Module, type[nn.Module]]]
"""Modules that can be fused, each with its new class, a subclass of its own."""


def fuse_layers(model: LogpModel, device: torch.device, recall: Recall | None = None) -> str:
    """Fuse what can be fused in ``model``, if its log-probs and gradients stay the same up to rounding.

    Called after ``selfcheck.choose_layout``. All ranks that share the model call it together.

    Returns:
        A line for the log: what was fused and how far it is from the plain model, or why nothing was.
    """
    if not model.has_float32_stream:
        return "fused: nothing; only a bfloat16 model with a float32 residual stream gains from it"
    recall = recall or Recall(None, device)
    parts = find_parts(model)
    if not parts:
        return f"fused: nothing; its layers have a form that cannot be fused ({type(model.causal_lm).__name__})"
    known = recall.known("fused")
    if known is None:
        known = _check(model, parts, device)
        recall.keep("fused", known)
    accepted, line = known
    switch(model, parts, on=accepted)
    return line


# -- the check ------------------------------------------------------------------------------------------------------------


def _check(model: LogpModel, parts: Parts, device: torch.device) -> tuple[bool, str]:
    """Whether the fused model is the plain one up to rounding, and the line for the log."""
    try:
        exact, error = _copy_errors(model, device)
        gap = float(np.abs(np.subtract(*_both(model, parts, lambda: _random_logps(model, device)))).mean())
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # A compiler may fail in any way.
        return False, f"fused: nothing; it failed with {type(error).__name__}: {one_line(error, 160)}"
    finally:
        switch(model, parts, on=False)
    largest = TOLERANCES[torch.bfloat16]
    if exact <= EXACT and error <= ROUNDED and gap <= largest:
        names = ", ".join(sorted({fused.part for _, fused in parts}))
        return True, f"fused: {names}; {gap:.2g} nats a token from the plain model, gradients of a small copy {error:.2g}"
    return False, (
        f"fused: nothing; {gap:.2g} nats a token from the plain model (tolerance {largest:g}), gradients of a small copy "
        f"{exact:.2g} in float32 and {error:.2g} in bfloat16 (tolerances {EXACT:g} and {ROUNDED:g})"
    )


def _both(model: LogpModel, parts: Parts, compute: Callable[[], Any]) -> tuple[Any, Any]:
    """Result of ``compute`` by the plain and by the fused model."""
    results = []
    for on in (False, True):
        switch(model, parts, on)
        results.append(compute())
    return results[0], results[1]


@torch.no_grad()
def _random_logps(model: LogpModel, device: torch.device) -> np.ndarray:
    """Log-probs of the tokens of random pairs."""
    longest = min(longest_sequence(model.causal_lm) or PROBE_TOKENS, PROBE_TOKENS)
    return flat(model.score(probe_groups(PROBE_PAIRS * longest, model.vocabulary, longest), device))


def _copy_errors(model: LogpModel, device: torch.device) -> tuple[float, float]:
    """Norm of the difference between fused and plain gradients of a small copy of ``model``, relative to the gradients: in
    float32, where only the order of sums differs, and in bfloat16 on ``device``.

    In the model itself a backward pass would reach DeepSpeed, which would reduce the gradients.
    """
    small = small_copy(model.causal_lm, COPY_LAYERS)
    small.wrap_mixers(model.mixers.kinds)
    parts = find_parts(small)
    layout = model.method.layout

    def error(method: Method, device: torch.device) -> float:
        small.use(method)
        batch = small.lay_out([probe_group(COPY_TOKENS, small.vocabulary)]).to(device)

        def gradients() -> list[Tensor]:
            with torch.enable_grad():
                found = torch.autograd.grad(small(batch).sum(), list(small.parameters()), allow_unused=True)
            return [each.float() for each in found if each is not None]

        plain, fused = _both(small, parts, gradients)
        total = torch.nn.utils.get_total_norm
        return float(total([one - other for one, other in zip(plain, fused, strict=True)]) / total(plain))

    with _also_in_float32():
        exact = error(Method(layout, None if model.method.body is None else "sdpa"), torch.device("cpu"))
    small.policy.to(device, torch.bfloat16)
    return exact, error(model.method, device)


# -- what can be fused ----------------------------------------------------------------------------------------------------


def find_parts(model: LogpModel) -> Parts:
    """Modules of the decoder layers whose formula is known. Empty if a layer has other modules with weights than linear
    layers and known norms, or another number of gated feed-forward parts than one.

    A fused norm rounds to bfloat16, as autocast would before a linear layer. A module that reads the norm in float32, such
    as a router, would compute with other numbers.
    """
    found: list[tuple[nn.Module, type[nn.Module]]] = []
    for layer in getattr(model.backbone, "layers", ()):
        mine = []
        for module in _modules(layer):
            fused = _fused_class(module)
            if fused is not None:
                mine.append((module, fused))
            elif not _is_linear(module) and any(each is not None for each in module._parameters.values()):
                return ()
        if [fused.part for _, fused in mine].count(FEED_FORWARD) != 1:
            return ()
        found += mine
    return found


def switch(model: LogpModel, parts: Parts, on: bool) -> None:
    """Switch all parts and the passes over logits on, or back to what they were."""
    for module, fused in parts:
        module.__class__ = fused if on else fused.__base__
    model.head.fused = on


def _modules(layer: nn.Module) -> Iterator[nn.Module]:
    """``layer`` and all modules in it, except inside linear layers with adapters."""
    yield layer
    if not _is_linear(layer):
        for child in layer.children():
            yield from _modules(child)


def _is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer, quantized or not, with an adapter or without."""
    base = getattr(module, "base_layer", module)
    return isinstance(base, nn.Linear) or hasattr(base, "in_features")


def _fused_class(module: nn.Module) -> type[nn.Module] | None:
    kind = type(module)
    if "forward" in vars(module):
        return None  # a library has replaced it, and a class with another one would not be called
    try:
        if list(module._parameters) == ["weight"] and not module._modules and not _is_linear(module):
            eps = next((name for name in _EPS if isinstance(getattr(module, name, None), float)), None)
            return None if eps is None else _norm_class(kind, eps, getattr(module, eps))
        if all(_is_linear(getattr(module, name, None)) for name in _MLP):
            return _feed_forward_class(kind, module)
        return _attention_class(kind)
    except Exception:
        return None  # a class that cannot be tried like this has another form


# -- the new classes ------------------------------------------------------------------------------------------------------


def _subclass(kind: type[nn.Module], part: str, forward: Callable[..., Any]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"forward": forward, "part": part, "__module__": kind.__module__})


def _bare(kind: type[nn.Module], like: nn.Module | None = None, **attributes: Any) -> nn.Module:
    """A module of class ``kind`` without its initialisation: ``like``'s plain attributes, and the given ones."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    if like is not None:
        module.__dict__.update({name: value for name, value in vars(like).items() if not name.startswith("_")})
        module._modules.update(like._modules)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@cache
def _norm_class(kind: type[nn.Module], eps_name: str, eps: float) -> type[nn.Module] | None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(4, 64, generator=generator) * SCALES, torch.rand(64, generator=generator)
    expected = kind.forward(_bare(kind, weight=nn.Parameter(weight), **{eps_name: eps}), rows)
    for plus_one in (False, True):
        if _same(expected, rms_norm(rows, weight, eps, plus_one)):
            break
    else:
        return None

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not _computes_fused(hidden_states, self.weight.dtype):
            return kind.forward(self, hidden_states)
        return rms_norm(hidden_states, self.weight, getattr(self, eps_name), plus_one)

    return _subclass(kind, "norms", forward)


@torch.no_grad()
def _feed_forward_class(kind: type[nn.Module], module: nn.Module) -> type[nn.Module] | None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linears = {name: nn.Linear(8, 8) for name in _MLP}
        states = torch.randn(4, 8) * SCALES
        expected = kind.forward(_bare(kind, module, **linears), states)
        for name in ("silu", "gelu_tanh"):
            hidden = gated(linears["gate_proj"](states), linears["up_proj"](states), name)
            if _same(expected, linears["down_proj"](hidden)):
                return _gated_class(kind, name)
    return None


@cache
def _gated_class(kind: type[nn.Module], activation: Activation) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not _computes_fused(x):
            return kind.forward(self, x)
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), activation))

    return _subclass(kind, FEED_FORWARD, forward)


@cache
def _attention_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Attention whose ``forward`` calls another rotary function. Only its own globals are changed, not its module's."""
    plain = kind.forward
    if not isinstance(plain, types.FunctionType) or _ROTARY not in plain.__code__.co_names:
        return None
    original = plain.__globals__[_ROTARY]
    generator = torch.Generator().manual_seed(0)
    query, key, cos, sin = (
        torch.randn(*shape, generator=generator) for shape in ((1, 4, 5, 8), (1, 2, 5, 8), (1, 5, 8), (1, 5, 8))
    )
    for expected, found in zip(original(query, key, cos, sin), rotate(query, key, cos, sin), strict=True):
        if not _same(expected, found):
            return None

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
        plain = not others and not options and q.dtype == k.dtype and cos.dtype == sin.dtype == torch.float32
        if plain and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] and _computes_fused(q, q.dtype):
            return rotate(q, k, cos, sin)
        return original(q, k, cos, sin, *others, **options)

    names = plain.__globals__ | {_ROTARY: apply}
    forward = types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    forward.__kwdefaults__ = plain.__kwdefaults__
    return _subclass(kind, "rotary", forward)


_in_float32 = False
"""Whether float32 models compute fused, as the small copy does."""


@contextlib.contextmanager
def _also_in_float32() -> Iterator[None]:
    global _in_float32
    _in_float32 = True
    try:
        yield
    finally:
        _in_float32 = False


def _computes_fused(tensor: Tensor, precision: torch.dtype = torch.bfloat16) -> bool:
    """Whether a module with weights of ``precision`` computes fused: within ``LogpModel.hidden``, which turns autocast on
    for bfloat16 weights."""
    return _in_float32 or (precision == torch.bfloat16 and torch.is_autocast_enabled(tensor.device.type))


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=SAME, rtol=SAME)

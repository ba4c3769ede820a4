"""Rotary frequencies that depend on the sequence length, fixed for a whole run.

transformers chooses them in each forward pass by the longest position of the batch: short or long factors with rope type
``longrope``, a base that grows with the longest sequence so far with ``dynamic``. A log-prob would then depend on the other
rows of the batch, on earlier batches, and on the positions of a rank. Here one length, from ``data.max_length``, decides for
the run, as vLLM decides by its length limit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from raydpo.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ROTARY", "fix_rotary", "rope_length", "rope_line"]

ORIGINAL = "original_max_position_embeddings"
ROTARY = "model.path (rotary frequencies)"
"""Name of ``rope_length`` in a run's fingerprint."""


def rope_length(settings: Mapping[str, Any], longest: int) -> int | None:
    """Sequence length (tokens) that the rotary frequencies are computed for, or None if they do not depend on a length.

    Lengths with the same frequencies give the same result. For ``longrope`` that is the original length, up to which the
    short factors apply, or the original length plus one, from which the long factors apply.

    Args:
        settings: entries of config.json.
        longest: ``data.max_length``.
    """
    found = list(_dependent(settings))
    if not found:
        return None
    if any(original is None or (kind != "longrope" and original < longest) for kind, original in found):
        return longest
    originals = [original for _, original in found]
    return min((original for original in originals if original >= longest), default=max(originals) + 1)


def rope_line(length: int, longest: int) -> str:
    """One line for the log about ``rope_length``."""
    return (
        f"rotary frequencies: this model's depend on the sequence length; all sequences (data.max_length {longest:,}) "
        f"are computed with those for {length:,} positions"
    )


def _dependent(settings: Mapping[str, Any]) -> Iterator[tuple[str, int | None]]:
    """(rope type, original length or None) of each entry of config.json that depends on the length."""
    for key, value in settings.items():
        if not isinstance(value, dict):
            continue
        if key not in ("rope_scaling", "rope_parameters"):
            yield from _dependent(value)  # such as text_config
            continue
        for rope in (value, *(one for one in value.values() if isinstance(one, dict))):
            kind = str(rope.get("rope_type", rope.get("type")))
            if kind in ("longrope", "su"):
                yield "longrope", settings.get(ORIGINAL, rope.get(ORIGINAL))
            elif "dynamic" in kind and not rope.get("alpha"):  # with alpha the base is fixed
                yield kind, settings.get("max_position_embeddings")


def fix_rotary(causal_lm: nn.Module, length: int | None) -> None:
    """Fix the rotary frequencies of ``causal_lm`` for sequences of ``length`` tokens.

    Sets its attribute ``rope_limit``: the longest sequence for which they are right, or None for the model's own limit.

    Args:
        length: result of ``rope_length``.

    Raises:
        ModelError: if the frequencies depend on a length and none is given, or custom code of the model chooses them.
    """
    causal_lm.rope_length = length  # ``model.selfcheck`` reads it when it copies the model
    name, places = type(causal_lm).__name__, list(_places(causal_lm))
    if length is None:
        if places:
            raise ModelError(
                f"the rotary frequencies of {name} depend on the sequence length (rope_type {places[0][2]}), "
                "and no length is known: this command does not support such models, or config.json has neither "
                "rope_scaling nor rope_parameters"
            )
        return
    # Longer sequences would need other frequencies.
    causal_lm.rope_limit = (
        length
        if any(kind != "longrope" or length <= _settings(module, layer)[ORIGINAL] for module, layer, kind in places)
        else None
    )
    for module, layer, kind in places:
        _set(module, layer, kind, length)
    if not places or not all(_is_fixed(module, layer, length) for module, layer, _ in places):
        raise ModelError(
            f"config.json gives {name} rotary frequencies that depend on the longest sequence of a batch "
            "(rope_scaling longrope or dynamic), and its code chooses them in a way that raydpo cannot fix: "
            "log-probs would depend on the other rows. Set model.trust_remote_code=false if transformers "
            "knows the architecture, or remove rope_scaling from config.json"
        )


def _places(causal_lm: nn.Module) -> Iterator[tuple[Any, str | None, str]]:
    """(module, kind of layer or None, rope type) of all rotary embeddings that depend on a length."""
    for module in causal_lm.modules():
        kinds = getattr(module, "rope_type", None)
        for layer, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind):
                yield module, layer, kind


def _settings(module: Any, layer: str | None) -> dict[str, Any]:
    rope = module.config.rope_parameters
    return rope if layer is None else rope[layer]


def _set(module: Any, layer: str | None, kind: str, length: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    prefix = "" if layer is None else f"{layer}_"
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](module.config, seq_len=length, layer_type=layer)
    setattr(module, f"{prefix}inv_freq", frequencies.to(getattr(module, f"{prefix}inv_freq").device))
    # transformers does not update frequencies of type default.
    if layer is None:
        module.rope_type = "default"
    else:
        module.rope_type[layer] = "default"
    rope = _settings(module, layer)
    if "long_mscale" in rope:
        # PhiMoE computes the frequencies again in each forward pass, and transformers always gives it the short factors.
        # Its authors and vLLM use the long factors for long sequences.
        scaling = rope["long_mscale" if length > rope[ORIGINAL] else "short_mscale"]
        module.config = copy.copy(module.config)
        module.config.rope_parameters = rope | {"rope_type": "default"}
        module.rope_init_fn = lambda *_: (module.inv_freq, scaling)
    setattr(module, f"{prefix}attention_scaling", scaling)


def _is_fixed(module: Any, layer: str | None, length: int) -> bool:
    """Whether the embeddings of a few positions stay the same beside a far position, and after it."""
    import torch

    near = torch.arange(4, device=next(module.buffers()).device)[None]
    far = torch.cat([near, near[:, -1:] + 16 * length], dim=1)

    def ask(positions: Tensor) -> list[Tensor]:
        found = module(torch.zeros(1, 1, 1, device=positions.device), positions, *([] if layer is None else [layer]))
        return [each[:, :4] for each in (found if isinstance(found, tuple) else (found,))]

    before, beside, after = ask(near), ask(far), ask(near)
    return all(torch.equal(one, other) for others in (beside, after) for one, other in zip(before, others, strict=True))

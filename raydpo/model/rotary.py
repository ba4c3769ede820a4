"""Rotary frequencies that depend on the length of a sequence, set once for a whole run.

transformers chooses them in every forward pass, by the longest position of the whole batch: with rope type ``longrope``
short or long factors, with ``dynamic`` a base that grows with the longest sequence so far. So a log-prob would depend on
its neighbours in the batch, on earlier batches, and on which positions a rank computes. Here one length decides for the run,
as vLLM decides by its length limit: whatever fits ``data.max_length`` is computed with the same frequencies everywhere.
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
"""What a run's fingerprint calls ``rope_length``."""


def rope_length(settings: Mapping[str, Any], longest: int) -> int | None:
    """The sequence length that rotary frequencies are made for, or None where they do not depend on a length.

    Lengths with the same frequencies give the same number: the original length up to it, and one more above it where the
    long factors are the same for all.

    Args:
        settings: what config.json says.
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
    """``rope_length`` for people."""
    return (f"rotary frequencies: this model's depend on the length; all sequences, data.max_length {longest:,}, are "
            f"computed with those for {length:,} positions")


def _dependent(settings: Mapping[str, Any]) -> Iterator[tuple[str, int | None]]:
    """(rope type, original length if config.json says it) of everything in it that depends on the length."""
    for key, value in settings.items():
        if not isinstance(value, dict):
            continue
        if key not in ("rope_scaling", "rope_parameters"):
            yield from _dependent(value)  # text_config and its like
            continue
        for rope in (value, *(one for one in value.values() if isinstance(one, dict))):
            kind = str(rope.get("rope_type", rope.get("type")))
            if kind in ("longrope", "su"):
                yield "longrope", settings.get(ORIGINAL, rope.get(ORIGINAL))
            elif "dynamic" in kind and not rope.get("alpha"):  # with alpha the base is a fixed one
                yield kind, settings.get("max_position_embeddings")


def fix_rotary(causal_lm: nn.Module, length: int | None) -> None:
    """Set the frequencies of ``causal_lm`` for sequences of ``length`` tokens and let nothing change them.

    Afterwards its attribute ``rope_limit`` is the longest sequence that they serve, None if it is that of the model.

    Args:
        length: of ``rope_length``.

    Raises:
        ModelError: if frequencies depend on a length and none is given; or if the model has code of its own for them.
    """
    causal_lm.rope_length = length  # for copies of it
    name, places = type(causal_lm).__name__, list(_places(causal_lm))
    if length is None:
        if places:
            raise ModelError(f"the rotary frequencies of {name} depend on the length of a sequence (rope_type "
                             f"{places[0][2]}) and are set once for a whole run; here neither rope_scaling nor "
                             "rope_parameters of config.json, or not this command, says for which length")
        return
    # Beyond it others would be right.
    causal_lm.rope_limit = length if any(kind != "longrope" or length <= _settings(module, layer)[ORIGINAL]
                                         for module, layer, kind in places) else None
    for module, layer, kind in places:
        _set(module, layer, kind, length)
    if not places or not all(_is_fixed(module, layer, length) for module, layer, _ in places):
        raise ModelError(f"config.json gives {name} rotary frequencies that depend on the longest sequence of a batch "
                         "(rope_scaling longrope or dynamic), and its code chooses them in a way that raydpo cannot fix: "
                         "log-probs would depend on their neighbours. Set model.trust_remote_code=false if transformers "
                         "knows the architecture, or take rope_scaling out of its config.json")


def _places(causal_lm: nn.Module) -> Iterator[tuple[Any, str | None, str]]:
    """(module, kind of layer or None, rope type) of all frequencies that depend on a length."""
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
    # A type that transformers does not update.
    if layer is None:
        module.rope_type = "default"
    else:
        module.rope_type[layer] = "default"
    rope = _settings(module, layer)
    if "long_mscale" in rope:
        # PhiMoE asks again for the length, and for the frequencies, of which transformers gives it the short ones always;
        # its authors and vLLM give long sequences the long ones.
        scaling = rope["long_mscale" if length > rope[ORIGINAL] else "short_mscale"]
        module.config = copy.copy(module.config)
        module.config.rope_parameters = rope | {"rope_type": "default"}
        module.rope_init_fn = lambda *_: (module.inv_freq, scaling)
    setattr(module, f"{prefix}attention_scaling", scaling)


def _is_fixed(module: Any, layer: str | None, length: int) -> bool:
    """Whether what it gives for some positions stays the same beside a far one, and after it."""
    import torch

    near = torch.arange(4, device=next(module.buffers()).device)[None]
    far = torch.cat([near, near[:, -1:] + 16 * length], dim=1)

    def ask(positions: Tensor) -> list[Tensor]:
        found = module(torch.zeros(1, 1, 1, device=positions.device), positions, *([] if layer is None else [layer]))
        return [each[:, :4] for each in (found if isinstance(found, tuple) else (found,))]

    before, beside, after = ask(near), ask(far), ask(near)
    return all(torch.equal(one, other) for others in (beside, after) for one, other in zip(before, others, strict=True))

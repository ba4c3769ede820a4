"""One code path for scoring, training and evaluation: groups of completions in, per-token log-probs out.

Shapes: N = predicted tokens of all completions of a micro-batch, H = hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raydpo.model import attention
from raydpo.model.head import attach_logp_head
from raydpo.model.layout import PADDED, Layout, Method, PromptGroup, lay_out
from raydpo.model.ulysses import SequenceGroup

__all__ = ["LogpModel"]


class LogpModel(nn.Module):
    """A causal language model that answers with the log-probs of completion tokens.

    Args:
        policy: a transformers causal LM, or a PEFT model around one.

    Attributes:
        method: the layout in use; padded rows until ``use`` says otherwise (see ``model.selfcheck``).
        float32_stream: whether bfloat16 layers work on a float32 residual stream.
        group: ranks that share the positions of every micro-batch, or None. All of them call ``forward`` at the same time.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        # Kept out of the module tree (in a tuple): these are parts of ``policy`` and must not be registered twice.
        causal_lm = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        backbone = getattr(causal_lm, causal_lm.base_model_prefix, None)
        self._parts = (causal_lm, causal_lm.get_decoder() if backbone is None else backbone, attach_logp_head(causal_lm))
        self._own_attention = causal_lm.config._attn_implementation
        self.method = PADDED
        self.float32_stream = True
        self.group: SequenceGroup | None = None
        self.train(policy.training)

    def train(self, mode: bool = True) -> LogpModel:
        """Put into training mode only what needs it, gradient checkpointing. All else computes as in evaluation, as the
        reference was scored; routers, for one, draw noise in training mode."""
        super().train(mode)
        for module in self.modules():
            # On a CPU bitsandbytes packs weights that compute in evaluation mode, for good, and has no gradient then.
            module.training = type(module).__name__ == "Linear4bit" or (
                mode and (module is self or hasattr(module, "gradient_checkpointing")))
        return self

    @property
    def causal_lm(self) -> nn.Module:
        return self._parts[0]

    @property
    def vocabulary(self) -> int:
        return self.causal_lm.config.get_text_config().vocab_size

    def use(self, method: Method) -> None:
        """Compute micro-batches this way from now on."""
        self.method = method
        if method.body is not None:
            attention.register()
        self._set_attention(self._own_attention if method.body is None else attention.ATTENTION)

    @contextlib.contextmanager
    def own_attention(self) -> Iterator[None]:
        """The model as transformers made it, for generation; not for a forward whose backward comes later."""
        self._set_attention(self._own_attention)
        try:
            yield
        finally:
            self.use(self.method)

    def lay_out(self, groups: Sequence[PromptGroup]) -> Layout:
        layout = lay_out(groups, self.method)
        return layout if self.group is None else layout.part(self.group)

    def forward(self, layout: Layout, log_sum_sq: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Natural-log probabilities of the layout's targets, float32 [N]; with ``log_sum_sq`` also the log of the sum of the
        squared probabilities of each whole distribution, [N], without gradient.

        With bfloat16 weights the products of the layers are bfloat16, but the residual stream, the norms and the rotary
        embedding are float32 (autocast does that to a stream that starts as float32), and so are the logits. It halves
        the distance to the log-probs of a float32 model at a few percent of the time.
        """
        head, hidden = self._parts[2], self.hidden(layout)  # [N, H]
        found = head(hidden, layout.targets, log_sum_sq=True) if log_sum_sq else (head(hidden, layout.targets),)
        if layout.places is not None:
            found = tuple(layout.segments.group.join(each, layout.places, sum(layout.lengths)) for each in found)
        return found if log_sum_sq else found[0]

    def hidden(self, layout: Layout) -> Tensor:
        """Hidden states of the positions that predict the layout's targets, [N, H]."""
        causal_lm, backbone, head = self._parts
        arguments: dict[str, Any] = {"use_cache": False}
        if layout.segments is not None:
            arguments |= {"position_ids": layout.position_ids, "segments": layout.segments}
        if self.float32_stream and head.weight_dtype == torch.bfloat16:
            stream = causal_lm.get_input_embeddings()(layout.input_ids).float()
            with torch.autocast(stream.device.type, dtype=torch.bfloat16, cache_enabled=False):
                hidden = backbone(inputs_embeds=stream, **arguments).last_hidden_state
        else:
            hidden = backbone(input_ids=layout.input_ids, **arguments).last_hidden_state
        return hidden.flatten(0, 1)[layout.positions]

    @torch.no_grad()
    def log_distribution(self, hidden: Tensor) -> Tensor:
        """Log-probs of the whole vocabulary, float32 [C, V], at hidden states [C, H]: few enough that they fit."""
        return self._parts[2].logits(hidden).log_softmax(-1)

    @torch.no_grad()
    def score(self, groups: Sequence[PromptGroup], device: torch.device) -> list[tuple[np.ndarray, ...]]:
        """Per-token float32 log-probs of every completion, by group: one forward pass, no gradient."""
        return self.score_layout(self.lay_out(groups).to(device), groups)

    @torch.no_grad()
    def score_layout(self, layout: Layout, groups: Sequence[PromptGroup]) -> list[tuple[np.ndarray, ...]]:
        """The same for groups that are laid out and on the device already."""
        pieces = iter(np.split(self(layout).cpu().numpy(), np.cumsum(layout.lengths)[:-1]))
        return [tuple(next(pieces) for _ in group.completions) for group in groups]

    def _set_attention(self, name: str) -> None:
        for module in self._parts[0], self._parts[1]:
            module.config._attn_implementation = name

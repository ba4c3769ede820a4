"""The model that scoring, training and evaluation share: groups of completions in, log-probs of their tokens out.

Shapes: N = predicted tokens of all completions of a micro-batch, H = hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raydpo.model import attention
from raydpo.model.head import attach_logp_head
from raydpo.model.layout import PADDED, Layout, Method, PromptGroup, lay_out
from raydpo.model.package import backbone_of, per_layer_inputs
from raydpo.model.quantized import compute_under_autocast
from raydpo.model.recurrent import Mixers
from raydpo.model.router import balance_loss, chosen_experts
from raydpo.model.ulysses import SequenceGroup

__all__ = ["LogpModel"]


class LogpModel(nn.Module):
    """A causal language model that returns the log-probs of completion tokens.

    Args:
        policy: a transformers causal LM, or a PEFT model around one.

    Attributes:
        method: the layout in use; padded rows until ``use`` is called (see ``model.selfcheck``).
        float32_stream: whether bfloat16 layers work on a float32 residual stream.
        group: ranks that share the positions of each micro-batch, or None. All of them call ``forward`` together.
        mixers: layers that carry a state from token to token, see ``model.recurrent``.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        # In a tuple, so that torch does not register these parts of ``policy`` a second time.
        causal_lm = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        self._parts = (causal_lm, backbone_of(causal_lm), attach_logp_head(causal_lm))
        compute_under_autocast(policy)
        self._own_attention = causal_lm.config._attn_implementation
        self.method = PADDED
        self.float32_stream = True
        self.group: SequenceGroup | None = None
        self.mixers = Mixers()
        self.train(policy.training)

    def train(self, mode: bool = True) -> LogpModel:
        """Set training mode only on modules with gradient checkpointing, which needs it.

        All other modules compute as in evaluation mode, as the reference was scored. Routers, for example, add noise in
        training mode.
        """
        super().train(mode)
        for module in self.modules():
            # On a CPU, bitsandbytes in evaluation mode packs 4-bit weights permanently and then has no gradient.
            module.training = type(module).__name__ == "Linear4bit" or (
                mode and (module is self or hasattr(module, "gradient_checkpointing"))
            )
        return self

    @property
    def causal_lm(self) -> nn.Module:
        return self._parts[0]

    @property
    def backbone(self) -> nn.Module:
        """The model without its head; of a package (``model.package``), its text model."""
        return self._parts[1]

    @property
    def head(self) -> nn.Module:
        """The vocabulary projection, see ``model.head``."""
        return self._parts[2]

    @property
    def has_float32_stream(self) -> bool:
        """Whether bfloat16 layers work on a float32 residual stream here: the model is bfloat16, and it can."""
        return self.float32_stream and self.head.weight_dtype == torch.bfloat16

    @property
    def vocabulary(self) -> int:
        return self.causal_lm.config.get_text_config().vocab_size

    def use(self, method: Method) -> None:
        """Use ``method`` for all following micro-batches."""
        self.method = method
        if method.body is not None:
            attention.register()
        self._set_attention(self._own_attention if method.body is None else attention.ATTENTION)

    def wrap_mixers(self, kinds: Collection[str]) -> None:
        """Let the modules whose class is named in ``kinds``, and no others, compute packs in rows."""
        self.mixers.wrap(self.causal_lm, kinds)

    def recompute_layers(self) -> None:
        """Compute each layer a second time in the backward pass instead of keeping its activations."""
        how = {"use_reentrant": False, "context_fn": self.mixers.recomputing}
        self.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)

    @contextlib.contextmanager
    def own_attention(self) -> Iterator[None]:
        """Restore transformers' attention for generation. Do not run a forward pass here that needs a backward pass."""
        self._set_attention(self._own_attention)
        try:
            yield
        finally:
            self.use(self.method)

    def lay_out(self, groups: Sequence[PromptGroup]) -> Layout:
        """CPU tensors of a micro-batch in the layout in use; in a group of ranks, this rank's part."""
        layout = lay_out(groups, self.method)
        return layout if self.group is None else layout.part(self.group)

    def forward(self, layout: Layout, log_sum_sq: bool = False, router_loss: bool = False) -> Tensor | tuple[Tensor, ...]:
        """Log-probs (natural logarithm) of the layout's targets, float32 [N].

        With bfloat16 weights the products of the layers are bfloat16. The residual stream, norms, rotary embeddings and
        logits are float32: autocast keeps a stream float32 that starts as float32. This halves the distance to the log-probs
        of a float32 model and takes a few percent more time.

        Args:
            log_sum_sq: also return log sum_v p_v^2 over the vocabulary, [N], without gradient.
            router_loss: also return the load-balancing loss of a mixture of experts, [], with gradient; last.

        Raises:
            ModelError: if ``router_loss`` is asked of a model that returns no router logits.
        """
        routed: list[Tensor] | None = [] if router_loss else None
        head, hidden = self.head, self.hidden(layout, routed)  # [N, H]
        found = head(hidden, layout.targets, log_sum_sq=True) if log_sum_sq else (head(hidden, layout.targets),)
        if layout.places is not None:
            found = tuple(layout.segments.group.join(each, layout.places, sum(layout.lengths)) for each in found)
        if routed is not None:
            group = None if layout.segments is None else layout.segments.group
            found += (balance_loss(routed, chosen_experts(self.causal_lm, routed), layout.real, group),)
        return found if len(found) > 1 else found[0]

    def hidden(self, layout: Layout, routed: list[Tensor] | None = None) -> Tensor:
        """Hidden states of the positions that predict the layout's targets, [N, H].

        Args:
            routed: receives the router logits of each layer of a mixture of experts.
        """
        arguments: dict[str, Any] = {"use_cache": False}
        if routed is not None:
            arguments["output_router_logits"] = True
        if layout.segments is not None:
            arguments |= {"position_ids": layout.position_ids, "segments": layout.segments}
        with self.mixers.over(layout.segments):
            found = self._backbone_output(layout, arguments)
        if routed is not None:
            routed.extend(getattr(found, "router_logits", None) or ())
        return found.last_hidden_state.flatten(0, 1)[layout.positions]

    def _backbone_output(self, layout: Layout, arguments: dict[str, Any]) -> Any:
        causal_lm, backbone = self.causal_lm, self.backbone
        if self.has_float32_stream:
            stream = causal_lm.get_input_embeddings()(layout.input_ids).float()
            arguments |= per_layer_inputs(backbone, layout.input_ids)
            with torch.autocast(stream.device.type, dtype=torch.bfloat16, cache_enabled=False):
                return backbone(inputs_embeds=stream, **arguments)
        return backbone(input_ids=layout.input_ids, **arguments)

    @torch.no_grad()
    def log_distribution(self, hidden: Tensor) -> Tensor:
        """Log-probs of the whole vocabulary, float32 [C, V], at hidden states [C, H]. The caller keeps C small."""
        return self.head.logits(hidden).log_softmax(-1)

    @torch.no_grad()
    def score(self, groups: Sequence[PromptGroup], device: torch.device) -> list[tuple[np.ndarray, ...]]:
        """float32 log-probs of each token of each completion, by group, from one forward pass without gradient."""
        return self.score_layout(self.lay_out(groups).to(device), groups)

    @torch.no_grad()
    def score_layout(self, layout: Layout, groups: Sequence[PromptGroup]) -> list[tuple[np.ndarray, ...]]:
        """The same for groups whose layout is already on the device."""
        pieces = iter(np.split(self(layout).cpu().numpy(), np.cumsum(layout.lengths)[:-1]))
        return [tuple(next(pieces) for _ in group.completions) for group in groups]

    def _set_attention(self, name: str) -> None:
        for module in self._parts[0], self._parts[1]:
            module.config._attn_implementation = name

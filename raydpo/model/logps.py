"""One code path for scoring, training and evaluation: groups of completions in, per-token log-probs out.

Shapes: R = rows (completions), T = longest row, N = predicted tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from raydpo.errors import ModelError
from raydpo.model.head import attach_logp_head

__all__ = ["ROW_MULTIPLE", "Layout", "LogpModel", "PromptGroup", "lay_out"]

ROW_MULTIPLE = 16
"""Rows are padded to a multiple of this. CPU attention treats a last partial vector of keys with another exponential, so
that in bfloat16 a row differs by up to 0.3 nats a token with the width it is given. GPUs like the alignment too."""


@dataclass(frozen=True)
class PromptGroup:
    """One prompt and completions that answer it; a pair is the group (chosen, rejected).

    Attributes:
        prompt: token ids, at least one.
        completions: token ids of each completion, at least one each.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Layout:
    """A micro-batch as tensors.

    Attributes:
        input_ids: [R, T], right-padded, T a multiple of ROW_MULTIPLE.
        positions: [N], flat indices into R * T of the positions that predict completion tokens.
        targets: [N], the token each of them predicts.
        lengths: completion tokens of each row, in the order of groups and completions; they sum to N.
        widths: tokens of each row, rounded up to ROW_MULTIPLE: what the row needs when it is computed by itself.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    widths: tuple[int, ...]

    def to(self, device: torch.device) -> Layout:
        return Layout(self.input_ids.to(device, non_blocking=True), self.positions.to(device, non_blocking=True),
                      self.targets.to(device, non_blocking=True), self.lengths, self.widths)


def lay_out(groups: Sequence[PromptGroup]) -> Layout:
    """Right-padded rows, one for each completion.

    Padding needs no attention mask: in a causal model nothing looks to its right, and padded positions are never read.
    """
    rows = [np.concatenate([group.prompt, completion]) for group in groups for completion in group.completions]
    widths = tuple(-(-len(row) // ROW_MULTIPLE) * ROW_MULTIPLE for row in rows)
    longest = max(widths)
    input_ids = np.zeros((len(rows), longest), dtype=np.int64)
    positions, targets, lengths = [], [], []
    row = 0
    for group in groups:
        for completion in group.completions:
            input_ids[row, : len(rows[row])] = rows[row]
            first = row * longest + len(group.prompt) - 1  # the last prompt token predicts the first completion token
            positions.append(np.arange(first, first + len(completion)))
            targets.append(completion)
            lengths.append(len(completion))
            row += 1
    return Layout(torch.from_numpy(input_ids), torch.from_numpy(np.concatenate(positions)),
                  torch.from_numpy(np.concatenate(targets).astype(np.int64)), tuple(lengths), widths)


class LogpModel(nn.Module):
    """A causal language model that answers with the log-probs of completion tokens.

    Args:
        policy: a transformers causal LM, or a PEFT model around one.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        # Kept out of the module tree (in a tuple): these are parts of ``policy`` and must not be registered twice.
        causal_lm = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        self._parts = (causal_lm, getattr(causal_lm, causal_lm.base_model_prefix), attach_logp_head(causal_lm))

    @property
    def causal_lm(self) -> nn.Module:
        return self._parts[0]

    def forward(self, input_ids: Tensor, positions: Tensor, targets: Tensor, lengths: tuple[int, ...],
                widths: tuple[int, ...] | None = None) -> Tensor:
        """Natural-log probabilities of the targets, float32 [N], for the fields of a ``Layout``.

        Without ``widths`` all rows go through the model together, [R, T]. With them, one after the other, each at its own
        width: no position is wasted on padding, and a row's numbers cannot depend on its company. That is right for CPUs,
        whose attention chooses another code path, hence other bfloat16 rounding, with the size of the batch; there it was
        0.018 nats a token between batches of long rows.
        """
        _, backbone, head = self._parts
        if widths is None:
            hidden = backbone(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)[positions]
        else:
            longest = input_ids.shape[1]
            hidden = torch.cat([
                backbone(input_ids=input_ids[row : row + 1, :width],
                         use_cache=False).last_hidden_state[0, at - row * longest]
                for row, (width, at) in enumerate(zip(widths, positions.split(lengths), strict=True))])
        return head(hidden, targets)

    @torch.no_grad()
    def score(self, groups: Sequence[PromptGroup], device: torch.device) -> list[tuple[np.ndarray, ...]]:
        """Per-token float32 log-probs of every completion, by group: one forward pass, no gradient."""
        layout = lay_out(groups)
        on_device = layout.to(device)
        flat = self(on_device.input_ids, on_device.positions, on_device.targets, on_device.lengths,
                    on_device.widths if device.type == "cpu" else None).cpu().numpy()
        pieces = iter(np.split(flat, np.cumsum(layout.lengths)[:-1]))
        return [tuple(next(pieces) for _ in group.completions) for group in groups]

    @torch.no_grad()
    def check(self, device: torch.device) -> None:
        """Compare with the model's own logits on a few tokens.

        Raises:
            ModelError: if they differ: the architecture does something to its logits that raydpo does not know.
        """
        causal_lm = self.causal_lm
        vocabulary = causal_lm.config.get_text_config().vocab_size
        # As many as a padded row has, so that both sides compute the very same shapes.
        ids = np.random.default_rng(0).integers(0, vocabulary, ROW_MULTIPLE).astype(np.int32)
        group = PromptGroup(ids[:4], (ids[4:],))
        ours = torch.from_numpy(self.score([group], device)[0][0])
        logits = causal_lm(input_ids=torch.from_numpy(ids[None].astype(np.int64)).to(device), use_cache=False).logits
        theirs = logits[0, 3:-1].float().log_softmax(-1).cpu().gather(1, torch.from_numpy(ids[4:, None].astype(np.int64)))
        gap = (ours - theirs[:, 0]).abs().max().item()
        tolerance = 1e-3 if next(self.parameters()).dtype == torch.float32 else 0.05
        if not gap <= tolerance:
            raise ModelError(f"{type(causal_lm).__name__} cannot be scored exactly: log-probs from its hidden states and "
                             f"head differ from its own logits by {gap:.3g} nats (tolerance {tolerance:g}). Please "
                             "report the architecture.")

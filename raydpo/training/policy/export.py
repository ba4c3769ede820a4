"""The trained policy as a directory that transformers or PEFT loads without raydpo.

What was written is loaded again and compared with the policy on a few rows before a run reports that it is done.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raydpo.errors import ModelError, TrainError, some_of
from raydpo.model.budget import free_memory, probe_group
from raydpo.model.files import ADAPTER, model_files, read_header
from raydpo.model.layout import PromptGroup
from raydpo.model.load import dropout_settings, load_causal_lm, restore_dropout
from raydpo.model.selfcheck import logps_by_definition
from raydpo.model.weights import ADAPTER_NAME
from raydpo.training.gate import TOLERANCES
from raydpo.training.policy.engine import Engine, PolicySpec

__all__ = ["export_policy"]

_COMPANIONS = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.json", "tokenizer.model",
)  # fmt: skip
"""Files of a model that other programs read and that neither the model nor the tokenizer saves."""
_ROWS, _PROMPT, _COMPLETION = 2, 32, 16
"""Groups of the data that are compared, and how many tokens of their prompts and completions."""
_SPARE = 1.2
"""Memory needed to load a model again, in sizes of its weights."""


def export_policy(
    engine: Engine,
    spec: PolicySpec,
    base_name: str,
    tokenizer: Any,
    directory: Path,
    merge: bool = False,
    rows: Sequence[PromptGroup] = (),
    note: Callable[[str], None] = lambda line: None,
) -> None:
    """Write model or adapter and tokenizer to ``directory`` on rank 0. All ranks must call it, with the same ``rows``.

    Args:
        base_name: name of the base model in an adapter's configuration.
        merge: also write the adapter merged into its model, to ``merged`` below ``directory``.
        rows: groups of the data on which the policy and what was written are compared; made-up tokens without them.
        note: called on rank 0 with what was compared, and with warnings.

    Raises:
        TrainError: if what was written cannot be loaded, or gives other log-probs than the policy.
    """
    groups = [
        PromptGroup(group.prompt[-_PROMPT:], tuple(one[:_COMPLETION] for one in group.completions))
        for group in list(rows)[:_ROWS] or [probe_group(_PROMPT + 2 * _COMPLETION, engine.module.vocabulary)]
    ]
    with engine.evaluating():
        policy = [logps for group in engine.module.score(groups, engine.device) for logps in group]
    weights = engine.gather()
    if engine.rank != 0:
        return
    check = _Check(spec, groups, note)
    (_write_adapter if spec.adapts else _write_model)(engine.module.policy, spec, base_name, weights, directory)
    tokenizer.save_pretrained(str(directory))
    _add_companions(spec, directory)
    del weights
    engine.load_whole_models()
    if not spec.adapts:
        check.load(directory, policy, check_names=True)
        return
    if spec.quantization is not None:
        check.load(directory, policy, device=engine.device, quantization=spec.quantization)
    if not merge:
        if spec.quantization is None:
            check.load(directory, policy)
        return
    # Merge into the stored weights, not into those that were quantized for training.
    how = {"rope_length": spec.rope_length, "trust_remote_code": spec.trust_remote_code}
    adapted = load_causal_lm(spec.path, spec.dtype, adapter=str(directory), **how)
    plain = check.score(adapted)
    if spec.quantization is None:
        check.compare(directory, plain, policy)
    _untie(adapted.get_base_model())
    merged = adapted.merge_and_unload()
    _say_untied(merged)
    target = directory / "merged"
    merged.save_pretrained(str(target), safe_serialization=True)
    del adapted, merged
    _restore_dropout(spec, target)
    tokenizer.save_pretrained(str(target))
    _add_companions(spec, target)
    check.load(target, plain, check_names=True)


def _write_adapter(policy: Any, spec: PolicySpec, base_name: str, weights: dict[str, torch.Tensor], directory: Path) -> None:
    policy.peft_config[ADAPTER_NAME].base_model_name_or_path = base_name
    # Some adapters, such as VeRA, store projections that do not train.
    buffers = dict(policy.named_buffers(remove_duplicate=False))
    weights |= {name: value.cpu() for name, value in policy.state_dict().items() if name in buffers}
    policy.save_pretrained(str(directory), state_dict=weights, safe_serialization=True)


def _write_model(policy: Any, spec: PolicySpec, base_name: str, weights: dict[str, torch.Tensor], directory: Path) -> None:
    buffers = {name: value.cpu() for name, value in policy.state_dict().items() if name not in weights}
    tied = set(getattr(policy, "_tied_weights_keys", None) or ())
    weights |= {name: value for name, value in buffers.items() if name not in tied}
    _say_untied(policy)
    policy.save_pretrained(str(directory), state_dict=weights, safe_serialization=True)
    _restore_dropout(spec, directory)


class _Check:
    """Comparison of exported directories with the policy, on a few rows, on the CPU."""

    def __init__(self, spec: PolicySpec, groups: Sequence[PromptGroup], note: Callable[[str], None]) -> None:
        self.spec, self.groups, self.note = spec, groups, note

    def load(
        self,
        directory: Path,
        expected: Sequence[np.ndarray],
        *,
        device: torch.device | str = "cpu",
        quantization: str | None = None,
        check_names: bool = False,
    ) -> None:
        """Load ``directory`` again and compare its log-probs with ``expected``.

        Args:
            device: where the model is computed.
            check_names: also compare the names of its tensors with those of the model that training began with.

        Raises:
            TrainError: if it cannot be loaded, or its log-probs differ.
        """
        spec, adapter = self.spec, (directory / ADAPTER).is_file()
        if check_names:
            self._check_names(directory)
        base = Path(spec.path) if adapter else directory
        needed = _SPARE * sum(file.stat().st_size for file in model_files(base, spec.trust_remote_code).weights)
        free = free_memory(torch.device(device))
        if free < needed:
            self.note(
                f"warning: {self._name(directory)} was not loaded again and compared with the policy: that takes "
                f"{needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free; only the names and shapes of its "
                "tensors were checked"
            )
            return
        try:
            loaded = load_causal_lm(
                base,
                spec.dtype,
                adapter=str(directory) if adapter else None,
                quantization=quantization,
                rope_length=spec.rope_length,
                trust_remote_code=spec.trust_remote_code,
                device=device,
            )
        except ModelError as error:
            raise TrainError(f"what was exported to {self._name(directory)} cannot be loaded again: {error}") from None
        self.compare(directory, self.score(loaded, device), expected)

    @torch.no_grad()
    def score(self, causal_lm: nn.Module, device: torch.device | str = "cpu") -> list[np.ndarray]:
        """Log-probs [tokens] of each completion, from the model's own logits."""
        alone = [PromptGroup(group.prompt, (one,)) for group in self.groups for one in group.completions]
        return [logps_by_definition(causal_lm, group, torch.device(device)) for group in alone]

    def compare(self, directory: Path, found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
        """Refuse log-probs that differ by more than rounding: the tolerances of the step-0 gate."""
        gaps = np.abs(np.concatenate(found) - np.concatenate(expected))
        (mean, worst), (most, token) = (float(gaps.mean()), float(gaps.max())), TOLERANCES[self.spec.dtype]
        told = f"{mean:.2g} nats a token on average, {worst:.2g} at most (tolerance {most:g} and {token:g})"
        if not (mean <= most and worst <= token):
            raise TrainError(
                f"the exported {self._name(directory)}, loaded again, differs from the trained policy by {told} over "
                f"{len(gaps)} tokens, so it is not kept; the checkpoints are. Please report it with the model's config.json"
            )
        self.note(f"{self._name(directory)} loaded again: its log-probs differ from the trained policy's by {told}")

    def _check_names(self, directory: Path) -> None:
        ours, theirs = (_tensor_names(path, self.spec.trust_remote_code) for path in (directory, Path(self.spec.path)))
        other = sorted(ours - theirs - {"lm_head.weight"})  # a head may be untied
        if other:
            self.note(
                f"warning: {self._name(directory)} has {len(other):,} tensors under names that the files of "
                f"{self.spec.path} do not have ({some_of(other)}): transformers loads them, other programs may not"
            )

    @staticmethod
    def _name(directory: Path) -> str:
        return "final/merged" if directory.name == "merged" else "final"


def _tensor_names(path: Path, trust_remote_code: bool) -> set[str]:
    return {name for file in model_files(path, trust_remote_code).weights for name in read_header(file)[1]}


def _add_companions(spec: PolicySpec, directory: Path) -> None:
    """Copy files of the model that neither the model nor the tokenizer saves, such as those of its image processor."""
    source = Path(spec.path)
    wanted: Iterable[str] = _COMPANIONS
    if (directory / "config.json").is_file():
        written, original = (model_files(path, spec.trust_remote_code) for path in (directory, source))
        wanted = (*wanted, *(file.relative_to(source).as_posix() for file in original.code))
        if "vision_config" in original.config and "vision_config" not in written.config:  # only the text part was loaded
            wanted = ("generation_config.json", "tokenizer.model")
    for name in wanted:
        # The tokenizer has written the chat template that was trained with.
        outdated = name == "chat_template.json" and (directory / "chat_template.jinja").is_file()
        if (source / name).is_file() and not (directory / name).exists() and not outdated:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, directory / name)


def _untie(causal_lm: nn.Module) -> None:
    """Copy the head's weight if it is tied to the embedding and one of them has an adapter: merging adds to the weight in
    place, and would change both. PEFT then writes tie_word_embeddings=false."""
    ends = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    embedding, head = (getattr(end, "base_layer", end) for end in ends)
    if (embedding, head) != ends and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())


def _say_untied(causal_lm: nn.Module) -> None:
    """Let config.json say that embedding and head are not tied, if they differ."""
    ends = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    embedding, head = (getattr(end, "weight", None) for end in ends)
    if embedding is None or head is None or head is embedding or torch.equal(head, embedding):
        return
    for config in (causal_lm.config, causal_lm.config.get_text_config()):
        config.tie_word_embeddings = False


def _restore_dropout(spec: PolicySpec, directory: Path) -> None:
    from transformers import AutoConfig

    original = AutoConfig.from_pretrained(spec.path, trust_remote_code=spec.trust_remote_code)
    restore_dropout(directory / "config.json", dropout_settings(original.to_dict()))

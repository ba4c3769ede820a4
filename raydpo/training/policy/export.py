"""The trained policy as a directory that transformers or PEFT loads without raydpo.

What was written is loaded again and compared with the policy on a few rows before a run reports that it is done.
"""

from __future__ import annotations

import math
import re
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
from raydpo.model.load import dropout_settings, load_causal_lm, restore_dropout, torch_dtype
from raydpo.model.package import auto_class, other_modules
from raydpo.model.selfcheck import logps_by_definition, without_placeholders
from raydpo.model.weights import ADAPTER_NAME, compare_headers
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

_POLICYS = "the trained policy's"
"""Whose log-probs are compared, in messages."""
_AT_AN_END = re.compile(r"\.(?:lm_head|embed_out|embed_tokens|embed_in|wte|word_embeddings)\.(?!.*trainable_tokens)")
"""Names of an adapter's tensors that change embedding or head. PEFT itself keeps trainable tokens tied."""
_UNTIE_FIRST = (
    ". Embedding and head of this model share one weight, and the adapter changes one of them: copy the head's weight before"
)


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
    groups = without_placeholders(engine.module.causal_lm, groups)
    with engine.evaluating():
        policy = [logps for group in engine.module.score(groups, engine.device) for logps in group if len(logps)]
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
    if not check.has_memory(Path(spec.path), "cpu", None):
        if spec.quantization is None:
            check.load(directory, policy)
        tied = engine.module.policy.config.get_text_config().tie_word_embeddings
        changes_an_end = any(_AT_AN_END.search(name) for name in read_header(directory / ADAPTER)[1])
        note(
            f"warning: final/merged was not written: merging takes {check.told_memory}; to do it later, load final with "
            f"{_loader(engine.module.causal_lm)} on a machine with that memory, then merge_and_unload() and "
            "save_pretrained()" + (_UNTIE_FIRST if tied and changes_an_end else "")
        )
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
    if spec.quantization is None:
        check.load(target, policy, check_names=True)
    else:
        whole = f"those of the adapter on {spec.path} as it is stored"
        check.load(target, plain, check_names=True, of=whole, quantized=policy)


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
        of: str = _POLICYS,
        quantized: Sequence[np.ndarray] | None = None,
    ) -> None:
        """Load ``directory`` again and compare its log-probs with ``expected``.

        Args:
            device: where the model is computed.
            check_names: also compare names and shapes of its tensors with those of the model that training began with.
            of: whose log-probs ``expected`` are.
            quantized: log-probs of the policy on its quantized base, whose distance is measured and not refused.

        Raises:
            TrainError: if it cannot be loaded, or its log-probs differ.
        """
        spec, adapter = self.spec, (directory / ADAPTER).is_file()
        if check_names:
            self._compare_tensors(directory)
        base = Path(spec.path) if adapter else directory
        if not self.has_memory(base, device, quantization):
            self.note(
                f"warning: {self._name(directory)} was not loaded again to compare its log-probs with {of}: that "
                f"takes {self.told_memory}; {self._check_headers(directory, base)}"
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
        found = self.score(loaded, device)
        self.compare(directory, found, expected, of)
        if quantized is not None:
            self.note(
                f"{self._name(directory)}: its log-probs differ by {_gap(found, quantized)[0]} from the trained policy's, "
                f"whose base was quantized to {spec.quantization}; that is the error of quantization, and is not refused"
            )

    def has_memory(self, base: Path, device: torch.device | str, quantization: str | None) -> bool:
        """Whether the model in ``base`` fits in the free memory of ``device``; ``told_memory`` says what it takes."""
        files = model_files(base, self.spec.trust_remote_code).weights
        needed = _SPARE * sum(file.stat().st_size for file in files)
        if quantization is None:
            needed = _SPARE * sum(self._loaded_bytes(tensor) for file in files for tensor in read_header(file)[1].values())
        free = free_memory(torch.device(device))
        self.told_memory = f"{needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        return free >= needed

    def _loaded_bytes(self, tensor: dict[str, Any]) -> int:
        """Bytes of a stored tensor when it is loaded: numbers with a fraction become ``dtype``, others stay."""
        if tensor["dtype"] in ("F64", "F32", "F16", "BF16"):
            return math.prod(tensor["shape"]) * torch_dtype(self.spec.dtype).itemsize
        begin, end = tensor["data_offsets"]
        return end - begin

    def _check_headers(self, directory: Path, base: Path) -> str:
        """Compare the headers of the files with the architecture; returns what was checked.

        Raises:
            TrainError: if weights are missing, unknown, or of another shape.
        """
        adapter = str(directory) if directory != base else None
        try:
            warnings = compare_headers(base, adapter=adapter, trust_remote_code=self.spec.trust_remote_code)
        except ModelError as error:
            raise TrainError(f"what was exported to {self._name(directory)} cannot be loaded again: {error}") from None
        if warnings is None:
            return "its files were not checked, since this model cannot be made without its weights"
        for line in warnings if adapter is None else ():
            self.note(f"warning: {line}")
        model = "its config.json describes" if adapter is None else "PEFT makes of its adapter_config.json"
        return (
            "only the names and shapes in the headers of its files were compared with those of the model that "
            f"{model}: none is missing, none unknown, none of another shape"
        )

    @torch.no_grad()
    def score(self, causal_lm: nn.Module, device: torch.device | str = "cpu") -> list[np.ndarray]:
        """Log-probs [tokens] of each completion, from the model's own logits."""
        alone = [PromptGroup(group.prompt, (one,)) for group in self.groups for one in group.completions if len(one)]
        return [logps_by_definition(causal_lm, group, torch.device(device)) for group in alone]

    def compare(
        self, directory: Path, found: Sequence[np.ndarray], expected: Sequence[np.ndarray], of: str = _POLICYS
    ) -> None:
        """Refuse log-probs that differ by more than rounding: the tolerances of the step-0 gate."""
        (told, mean, worst), (most, token) = _gap(found, expected), TOLERANCES[self.spec.dtype]
        told += f" (tolerance {most:g} and {token:g})"
        if not (mean <= most and worst <= token):
            raise TrainError(
                f"the log-probs of the exported {self._name(directory)}, loaded again, differ from {of} by {told} over "
                f"{sum(map(len, found))} tokens, so it is not kept; the checkpoints are. Please report it with the model's "
                "config.json"
            )
        self.note(f"{self._name(directory)} loaded again: its log-probs differ from {of} by {told}")

    def _compare_tensors(self, directory: Path) -> None:
        """Warn of tensors that other programs, which know the original files, would miss or not know."""
        ours, theirs = (_shapes(path, self.spec.trust_remote_code) for path in (directory, Path(self.spec.path)))
        head = {"lm_head.weight"}  # may be tied in one of them
        new, gone = sorted(ours.keys() - theirs.keys() - head), sorted(theirs.keys() - ours.keys() - head)
        other = [name for name in sorted(ours.keys() & theirs.keys()) if ours[name] != theirs[name]]
        found = [f"has {len(new):,} more ({some_of(new)})"] if new else []
        found += [f"lacks {len(gone):,} ({some_of(gone)})"] if gone else []
        found += [f"has {len(other):,} of another shape ({some_of(other)})"] if other else []
        if found:
            self.note(
                f"warning: {self._name(directory)} has other tensors than the files of {self.spec.path}: it "
                f"{' and '.join(found)}. transformers takes them, other programs may not"
            )

    @staticmethod
    def _name(directory: Path) -> str:
        return "final/merged" if directory.name == "merged" else "final"


def _gap(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> tuple[str, float, float]:
    """Absolute differences of log-probs, in words; their mean, and the largest."""
    gaps = np.abs(np.concatenate(found) - np.concatenate(expected))
    mean, worst = float(gaps.mean()), float(gaps.max())
    return f"{mean:.2g} nats a token on average, {worst:.2g} at most", mean, worst


def _shapes(path: Path, trust_remote_code: bool) -> dict[str, list[int]]:
    """Shapes of the tensors of a directory, by name."""
    files = model_files(path, trust_remote_code).weights
    return {name: tensor["shape"] for file in files for name, tensor in read_header(file)[1].items()}


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


def _loader(causal_lm: nn.Module) -> str:
    """What loads an exported adapter with its model, in a message."""
    if not other_modules(causal_lm):
        return "PEFT's AutoPeftModelForCausalLM"
    return f"PEFT's PeftModel.from_pretrained, given the model by {auto_class(causal_lm.config).__name__},"


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

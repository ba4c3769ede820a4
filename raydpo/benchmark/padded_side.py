"""A stand-in for TRL where TRL is not installed: padded rows through transformers and torch, nothing of raydpo's kernels.

Rows of a forward pass are padded to its longest and go through the model at once, chosen before rejected; log-probs of
completion tokens come from chunks of logits. Logits that an architecture caps or scales are not handled.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raydpo.benchmark import workload
from raydpo.benchmark.job import Job, Result, StepRecord, now, set_adapters, side
from raydpo.model.budget import used_memory
from raydpo.model.load import load_causal_lm
from raydpo.training.optimizer import make_optimizer

CHUNK = 1024
"""Completion tokens whose logits exist at a time."""


def run(job: Job, device: torch.device) -> Result:
    """The reference pass, where it is cached, and the steps."""
    start = time.perf_counter()
    table, settings = workload.load(job.workload), job.train
    steps = [[_batch(table, rows) for rows in workload.cut(step, job.pairs_per_pass)]
             for step in workload.parts(table, job.pairs_per_step)]
    model = load_causal_lm(job.model, job.dtype, rope_length=None, device=device)
    if job.lora is not None:
        model = get_peft_model(model, job.peft_config)
        set_adapters(model, job.initial_adapters)
    reference = load_causal_lm(job.model, job.dtype, rope_length=None, device=device) \
        if job.lora is None and job.stage == "online" else None
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trainable, settings, device)
    found = Result(load_seconds=now(device) - start, facts={"transformers": transformers.__version__})
    scored: list[list[Tensor]] = []
    if job.stage == "cached":
        begin = now(device)
        scored = [[_reference(model, None, batch, device) for batch in batches] for batches in steps]
        found.reference_seconds = now(device) - begin
        found.ref_chosen, found.ref_rejected = (torch.cat([each.chunk(2)[half] for step in scored for each in step]).tolist()
                                                for half in range(2))
    record = StepRecord(device)
    for number, batches in enumerate(steps[: job.steps]):
        pairs = sum(len(batch[0]) // 2 for batch in batches)
        for place, batch in enumerate(batches):
            known = scored[number][place] if scored else _reference(model, reference, batch, device)
            logps = _sums(model, batch, device)
            chosen, rejected = (logps - known).chunk(2)
            loss = -F.logsigmoid(settings.beta * (chosen - rejected)).mean()
            (loss * len(chosen) / pairs).backward()
            record.add_pass(len(chosen), batch[0].numel(), loss.detach(), *(half.detach().mean() for half in logps.chunk(2)))
        torch.nn.utils.clip_grad_norm_(trainable, settings.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record.end_step()
    found.step_seconds, found.peak_bytes = record.seconds, used_memory(device)
    found.losses, found.chosen_logps, found.rejected_logps = record.means()
    found.facts |= record.facts(optimizer)
    return found


def _batch(table: pa.Table, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and completion mask, each [2 * pairs, longest]: all chosen rows, then all rejected ones."""
    ids = {name: table[name].slice(rows[0], len(rows)).to_pylist() for name in workload.IDS}
    pairs = [(prompt, completion) for name in ("chosen_ids", "rejected_ids")
             for prompt, completion in zip(ids["prompt_ids"], ids[name], strict=True)]
    tokens = np.zeros((3, len(pairs), max(len(prompt) + len(completion) for prompt, completion in pairs)), np.int64)
    for row, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        tokens[0, row, :end] = prompt + completion
        tokens[1, row, :end] = 1
        tokens[2, row, len(prompt) : end] = 1
    return tuple(torch.from_numpy(tokens).unbind())


@torch.no_grad()
def _reference(policy: nn.Module, reference: nn.Module | None, batch: tuple[Tensor, ...], device: torch.device) -> Tensor:
    """Sums by the reference: a model of its own, or the policy without its adapters, or before its first step."""
    if reference is None and hasattr(policy, "disable_adapter"):
        with policy.disable_adapter():
            return _sums(policy, batch, device)
    return _sums(policy if reference is None else reference, batch, device)


def _sums(model: nn.Module, batch: tuple[Tensor, ...], device: torch.device) -> Tensor:
    """float32 log-probs of each row's completion, [2 * pairs]."""
    ids, mask, completion = (part.to(device, non_blocking=True) for part in batch)
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = getattr(causal_lm, causal_lm.base_model_prefix)(
        input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    head, wanted = causal_lm.get_output_embeddings(), completion[:, 1:].bool()
    rows = torch.arange(len(ids), device=device)[:, None].expand_as(wanted)[wanted]

    def logps(hidden: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(head(hidden).float(), targets, reduction="none")

    pieces = [checkpoint(logps, hidden_C, targets_C, use_reentrant=False) for hidden_C, targets_C in
              zip(hidden[wanted].split(CHUNK), ids[:, 1:][wanted].split(CHUNK), strict=True)]
    return torch.zeros(len(ids), device=device).index_add(0, rows, torch.cat(pieces))


if __name__ == "__main__":
    raise SystemExit(side(run))

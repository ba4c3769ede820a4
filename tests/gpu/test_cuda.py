"""The kernels on a CUDA device. Needs torch, transformers, peft, deepspeed and pyarrow; no Ray."""

import math

import pytest
import torch
from distributed import run_distributed
from kernel import tiny_pairs, train_here, with_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def curves(jobs):
    torch.backends.cuda.matmul.allow_tf32 = False
    return [
        [(row["loss"], row["grad_norm"]) for row in train_here(*args, device="cuda", **kwargs).steps]
        for args, kwargs in jobs
    ]


def test_float32_on_cuda_equals_cpu(tiny_llama):
    pairs = tiny_pairs(33)
    cpu, cuda = (with_reference(pairs, tiny_llama, device=device) for device in ("cpu", "cuda"))
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        for one, other in zip(cpu[column].to_pylist(), cuda[column].to_pylist(), strict=True):
            assert one == pytest.approx(other, abs=2e-5)


def test_zero_stages_agree_and_begin_at_ln_2(tiny_llama, tmp_path):
    table = with_reference(tiny_pairs(33), tiny_llama, device="cuda")
    jobs = [
        ((table, tiny_llama, tmp_path / "scratch"), dict(zero=zero, steps=9, lora=lora))
        for lora in (None, {"r": 4, "alpha": 8})
        for zero in (0, 1, 2, 3)
    ]
    (found,) = run_distributed(curves, 1, tmp_path / "ranks", jobs)
    for group in (found[:4], found[4:]):
        assert group[0][0][0] == pytest.approx(math.log(2), abs=1e-5)
        for curve in group[1:]:
            assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in group[0]], abs=1e-5)


def test_bfloat16_begins_near_ln_2(tiny_llama, tiny_qwen3, tmp_path):
    jobs = [
        (
            (with_reference(tiny_pairs(64), model, "bfloat16", device="cuda"), model, tmp_path / "scratch"),
            dict(zero=zero, steps=1, dtype="bfloat16", lora=lora, pairs_per_step=64),
        )
        for model in (tiny_llama, tiny_qwen3)
        for zero in (1, 2)
        for lora in (None, {"r": 4, "alpha": 8})
    ]
    (found,) = run_distributed(curves, 1, tmp_path / "ranks", jobs)
    for curve in found:
        assert curve[0][0] == pytest.approx(math.log(2), abs=1e-3)

"""Bytes and kernels of fused functions, counted on tensors without data in the shape of Llama 3 8B."""

import counting
import pytest


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_fused_layer_moves_and_keeps_less(lora):
    plain, fused = (counting.llama_layer(each, lora) for each in (False, True))
    for name, one in (("plain", plain), ("fused", fused)):
        kilobytes = f"{one.forward / 1e3:.1f} forward, {one.backward / 1e3:.1f} backward, {one.kept / 1e3:.1f} kept"
        print(f"{name}: kB a position: {kilobytes}; kernels: {one.kernels}")
    assert plain.forward / fused.forward > 3
    assert plain.backward / fused.backward > 3
    assert fused.kept / plain.kept < (0.751 if lora else 0.66)
    assert sum(fused.kernels) < 0.6 * sum(plain.kernels)


@pytest.mark.parametrize("frozen", [False, True], ids=["learns", "frozen"])
def test_a_fused_head_reads_the_logits_once(frozen):
    logits, weight = 4 * 8192 * 128256, 128256 * 4096
    plain, fused = (counting.llama_head(each, frozen) for each in (False, True))
    for name, passes in (("plain", plain), ("fused", fused)):
        print(f"{name}: {passes[0].elementwise / 1e9:.1f} GB forward, {passes[1].elementwise / 1e9:.1f} backward")
    # The normaliser reads the logits. A slope reads them, too, and is rounded to 2 bytes. The weight's gradient is zero at
    # first and rounded at last; in between, products add to it. Hidden states and slopes of rows are below 1 GB.
    normaliser, slope, sums = logits, 1.5 * logits, (6 + 6) * weight
    assert fused[0].elementwise < normaliser + slope * frozen + 1e9
    assert plain[0].elementwise > 2.5 * fused[0].elementwise
    assert fused[1].elementwise < (slope + sums) * (not frozen) + 1e9
    assert plain[1].elementwise < (8 * logits + sums) * (not frozen) + 1e9

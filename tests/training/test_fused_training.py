"""Training with fused functions inside DeepSpeed: losses of plain training up to rounding, with and without partitions."""

import pytest
from distributed import run_distributed
from kernel import tiny_pairs, train_here, with_reference

LORA = {"r": 4, "alpha": 8}
# ZeRO-3 last: while its engine lives, transformers partitions every model it loads.
KINDS = [
    dict(zero=2, gradient_checkpointing=True),
    dict(zero=3),
    dict(zero=3, lora=LORA),
]

SAID = (("with", "without", "true"), ("without", "with", "false"))


def trained(table, model, scratch):
    """(notes, losses, gradient norms) of plain and fused training of each kind."""
    found = []
    for kind in KINDS:
        for fused in (False, True):
            settings = {"dtype": "bfloat16", "steps": 2, "policy": {"fused": fused}} | kind
            record = train_here(table, model, scratch, reference_fused=frozenset({not fused}), **settings)
            found.append((record.notes, *([row[name] for row in record.steps] for name in ("loss", "grad_norm"))))
    return found


def test_fused_training_is_plain_training_up_to_rounding(tiny_llama, tmp_path):
    table = with_reference(tiny_pairs(16), tiny_llama, "bfloat16")
    found, _ = run_distributed(trained, 2, tmp_path / "ranks", table, tiny_llama, tmp_path / "scratch")
    for kind, plain, fused in zip(KINDS, found[::2], found[1::2], strict=True):
        assert not any("; fused" in line for line in plain[0])
        for (notes, *_), (scored, computes, other) in zip((plain, fused), SAID, strict=True):
            (line,) = (line for line in notes if line.startswith("warning: stored log-probs were computed "))
            assert f"computed {scored} fused functions, the policy computes {computes} fused functions" in line
            assert f"; set model.fused={other}, or score into another cache" in line
        assert any("; fused: feed-forward, norms, rotary; " in line for line in fused[0]), (kind, fused[0])
        for one, other in zip(plain[1:], fused[1:], strict=True):
            assert one != other and one == pytest.approx(other, rel=0.05), kind

"""Moments in 8 bits are stored as float32 and come back to the bit, from whichever blocks they were cut."""

import pytest
import torch

from raydpo.training.policy.moments import PIECE, begin_moments, moments_of

optim = pytest.importorskip("bitsandbytes.optim")
KINDS = [optim.AdamW8bit, optim.PagedAdamW, optim.PagedAdamW8bit]
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def stepped(kind, numel, steps=3):
    """A tensor and bitsandbytes' optimizer, after some steps with gradients of many sizes."""
    torch.manual_seed(0)
    flat = torch.nn.Parameter(torch.randn(numel))
    optimizer = kind([flat], lr=1e-3, weight_decay=0.1)
    for _ in range(steps):
        flat.grad = torch.randn(numel) * torch.logspace(-6, 2, numel)
        optimizer.step()
    return flat, optimizer


def read(flat, optimizer):
    return {kind: moment.read(0, flat.numel()) for kind, moment in moments_of(optimizer.state[flat], flat).items()}


def resumed(flat, kind, values, steps=3):
    """The same tensor and a new optimizer with the moments ``values``."""
    flat = torch.nn.Parameter(flat.detach().clone())
    optimizer = kind([flat], lr=1e-3, weight_decay=0.1)
    for name, moment in begin_moments(optimizer, flat, steps).items():
        for start in range(0, flat.numel(), PIECE):
            moment.write(start, values[name][start : start + PIECE])
    return flat, optimizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numel", [100, 9999, 400_001])  # fewer than 4,096 numbers stay in 32 bits; the last block is cut
def test_what_was_read_is_written_back_to_the_bit(kind, numel):
    flat, optimizer = stepped(kind, numel)
    values = read(flat, optimizer)
    assert set(values) == {"exp_avg", "exp_avg_sq"} and {one.dtype for one in values.values()} == {torch.float32}
    again, other = resumed(flat, kind, values)
    for name, found in read(again, other).items():
        assert torch.equal(found, values[name]), name
    for tensor, its in ((flat, optimizer), (again, other)):
        tensor.grad = torch.linspace(-1, 1, numel)
        its.step()
        assert its.state[tensor]["step"] == 4
    assert torch.equal(flat, again)


def test_a_part_is_read_as_bitsandbytes_reads_the_whole():
    from bitsandbytes.functional import dequantize_blockwise

    flat, optimizer = stepped(optim.AdamW8bit, 9999)
    state = optimizer.state[flat]
    for number, moment in enumerate(moments_of(state, flat).values(), 1):
        scales, code = state[f"absmax{number}"], state[f"qmap{number}"]
        whole = dequantize_blockwise(state[f"state{number}"], absmax=scales, code=code, blocksize=256)
        assert torch.equal(moment.read(300, 7000), whole[300:7300])


def test_other_blocks_lose_no_more_than_bitsandbytes_itself():
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    flat, optimizer = stepped(optim.AdamW8bit, 9999)
    moved = {name: values.roll(77) for name, values in read(flat, optimizer).items()}
    for number, (name, found) in enumerate(read(*resumed(flat, optim.AdamW8bit, moved)).items(), 1):
        theirs = dequantize_blockwise(
            *quantize_blockwise(moved[name], code=optimizer.state[flat][f"qmap{number}"], blocksize=256)
        )
        assert (found - moved[name]).norm() <= 1.01 * (theirs - moved[name]).norm()


def test_moments_of_one_kind_begin_another():
    values = read(*stepped(torch.optim.AdamW, 9999))
    flat, _ = stepped(torch.optim.AdamW, 9999)
    for kind in (optim.AdamW8bit, optim.PagedAdamW):
        for name, found in read(*resumed(flat, kind, values)).items():
            assert (found - values[name]).norm() <= (0.02 if kind is optim.AdamW8bit else 0) * values[name].norm(), name

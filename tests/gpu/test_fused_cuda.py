"""Fused functions as a GPU runs them, compiled: accepted by the check, equal to the plain model, compiled once."""

import pytest
import torch
from architectures import make_random
from definition import VOCAB, groups

from raydpo.model.fused import fuse_layers
from raydpo.model.layout import Method
from raydpo.model.logps import LogpModel

CUDA = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_a_fused_model_is_the_plain_one(name):
    model = LogpModel(make_random(name, VOCAB).to(CUDA, torch.bfloat16))
    model.use(Method("tree", "sdpa"))

    def computed(seed):
        logps = model(model.lay_out(groups(seed, ((20 + seed, 5, 9 + seed), (3, 4, 7)))).to(CUDA))
        return [logps.detach(), *torch.autograd.grad(logps.sum(), list(model.parameters()))]

    plain = [computed(seed) for seed in range(3)]
    torch._dynamo.reset()
    # Norms of the stream and of heads; the head for its own vocabulary and for the small copy's.
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        assert fuse_layers(model, CUDA).startswith("fused: feed-forward, norms, rotary; ")
        fused = [computed(seed) for seed in range(3)]
    total = torch.nn.utils.get_total_norm
    for found, expected in zip(fused, plain, strict=True):
        assert (found[0] - expected[0]).abs().mean() < 0.02
        differences = [one.float() - other.float() for one, other in zip(found, expected, strict=True)]
        assert total(differences) < 0.05 * total([each.float() for each in expected])

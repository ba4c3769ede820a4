"""The ledger is within 5 % of the bytes that the code keeps and needs, counted tensor by tensor at the size of Llama 3.1 8B."""

import gc

import pytest
from live import like_a_gpu, make_policy, pairs_of

from raydpo.config import LoraSettings, ModelConfig, TrainConfig
from raydpo.memory.activations import Batch
from raydpo.memory.ledger import estimate_memory

PAIR = 1024, 512, 512
CONFIG = "tests/recipes/Llama-3.1-8B-Instruct"
KINDS = {
    "full": {},
    "lora": {"rank": 16},
    "qlora": {"rank": 16, "quantized": True},
}


def counted(directory, pairs, **kind):
    """Bytes of the weights, and in addition those kept after a forward pass, and at the peaks of both passes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    with like_a_gpu() as live:
        policy = make_policy(config, **kind)
        gc.collect()
        layout = policy.lay_out(pairs_of(pairs, *PAIR[:2]))
        weights = live.peak = live.now
        logps = policy(layout)
        kept, forward = live.now - weights, live.peak - weights
        live.peak = live.now
        logps.sum().backward()
        return weights, kept, forward, live.peak - weights


@pytest.mark.parametrize("recomputes", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_at_the_size_of_8b(llama, kind, recomputes, pytestconfig):
    settings = KINDS[kind]
    quantization = "4bit" if "quantized" in settings else None
    model = ModelConfig(path="m", lora=LoraSettings(r=16) if "rank" in settings else None, quantization=quantization)
    for pairs in (4, 8):
        weights, kept, forward, backward = counted(
            pytestconfig.rootpath / CONFIG, pairs, **settings, recomputes=recomputes
        )
        memory = estimate_memory(
            llama,
            model,
            TrainConfig(zero=0, gradient_checkpointing=recomputes),
            Batch.of_pairs([PAIR] * pairs, micro_batches=1),
            workers=1,
            dtype="bfloat16",
        )

        def of_pass(moment):
            return moment.activations + moment.gradients + moment.head

        passes = {moment.name: of_pass(moment) for moment in memory.moments if "forward" in moment.name or "backward" in moment.name}
        print(kind, recomputes, pairs, [round(x / 2**30, 3) for x in (weights, kept, forward, backward)],
          round(memory.standing.weights / 2**30, 3),
          round(max(v for k, v in passes.items() if "forward" in k) / 2**30, 3),
          round(max(v for k, v in passes.items() if "backward" in k) / 2**30, 3), max(passes, key=passes.get))

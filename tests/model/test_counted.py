"""The ledger is within 5 % of what the code keeps and takes, counted tensor by tensor at the widths of Llama 3.1 8B."""

import gc
import json

import pytest
from live import like_a_gpu, make_policy, pairs_of

from raydpo.config import LoraSettings, ModelConfig, TrainConfig
from raydpo.model.memory.activations import Batch
from raydpo.model.memory.anatomy import Anatomy
from raydpo.model.memory.ledger import estimate_memory

LAYERS, PAIRS, PAIR = 6, 6, (1024, 512, 512)
KINDS = {
    "full": {},
    "lora": {"lora": LoraSettings(r=16)},
    "fused": {"fused": True},
    "fused lora": {"lora": LoraSettings(r=16), "fused": True},
    "qlora": {"lora": LoraSettings(r=16), "quantization": "4bit"},
}


@pytest.fixture(scope="module")
def shortened(tmp_path_factory, pytestconfig):
    """config.json of Llama 3.1 8B with fewer layers: they are alike, and this takes a fifth of the time."""
    directory = tmp_path_factory.mktemp("llama")
    tree = json.loads((pytestconfig.rootpath / "tests/recipes/Llama-3.1-8B-Instruct/config.json").read_text())
    (directory / "config.json").write_text(json.dumps(tree | {"num_hidden_layers": LAYERS}))
    return directory


def counted(directory, model, recomputes):
    """Bytes of the weights; in addition those that are kept after a forward pass, and the most during both passes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    with like_a_gpu() as live:
        policy = make_policy(config, model, recomputes=recomputes)
        gc.collect()
        layout = policy.lay_out(pairs_of(PAIRS, *PAIR[:2]))
        weights = live.peak = live.now
        logps = policy(layout)
        kept = live.now - weights
        logps.sum().backward()
        return weights, kept, live.peak - weights


@pytest.mark.parametrize("recomputes", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_is_what_the_code_takes(shortened, kind, recomputes):
    model = ModelConfig(path="m", **KINDS[kind])
    train = TrainConfig(zero=0, gradient_checkpointing=recomputes)
    batch = Batch.of_pairs([PAIR] * PAIRS, micro_batches=1)
    memory = estimate_memory(Anatomy.of(shortened), model, train, batch, workers=1, dtype="bfloat16")
    estimated = (
        memory.standing.weights,
        next(moment.activations for moment in memory.passes if moment.name == "forward"),
        max(moment.activations + moment.gradients + moment.head for moment in memory.passes),
    )
    found = counted(shortened, model, recomputes)
    for what, wanted, size in zip(("weights", "kept", "peak"), estimated, found, strict=True):
        print(f"{kind}: {what} {wanted / 2**30:.3f} GiB by the ledger, {size / 2**30:.3f} counted, {wanted / size:.3f}")
    assert estimated == pytest.approx(found, abs=0.05 * found[-1]) and estimated[0] == pytest.approx(found[0], rel=0.01)


SHAPES = {
    "qwen3": {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 64, "num_key_value_heads": 8},
    "qwen3_moe": {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
}


@pytest.mark.parametrize("recomputes", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("kind", SHAPES)
def test_norms_of_heads_and_copies_for_experts_are_in_the_ledger(tmp_path, kind, recomputes):
    """Adapters on the attention of Qwen3, with as many heads as the one of 235B, and of Qwen3-30B-A3B."""
    sizes = {"model_type": kind, "num_hidden_layers": LAYERS, "vocab_size": 512, "head_dim": 128, **SHAPES[kind]}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    model = ModelConfig(path="m", lora=LoraSettings(r=16, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")))
    train = TrainConfig(zero=0, gradient_checkpointing=recomputes)
    batch = Batch.of_pairs([PAIR] * PAIRS, micro_batches=1)
    memory = estimate_memory(Anatomy.of(tmp_path), model, train, batch, workers=1, dtype="bfloat16")
    estimated = max(moment.activations + moment.gradients + moment.head for moment in memory.passes)
    _, _, found = counted(tmp_path, model, recomputes)
    print(f"{kind}: peak {estimated / 2**30:.3f} GiB by the ledger, {found / 2**30:.3f} counted, {estimated / found:.3f}")
    assert estimated == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("recomputes", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=16)], ids=["full", "lora"])
def test_trained_and_adapted_experts_are_in_the_ledger(tmp_path, lora, recomputes):
    """Layers of Qwen3-30B-A3B. PEFT computes the adapted weights of all experts of a layer, and their gradient."""
    sizes = {"model_type": "qwen3_moe", "num_hidden_layers": LAYERS, "vocab_size": 512, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(sizes | SHAPES["qwen3_moe"]))
    model, train = ModelConfig(path="m", lora=lora), TrainConfig(zero=0, gradient_checkpointing=recomputes)
    batch = Batch.of_pairs([PAIR] * PAIRS, micro_batches=1)
    memory = estimate_memory(Anatomy.of(tmp_path), model, train, batch, workers=1, dtype="bfloat16")
    estimated = max(moment.activations + moment.gradients + moment.head for moment in memory.passes)
    weights, _, found = counted(tmp_path, model, recomputes)
    print(f"peak {estimated / 2**30:.3f} GiB by the ledger, {found / 2**30:.3f} counted, {estimated / found:.3f}")
    assert estimated == pytest.approx(found, rel=0.05) and memory.standing.weights == pytest.approx(weights, rel=0.01)

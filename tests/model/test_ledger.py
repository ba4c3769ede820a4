"""The estimate against figures worked out by hand; test_footprint.py compares it with measurements."""

import json
from dataclasses import replace

import pytest
from tiny import make_model

from raydpo.config import LoraSettings, ModelConfig, TrainConfig
from raydpo.config.train import REDUCE_BUCKET, ROUNDED_PIECE
from raydpo.errors import ConfigError, ModelError
from raydpo.model.memory.activations import Batch, head_backward, head_forward, layer_memory
from raydpo.model.memory.adapters import adapters_of
from raydpo.model.memory.anatomy import EMBEDDING, HEAD, Anatomy
from raydpo.model.memory.ledger import adapters_line, estimate_memory, trained_numbers

MODEL = ModelConfig(path="m")
BATCH = Batch.of_pairs([(4096, 2048, 2048)])
P = 8_030_261_248
"""Parameters of Llama 3.1 8B: 2 x 128,256 x 4,096 in embedding and head, 32 layers of 218,112,000, a last norm of 4,096."""
LAYER = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
"""Numbers of one layer: queries and output, keys and values, three products, two norms."""


def estimate(anatomy, batch=BATCH, model=MODEL, workers=8, dtype="bfloat16", device="cuda", **train):
    return estimate_memory(anatomy, model, TrainConfig(**train), batch, workers=workers, dtype=dtype, device=device)


def at(memory, name):
    return next(moment for moment in memory.moments if moment.name == name)


def adapters(anatomy, **settings):
    return adapters_of(anatomy, ModelConfig(path="m", lora=LoraSettings(**{"r": 16} | settings)))


def test_anatomy_of_llama(llama):
    assert llama.parameters == P == 2 * 128256 * 4096 + 32 * LAYER + 4096
    assert (llama.layers, llama.hidden, llama.vocabulary) == (32, 4096, 128256)
    assert (llama.query_width, llama.key_width, llama.inner, llama.gated, llama.tied) == (4096, 1024, 14336, True, False)
    assert sum(weight.numel for weight in llama.weights if weight.place == 7) == LAYER
    assert len(adapters(llama).on) == 32 * 7
    assert {adapter.name for adapter in adapters(llama, target_modules=("q_proj", "v_proj")).on} == {"q_proj", "v_proj"}
    assert len(adapters(llama, target_modules=r".*layers\.3\..*proj").on) == 7


@pytest.mark.parametrize(
    ("kind", "settings", "wanted"),
    [
        ("qwen3", {"tie_word_embeddings": True}, {"tied": True, "gated": True}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, {"inner": 2 * 128, "gated": True}),
        ("gpt_neox", {}, {"gated": False, "inner": 128}),
        ("gemma2", {"final_logit_softcapping": 30.0}, {"softcap": True}),
    ],
)
def test_anatomy_is_what_transformers_builds(tmp_path, kind, settings, wanted):
    """Sizes from config.json equal those of the loaded model; the weights' file is not read."""
    from transformers import AutoModelForCausalLM

    directory = make_model(tmp_path, kind, **settings)
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    anatomy = Anatomy.of(directory)
    assert anatomy.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert anatomy == Anatomy.of_loaded(model)
    assert anatomy.layers == 2 and {weight.place for weight in anatomy.weights} >= {EMBEDDING, 0, 1}
    assert (HEAD in {weight.place for weight in anatomy.weights}) == (not anatomy.tied)
    assert {name: getattr(anatomy, name) for name in wanted} == wanted


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(ModelError, match="cannot tell the sizes"):
        Anatomy.of(tmp_path / "nothing")


def test_sizes_are_deepspeeds_defaults_where_the_engine_sets_none():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from raydpo.model.memory.ledger import PERSISTENT, PREFETCH, REUSE, SUB_GROUP
    from raydpo.training.policy.deepspeed_engine import _deepspeed_config

    zero = DeepSpeedZeroConfig(**_deepspeed_config(TrainConfig(zero=3), "bfloat16")["zero_optimization"])
    assert (
        zero.reduce_bucket_size,
        zero.prefetch_bucket_size,
        zero.max_reuse_distance,
        zero.param_persistence_threshold,
        zero.sub_group_size,
    ) == (REDUCE_BUCKET, PREFETCH, REUSE, PERSISTENT, SUB_GROUP)


@pytest.mark.parametrize(("zero", "more"), [(1, 2 * REDUCE_BUCKET), (2, 2 * REDUCE_BUCKET)])
def test_overlapped_communication_takes_a_second_bucket(llama, zero, more):
    one, two = (at(estimate(llama, zero=zero, overlap_communication=each), "reduction") for each in (False, True))
    assert two.communication - one.communication == more


def test_a_batch_by_hand():
    """Prompt of 100 tokens, completions of 20 and 30: three nodes, and each completion reads the prompt's keys again."""
    batch = Batch.of_pairs([(100, 20, 30)])
    assert (batch.positions, batch.keys, batch.predictions) == (150, 100 + 120 + 130, 50)
    assert batch.masked == 20 * 120 + 30 * 130
    assert (batch.padded_queries, batch.padded_keys) == (128 + 32 + 32, 3 * 512)
    assert Batch.of_pairs([(100, 20, 30)], "packed").positions == 250
    assert Batch.of_pairs([(100, 20, 30)], "padded").positions == 2 * 144  # a multiple of 16
    assert batch.scaled(300).keys == 700


def test_a_layer_by_hand(llama):
    """Bytes per position in bfloat16 on a GPU: both norms keep input and normalised input in float32, 16 x 4096; five
    projections keep a bfloat16 copy each, 10 x 4096; queries and output, 4 x 4096; keys and values twice (half the positions
    are a prompt that both completions read), 8 x 1024; four tensors of the inner width, 8 x 14336."""
    layer = layer_memory(llama, BATCH, width=2, device="cuda", trained=True, adapted=())
    assert layer.kept / 8192 == 16 * 4096 + 10 * 4096 + 4 * 4096 + 8 * 1024 + 8 * 14336
    assert layer.entry / 8192 == 4 * 4096
    adapted = [adapter for adapter in adapters(llama).on if adapter.weight.place == 0]
    lora = layer_memory(llama, BATCH, width=2, device="cuda", trained=False, adapted=adapted)
    assert lora.kept / 8192 == layer.kept / 8192 - 8 * 4096 + 7 * 16 * 2
    # Fused norms keep their input only, and round it once for all projections; the activation is computed again.
    fused = layer_memory(llama, BATCH, width=2, device="cuda", trained=True, adapted=(), fused=True)
    assert fused.kept / 8192 == 8 * 4096 + 2 * 2 * 4096 + 4 * 4096 + 8 * 1024 + 6 * 14336


def test_a_head_by_hand(llama):
    """A chunk of 2,048 rows and its bfloat16 copy; for 525M weights the gradient in float32 and rounded: 4 + 2 bytes."""
    chunk, weights = 4 * 2048 * 128256, 128256 * 4096
    assert head_forward(llama, BATCH, width=2, device="cuda", trained=True) == chunk
    assert head_forward(llama, BATCH.scaled(2048), width=2, device="cuda", trained=True) == chunk / 2
    assert head_backward(llama, BATCH, width=2, device="cuda") == 1.5 * chunk + 4 * 4096 * 4096 + 6 * weights


def test_llama_on_8_gpus_under_zero_2(llama):
    """All weights (16.06 GB); an eighth of float32 weights and two moments, 12 bytes per parameter; a bucket of 100 MB."""
    memory = estimate(llama, zero=2, gradient_checkpointing=True)
    share = P // 8
    head = at(memory, "head's backward")
    assert head.weights == 2 * P == pytest.approx(16.06e9, rel=1e-3)
    assert head.optimizer == 12 * share == pytest.approx(12.05e9, rel=1e-3)
    assert head.communication == 1e8
    # Gradients of earlier micro-batches: of the share, and of parameters in two shares the whole gradient.
    assert 2 * share <= head.gradients <= 2 * (share + 2 * 128256 * 4096)
    # In float32: 32 inputs of layers, the last norm's input and output, and predicting positions.
    assert head.activations == 4 * 4096 * (8192 * (32 + 2) + 4096)
    update = at(memory, "update")
    assert update.gradients == 4 * share and update.optimizer == 12 * share
    assert memory.device == max(moment.total for moment in memory.moments)
    assert memory.host == 0


def test_llama_on_8_gpus_under_zero_3(llama):
    """An eighth of everything. Gathered at the head: its 525M weights, a prefetched part of the layer before it, and 65
    norms that stay whole. The other layers are used again only after more than 1e9 other weights, so they are released."""
    memory = estimate(llama, zero=3, gradient_checkpointing=True)
    head = at(memory, "head's backward")
    assert head.weights == 2 * P // 8 and head.optimizer == 12 * P // 8 and head.gradients == 2 * P // 8
    assert head.communication >= 1e8 + 2 * (128256 * 4096 + 65 * 4096)
    assert head.communication <= 1e8 + 2 * (128256 * 4096 + LAYER + 65 * 4096)
    assert memory.device < estimate(llama, zero=2, gradient_checkpointing=True).device - 10e9


def test_recomputing_leaves_inputs_and_one_layer(llama):
    whole, again = (estimate(llama, zero=3, gradient_checkpointing=on) for on in (False, True))
    layer = layer_memory(llama, BATCH, width=2, device="cuda", trained=True, adapted=())
    saved = at(whole, "forward").activations - at(again, "forward").activations
    assert saved == 32 * (layer.kept - layer.entry)
    offloaded = estimate(llama, zero=3, gradient_checkpointing=True, offload_activations=True)
    assert at(offloaded, "forward").activations < 0.1 * at(again, "forward").activations
    assert offloaded.host > 32 * layer.entry


def test_optimizers(llama):
    def moments(**train):
        memory = estimate(llama, zero=2, **train)
        return at(memory, "update").optimizer, memory.host

    share = P // 8
    assert moments() == (12 * share, 0)
    assert moments(optimizer="adamw_8bit") == ((4 + 2 + 1 / 32) * share, 0)
    assert moments(optimizer="paged_adamw") == (4 * share, 8 * share)
    # A first moment in bfloat16, 2 bytes less, is converted piece by piece.
    assert moments(optimizer_states="bfloat16") == (10 * share + 12 * ROUNDED_PIECE, 0)


def test_an_offloaded_optimizer_is_on_the_host(llama):
    """Float32 weights, moments and gradients: 16 bytes per parameter; a bfloat16 copy: 2; under ZeRO 2 also a buffer for the
    largest gradient, and gradients of earlier micro-batches."""
    memory = estimate(llama, zero=2, offload_optimizer="cpu")
    share, largest = P // 8, 128256 * 4096
    assert at(memory, "update").optimizer == 0
    assert memory.host == pytest.approx(18 * share + 2 * largest + 2 * share, rel=0.08)
    assert memory.host_peak == memory.host, "its update works in place"
    three = estimate(llama, zero=3, offload_optimizer="cpu", offload_params="cpu")
    assert three.peak.weights == 0 and three.host == pytest.approx((18 + 2) * share)


def test_adapters_and_quantization(llama):
    """Rank 16 on all linear layers: 16 x (in + out) numbers each, 1.31M per layer."""
    lora = LoraSettings(r=16)
    adapters = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    memory = estimate(llama, model=ModelConfig(path="m", lora=lora), zero=2, gradient_checkpointing=True)
    update = at(memory, "update")
    assert update.weights == 2 * P + 2 * adapters
    assert update.optimizer == 12 * -(-adapters // 8)
    assert not any(moment.name == "head's backward" for moment in memory.moments)
    quantized = estimate(llama, model=ModelConfig(path="m", lora=lora, quantization="4bit"), zero=2)
    linear = 32 * (LAYER - 2 * 4096)
    bytes_of = linear * (0.5 + 1 / 64 + 1 / 4096) + 2 * (P - linear) + 2 * adapters
    assert at(quantized, "update").weights == pytest.approx(bytes_of, rel=1e-6)
    eight = estimate(llama, model=ModelConfig(path="m", lora=lora, quantization="8bit"), zero=2)
    assert linear < at(eight, "update").weights - 2 * (P - linear) - 2 * adapters < 1.01 * linear


def test_frozen_parameters_have_no_optimizer_and_no_graph(llama):
    frozen = ModelConfig(path="m", freeze=("embed_tokens", r"layers[.]([0-9]|1[0-5])[.]"))
    memory, whole = (estimate(llama, model=model, zero=2) for model in (frozen, MODEL))
    assert at(memory, "update").optimizer == 12 * (P - 128256 * 4096 - 16 * LAYER) // 8
    assert at(memory, "update").weights == 2 * P
    assert at(memory, "forward").activations == pytest.approx(at(whole, "forward").activations / 2, rel=0.02)


def test_float32_under_zero_has_a_second_copy_of_the_weights(llama):
    """DeepSpeed updates copies of the weights; without ZeRO, AdamW updates the weights themselves."""
    assert at(estimate(llama, dtype="float32", zero=0), "update").optimizer == 8 * P
    assert at(estimate(llama, dtype="float32", zero=1), "update").optimizer == 12 * P // 8


def test_a_cpu_touches_only_what_it_writes_of_a_bucket(tmp_path):
    anatomy = Anatomy.of(make_model(tmp_path))
    batch = Batch.of_pairs([(64, 32, 32)], micro_batches=1)
    gpu, cpu = (estimate(anatomy, batch, workers=1, dtype="float32", device=device) for device in ("cuda", "cpu"))
    assert at(gpu, "reduction").communication == 4 * REDUCE_BUCKET
    assert at(cpu, "reduction").communication == 4 * anatomy.parameters


def test_adapters_on_128_experts_by_hand(pytestconfig):
    """Qwen3-30B-A3B at rank 16, in 48 layers: gate and up of 2,048 x 1,536 are one tensor at twice the rank, down of 768 x
    2,048 has the rank; queries and output 2,048 x 4,096, keys and values 2,048 x 512. The routers have none."""
    anatomy = Anatomy.of(pytestconfig.rootpath / "tests/recipes/Qwen3-30B-A3B-Instruct-2507")
    experts = 128 * (32 * (2048 + 1536) + 16 * (768 + 2048))
    attention = 16 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    model = ModelConfig(path="m", lora=LoraSettings(r=16))
    assert sum(trained_numbers(anatomy, model)) == 48 * (experts + attention) == 994_836_480
    assert adapters_line(anatomy, model) == "adapters: attention, experts; spared: router"
    router = ModelConfig(path="m", lora=LoraSettings(r=16, target_parameters=("mlp.gate.weight",)))
    assert sum(trained_numbers(anatomy, router)) == 994_836_480 + 48 * 16 * (2048 + 128)
    spared = ModelConfig(path="m", lora=LoraSettings(r=16, exclude_modules=("experts",)))
    assert sum(trained_numbers(anatomy, spared)) == 48 * attention


def test_more_of_anything_takes_more(llama):
    base = estimate(llama, zero=2, gradient_checkpointing=True).device
    assert estimate(llama, BATCH.scaled(16384), zero=2, gradient_checkpointing=True).device > base
    assert estimate(llama, zero=2, gradient_checkpointing=True, workers=4).device > base
    assert estimate(replace(llama, vocabulary=256000), zero=2, gradient_checkpointing=True).device > base
    assert estimate(llama, zero=2, gradient_checkpointing=True, dtype="float32").device > base


def test_an_adapter_is_read(llama, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}))
    memory = estimate(llama, model=ModelConfig(path="m", adapter=str(tmp_path)), zero=0)
    assert at(memory, "update").weights == 2 * P + 2 * 32 * 8 * (4096 + 4096)
    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        estimate(llama, model=ModelConfig(path="m", adapter=str(tmp_path / "none")))


def test_router_logits_are_kept_for_the_router_loss(tmp_path):
    settings = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    mixture = Anatomy.of(make_model(tmp_path / "mixture", "qwen3_moe", **settings))
    assert mixture.routed == 2 * 8, "two layers of eight experts"
    assert Anatomy.of(make_model(tmp_path / "dense")).routed == 0
    for recomputes in False, True:
        with_it, without = (
            estimate(mixture, workers=1, gradient_checkpointing=recomputes, router_aux_loss_coef=coef) for coef in (None, 0)
        )
        grown = at(with_it, "forward").activations - at(without, "forward").activations
        assert grown == pytest.approx(2 * 8 * 2 * BATCH.positions), "bfloat16"

"""The policy in training is the same function as the scored reference: the same numbers in every tensor, and equal results
in training mode and evaluation mode."""

import deepspeed
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, LONGEST, make_directories, make_random
from definition import VOCAB, groups
from distributed import run_distributed
from kernel import tiny_pairs, train_here, with_reference
from peft import LoraConfig, get_peft_model
from tiny import make_model

from raydpo.config import TrainConfig
from raydpo.errors import ModelError
from raydpo.model.load import load_causal_lm
from raydpo.model.logps import LogpModel
from raydpo.model.selfcheck import check_training_mode
from raydpo.reference.identity import identify

CPU = torch.device("cpu")
TARGETS = ["q_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "x_proj"]
NO_ZERO_3 = {"mamba", "qwen3_next"}
"""Models in which a layer uses another layer's weight."""


def make_adapter(directory, folder, scale):
    """A float32 adapter on attention layers, whose output is noise times ``scale``."""
    model = load_causal_lm(directory, "float32", rope_length=identify(directory, "float32", max_length=LONGEST).rope_length)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(directory, directory of an adapter) by architecture."""
    folder = tmp_path_factory.mktemp("architectures")
    return {
        name: (directory, make_adapter(directory, folder / f"{name}-adapter", 0.2))
        for name, directory in make_directories(ARCHITECTURES, folder, VOCAB).items()
    }


def differences(models, dtype, zero, adapts):
    """Differences of policy and scorer for each model, or the error that was raised."""
    from raydpo.model.partition import join_process_group
    from raydpo.training.policy.deepspeed_engine import PolicyEngine
    from raydpo.training.policy.engine import PolicySpec

    join_process_group(CPU)
    found = {}
    for name, (directory, adapter) in models.items():
        adapter = str(adapter) if adapts else None
        length = identify(directory, dtype, max_length=LONGEST).rope_length
        scorer = load_causal_lm(directory, dtype, adapter=adapter, rope_length=length)
        spec = PolicySpec(
            path=str(directory),
            dtype=dtype,
            lora=None,
            adapter=adapter,
            rope_length=length,
            freeze=("mlp.gate",) if name == "ernie4_5_moe" and not adapts else (),
        )
        try:
            engine = PolicyEngine(spec, TrainConfig(zero=zero), CPU)
        except ModelError as error:
            found[name] = str(error)
            continue
        engine.load_whole_models()
        theirs = dict(scorer.named_parameters()) | dict(scorer.named_buffers())
        policy = engine.module.policy
        ours = dict(policy.named_parameters()) | dict(policy.named_buffers())
        wrong = sorted(ours.keys() ^ theirs.keys())
        for key in ours.keys() & theirs.keys():
            with deepspeed.zero.GatheredParameters([ours[key]], enabled=zero == 3):
                if ours[key].dtype != theirs[key].dtype or not torch.equal(ours[key], theirs[key]):
                    wrong.append(f"{key}: {ours[key].dtype} here, {theirs[key].dtype} there")
        if wrong:
            found[name] = wrong
    return found


@pytest.mark.parametrize("adapts", [False, True], ids=["", "adapter"])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_tensor_of_the_policy_is_the_scorers(zero, dtype, adapts, models, tmp_path):
    chosen = {name: model for name, model in models.items() if zero < 3 or name not in NO_ZERO_3}
    (found,) = run_distributed(differences, 1, tmp_path, chosen, dtype, zero, adapts)
    if zero == 3 and dtype == "bfloat16":
        refused = found.pop("ernie4_5_moe")
        assert "keeps parameters in float32 " in refused and "Set train.zero=2, or model.dtype=float32" in refused
    assert not found


def refused(directory):
    from raydpo.model.partition import join_process_group
    from raydpo.training.policy.deepspeed_engine import PolicyEngine
    from raydpo.training.policy.engine import PolicySpec

    join_process_group(CPU)
    with pytest.raises(ModelError) as caught:
        PolicyEngine(PolicySpec(path=str(directory), dtype="bfloat16", lora=None), TrainConfig(), CPU)
    return str(caught.value)


def test_a_float32_router_that_bfloat16_would_round_is_not_trained(models, tmp_path):
    (said,) = run_distributed(refused, 1, tmp_path, models["ernie4_5_moe"][0])
    assert "model.layers.0.mlp.gate.weight" in said and "model.freeze=[" in said and "model.dtype=float32" in said


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_that_adds_nothing_changes_nothing(name, models, tmp_path):
    """Equal bits in bfloat16, at positions where rounded rotary frequencies would differ."""
    directory = models[name][0]
    length = identify(directory, "bfloat16", max_length=LONGEST).rope_length
    plain = load_causal_lm(directory, "bfloat16", rope_length=length)
    adapted = load_causal_lm(directory, "bfloat16", rope_length=length, adapter=make_adapter(directory, tmp_path / "a", 0.0))
    theirs = {name.removeprefix("base_model.model."): buffer for name, buffer in adapted.named_buffers()}
    for key, buffer in plain.named_buffers():
        assert theirs[key].dtype == buffer.dtype and torch.equal(theirs[key], buffer), key
    rows = groups(shapes=((180, 40, 20),))
    scored = []
    for model in (LogpModel(plain), LogpModel(adapted)):
        model.float32_stream = False  # some norms refuse it
        scored.append(np.concatenate(model.score(rows, CPU)[0]))
    assert np.array_equal(*scored)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_pass_in_training_mode_is_one_in_evaluation_mode(name):
    model = LogpModel(make_random(name, VOCAB))
    model.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check_training_mode(model, CPU)
    layout = model.lay_out(groups())
    assert model.training
    trained = model(layout).detach()
    assert torch.equal(trained, model(layout)) and torch.equal(trained, model.eval()(layout))


def test_a_layer_with_noise_of_its_own_is_named():
    model = LogpModel(make_random("llama", VOCAB))
    layer = model.causal_lm.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) * (1.0 + 0.01 * layer.training * torch.rand(1))
    named = r"LlamaDecoderLayer \(policy\.model\.layers\.0\)"
    with pytest.raises(ModelError, match=rf"in training mode .*: {named} adds noise or dropout"):
        check_training_mode(model, CPU)


def trained_with_biases(model, adapter, scratch, zero):
    """Trainable weights before and after three steps."""
    table = with_reference(tiny_pairs(17), model, adapter=adapter)
    before = {
        name: parameter.detach().clone()
        for name, parameter in load_causal_lm(
            model, "float32", adapter=str(adapter), train_adapter=True, rope_length=None
        ).named_parameters()
        if parameter.requires_grad
    }
    run = train_here(table, model, scratch, steps=3, zero=zero, policy={"adapter": str(adapter)})
    return before, run.engine.gather()


@pytest.mark.parametrize(
    ("settings", "count", "ranks"),
    [
        pytest.param({"bias": "none"}, 8, 1, marks=pytest.mark.slow),
        ({"bias": "lora_only"}, 12, 2),
        pytest.param({"bias": "all"}, 14, 1, marks=pytest.mark.slow),
        ({"modules_to_save": ["lm_head"]}, 9, 1),
    ],
    ids=str,
)
def test_all_that_an_adapter_trains_moves_under_every_zero(settings, count, ranks, tmp_path):
    """Biases and whole modules train too, with the same result under every ZeRO stage."""
    model = make_model(tmp_path / "model", "qwen2")
    adapter = tmp_path / "adapter"
    policy = get_peft_model(
        load_causal_lm(model, "float32", rope_length=None),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings),
    )
    torch.manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    policy.save_pretrained(str(adapter))
    expected = None
    for zero in range(4):
        before, after = run_distributed(
            trained_with_biases, ranks if zero == 3 else 1, tmp_path / f"zero-{zero}", model, adapter, tmp_path / "s", zero
        )[0]
        assert after.keys() == before.keys() and len(after) == count
        assert not [name for name, value in after.items() if torch.equal(value, before[name])]
        expected = expected or after
        for name, value in after.items():
            assert torch.allclose(value, expected[name], atol=1e-5), (zero, name)

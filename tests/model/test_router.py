"""The router loss is transformers', in every layout, on several ranks, recomputed or not; refused where there is none."""

import importlib
import json
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import transformers
from architectures import make_random
from definition import VOCAB, groups
from distributed import run_distributed

from raydpo.config import LoraSettings
from raydpo.errors import ConfigError, ModelError
from raydpo.model.layout import PADDED, Method, lay_out
from raydpo.model.load import add_lora
from raydpo.model.logps import LogpModel
from raydpo.model.router import balance_loss, router_loss_coef
from raydpo.model.ulysses import SequenceGroup

MODELS = Path(transformers.__file__).parent / "models"
PACKED, TREE = Method("packed", "sdpa"), Method("tree", "sdpa")
MIXTURES = ["mixtral", "phimoe", "ernie4_5_moe", "qwen3_moe", "gpt_oss"]
OTHERWISE = {"doge", "nllb_moe", "switch_transformers"}
"""Mixtures with a loss of another definition; the last two are no causal language models."""


def defined() -> list[str]:
    """The architectures of transformers that have a load-balancing loss."""
    files = sorted(MODELS.glob("*/modeling_*.py"))
    return [file.parent.name for file in files if "def load_balancing_loss_func" in file.read_text(encoding="utf-8")]


def test_the_loss_is_that_of_every_architecture():
    torch.manual_seed(0)
    layers = [torch.randn(30, 8, requires_grad=True) for _ in range(3)]
    real = torch.rand(30) < 0.7
    names = [name for name in defined() if name not in OTHERWISE]
    assert len(names) > 20
    for name in names:
        theirs = importlib.import_module(f"transformers.models.{name}.modeling_{name}").load_balancing_loss_func
        for mask in None, real:
            wanted = theirs(tuple(layers), 8, 2, mask)
            found = balance_loss(layers, 2, mask)
            assert found.item() == pytest.approx(wanted.item(), rel=1e-6), name
            for ours, other in zip(torch.autograd.grad(found, layers), torch.autograd.grad(wanted, layers), strict=True):
                assert torch.allclose(ours, other, atol=1e-7), name


def test_alike_and_collapsed():
    even = torch.eye(6).repeat(1, 2)  # each of 12 experts is the first choice of a position or its twin
    assert balance_loss([even], 2).item() == pytest.approx(2, rel=1e-5)
    collapsed = torch.full((6, 12), -50.0)
    collapsed[:, :2] = 50.0
    assert balance_loss([collapsed], 2).item() == pytest.approx(12, rel=1e-5)


def padded_of_theirs(model):
    """transformers' own loss of the same rows, with an attention mask; and its gradients."""
    rows = [torch.from_numpy(row) for group in groups() for row in group.sequences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).long()
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).long()
    model.zero_grad(set_to_none=True)
    loss = model(ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss
    loss.backward()
    return loss.item(), gradients(model)


def gradients(model):
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def results(model, method, group=None):
    """The loss of ``groups``, and its gradients; of a group, this rank's."""
    ours = LogpModel(model)
    ours.use(method)
    ours.group = group
    ours.train()
    model.zero_grad(set_to_none=True)
    _, loss = ours(ours.lay_out(groups()), router_loss=True)
    loss.backward()
    return loss.item(), gradients(model)


def alike(found, wanted, note):
    assert found[0] == pytest.approx(wanted[0], abs=1e-6), note
    assert set(found[1]) == set(wanted[1]), note
    for name, value in wanted[1].items():
        assert torch.allclose(found[1][name], value, atol=1e-6, rtol=1e-4), f"{note} {name}"


@pytest.mark.parametrize("name", MIXTURES)
def test_padded_and_packed_are_transformers_own(name):
    model = make_random(name, VOCAB)
    theirs = padded_of_theirs(model)
    alike(results(make_random(name, VOCAB), PADDED), theirs, "padded")
    alike(results(make_random(name, VOCAB), PACKED), theirs, "packed")
    recomputed = make_random(name, VOCAB)
    recomputed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    alike(results(recomputed, PACKED), theirs, "recomputed")


def test_the_tree_counts_a_shared_prompt_once():
    model = make_random("qwen3_moe", VOCAB)
    found, _ = results(model, TREE)
    layout = lay_out(groups(), TREE)
    logits = model.model(
        layout.input_ids, position_ids=layout.position_ids, segments=layout.segments, output_router_logits=True
    ).router_logits
    assert found == pytest.approx(balance_loss(logits, 2).item(), abs=1e-6)
    packed = lay_out(groups(), PACKED)
    assert layout.tokens == layout.input_ids.numel() < packed.tokens == lay_out(groups()).tokens
    assert abs(found - results(model, PACKED)[0]) > 1e-4, "the same loss of other positions"


def test_adapters_train_by_it():
    adapted = add_lora(make_random("qwen3_moe", VOCAB), LoraSettings(r=4, alpha=8, target_modules=("q_proj", "v_proj")), 0)
    _, found = results(adapted, TREE)
    assert max(each.abs().max() for name, each in found.items() if "lora_B" in name) > 0


def test_a_bfloat16_model_is_near_float32_and_scoring_asks_for_nothing():
    exact = results(make_random("qwen3_moe", VOCAB), PACKED)[0]
    model = make_random("qwen3_moe", VOCAB).bfloat16()
    assert results(model, PACKED)[0] == pytest.approx(exact, rel=0.02)
    ours = LogpModel(model)
    ours.use(PACKED)
    logps = ours(ours.lay_out(groups()))
    assert isinstance(logps, torch.Tensor) and logps.dtype == torch.float32


def on_ranks():
    torch.distributed.init_process_group("gloo")
    group = SequenceGroup.of_world(torch.distributed.get_world_size(), timedelta(minutes=1))
    return {name: results(make_random(name, VOCAB), TREE, group) for name in ("qwen3_moe", "gpt_oss")}


def test_ranks_that_share_positions_add_up_to_one(tmp_path):
    """Four ranks, of which the last has positions that are padding."""
    assert lay_out(groups(), TREE).input_ids.shape[1] % 4
    ranks = run_distributed(on_ranks, 4, tmp_path)
    for name, first in ranks[0].items():
        alone = results(make_random(name, VOCAB), TREE)
        for rank in ranks:
            assert rank[name][0] == pytest.approx(alone[0], abs=1e-6)
        parts = {each: sum(rank[name][1].get(each, torch.zeros(())) for rank in ranks) for each in first[1]}
        alike((alone[0], parts), alone, name)


def test_a_model_without_router_says_so_when_asked():
    model = LogpModel(make_random("llama", VOCAB))
    with pytest.raises(ModelError, match=r"returned no router logits.*set train.router_aux_loss_coef to 0"):
        model(model.lay_out(groups()), router_loss=True)


def directory(folder: Path, kind: str, **settings) -> str:
    config = transformers.AutoConfig.for_model(kind, **settings)
    config.save_pretrained(folder / kind)
    return str(folder / kind)


def test_null_is_the_models_own_and_zero_is_none(tmp_path):
    own = directory(tmp_path, "qwen3_moe", router_aux_loss_coef=0.02)
    assert [router_loss_coef(own, wish) for wish in (None, 0.0, 0.5)] == [0.02, 0.0, 0.5]
    for kind in ("mixtral", "olmoe", "gpt_oss", "qwen2_moe", "jamba", "granitemoe", "dbrx", "minimax_m2", "qwen3_5_moe"):
        assert router_loss_coef(directory(tmp_path, kind), 0.25) == 0.25, kind
    assert router_loss_coef(directory(tmp_path, "dbrx"), None) == 0.0, "it has no setting of that name"
    written = json.loads(Path(own, "config.json").read_text())
    assert written["router_aux_loss_coef"] == 0.02


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("llama", {}, "is not a mixture of experts that returns router logits"),
        ("deepseek_v3", {}, "has no load-balancing loss in transformers.*a bias of the router"),
        ("llama4_text", {}, "has no load-balancing loss in transformers"),
        ("granitemoehybrid", {"num_local_experts": 0}, "has 0 experts, so nothing is routed"),
        ("jamba", {"num_experts": 1}, "has 1 experts, so nothing is routed"),
        ("doge", {"is_moe": True}, "defines another loss"),
    ],
)
def test_refused_with_the_reason(kind, settings, why, tmp_path):
    path = directory(tmp_path, kind, **settings)
    assert router_loss_coef(path, None) == router_loss_coef(path, 0.0) == 0.0
    with pytest.raises(
        ConfigError, match=f"router_aux_loss_coef is 0.01, but {re.escape(path)}.*{why}.*set it to 0 or null"
    ):
        router_loss_coef(path, 0.01)

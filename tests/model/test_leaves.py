"""Mixtures under ZeRO-3 on ranks of unequal work, where each rank's tokens choose other experts."""

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, make_directories, make_random
from definition import VOCAB, groups
from distributed import run_distributed
from listed import make_listed

from raydpo.config import LoraSettings, TrainConfig
from raydpo.model.layout import PromptGroup
from raydpo.model.leaves import set_leaf_modules
from raydpo.model.load import load_causal_lm
from raydpo.model.logps import LogpModel
from raydpo.model.mixture import expert_blocks

CPU = torch.device("cpu")
STAND_IN = [PromptGroup(np.array([3], np.int32), (np.array([4], np.int32),))]
"""The work of a rank that has none: a prompt and a completion of one token each."""


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    return make_listed(tmp_path_factory.mktemp("listed") / "model", VOCAB)


def test_blocks_are_found_by_structure(listed):
    model = load_causal_lm(listed, "float32", rope_length=None, trust_remote_code=True)
    (first, _) = blocks = expert_blocks(model)
    assert (first.name, first.experts, first.routers, first.listed) == (
        "model.layers.0.mlp",
        ("model.layers.0.mlp.experts",),
        ("model.layers.0.mlp.gate",),
        True,
    )
    assert set_leaf_modules(LogpModel(model)) == [f"policy.{block.name}" for block in blocks]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_experts_and_attention_have_no_leaves(name):
    model = make_random(name, VOCAB)
    mixers = {"mamba": "MambaMixer", "qwen3_next": "Qwen3NextGatedDeltaNet"}.get(name)
    assert set_leaf_modules(model) == [key for key, module in model.named_modules() if type(module).__name__ == mixers]
    wanted = ("experts" in ARCHITECTURES[name] or "num_experts" in ARCHITECTURES[name]) * model.config.num_hidden_layers
    blocks = expert_blocks(model)
    assert len(blocks) == wanted
    for block in blocks:
        assert block.experts == (f"{block.name}.experts",) and len(block.routers) == 1 and not block.listed


def work_of(directory, lora, zero):
    """Log-probs of this rank's groups, the gradient norm and the weights after a step on the work of two ranks.

    On two ranks, the second has a stand-in; on one rank, both are its micro-batches.
    """
    from raydpo.model.partition import join_process_group
    from raydpo.training.policy import deepspeed_engine
    from raydpo.training.policy.deepspeed_engine import PolicyEngine
    from raydpo.training.policy.engine import PolicySpec

    def without_persistent(train, dtype, settings=deepspeed_engine._deepspeed_config):
        """As in large models, no weight is small enough to stay whole on every rank."""
        found = settings(train, dtype)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    deepspeed_engine._deepspeed_config = without_persistent
    join_process_group(CPU)
    spec = PolicySpec(path=str(directory), dtype="float32", lora=lora, trust_remote_code=True, layout="padded")
    engine = PolicyEngine(spec, TrainConfig(zero=zero, collective_timeout=20), CPU, groups()[:1])
    shares = [groups(), STAND_IN]
    if engine.world_size == 2:
        shares = [shares[engine.rank]]
    with engine.evaluating():
        scored = [np.concatenate([part for group in engine.module.score(each, CPU) for part in group]) for each in shares]
    for number, each in enumerate(shares):
        logps = engine.logps(engine.lay_out(each))
        engine.backward((logps * torch.linspace(-1, 1, len(logps))).sum() + logps.sum(), last=number == len(shares) - 1)
    norm = engine.step(1e-2)
    return scored, norm, engine.gather()


def cases(listed, folder):
    fused = make_directories(["gpt_oss", "deepseek_v3"], folder, VOCAB)
    only = LoraSettings(r=2, target_modules=(), target_parameters=("experts.gate_up_proj", "experts.down_proj"))
    return {
        "list": (listed, None),
        "adapters on a list": (listed, LoraSettings(r=2)),
        "adapters on tensors alone": (fused["gpt_oss"], only),
        "adapters on shared experts": (fused["deepseek_v3"], LoraSettings(r=2)),
    }


def scored_in_parts(directory):
    """Log-probs of this rank's groups, by a team that holds the weights together."""
    from raydpo.model.partition import Partition, join_process_group, partitioned, partitioned_loading

    join_process_group(CPU)
    partition = Partition(2)
    with partitioned_loading(partition, "float32"):
        model = LogpModel(load_causal_lm(directory, "float32", rope_length=None, trust_remote_code=True))
    model = partitioned(model, partition, "float32")
    work = groups() if torch.distributed.get_rank() == 0 else STAND_IN
    return np.concatenate([part for group in model.score(work, CPU) for part in group])


def runs(made, zero):
    parts = scored_in_parts(made["list"][0]) if zero == 3 else None
    return parts, {name: work_of(directory, lora, zero) for name, (directory, lora) in made.items()}


def test_ranks_of_unequal_work_compute_what_one_rank_does(listed, tmp_path):
    made = cases(listed, tmp_path / "models")
    ((_, alone),) = run_distributed(runs, 1, tmp_path / "one", made, 0)
    (parts, first), (stand_in, second) = run_distributed(runs, 2, tmp_path / "two", made, 3)
    assert np.allclose(parts, alone["list"][0][0], atol=1e-6) and np.allclose(stand_in, alone["list"][0][1], atol=1e-6)
    for name in made:
        (wanted, nothing), norm, weights = alone[name]
        assert np.allclose(first[name][0][0], wanted, atol=1e-6) and np.allclose(second[name][0][0], nothing, atol=1e-6)
        assert first[name][1] == second[name][1] == pytest.approx(norm, rel=1e-5)
        assert first[name][2].keys() == weights.keys()
        for key, value in weights.items():
            assert torch.allclose(first[name][2][key], value, atol=1e-5), (name, key)

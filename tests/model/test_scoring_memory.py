"""Bytes of a reference and of its pass as planned: against named_parameters, and against tensors counted one by one."""

import gc
from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES, make_random
from live import like_a_gpu, make_policy, pairs_of
from tiny import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from raydpo.config import ModelConfig
from raydpo.config.train import ScoreConfig
from raydpo.errors import ConfigError
from raydpo.model.memory.activations import scoring_memory
from raydpo.model.memory.anatomy import EMBEDDING, HEAD, Anatomy
from raydpo.model.memory.ledger import ENOUGH
from raydpo.model.memory.scoring import Links, ScoringRoom, adapter_bytes, choose_partition, weight_bytes

GIB = 2**30
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
WIDTHS = {
    "llama 8B": ("llama", {"hidden_size": 4096, "intermediate_size": 14336, **HEADS}),
    "llama 405B": (
        "llama",
        {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 8},
    ),
    "as many keys as queries": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32},
    ),
    "gemma2 27B": (
        "gemma2",
        {"hidden_size": 4608, "intermediate_size": 36864, "num_attention_heads": 32, "num_key_value_heads": 16},
    ),
    "gpt_neox": ("gpt_neox", {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32}),
    "mixtral 8x7B": (
        "mixtral",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2, **HEADS},
    ),
    "qwen3 235B-A22B": (
        "qwen3_moe",
        {
            "hidden_size": 4096,
            "moe_intermediate_size": 1536,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
    ),
    "gpt_oss 20B": (
        "gpt_oss",
        {
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
        },
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_are_counted_to_the_last_byte(name):
    made = make_random(name, 96).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    numbers = sum(parameter.numel() for _, parameter in model.named_parameters())
    anatomy = Anatomy.of_model(model)
    assert weight_bytes(anatomy, "bfloat16") == 2 * numbers
    assert weight_bytes(anatomy, "float32") == 4 * numbers


@pytest.mark.parametrize("name", WIDTHS)
def test_the_pass_is_planned_as_its_tensors_are_counted(name):
    """Within 5 % of the most that is alive in a pass of two layers, beside the weights, for each position more."""
    kind, sizes = WIDTHS[name]
    config = AutoConfig.for_model(kind, num_hidden_layers=2, vocab_size=512, **sizes)
    peaks = []
    with like_a_gpu() as live:
        model = make_policy(config, ModelConfig(path="m")).eval().requires_grad_(False)
        for pairs in (3, 6):
            gc.collect()
            layout = model.lay_out(pairs_of(pairs, 1024, 512))
            weights = live.peak = live.now
            with torch.no_grad():
                model(layout)
            peaks.append(live.peak - weights)
    counted = (peaks[1] - peaks[0]) / (3 * 2048)
    with torch.device("meta"):
        anatomy = Anatomy.of_model(AutoModelForCausalLM.from_config(config))
    planned = scoring_memory(anatomy, width=2)
    print(f"{name}: {planned:,.0f} bytes a position planned, {counted:,.0f} counted")
    assert planned == pytest.approx(counted, rel=0.05)


def ask(anatomy, gib, per_machine=8, longest=2000, host=None, links=None, adapter=0.0, **wish):
    room = ScoringRoom(name="GPU", device_bytes=gib * GIB, per_machine=per_machine, host_bytes=host, links=links)
    wish = ScoreConfig(**{"workers": per_machine, **wish})
    return choose_partition(anatomy, wish, room, dtype="bfloat16", longest=longest, adapter_bytes=adapter)


def test_gathers_are_twice_the_largest_layer_or_table(llama):
    """Llama 3.1 8B on 8 cards of 10 GiB: its tables have 1.0 GB, a layer 0.4."""
    found = ask(llama, 10)
    assert not found.simple and found.gathered_bytes == 2 * 2 * 128256 * 4096
    layer = 2 * sum(weight.numel for weight in llama.weights if weight.place == 3 and weight.numel > 100_000)
    small = replace(llama, weights=tuple(one for one in llama.weights if one.place not in (EMBEDDING, HEAD)))
    assert ask(small, 10).gathered_bytes == 2 * layer
    norms = 2 * (2 * 32 + 1) * 4096
    assert found.weights_bytes == pytest.approx(found.model_bytes / found.partition + norms)


def test_the_longest_sequence_and_the_budget_must_fit(llama):
    """15 GiB of weights in 24 GiB leave room for 35,000 positions."""
    assert ask(llama, 24, longest=30_000).simple and not ask(llama, 24, longest=40_000).simple
    assert ask(llama, 24, longest=60_000, sequence_parallel=2).simple
    assert not ask(llama, 24, tokens_per_batch=40_000).simple
    with pytest.raises(ConfigError, match=r"2,048 positions"):
        ask(llama, 4, per_machine=1, offload=None)
    with pytest.raises(ConfigError, match=r"a higher score\.sequence_parallel"):
        ask(llama, 24, per_machine=1, longest=4_000_000)


def test_teams_divide_the_workers_and_the_sequence_groups(llama):
    assert {ask(llama, 11, workers=workers).partition for workers in (8, 16, 24)} == {4}
    assert ask(llama, 11, workers=6).partition == 6
    assert ask(llama, 12, workers=12).partition == 3  # two teams of three on each of two machines
    assert ask(llama, 11, workers=12).partition == 4
    assert ask(llama, 24, workers=12, longest=70_000, sequence_parallel=4).partition == 1
    assert ask(llama, 10, workers=8, sequence_parallel=8).partition == 8
    with pytest.raises(ConfigError, match=r"8 workers are not a multiple of score\.partition 3"):
        choose_partition(
            llama,
            ScoreConfig(workers=3, partition=3).model_copy(update={"workers": 8}),
            ScoringRoom(name="GPU", device_bytes=24 * GIB, per_machine=8),
            dtype="bfloat16",
            longest=2000,
        )


def test_an_adapter_counts(llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    numbers = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert adapter_bytes(str(tmp_path / "adapter"), "bfloat16") == 2 * numbers
    assert adapter_bytes(None, "bfloat16") == 0
    assert ask(llama, 80, adapter=GIB).model_bytes == ask(llama, 80).model_bytes + GIB


def test_the_share_of_gathers_by_hand(llama):
    """Each of 4 devices receives three quarters of 16 GB at 16 GB/s, and its quarter from the host at 4 GB/s."""
    links = Links(name="PCIe 4", gather=16e9, host=4e9, seconds=1e-4)
    found = ask(llama, 10, per_machine=4, links=links, tokens_per_batch=4096)
    size = found.model_bytes
    assert found.partition == 4 and found.gather_share == pytest.approx(0.75 * size / 16e9 / 0.4096)
    assert found.slower == found.gather_share > 1 and "times as long as products" in found.line
    host = ask(llama, 10, per_machine=4, links=links, tokens_per_batch=4096, offload="cpu")
    assert host.gather_share == pytest.approx((0.75 * size / 16e9 + size / 4 / 4e9) / 0.4096)
    assert host.host_bytes == size
    assert ask(llama, 80, links=links).gather_share == 0 and ask(llama, 80, links=links).slower == 1


def test_each_team_needs_its_own_copy_in_the_hosts_memory(llama):
    forced = ask(llama, 10, partition=2, offload="cpu")
    assert forced.host_bytes == 4 * forced.model_bytes
    enough = 1.1 * forced.host_bytes
    assert ask(llama, 10, partition=2, offload="cpu", host=enough).partition == 2
    with pytest.raises(ConfigError, match="of host memory"):
        ask(llama, 10, partition=2, offload="cpu", host=enough - 1)
    assert ask(llama, 10, offload="cpu", host=enough / 4).partition == 8 and ENOUGH == 2048


def test_few_positions_or_the_host_whichever_is_faster(llama):
    """On 4 cards of 10 GiB the weights leave 12,000 positions, from the host 38,000."""
    for host, offload in ((50e9, "cpu"), (1e9, None)):
        links = Links(name="NVLink", gather=350e9, host=host, seconds=1e-5)
        assert ask(llama, 10, per_machine=4, links=links).offload == offload
    assert ask(llama, 10, per_machine=4).offload == "cpu" and ask(llama, 10, per_machine=4, host=GIB).offload is None

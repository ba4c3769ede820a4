"""One micro-batch on several ranks: the same log-probs and gradients, with a part of the memory."""

from datetime import timedelta

import numpy as np
import pytest
import torch
from architectures import make_random
from definition import VOCAB, groups
from distributed import run_distributed

from raydpo.config import LoraSettings
from raydpo.errors import ModelError
from raydpo.model.budget import reset_peak_memory, used_memory
from raydpo.model.layout import Method, PromptGroup, lay_out
from raydpo.model.load import add_lora
from raydpo.model.logps import LogpModel
from raydpo.model.selfcheck import choose_layout, share_positions
from raydpo.model.ulysses import HeadShare, SequenceGroup, head_shares

CPU = torch.device("cpu")
SOON = timedelta(minutes=1)
NAMES = ["llama", "gemma2", "gemma3_text", "gpt2", "qwen3_moe", "gpt_oss"]
"""Grouped key heads, soft caps, windows, learned positions, experts, sinks."""


def test_heads_are_shared_out_by_hand():
    assert head_shares(8, 2, 2) == (HeadShare(range(0, 4), (0,)), HeadShare(range(4, 8), (1,)))
    assert head_shares(9, 3, 2) == (HeadShare(range(0, 3), (0,)), HeadShare(range(3, 9), (1, 2)))
    assert head_shares(8, 2, 4) == tuple(HeadShare(range(2 * rank, 2 * rank + 2), (rank // 2,)) for rank in range(4))
    assert head_shares(6, 2, 4)[1:3] == (HeadShare(range(1, 3), (0,)), HeadShare(range(3, 4), (1,)))
    assert head_shares(15, 3, 4)[1] == HeadShare(range(3, 7), (0, 1))
    # Two query heads of one key head and one of another are not even: each gets its own copy of the key head.
    assert head_shares(10, 2, 3)[1] == HeadShare(range(3, 6), (0, 0, 1))
    with pytest.raises(ModelError, match="sequence_parallel 5 is more than the 4 attention heads"):
        head_shares(4, 2, 5)


def test_parts_are_all_positions_once():
    many = groups()
    whole = lay_out(many, Method("tree", "sdpa"))
    size, total = 3, sum(whole.lengths)
    parts = [whole.part(SequenceGroup(None, rank, size)) for rank in range(size)]
    width = -(-whole.input_ids.shape[1] // size)
    assert {part.input_ids.shape for part in parts} == {(1, width)} and width < whole.input_ids.shape[1] / 2
    assert torch.cat([part.input_ids for part in parts], 1)[:, : whole.input_ids.shape[1]].equal(whole.input_ids)
    places = torch.cat([part.places for part in parts])
    assert sorted(places[places < total].tolist()) == list(range(total))
    for part in parts:
        assert part.targets.equal(whole.targets[part.places])


def test_a_rank_without_predictions_still_makes_one():
    layout = lay_out([PromptGroup(np.arange(1, 40), (np.array([1]), np.array([2])))], Method("tree", "sdpa"))
    part = layout.part(SequenceGroup(None, 0, 2))
    assert part.places.tolist() == [2] and part.positions.tolist() == [0], "place N: nobody looks at it"


def results(model, method, group):
    """Log-probs, and the gradients of a weighted sum of them; with a group, this rank's part of the gradients."""
    ours = LogpModel(model)
    ours.use(method)
    ours.group = group
    ours.train()
    model.zero_grad(set_to_none=True)
    logps = ours(ours.lay_out(groups()))
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return logps.detach(), {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


def models():
    for name in NAMES:
        yield name, make_random(name, VOCAB)
    adapted = add_lora(make_random("llama", VOCAB), LoraSettings(r=4, alpha=8), seed=0)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
    adapted.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    yield "adapters, recomputed", adapted


def compared(size):
    group = SequenceGroup.of_world(size, SOON)
    found = {}
    for name, model in models():
        for layout in ("tree", "packed"):
            method = Method(layout, "sdpa")
            logps, gradients = results(model, method, None)
            logps_together, parts = results(model, method, group)
            worst = 0.0
            for key, gradient in gradients.items():
                # An expert without tokens has no gradient on any rank.
                assert (parts[key] is None) <= (gradient is None or not gradient.abs().sum()) or name == "qwen3_moe", key
                total = torch.zeros_like(model.get_parameter(key)) if parts[key] is None else parts[key].clone()
                torch.distributed.all_reduce(total)
                if gradient is not None:
                    worst = max(worst, float((total - gradient).norm() / gradient.norm().clamp_min(1e-2)))
            found[name, layout] = float((logps_together - logps).abs().max()), worst
    return found


def in_gloo(size):
    torch.distributed.init_process_group("gloo")
    return compared(size)


@pytest.mark.parametrize("size", [2, 3])
def test_log_probs_and_gradients_are_those_of_one_rank(size, tmp_path):
    for found in run_distributed(in_gloo, size, tmp_path, size):
        assert len(found) == 2 * (len(NAMES) + 1)
        for case, (gap, gradient_gap) in found.items():
            assert gap < 1e-5 and gradient_gap < 1e-4, (case, gap, gradient_gap)


def refused():
    torch.distributed.init_process_group("gloo")
    group, messages = SequenceGroup.of_world(2, SOON), []
    for name, settings in (("mamba", {}), ("bloom", {}), ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1})):
        model = LogpModel(make_random(name, VOCAB, **settings))
        choose_layout(model, CPU)
        with pytest.raises(ModelError) as caught:
            share_positions(model, CPU, group)
        messages.append(str(caught.value))
    model = LogpModel(make_random("llama", VOCAB))
    choose_layout(model, CPU)
    line = share_positions(model, CPU, group)
    # A layer that mixes neighbouring positions outside attention, which layouts cannot support.
    model = LogpModel(make_random("llama", VOCAB))
    choose_layout(model, CPU)
    mlp = model.causal_lm.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + x.mean(1, keepdim=True)
    with pytest.raises(ModelError) as caught:
        share_positions(model, CPU, group)
    return messages, line, str(caught.value)


def test_what_cannot_be_shared_is_refused(tmp_path):
    (stateful, padded, heads), line, wrong = run_distributed(refused, 2, tmp_path)[0]
    assert "sequence_parallel 2" in stateful and "MambaMixer of this model carries a state along the whole" in stateful
    assert "sequence_parallel 2" in padded and "padded rows" in padded
    assert "sequence_parallel 2 is more than the 1 attention heads" in heads
    assert line.startswith("sequence parallel: 2 devices compute each micro-batch together, ")
    assert "is wrong for LlamaForCausalLM" in wrong


def memory_of(size, positions):
    """Bytes of the autograd graph of one pair with ``positions`` positions on this rank."""
    torch.distributed.init_process_group("gloo")
    model = LogpModel(
        make_random(
            "llama", VOCAB, hidden_size=128, intermediate_size=512, num_hidden_layers=4, max_position_embeddings=positions
        )
    )
    model.use(Method("tree", "sdpa"))
    model.group = SequenceGroup.of_world(size, SOON)
    model.train()
    rng = np.random.default_rng(0)

    def run(count):
        prompt, chosen, rejected = (rng.integers(0, VOCAB, length) for length in (count // 2, count // 4, count // 4))
        model(model.lay_out([PromptGroup(prompt, (chosen, rejected))])).sum().backward()

    run(64)
    reset_peak_memory(CPU)
    before = used_memory(CPU)
    run(positions)
    return used_memory(CPU) - before


def test_a_rank_holds_its_part_of_a_long_sequence(tmp_path):
    alone, shared = (max(run_distributed(memory_of, size, tmp_path / f"{size}", size, 4096)) for size in (1, 4))
    # More than a quarter, since each rank has all of SDPA's masks and all-to-all makes copies. Measured: 0.40 to 0.45.
    assert shared < 0.6 * alone, (alone, shared)

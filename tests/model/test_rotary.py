"""Length-dependent rotary frequencies are the same for all rows, whatever the other rows and earlier batches are."""

from datetime import timedelta

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, LONGEST, make_random
from definition import VOCAB, by_definition, groups
from distributed import run_distributed
from kernel import tiny_pairs, train_here, with_reference
from tiny import make_model
from transformers import AutoModelForCausalLM

from raydpo.errors import ModelError
from raydpo.model.load import load_causal_lm
from raydpo.model.logps import LogpModel
from raydpo.model.rotary import fix_rotary, rope_length
from raydpo.model.selfcheck import choose_layout
from raydpo.reference.identity import identify
from raydpo.reference.score import ReferenceSpec, Scorer

CPU = torch.device("cpu")
DEPENDENT = ["phi3-longrope", "llama-dynamic", "phimoe"]
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
DYNAMIC = {"type": "dynamic", "factor": 2.0}


def flat(scored):
    return np.concatenate([logps for group in scored for logps in group])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_log_prob_does_not_depend_on_its_neighbours(name):
    """Log-probs do not depend on earlier batches, below and above the model's original length."""
    model = LogpModel(make_random(name, VOCAB))
    choose_layout(model, CPU)
    short, middle, long = groups(shapes=((9, 6, 4), (40, 20, 3), (150, 60, 46)))
    alone = [flat(model.score([group], CPU)) for group in (short, middle, long)]
    together = model.score([short, middle, long], CPU)
    again = [flat(model.score([group], CPU)) for group in (short, middle, long)]
    for before, beside, after in zip(alone, together, again, strict=True):
        assert np.array_equal(before, after)
        assert np.abs(before - np.concatenate(beside)).max() < 2e-5


@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic"])
@pytest.mark.parametrize(("max_length", "tokens"), [(LONGEST, LONGEST), (32, 32), (32, 20)])
def test_the_frequencies_are_those_that_transformers_gives_such_a_length(name, max_length, tokens, tmp_path):
    make_random(name, VOCAB).save_pretrained(tmp_path)
    length = identify(tmp_path, "float32", max_length=max_length).rope_length
    group = groups(shapes=((tokens - 12, 12),))[0]
    expected = by_definition(AutoModelForCausalLM.from_pretrained(tmp_path), group, group.completions[0])
    ours = load_causal_lm(tmp_path, "float32", rope_length=length)
    assert torch.allclose(by_definition(ours, group, group.completions[0]), expected, atol=1e-5)


@pytest.mark.parametrize("long", [False, True])
def test_phimoe_has_the_frequencies_and_the_scale_of_the_length(long):
    model = make_random("phimoe", VOCAB)
    fix_rotary(model := type(model)(model.config).eval(), 33 if long else 32)
    rotary, rope = model.model.rotary_emb, model.config.rope_parameters
    assert rope["rope_type"] == "longrope"  # the exported configuration is unchanged
    cos, _ = rotary(torch.zeros(1), torch.arange(8)[None])
    factor = torch.tensor(rope["long_factor" if long else "short_factor"])
    angles = torch.arange(8)[:, None] / (factor * 10000.0 ** (torch.arange(0, 8, 2) / 8))
    assert torch.allclose(cos[0, :, :4], angles.cos() * rope["long_mscale" if long else "short_mscale"], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "longest", "length"),
    [
        ({"rope_scaling": LONGROPE}, 4096, 4096),
        ({"rope_scaling": LONGROPE}, 100, 4096),
        ({"rope_scaling": LONGROPE}, 4097, 4097),
        ({"rope_scaling": LONGROPE}, 99_999, 4097),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 8}, 9, 9),
        ({"rope_scaling": {"type": "longrope"}}, 9, 9),
        ({"rope_scaling": DYNAMIC, "max_position_embeddings": 64}, 65, 65),
        ({"rope_scaling": DYNAMIC, "max_position_embeddings": 64}, 64, 64),
        ({"rope_scaling": DYNAMIC}, 10, 10),
        ({"rope_scaling": DYNAMIC, "max_position_embeddings": 64}, 3, 64),
        ({"text_config": {"rope_parameters": {"full": LONGROPE, "sliding": {"rope_type": "default"}}}}, 9, 4096),
        ({"rope_scaling": DYNAMIC | {"alpha": 1000.0}, "max_position_embeddings": 64}, 65, None),
        ({"rope_scaling": None}, 9, None),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 9, None),
        ({}, 9, None),
    ],
    ids=str,
)
def test_the_length_is_read_from_the_configuration(settings, longest, length):
    assert rope_length(settings, longest) == length
    if length is not None:  # a worker computes it from its settings
        assert rope_length(settings, length) == length


@pytest.mark.parametrize("name", DEPENDENT)
def test_it_travels_in_the_identity_and_cannot_be_forgotten(name, tmp_path):
    make_random(name, VOCAB).save_pretrained(tmp_path)
    short, long = (identify(tmp_path, "float32", max_length=length) for length in (32, 200))
    assert short.rope_length == 32 and long.rope_length == (200 if "dynamic" in name else 33)
    assert short.differences(long) == [f"rope_length: 32 here, {long.rope_length} there"]
    with pytest.raises(ModelError, match="depend on the sequence length"):
        load_causal_lm(tmp_path, "float32", rope_length=identify(tmp_path, "float32").rope_length)
    spec = ReferenceSpec(path=str(tmp_path), adapter=None, identity=long)
    assert Scorer(spec, device="cpu", tokens_per_batch=512).model.causal_lm.rope_length == long.rope_length


def test_a_model_with_code_of_its_own_is_refused():
    model = make_random("llama", VOCAB)
    with pytest.raises(ModelError, match="or remove rope_scaling from config"):
        fix_rotary(model, 4096)
    model = make_random("phi3-longrope", VOCAB)
    model.model.rotary_emb.rope_type = "longrope"
    forward = model.model.rotary_emb.forward

    def asks_for_itself(x, position_ids):
        return tuple(each * (2.0 if position_ids.max() > 32 else 1.0) for each in forward(x, position_ids))

    model.model.rotary_emb.forward = asks_for_itself
    with pytest.raises(ModelError, match="log-probs would depend on the other rows"):
        fix_rotary(model, 33)


def trained(model, scratch):
    table = with_reference(tiny_pairs(17), model, tokens_per_batch=1)
    run = train_here(table, model, scratch, steps=1, tokens_per_batch=4096, pairs_per_step=17)
    return run.steps[0]["loss"], run.summary.gate


def test_a_policy_starts_as_its_reference_however_both_were_batched(tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = make_model(tmp_path / "model", "phi3", original_max_position_embeddings=48, rope_parameters=rope)
    ((loss, gate),) = run_distributed(trained, 1, tmp_path / "run", model, tmp_path / "s")
    assert loss == pytest.approx(np.log(2), abs=1e-6), gate


def shared_scores(directory, length, ranks):
    import torch.distributed as dist

    from raydpo.model.ulysses import SequenceGroup

    dist.init_process_group("gloo")
    spec = ReferenceSpec(path=str(directory), adapter=None, identity=identify(directory, "float32", max_length=length))
    scorer = Scorer(spec, device="cpu", tokens_per_batch=512, group=SequenceGroup.of_world(ranks, timedelta(minutes=1)))
    return flat(scorer.score(groups(shapes=((40, 24), (9, 6, 4)))))


@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic"])
def test_ranks_that_share_positions_use_the_same_frequencies(name, tmp_path):
    make_random(name, VOCAB).save_pretrained(tmp_path / "model")
    (alone,) = run_distributed(shared_scores, 1, tmp_path / "1", tmp_path / "model", 64, 1)
    for together in run_distributed(shared_scores, 2, tmp_path / "2", tmp_path / "model", 64, 2):
        assert np.abs(alone - together).max() < 1e-5

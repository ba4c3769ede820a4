"""How a command puts the reference on a cluster's devices, by a list of nodes in place of Ray's."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from raydpo.cluster import resources
from raydpo.config import load_config
from raydpo.errors import ConfigError
from raydpo.model.memory.anatomy import Anatomy
from raydpo.pipeline import partition as module
from raydpo.pipeline.partition import check_alone, place_reference

RECIPES = Path(__file__).parents[1] / "recipes"
GIB = 2**30
ANATOMY = functools.cache(Anatomy.of)
BIG, SMALL = "Llama-3.1-70B-Instruct", "SmolLM2-135M-Instruct"


class Said:
    def __init__(self):
        self.lines, self.warnings = [], []

    def say(self, line):
        self.lines.append(line)

    def warn(self, line):
        self.warnings.append(line)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Gives how a model is placed on nodes, each (GPUs, kind or None); ``asked`` are answers of nodes that are asked."""
    (tmp_path / "a.jsonl").write_text("{}\n")
    monkeypatch.setattr(Anatomy, "of", ANATOMY)

    def placed(nodes, *overrides, model=BIG, quantization=None, asked=None, memory=64):
        listed = [
            {
                "NodeID": str(number),
                "Resources": {"CPU": 64, "memory": memory * GIB}
                | ({"GPU": gpus} if gpus else {})
                | ({f"accelerator_type:{kind}": 1.0} if kind else {}),
            }
            for number, (gpus, kind) in enumerate(nodes)
        ]
        for each in (resources, module):
            monkeypatch.setattr(each, "nodes_with", lambda *_: listed)
        monkeypatch.setattr(resources, "grows_to", lambda _: None)
        answers = dict(asked or {})
        monkeypatch.setattr(module, "_asked", lambda nodes, what: [answers[what] * GIB] * len(nodes))
        model_path = str(RECIPES / model)
        tree = {"output": "runs", "model": {"path": model_path}, "data": {"train": str(tmp_path / "a.jsonl")}}
        config = load_config(tree, ["score.workers=8", *overrides])
        identity = SimpleNamespace(dtype="bfloat16")
        spec = SimpleNamespace(
            path=model_path, adapter=None, quantization=quantization, trust_remote_code=False, identity=identity
        )
        return place_reference(config, spec), config, spec

    return placed


def test_a_team_is_made_where_one_gpu_cannot_hold_the_reference(place):
    """70B in bfloat16 on a machine with 8 cards of 80 GiB: two teams of four."""
    placed, *_ = place([(8, "H100")])
    assert (placed.config.score.partition, placed.config.score.offload) == (4, None)
    assert (placed.resources.partition, placed.resources.teams, placed.resources.bundle) == (4, 2, {"CPU": 4, "GPU": 4.0})
    (line,) = placed.lines
    assert "141.1 GB in bfloat16; score.partition=4: 32.9 GiB of weights and 3.9 GiB gathered on each of 4 x H100" in line
    assert "65,536 positions fit; gathers 2 % of the time (350 GB/s by NVLink, assumed)" in line
    said = Said()
    placed.tell(said)
    assert said.lines == [line] and not said.warnings


def test_nothing_is_said_of_a_reference_that_each_device_holds(place, monkeypatch):
    monkeypatch.setattr(module, "Anatomy", None)  # no model is built for that
    for model, nodes in (("Llama-3.1-8B-Instruct", [(8, "H100")]), (SMALL, [(8, None)])):
        placed, *_ = place(nodes, model=model)
        assert (placed.config.score.partition, placed.config.score.offload) == (1, None)
        assert placed.resources.teams == 8 and not (placed.lines or placed.warnings or placed.problem)


def test_a_card_whose_memory_is_unknown_is_asked(place):
    """Ray names both kinds of A100 alike, and does not know the newest cards."""
    assert place([(8, "A100")], asked={"gpu": 80})[0].config.score.partition == 4
    assert place([(8, "A100")], asked={"gpu": 40})[0].config.score.partition == 8
    assert place([(8, None)], asked={"gpu": 180})[0].config.score.partition == 1
    assert place([(8, "H100"), (8, "A100")], "score.workers=16", asked={"gpu": 40})[0].config.score.partition == 8


def test_the_host_holds_the_weights_if_it_has_room_for_a_tenth_more(place):
    nodes, workers = [(2, "H100")], "score.workers=2"
    placed, *_ = place(nodes, workers, asked={"host": 146})
    assert (placed.config.score.partition, placed.config.score.offload) == (2, "cpu")
    assert "144.6 GiB of each machine of 146.0 free" in placed.lines[0] and "50 GB/s from the host" in placed.lines[0]
    for gpus in (1, 2):
        short, *_ = place([(gpus, "H100")], f"score.workers={gpus}", asked={"host": 144})
        with pytest.raises(ConfigError, match=rf"141\.1 GB .* does not fit on {gpus} x H100 .*of which 144\.0 are free"):
            short.tell(Said())
    many, *_ = place([(4, "A100-80G")], "score.workers=4", model="Mistral-Large-Instruct-2407", asked={"host": 144})
    assert (many.config.score.partition, many.config.score.offload) == (4, None)


@pytest.mark.parametrize(
    ("overrides", "refusal"),
    [
        (["score.partition=2", "score.offload=null", "score.workers=8"], r"does not fit on 8 x L40S .*partition 2"),
        (["score.partition=1", "score.offload=null"], r"What would do: score\.offload=cpu with"),
        (
            ["score.partition=1"],
            r"score\.offload=cpu with 1,156\.5 GiB of host memory .*, of which 100\.0 are free; or 4 such",
        ),
    ],
)
def test_what_can_never_work_is_refused_before_a_worker_starts(place, overrides, refusal):
    placed, *_ = place([(8, "L40S")], *overrides, asked={"host": 100})
    with pytest.raises(ConfigError, match=refusal):
        placed.tell(Said())


def test_a_team_larger_than_a_machine_is_refused(place):
    with pytest.raises(ConfigError, match=r"score\.partition 8 needs one machine with 8 GPUs, .* has 4"):
        place([(4, "H100"), (4, "H100")], "score.partition=8")


def test_what_the_user_sets_is_used_even_if_the_plan_doubts_it(place):
    placed, *_ = place([(8, "H100")], "score.partition=2", "score.offload=null")
    assert placed.config.score.partition == 2 and "0 positions fit by the plan, where 2,048 are" in placed.lines[0]
    assert place([(8, "H100")], "score.offload=cpu", asked={"host": 500})[0].config.score.partition == 8


def test_a_fraction_of_a_gpu_holds_the_reference_whole_or_not_at_all(place):
    placed, *_ = place([(8, "L40S")], "score.gpus_per_worker=0.5", model="Llama-3.1-8B-Instruct", asked={"host": 1})
    assert placed.config.score.partition == 1 and placed.problem is None
    placed, *_ = place([(8, "L40S")], "score.gpus_per_worker=0.25", model="Llama-3.1-8B-Instruct", asked={"host": 1})
    with pytest.raises(ConfigError, match=r"does not fit on 1 x L40S \(12\.0 GiB\)"):
        placed.tell(Said())


def test_a_cluster_that_starts_nodes_on_demand_has_no_card_to_ask(place):
    grows = ("ray.autoscaling=true", "score.gpus_per_worker=1")
    assert place([], *grows, "score.accelerator=H100")[0].config.score.partition == 4
    placed, *_ = place([], *grows)
    said = Said()
    placed.tell(said)
    assert placed.config.score.partition == 1
    assert "each GPU must hold the whole reference, 141.1 GB in bfloat16. Set score.accelerator" in said.warnings[0]
    for decided in (["score.partition=4"], ["score.offload=cpu"]):
        assert not place([], *grows, *decided)[0].warnings


def test_cpus_hold_the_reference_whole_and_a_node_too_small_is_a_warning(place):
    placed, *_ = place([(0, None)], "score.workers=2")
    said = Said()
    placed.tell(said)
    assert placed.config.score.partition == 1
    assert "takes 131.4 GiB in each of 2 worker(s) of a node, and the smallest node has 64.0 GiB" in said.warnings[0]
    assert not place([(0, None)], "score.workers=2", memory=300)[0].warnings
    kept, *_ = place([(0, None)], "score.workers=2", "score.partition=2", "score.offload=cpu", memory=300)
    assert (kept.config.score.partition, kept.config.score.offload, kept.warnings) == (2, "cpu", ())


def test_a_quantized_reference_is_never_partitioned(place):
    placed, *_ = place([(8, "L40S")], quantization="4bit")
    assert placed.config.score.partition == 1 and placed.problem is None
    placed, *_ = place([(8, "H100")], "score.partition=4", quantization="4bit")
    with pytest.raises(ConfigError, match="exclude each other"):
        placed.tell(Said())


def test_answers_need_a_whole_model_on_each_gpu(place):
    """Whatever the reference pass does with it."""
    _, config, spec = place([(8, "H100")])
    with pytest.raises(ConfigError, match=r"answers of the policy need the whole model .* Set model\.quantization=4bit"):
        check_alone(config, spec, "answers of the policy")
    _, config, spec = place([(8, "H100")], "score.partition=2", model="Llama-3.1-8B-Instruct")
    check_alone(config, spec, "answers of the policy")
    _, config, spec = place([(8, "H100")], quantization="4bit")
    check_alone(config, spec, "answers of the policy")


def test_weights_that_are_stored_quantized_are_left_whole(place, monkeypatch, tmp_path):
    """Their bytes are fewer than their numbers tell, and a team refuses them."""
    monkeypatch.setattr(module, "_stored_quantized", lambda spec: True)
    placed, *_ = place([(8, "H100")])
    assert placed.config.score.partition == 1 and placed.problem is None
    monkeypatch.undo()
    for stored, quantized in (({}, False), ({"quantization_config": {"quant_method": "fp8"}}, True)):
        (tmp_path / "config.json").write_text(json.dumps(stored))
        assert module._stored_quantized(SimpleNamespace(path=str(tmp_path))) is quantized

"""Each recipe in jobs/ loads, and by raydpo's plan its training and its reference pass fit the hardware that it names."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny import make_tokenizer, preferences, write_preferences

from raydpo.config import load_config
from raydpo.data.pairs import load_pairs
from raydpo.data.tokenise import Tokeniser
from raydpo.estimate.cards import DEVICES, MEMORY
from raydpo.estimate.modes import Question, compare_modes
from raydpo.estimate.plan import make_plan
from raydpo.estimate.rate import stated_rates
from raydpo.model import budget
from raydpo.model.memory.activations import Batch
from raydpo.model.memory.anatomy import Anatomy, model_cost
from raydpo.model.memory.ledger import BASE_BYTES, ENOUGH, estimate_memory
from raydpo.model.memory.needs import PROPORTIONS, needs_of
from raydpo.model.memory.scoring import ScoringRoom, choose_partition

anatomy_of = functools.cache(Anatomy.of)
ROOT = Path(__file__).parents[2]
MODELS = Path(__file__).parent
GIB = 2**30
ALL = sorted(file.stem for file in (ROOT / "jobs").glob("*.yaml") if file.stem != "base")
ROUNDS = [name for name in ALL if "-rounds-" in name]
RECIPES = [name for name in ALL if name not in ROUNDS]
ON_GPUS = [name for name in RECIPES if not name.endswith("-cpu")]


@pytest.fixture(autouse=True)
def from_the_repository(monkeypatch):
    """The root of the repository, which relative data paths start from."""
    monkeypatch.chdir(ROOT)


def recipe(name, *overrides):
    return load_config(f"jobs/{name}.yaml", overrides)


SWEEPS = [name for name in RECIPES if "sweep:" in (ROOT / "jobs" / f"{name}.yaml").read_text()]


def hardware(name):
    """(number, device) in the first line of a recipe."""
    first = (ROOT / "jobs" / f"{name}.yaml").read_text().splitlines()[0]
    number, device = re.fullmatch(r"# Hardware: (\d+) x (\S+)", first).groups()
    return int(number), device


def facts(config):
    """The directory with config.json of a hub model."""
    return MODELS / config.model.path.rsplit("/", 1)[-1]


def test_the_example_in_the_head_of_the_base_works(tmp_path):
    example = re.findall(r"^#     (\S.*)$", (ROOT / "jobs" / "base.yaml").read_text(), re.MULTILINE)
    assert len(example) == 3
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    (tmp_path / "mine.yaml").write_text("\n".join(example))
    config = load_config(tmp_path / "mine.yaml")
    assert (config.data.eval.path, config.data.eval.fraction) == (None, 0.05)
    assert load_config("jobs/base.yaml", ["model.path=a/b", "train.checkpoint_every=100"]).train.checkpoint_minutes is None


def test_there_is_a_recipe_for_each_way_to_train():
    configs = [load_config(f"jobs/{name}.yaml") for name in RECIPES if name not in SWEEPS]
    assert {config.train.zero for config in configs} >= {0, 2, 3}
    assert {"4bit", None} == {config.model.quantization for config in configs}
    assert {config.train.loss for config in configs} >= {"sigmoid", "sigmoid_norm"}
    assert {True, False} == {config.model.adapts for config in configs} and SWEEPS


def test_the_recipe_of_rounds_has_its_prompts():
    (name,) = ROUNDS  # tests/rounds/test_small_tasks.py runs it
    config = recipe(name)
    assert config.rounds.count == 3 and config.train.steps == 8
    prompts = [json.loads(line) for line in (ROOT / config.rounds.prompts[0].path).read_text().splitlines()]
    assert len({each["prompt"][0]["content"] for each in prompts}) == 81
    for each in prompts:
        one, other = map(int, re.findall(r"\d+", each["prompt"][0]["content"]))
        assert each["answer"] == str(one + other)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_only_what_differs(name):
    """A recipe repeats no setting of its base, unless it follows a published source and lists all of its settings."""
    assert len(recipe(name).run_name) <= 128
    tree = yaml.safe_load((ROOT / "jobs" / f"{name}.yaml").read_text())
    base = yaml.safe_load((ROOT / "jobs" / tree.pop("base")).read_text())

    def repeated(mine, other, prefix=""):
        for key, value in mine.items():
            if isinstance(value, dict) and isinstance(other.get(key), dict):
                yield from repeated(value, other[key], f"{prefix}{key}.")
            elif key in other and other[key] == value:
                yield prefix + key

    assert list(repeated(tree, base)) == [] or name.startswith("tulu")


@pytest.mark.parametrize("name", ON_GPUS)
def test_names_say_the_hardware_and_the_settings_use_it(name):
    number, device = hardware(name)
    assert device in DEVICES
    if not name.startswith("tulu"):
        assert name.endswith(f"-{number}x{device.lower()}")
    config = recipe(name)
    for section in (config.score, config.train):
        assert section.workers == number and section.gpus_per_worker == 1
    # No setting may depend on GPU nodes that the cluster has not started yet.
    assert config.model.dtype == "bfloat16"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_preferences(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", preferences(64))


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_recipe_is_planned_and_fits(name, pairs, monkeypatch):
    """The longest pair within data.max_length fits as one micro-batch: two completions without a shared prompt."""
    number, device = hardware(name)
    config = recipe(name)
    model = facts(config)
    config = recipe(name, f"model.path={model}", f"data.train=[{pairs}]", "data.eval=null")
    cost = model_cost(model)
    monkeypatch.setattr("raydpo.estimate.plan.WORLD_SIZES", ())
    plan = make_plan(config, load_pairs(config.data, Tokeniser(make_tokenizer())), cost, cost, stated_rates(device))
    assert (plan.score_workers, plan.train_workers) == (number, number) and plan.training.gpu_hours > 0
    modes = compare_modes(
        Question(
            anatomy=anatomy_of(model),
            model=config.model,
            train=config.train,
            workers=number,
            memory=MEMORY[device] * GIB,
            dtype=config.model.dtype,
            batch=Batch.of_pairs([(200, 300, 300)]),
            longest=2 * config.data.max_length,
            budget=None,
        ),
        device,
    )
    (row,) = [row for row in modes.rows if row.configured]
    assert row.fits, "\n".join(modes.lines())


@pytest.mark.parametrize("name", ON_GPUS)
def test_the_measured_budget_of_a_recipe_fits_and_is_enough(name, monkeypatch):
    """With the memory that is left where error correction takes 1/16, and passes that take 5 % more than planned."""
    number, device = hardware(name)
    config = recipe(name)
    given = anatomy_of(facts(config)), config.model, config.train
    where = {"workers": number, "dtype": config.model.dtype}
    needs, standing = needs_of(*given, **where), estimate_memory(*given, PROPORTIONS, **where).standing.total
    free = MEMORY[device] * GIB * 15 / 16 - BASE_BYTES - standing
    monkeypatch.setattr(budget, "_peak", lambda run, tokens, device: 1.05 * needs.probe(tokens))
    monkeypatch.setattr(budget, "free_memory", lambda device, share: free)
    monkeypatch.setattr(budget, "reset_peak_memory", lambda device: None)
    cuda = torch.device("cuda")
    assert config.train.tokens_per_batch == "auto"
    found = budget.find_budget(lambda tokens: None, cuda, most=budget.MOST_TRAINED, needs=needs)
    assert found.tokens >= ENOUGH and found.step_bytes <= 0.95 * free, found.line()


@pytest.mark.parametrize("name", ON_GPUS)
def test_the_reference_fits_as_the_recipe_puts_it_on_the_devices(name):
    """With enough positions for a micro-batch and for the longest sequence, as a plan would decide by itself."""
    number, device = hardware(name)
    config = recipe(name)
    room = ScoringRoom(name=device, device_bytes=MEMORY[device] * GIB, per_machine=min(8, number))
    asked = {"dtype": "bfloat16", "longest": config.data.max_length, "quantization": config.reference_quantization}
    anatomy = anatomy_of(facts(config))
    found = choose_partition(anatomy, config.score, room, **asked)
    assert found.positions >= max(ENOUGH, config.data.max_length), found.line
    undecided = config.score.model_copy(update={"partition": "auto", "offload": "auto"})
    assert choose_partition(anatomy, undecided, room, **asked) == found
    # A cluster without GPUs yet cannot tell their memory.
    assert found.simple or (config.score.partition, config.score.offload) == (found.partition, found.offload)


def test_the_laptops_recipe_fits_a_laptop():
    first = (ROOT / "jobs" / "smollm2-135m-lora-cpu.yaml").read_text().splitlines()[0]
    cores, gib = map(int, re.fullmatch(r"# Hardware: (\d+) CPU cores, (\d+) GiB", first).groups())
    config = recipe("smollm2-135m-lora-cpu")
    assert config.train.workers == cores and config.train.gpus_per_worker == config.score.gpus_per_worker == 0
    batch = Batch.of_pairs([(1, config.data.max_length, config.data.max_length)])
    memory = estimate_memory(
        anatomy_of(facts(config)), config.model, config.train, batch, workers=cores, dtype="float32", device="cpu"
    )
    assert cores * memory.together < gib * GIB / 2, "the other half is Python's, torch's and Ray's"


def test_tulu_is_as_published():
    """docs/tulu3.md of github.com/allenai/open-instruct, the command of Llama-3.1-Tulu-3-8B-DPO."""
    train = recipe("tulu3-8b-dpo-norm").train
    assert (train.loss, train.beta, train.lr, train.pairs_per_step) == ("sigmoid_norm", 5.0, 5e-7, 8 * 1 * 16)
    assert (train.schedule, train.warmup, train.weight_decay, train.epochs, train.zero) == ("linear", 0.1, 0.0, 1, 3)
    assert recipe("tulu3-8b-dpo-norm").data.max_length == 2048

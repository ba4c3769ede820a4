"""The table of reuse: after each change of an input the cache either hits with right values or misses; it never hits with
wrong ones."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from tiny import preferences, write_preferences

from raydpo.config import load_config
from raydpo.pipeline.prepare import Prepared
from raydpo.reference.score import Scorer
from raydpo.reference.shards import Wanted, plan_shards, prompt_groups, read_groups
from raydpo.terminal.console import Console

COUNT = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama):
    """A directory with a model and data whose cache holds everything that ``settings()`` needs."""
    place = tmp_path_factory.mktemp("reuse")
    shutil.copytree(tiny_llama, place / "model")
    write_preferences(place / "a.jsonl", preferences(COUNT))
    fill(prepare(place))
    return place


def settings(place):
    return {
        "output": str(place / "runs"),
        "cache": {"uri": str(place / "cache")},
        "model": {"path": str(place / "model"), "dtype": "float32"},
        "data": {
            "train": [{"path": str(place / "a.jsonl")}],
            "eval": {"fraction": 0.2},
            "max_length": 200,
            "max_dropped": 1.0,
        },
    }


def prepare(place, overrides=(), change=None):
    tree = settings(place)
    if change is not None:
        change(place, tree)
    return Prepared.of(load_config(tree, overrides), Console(io.StringIO()))


def fresh(prepared):
    """(completion, log-probs scored now) of everything wanted."""
    wanted = Wanted(prepared.tables)
    scorer = Scorer(prepared.reference, device="cpu", tokens_per_batch=prepared.config.score.tokens_per_batch)
    for shard in plan_shards(wanted, 2000):
        groups = read_groups(shard, wanted.source)
        for group, scored in zip(groups, scorer.score(prompt_groups(groups)), strict=True):
            yield from zip(group, scored, strict=True)


def fill(prepared):
    rows = list(fresh(prepared))
    prepared.cache.commit([completion.key for completion, _ in rows], [logps for _, logps in rows], {})


def missing_keys(prepared):
    wanted = Wanted(prepared.tables)
    covered = prepared.cache.covers(wanted.keys, wanted.tokens)
    return {one.key for one, there in zip(wanted, covered, strict=True) if not there}


def share_of_hits(prepared):
    """Share of wanted completions that the cache answers; every answer is checked against a live score."""
    missing, wanted = missing_keys(prepared), len(Wanted(prepared.tables))
    for completion, live in fresh(prepared):
        if completion.key not in missing:
            (stored,) = prepared.cache.lookup([completion.key])["logps"].to_pylist()
            assert np.abs(np.array(stored[: len(live)]) - live).max() < 1e-4
    return 1 - len(missing) / wanted


HITS = {
    "nothing": [],
    "beta": ["train.beta=0.5"],
    "loss": ["train.loss=ipo"],
    "learning rate": ["train.lr=1e-3"],
    "seed": ["train.seed=7"],
    "order": ["data.shuffle=false"],
    "subset": ["data.train.0.limit=5"],
    "pairs per step": ["train.pairs_per_step=4"],
    "batch of training": ["train.tokens_per_batch=300"],
    "batch of scoring": ["score.tokens_per_batch=300"],
    "workers": ["train.workers=4", "score.workers=3"],
    "LoRA": ["model.lora={r: 4}"],
    "LoRA rank": ["model.lora={r: 32, alpha: 8}"],
    "output": ["output=elsewhere"],
    "precision of training": ["model.dtype=bfloat16", "score.dtype=float32"],
    "held-out share": ["data.eval.fraction=0.5"],
    "weight of the source": ["data.train.0.weight=3"],
    "shorter max_length": ["data.max_length=30"],
}


@pytest.mark.parametrize("overrides", HITS.values(), ids=HITS)
def test_does_not_matter_and_hits(overrides, place):
    assert share_of_hits(prepare(place, overrides)) == 1.0


def reversed_and_repaired(place, tree):
    """Other pairings of the same completions, in another order."""
    records = [json.loads(line) for line in (place / "a.jsonl").read_text().splitlines()]
    swapped = [record | {"chosen": record["rejected"], "rejected": record["chosen"]} for record in records[::-1]]
    tree["data"]["train"] = [{"path": str(write_preferences(place / "swapped.jsonl", swapped))}]


def test_other_pairings_of_the_same_completions_hit(place):
    assert share_of_hits(prepare(place, change=reversed_and_repaired)) == 1.0


def copied_model(place, tree):
    """A copy of the model, at a new path, that the change may then edit."""
    directory = place / f"model-{len(list(place.iterdir()))}"
    shutil.copytree(place / "model", directory)
    tree["model"]["path"] = str(directory)
    return directory


def one_weight(place, tree):
    from safetensors.torch import load_file, save_file

    file = copied_model(place, tree) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


def precision(place, tree):
    tree["model"]["dtype"] = "bfloat16"


def end_of_sequence(place, tree):
    """Use another token as end of sequence."""
    file = copied_model(place, tree) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<pad>"}))


def prompt_text(place, tree):
    records = [json.loads(line) for line in (place / "a.jsonl").read_text().splitlines()]
    edited = [record | {"prompt": record["prompt"] + " "} for record in records]
    tree["data"]["train"] = [{"path": str(write_preferences(place / "edited.jsonl", edited))}]


def reference_adapter(place, tree):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(place / "model"),
        LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False),
    )
    policy.save_pretrained(place / "adapter")
    tree["reference"] = {"adapter": str(place / "adapter")}


def other_reference(place, tree):
    from tiny import make_model

    tree["reference"] = {"path": str(make_model(place / "other", seed=9))}


@pytest.mark.parametrize("change", [one_weight, precision, end_of_sequence, prompt_text, reference_adapter, other_reference])
def test_matters_and_misses(change, place):
    prepared = prepare(place, change=change)
    assert share_of_hits(prepared) == 0.0
    fill(prepared)
    assert share_of_hits(prepared) == 1.0


def conversations(place, tree):
    records = [
        {
            "prompt": [{"role": "user", "content": record["prompt"]}],
            "chosen": record["chosen"],
            "rejected": record["rejected"],
        }
        for record in preferences(COUNT)
    ]
    tree["data"]["train"] = [{"path": str(write_preferences(place / "chat.jsonl", records))}]


def test_chat_template_matters(place):
    fill(prepare(place, change=conversations))
    assert share_of_hits(prepare(place, change=conversations)) == 1.0

    def other_template(place, tree):
        conversations(place, tree)
        tree["data"]["chat_template"] = (
            "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<s>{% endif %}"
        )

    assert share_of_hits(prepare(place, change=other_template)) == 0.0


def test_longer_max_length_scores_only_what_was_cut_again(tmp_path, tiny_llama):
    shutil.copytree(tiny_llama, tmp_path / "model")
    write_preferences(tmp_path / "a.jsonl", preferences(COUNT))
    short = prepare(tmp_path, ["data.max_length=45"])
    fill(short)
    longer = prepare(tmp_path)
    cut = {
        key
        for side in ("chosen", "rejected")
        for table in short.tables
        for key, used, full in zip(*(table[f"{side}_{name}"].to_pylist() for name in ("key", "ids", "full")), strict=True)
        if len(used) < full
    }
    missing = missing_keys(longer)
    kept = {key for table in short.tables for side in ("chosen", "rejected") for key in table[f"{side}_key"].to_pylist()}
    assert cut and missing & kept == cut
    fill(longer)
    assert share_of_hits(longer) == 1.0 and share_of_hits(short) == 1.0


def test_missing_rows_are_named_before_training(place):
    from raydpo.errors import CacheMissError
    from raydpo.reference.pairs import join_reference

    prepared = prepare(place, change=one_weight)
    prepared.cache.storage.fs.delete_dir_contents(prepared.cache.storage.path(prepared.cache.directory), missing_dir_ok=True)
    with pytest.raises(CacheMissError) as caught:
        join_reference(prepared.sets.train, prepared.cache, "training")
    message = str(caught.value)
    assert prepared.cache.identity.digest in message and prepare(place).cache.identity.digest in message
    assert "weights:" in message and "raydpo score" in message and "a:1" in message
    assert isinstance(prepared.sets.train, pa.Table)

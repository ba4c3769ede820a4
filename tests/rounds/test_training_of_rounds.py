"""The training of rounds: which policy and which reference each begins with, what it takes over, and what it refuses."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from distributed import forking
from kernel import with_reference
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer, preferences

from raydpo.cluster.session import session
from raydpo.config import load_config
from raydpo.config.verbs import check_verb
from raydpo.data.keys import completion_key
from raydpo.data.select import PAIR_SCHEMA
from raydpo.errors import ConfigError, FilesError, GateError
from raydpo.pipeline.prepare import open_reference
from raydpo.reference.identity import identify, on_this_machine, origin_of, resolve_model
from raydpo.rounds.training import check_training, policy_spec, round_config, start_of, train_round
from raydpo.terminal.console import Console
from raydpo.training.policy.engine import PolicySpec

TRAIN = {"pairs_per_step": 4, "lr": 1e-3, "steps": 3, "tokens_per_batch": 1024, "warmup": 0.3, "gate_pairs": 3}


class Heard:
    """A stream for a console, whose text can be read."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return False


def pairs_of(number, count=10, seed=None):
    """Pairs as a round makes them: of token ids that a tokenizer gave once."""
    tokenizer, rows = make_tokenizer(), []
    for row, record in enumerate(preferences(count, seed=number if seed is None else seed, high=12)):
        ids = {name: tokenizer(record[name])["input_ids"] for name in ("prompt", "chosen", "rejected")}
        chosen, rejected = ids["chosen"] + [tokenizer.eos_token_id], ids["rejected"] + [tokenizer.eos_token_id]
        rows.append(
            {
                "pair_id": f"r{number:03d}:{row}:0-1",
                "source": "prompts",
                "weight": 1.0,
                "prompt_ids": ids["prompt"],
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "chosen_key": completion_key(ids["prompt"], chosen),
                "rejected_key": completion_key(ids["prompt"], rejected),
                "chosen_full": len(chosen),
                "rejected_full": len(rejected),
            }
        )
    table = pa.Table.from_pylist(rows, PAIR_SCHEMA)
    return table.append_column("good", pa.array(np.zeros(count, np.int32)))


def rounds_config(place, start, rounds=None, **sections):
    (place / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    tree = {
        "output": str(place / "runs"),
        "name": "rounds",
        "model": {"path": str(start), "dtype": "float32"} | sections.pop("model", {}),
        "data": {"max_length": 128},
        "train": TRAIN | sections.pop("train", {}),
        "score": {"tokens_per_batch": 1024},
        "rounds": {
            "prompts": str(place / "prompts.jsonl"),
            "rewards": [{"use": "regex", "pattern": "a"}],
            "count": 2,
            "sample": {"max_tokens": 16},
        }
        | (rounds or {}),
    }
    return load_config(tree | sections)


def one(config, number, pairs=None, console=None):
    pairs = pairs_of(number) if pairs is None else pairs
    return train_round(config, number, pairs, start_of(config, number), console or Console(Heard()))


def weights(config, number, name="model.safetensors"):
    return load_file(Path(config.run_dir) / f"round-{number:03d}" / "train" / "final" / name)


def fingerprint(config, number):
    run = Path(config.run_dir) / f"round-{number:03d}" / "train" / "run.json"
    return json.loads(run.read_text())["fingerprint"]


def train_dir(config, number):
    return Path(config.run_dir) / f"round-{number:03d}" / "train"


def fill(config, *tables):
    """Fill the cache of a configuration in this process, which takes a second, and workers ten."""
    spec, cache = open_reference(config)
    for table in tables:
        scored = with_reference(table, Path(spec.path), adapter=spec.adapter and Path(spec.adapter))
        for side in ("chosen", "rejected"):
            logps = [np.array(row, np.float32) for row in scored[f"ref_{side}_logps"].to_pylist()]
            cache.commit(scored[f"{side}_key"].to_pylist(), logps, {})


def pretend(config, number, **summary):
    """Files of a finished training, as far as later rounds read them."""
    place = train_dir(config, number)
    place.mkdir(parents=True)
    (place / "summary.json").write_text(json.dumps({"steps": 3, "policy": f"policy {number}"} | summary))
    (place / "run.json").write_text(json.dumps({"fingerprint": {"reference identity": f"reference of {number}"}}))


@pytest.fixture(scope="module")
def in_ray(ray_cluster):
    """Trainings of this file connect to one Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray_cluster)
        yield


# ---- without a training


@pytest.mark.parametrize(
    ("wish", "bases"), [("initial", [0, 0, 0, 0, 0]), ("previous", [0, 1, 2, 3, 4]), ({"every": 2}, [0, 0, 2, 2, 4])]
)
@pytest.mark.parametrize("kind", ["full", "lora", "adapter"])
def test_what_a_round_begins_with(wish, bases, kind, tmp_path, tiny_llama):
    model = {"full": {}, "lora": {"lora": {"r": 4}}, "adapter": {"adapter": str(tmp_path)}}[kind]
    config = rounds_config(tmp_path, tiny_llama, {"reference": wish}, model=model)
    first = config.model.path, config.model.adapter
    policies = [first]
    for number, base in enumerate(bases, 1):
        start = start_of(config, number)
        assert (start.path, start.adapter) == policies[-1]
        assert start.policy == (None if number == 1 else f"policy {number - 1}")
        assert start.reference == (None if number == base + 1 else f"reference of {base + 1}")
        own = round_config(config, number, start)
        assert (own.reference_path, own.reference_adapter) == policies[base]
        assert (own.model.lora is None) == (number > 1 or kind != "lora") and own.model.tokenizer == str(tiny_llama)
        assert own.cache_uri == config.cache_uri and own.run_dir == str(train_dir(config, number))
        pretend(config, number)
        (final := train_dir(config, number) / "final").mkdir()
        policies.append((str(final), None) if kind == "full" else (str(tiny_llama), str(final)))
        file = tmp_path / f"{number}.yaml"
        file.write_text(own.to_yaml())
        again = load_config(file)
        assert again.to_yaml() == own.to_yaml() and again.run_dir == own.run_dir
        with pytest.raises(ConfigError, match="section 'rounds' has no effect on 'raydpo train'"):
            check_verb(again, "train")


def test_seeds_differ_by_round_but_not_offline(tmp_path, tiny_llama):
    def seeds(**rounds):
        config = rounds_config(tmp_path, tiny_llama, rounds, train={"seed": 5})
        starts = (start_of(rounds_config(tmp_path, tiny_llama), 1) for _ in range(3))
        return [round_config(config, number, start).train.seed for number, start in enumerate(starts, 1)]

    assert seeds()[0] == 5 and len(set(seeds())) == 3
    assert seeds(offline=True) == [5, 5, 5]


def test_a_round_waits_for_the_one_before(tmp_path, tiny_llama):
    config = rounds_config(tmp_path, tiny_llama)
    with pytest.raises(
        FilesError, match=r"round 1 has no trained policy yet: there is no summary.json in .*round-001/train"
    ):
        start_of(config, 2)


def test_what_cannot_be_trained_is_refused_before(tmp_path, tiny_llama):
    with pytest.raises(ConfigError, match=r"carry continues one schedule .* train.steps is null"):
        rounds_config(tmp_path, tiny_llama, {"optimizer": "carry"}, train={"steps": None})
    moving = rounds_config(tmp_path, tiny_llama, {"reference": "previous"}, reference={"path": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"section reference names .* by rounds.reference previous the policy"):
        check_training(moving)
    check_training(rounds_config(tmp_path, tiny_llama, reference={"path": str(tmp_path)}))


def test_a_carried_schedule_keeps_its_length(tmp_path, tiny_llama):
    """With a constant rate nothing depends on the number of rounds."""
    carry, key = {"optimizer": "carry"}, "rounds: steps of the schedule"
    config = rounds_config(tmp_path, tiny_llama, carry)
    pretend(config, 1)
    (train_dir(config, 1) / "run.json").write_text(json.dumps({"fingerprint": {key: 6}}))
    check_training(config)
    with pytest.raises(ConfigError, match=r"rounds.count 3 and train.steps 3 make a schedule of 9 .* round 1 .* one of 6"):
        check_training(rounds_config(tmp_path, tiny_llama, carry | {"count": 3}))
    (train_dir(config, 1) / "run.json").write_text(json.dumps({"fingerprint": {}}))
    check_training(rounds_config(tmp_path, tiny_llama, carry | {"count": 3}))


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_a_policy_at_a_uri_is_copied_to_every_machine(lora, tmp_path, tiny_llama, monkeypatch):
    """The driver names its own copy; a worker on another machine makes one of the same files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    config = rounds_config(tmp_path, tiny_llama, model={"lora": lora} if lora else {})
    config = config.model_copy(update={"output": f"file://{config.output}"})
    final = tmp_path / "runs" / "rounds" / "round-001" / "train" / "final"
    shutil.copytree(tiny_llama, final)
    (final.parent / "summary.json").write_text(json.dumps({"steps": 3, "policy": "policy 1"}))
    start = start_of(config, 2)
    assert (start.adapter if lora else start.path) == f"file://{final}"
    here = resolve_model(f"file://{final}")
    assert here.startswith(str(tmp_path / "here")) and sorted(os.listdir(here)) == sorted(os.listdir(final))
    spec = PolicySpec(path=here, dtype="float32", lora=None, origin=origin_of(f"file://{final}"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    there = on_this_machine(spec)
    assert there.path.startswith(str(tmp_path / "elsewhere")) and identify(there.path, "float32") == identify(
        here, "float32"
    )
    assert origin_of(str(final)) is None and origin_of("org/name") is None


# ---- with trainings


@pytest.mark.slow
def test_rounds_against_the_initial_model(in_ray, tmp_path, tiny_llama):
    config, heard = rounds_config(tmp_path, tiny_llama), Heard()
    pairs = pairs_of(1)
    replayed = pairs.slice(2)
    fill(config, pairs)
    with session(config):
        first = one(config, 1, pairs, Console(heard))
        assert not (train_dir(config, 1) / "checkpoints").exists()
        second = one(config, 2, replayed, Console(heard))
        assert one(config, 2, replayed, Console(Heard())) == second  # it is finished
        with pytest.raises(ConfigError, match=r"run with other settings .*data.train: "):
            one(config, 2, pairs)
        spec = policy_spec(config, 1)
    assert first["first_loss"] == pytest.approx(np.log(2), abs=1e-5) and first["gate"].startswith("step-0 gate: 5 pairs")
    assert second["first_loss"] != pytest.approx(np.log(2), abs=1e-3)
    assert f"first loss {second['first_loss']:.6f} = these pairs under the policy of round 1" in heard.text
    assert second["gate"].endswith("; all of its pairs were scored before, and nothing was scored again")
    assert "warning" not in heard.text
    assert second["reference"]["identity"] == first["reference"]["identity"] == policy_spec_digest(tiny_llama)
    assert (
        fingerprint(config, 2)["model.path (weights)"] == spec.identity.weights and spec.identity.digest == first["policy"]
    )
    assert (first["wanted"], first["hits"]) == (20, 20) and (second["wanted"], second["hits"]) == (16, 16)
    assert (first["name"], second["name"]) == ("rounds, round 1", "rounds, round 2")
    assert (train_dir(config, 2) / "report.html").is_file()
    final = train_dir(config, 1) / "final" / "model.safetensors"
    tensors = load_file(final)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, final, {"format": "pt"})
    now = identify(final.parent, "float32", max_length=128).digest
    with pytest.raises(FilesError, match=f"round-001/train/final has identity {now}, but round 1 wrote {first['policy']}"):
        policy_spec(config, 1)
    with session(config), pytest.raises(FilesError, match=f"identity {now}, but round 1 wrote {first['policy']}"):
        one(config, 2, replayed)


def policy_spec_digest(model):
    return identify(model, "float32", max_length=128).digest


@pytest.mark.slow
def test_the_policy_before_is_another_reference(in_ray, tmp_path, tiny_llama):
    config, pairs = rounds_config(tmp_path, tiny_llama, {"reference": "previous"}), pairs_of(1)
    with session(config):
        rounds = [one(config, number, pairs) for number in (1, 2)]
    for done in rounds:
        assert done["first_loss"] == pytest.approx(np.log(2), abs=1e-5) and "pairs computed again" in done["gate"]
        assert (done["wanted"], done["hits"]) == (20, 0)
    assert rounds[1]["reference"]["identity"] == rounds[0]["policy"] != rounds[0]["reference"]["identity"]


@pytest.mark.slow
def test_what_earlier_rounds_scored_is_compared_with_the_reference(in_ray, tmp_path, tiny_llama):
    """In the pass that scores the new answers: a changed value ends the round before its training."""
    config, old, new = rounds_config(tmp_path, tiny_llama), pairs_of(1), pairs_of(2, 4)
    fill(config, old)
    with session(config):
        one(config, 1, old)
        shutil.copytree(config.output, kept := tmp_path / "kept")
        done = one(config, 2, pa.concat_tables([new, old]))
        assert "; 3 pairs that it had scored before were scored again, and differ by " in done["gate"]
        assert (done["wanted"], done["hits"]) == (28, 20)
        shutil.rmtree(config.output)
        kept.rename(config.output)
        spec, cache = open_reference(config)
        shutil.rmtree(Path(cache.storage.path(cache.directory)))
        fill(config, old.slice(1))
        scored = with_reference(old.slice(0, 1), Path(spec.path))
        for side in ("chosen", "rejected"):
            values = np.array(scored[f"ref_{side}_logps"][0].as_py(), np.float32)
            values[1] -= 2
            open_reference(config)[1].commit(scored[f"{side}_key"].to_pylist(), [values], {})
        with pytest.raises(
            GateError, match=f"not those of the reference {spec.identity.digest}: scored again, pair r001:0:0-1"
        ):
            one(config, 2, pa.concat_tables([new, old]))
    assert not (train_dir(config, 2) / "run.json").exists()


@pytest.mark.slow
def test_an_adapter_is_trained_further(in_ray, tmp_path, tiny_llama):
    config = rounds_config(tmp_path, tiny_llama, model={"lora": {"r": 4, "alpha": 8}})
    pairs = pairs_of(1)
    with session(config):
        first, second = one(config, 1, pairs), one(config, 2, pairs)
        spec = policy_spec(config, 1)
    assert (first["hits"], second["hits"]) == (0, 20) and first["first_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["reference"]["identity"] == second["reference"]["identity"]
    assert fingerprint(config, 2)["model.adapter"] == spec.identity.adapter and fingerprint(config, 2)["model.lora"] is None
    settings = [json.loads((train_dir(config, number) / "final" / "adapter_config.json").read_text()) for number in (1, 2)]
    assert settings[0]["r"] == settings[1]["r"] == 4
    changed = [weights(config, number, "adapter_model.safetensors") for number in (1, 2)]
    assert changed[0].keys() == changed[1].keys()
    assert policy_spec(config, 2).identity.digest == second["policy"] != first["policy"] == spec.identity.digest


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}], ids=["full", "lora"])
def test_offline_rounds_with_carried_moments_are_one_training(lora, in_ray, tmp_path, tiny_llama):
    """10 pairs of 4 a step are 3 steps an epoch; two rounds of 4 steps end within epochs."""
    pairs, offline = pairs_of(1), {"offline": True, "optimizer": "carry"}
    (tmp_path / "one").mkdir()
    model = {"lora": lora} if lora else {}
    whole = rounds_config(tmp_path / "one", tiny_llama, offline | {"count": 1}, model=model, train={"steps": 8})
    config = rounds_config(tmp_path, tiny_llama, offline, model=model, train={"steps": 4})
    fill(whole, pairs)
    fill(config, pairs)
    with session(config):
        one(whole, 1, pairs)
        one(config, 1, pairs)
        assert [path.name for path in (train_dir(config, 1) / "checkpoints").glob("step-*")] == ["step-00000004"]
        one(config, 2, pairs)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    left, right = weights(whole, 1, name), weights(config, 2, name)
    assert left.keys() == right.keys() and all(torch.equal(left[each], right[each]) for each in left)
    assert not (train_dir(config, 1) / "checkpoints").exists() and (train_dir(config, 2) / "checkpoints").exists()


def _train_alone(config, number, pairs, variables):
    os.environ.update(variables)
    with session(config):
        one(config, number, pairs)


@pytest.mark.slow
def test_a_killed_round_ends_as_an_undisturbed_one(in_ray, tmp_path, tiny_llama):
    carried = {"optimizer": "carry"}
    long = {"steps": 40, "checkpoint_every": 1, "pairs_per_step": 4}
    config = rounds_config(tmp_path, tiny_llama, carried, train=dict(long), cache={"uri": str(tmp_path / "cache")})
    (tmp_path / "undisturbed").mkdir()
    other = rounds_config(
        tmp_path / "undisturbed", tiny_llama, carried, train=dict(long), cache={"uri": str(tmp_path / "cache")}
    )
    with session(config):
        one(config, 1)
    shutil.copytree(config.run_dir, other.run_dir)
    process = forking().Process(
        target=_train_alone, args=(config, 2, pairs_of(2), {"RAY_ADDRESS": os.environ["RAY_ADDRESS"]})
    )
    process.start()
    begun = time.monotonic()
    while not (train_dir(config, 2) / "checkpoints" / "step-00000005").exists():
        assert process.is_alive() and time.monotonic() - begun < 300
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (train_dir(config, 2) / "summary.json").exists()
    heard = Heard()
    with session(config):
        disturbed, undisturbed = one(config, 2, console=Console(heard)), one(other, 2)
        assert not (train_dir(config, 1) / "checkpoints").exists()
        assert one(config, 2) == disturbed, (
            "a round that was killed after its training needs no checkpoint of the one before"
        )
    assert "continuing after step" in heard.text
    left, right = weights(config, 2), weights(other, 2)
    assert all(torch.equal(left[each], right[each]) for each in left) and disturbed["policy"] == undisturbed["policy"]
    assert (disturbed["wanted"], disturbed["hits"]) == (20, 0)  # as before the kill

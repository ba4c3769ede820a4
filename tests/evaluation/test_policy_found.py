"""What evaluate.policy can name, and that lm-evaluation-harness loads it."""

import json

import pytest
import torch
from tiny import make_model, make_tokenizer, preferences, write_preferences

from raydpo.config import load_config
from raydpo.errors import ConfigError, ModelError
from raydpo.evaluation.policy import find_policy, harness_arguments
from raydpo.pipeline.evaluate import _Evaluation
from raydpo.reference.identity import identify
from raydpo.terminal.console import Console


def make_adapter(directory, model, base=None, seed=5):
    """A PEFT adapter that changes ``model``, with its tokenizer, as a run exports it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    policy.peft_config["default"].base_model_name_or_path = str(base or model)
    policy.save_pretrained(str(directory))
    make_tokenizer().save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama):
    place = tmp_path_factory.mktemp("policies")
    write_preferences(place / "a.jsonl", preferences(4))
    make_adapter(place / "adapter", tiny_llama)
    return place


def configured(place, tiny_llama, **evaluate):
    return load_config(
        {
            "name": "run",
            "output": str(place / "runs"),
            "model": {"path": str(tiny_llama)},
            "data": {"train": str(place / "a.jsonl")},
            "evaluate": evaluate,
        }
    )


def test_a_model_and_an_adapter(place, tiny_llama):
    whole = find_policy(configured(place, tiny_llama, policy=str(tiny_llama)), "float32")
    assert whole.spec.identity == identify(tiny_llama, "float32") and whole.spec.adapter is None and whole.run is None
    adapter = find_policy(configured(place, tiny_llama, policy=str(place / "adapter")), "float32")
    assert adapter.spec.identity == identify(tiny_llama, "float32", place / "adapter")
    assert (adapter.spec.path, adapter.slug) == (str(tiny_llama), "adapter")


def rewards_per_token(config, policy):
    return _Evaluation(config, Console(), policy, None, None, None, None)._objective().per_token


def test_a_run(place, tiny_llama):
    """Its rewards are those it was trained with; its own adapter lies on this configuration's model."""
    config = configured(place, tiny_llama)
    with pytest.raises(ConfigError, match=r"no trained policy in .*runs/run/final; run 'raydpo run' first"):
        find_policy(config, "float32")
    run = place / "runs" / "run"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"fingerprint": {"train.beta": 0.3, "train.loss": "ipo"}}))
    with pytest.raises(ConfigError, match="has no final/ yet"):
        find_policy(config, "float32")
    make_adapter(run / "final", tiny_llama, base="/long/gone")
    policy = find_policy(config, "float32")
    assert policy.spec.path == str(tiny_llama) and policy.run is not None
    assert policy.beta(config) == 0.3 and rewards_per_token(config, policy)
    asked = configured(place, tiny_llama, beta=0.7, log_ratios="sum")
    assert policy.beta(asked) == 0.7 and not rewards_per_token(asked, policy)
    with pytest.raises(ModelError, match=r"belongs to the model '/long/gone', which is not here; set evaluate\.base"):
        find_policy(configured(place, tiny_llama, policy=str(run)), "float32")
    named = find_policy(configured(place, tiny_llama, policy=str(run), base=str(tiny_llama)), "float32")
    assert named.spec.identity == policy.spec.identity


def test_what_is_no_policy(place, tiny_llama, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        find_policy(configured(place, tiny_llama, policy=str(tmp_path / "empty")), "float32")
    pickled = make_model(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        find_policy(configured(place, tiny_llama, policy=str(pickled)), "float32")
    broken = make_adapter(tmp_path / "broken", tiny_llama)
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"evaluate\.base"):
        find_policy(configured(place, tiny_llama, policy=str(broken)), "float32")
    with pytest.raises(ConfigError, match=r"evaluate\.policy"):
        configured(place, tiny_llama, policy="/nowhere/at/all")


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_the_harness_loads_it(kind, place, tiny_llama):
    """What lm-evaluation-harness's HFLM does with the arguments that we print: weights, adapter, tokenizer, chat template;
    and its log-likelihoods are ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from raydpo.reference.score import Scorer

    policy = find_policy(
        configured(place, tiny_llama, policy=str(tiny_llama if kind == "whole" else place / "adapter")), "float32"
    )
    arguments = dict(pair.split("=", 1) for pair in harness_arguments(policy).split(","))
    model = AutoModelForCausalLM.from_pretrained(arguments["pretrained"], dtype=arguments["dtype"])
    if kind == "adapter":
        model = PeftModel.from_pretrained(model, arguments["peft"])
    tokenizer = AutoTokenizer.from_pretrained(arguments.get("tokenizer", arguments["pretrained"]))
    context = tokenizer.apply_chat_template(
        [{"role": "user", "content": "why is the sky blue"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(context, add_special_tokens=False)["input_ids"]
    answer = tokenizer(" because", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    theirs = logps.gather(1, torch.tensor(answer)[:, None]).sum().item()
    assert _ours(policy, ids, answer, Scorer) == pytest.approx(theirs, abs=1e-4)


def test_the_harness_itself(place, tiny_llama):
    """Skipped where lm-evaluation-harness is not installed."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from raydpo.reference.score import Scorer

    policy = find_policy(configured(place, tiny_llama, policy=str(place / "adapter")), "float32")
    arguments = dict(pair.split("=", 1) for pair in harness_arguments(policy).split(","))
    harness = HFLM(**arguments, device="cpu", batch_size=1)
    assert harness.apply_chat_template([{"role": "user", "content": "why"}])
    context, answer = "why is the sky", " blue"
    ((found, _),) = harness.loglikelihood([Instance("loglikelihood", {}, (context, answer), 0)])
    ids = harness.tok_encode(context)
    whole = harness.tok_encode(context + answer)
    assert _ours(policy, ids, whole[len(ids) :], Scorer) == pytest.approx(found, abs=1e-4)


def _ours(policy, prompt, answer, scorer):
    import numpy as np

    from raydpo.model.layout import PromptGroup

    group = PromptGroup(np.array(prompt, np.int32), (np.array(answer, np.int32),))
    return float(scorer(policy.spec, device="cpu", tokens_per_batch=512).score([group])[0][0].sum())

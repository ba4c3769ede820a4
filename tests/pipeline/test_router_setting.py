"""The weight of the router loss is settled before the workers start: for them, and for what a run is compared by."""

from types import SimpleNamespace

import pytest
from tiny import make_model, preferences, write_preferences

from raydpo.config import load_config
from raydpo.pipeline.prepare import Prepared
from raydpo.pipeline.train import _training_job

KEY = "train.router_aux_loss_coef"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("models")
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "router_aux_loss_coef": 0.02}
    return {"mixture": make_model(scratch / "mixture", "qwen3_moe", **sizes), "dense": make_model(scratch / "dense")}


def prepared(model, *words, place):
    write_preferences(place / "a.jsonl", preferences(4))
    (place / "config.yaml").write_text(
        f"output: {place}\nmodel: {{path: {model}, dtype: float32}}\ndata: {{train: [{place}/a.jsonl]}}\n"
    )
    config = load_config(place / "config.yaml", words)
    identity = SimpleNamespace(digest="d", dtype="float32")
    reference, tokeniser = SimpleNamespace(identity=identity), SimpleNamespace(stop_ids=[2])
    return Prepared(config, "float32", str(model), tokeniser, None, None, reference, None, lambda: "pairs")


@pytest.mark.parametrize(
    ("kind", "wish", "wanted"),
    [
        ("mixture", "null", 0.02),
        ("mixture", "0", 0.0),
        ("mixture", "0.3", 0.3),
        ("dense", "null", 0.0),
        ("dense", "0", 0.0),
    ],
)
def test_settled_once(kind, wish, wanted, models, tmp_path, monkeypatch):
    monkeypatch.setattr("raydpo.pipeline.train._sample_prompts", lambda _: ())
    monkeypatch.setattr("raydpo.reference.identity.ReferenceIdentity.same_model", lambda *_: True)
    found = prepared(models[kind], f"{KEY}={wish}", place=tmp_path)
    job = _training_job(found, SimpleNamespace(memory_share=1.0), frozenset())
    assert job.train.router_aux_loss_coef == wanted
    assert job.fingerprint.get(KEY) == found.fingerprint().get(KEY) == (wanted or None)
    assert found.config.train.router_aux_loss_coef == (None if wish == "null" else float(wish)), "as it was written"

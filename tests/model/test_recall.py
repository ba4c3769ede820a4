"""Checks of a model that the machine remembers."""

import pytest
import torch
from architectures import make_random

from raydpo.errors import ModelError
from raydpo.model import recall as module
from raydpo.model import selfcheck
from raydpo.model.logps import LogpModel
from raydpo.model.recall import Recall
from raydpo.model.selfcheck import check_training_mode, choose_layout

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def test_a_result_belongs_to_its_model_machine_threads_and_versions(monkeypatch):
    Recall("a", CPU).keep("layout", [1])
    assert Recall("a", CPU).known("layout") == [1]
    assert Recall("a", CPU).known("other") is None and Recall("b", CPU).known("layout") is None
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert Recall("a", CPU).known("layout") is None
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(module, "processor", lambda: "another processor")
    assert Recall("a", CPU).known("layout") is None
    monkeypatch.undo()
    monkeypatch.setattr(module, "program", lambda *packages: ["another version"])
    assert Recall("a", CPU).known("layout") is None


def test_without_a_model_or_another_process_nothing_is_remembered():
    Recall(None, CPU).keep("layout", 1)
    assert Recall(None, CPU).known("layout") is None
    Recall("a", CPU).keep("layout", 1)
    assert Recall("a", CPU, agree=lambda known: False).known("layout") is None


@pytest.mark.parametrize("name", ["llama", "mamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layout_is_chosen_once(name, dtype, monkeypatch):
    models = [LogpModel(make_random(name, 96).to(dtype)).eval() for _ in "12"]
    first = choose_layout(models[0], CPU, recall=Recall("model", CPU))

    def never(*args):
        raise AssertionError("checked again")

    monkeypatch.setattr(selfcheck, "_try_layouts", never)
    found = choose_layout(models[1], CPU, recall=Recall("model", CPU))
    assert found.method == first.method == models[1].method
    assert found.line == f"{first.line} (checked earlier on this machine)"
    assert models[1].float32_stream == models[0].float32_stream
    with pytest.raises(AssertionError, match="checked again"):
        choose_layout(models[1], CPU, "padded", recall=Recall("model", CPU))


def test_a_model_in_training_mode_is_compared_once_and_a_difference_is_never_remembered():
    sound, noisy = LogpModel(make_random("llama", 96)), LogpModel(make_random("llama", 96))
    choose_layout(noisy, CPU)
    choose_layout(sound, CPU)
    layer = noisy.causal_lm.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) * (1.0 + 0.01 * layer.training * torch.rand(1))
    for _ in "12":
        with pytest.raises(ModelError, match="other log-probs in training mode"):
            check_training_mode(noisy, CPU, Recall("noisy", CPU))
    for model in (sound, noisy):  # the second is not looked at
        check_training_mode(model, CPU, Recall("sound", CPU))
        assert model.training

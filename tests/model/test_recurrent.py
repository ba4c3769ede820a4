"""Layers that carry a state from token to token, in packed layouts. Values and gradients of each architecture are compared
with the definition in ``test_logps``."""

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, HYBRIDS, NO_TREE, make_random
from definition import VOCAB, groups
from torch import nn

from raydpo.config import LoraSettings
from raydpo.errors import ModelError
from raydpo.model import selfcheck
from raydpo.model.layout import Method
from raydpo.model.load import add_lora, load_causal_lm
from raydpo.model.logps import LogpModel
from raydpo.model.recall import Recall
from raydpo.model.recurrent import BUCKETS, Rows, find_mixers
from raydpo.model.selfcheck import choose_layout, flat, small_copy
from raydpo.model.tree import PrefixTree

CPU = torch.device("cpu")
TREE, PACKED, PADDED = Method("tree", "sdpa"), Method("packed", "sdpa"), Method("padded")
OTHERS = {"mamba": "MambaMixer", "qwen3_next": "Qwen3NextGatedDeltaNet"}


@pytest.mark.parametrize("name", sorted({*ARCHITECTURES, *HYBRIDS} - NO_TREE))
def test_layers_with_state_are_found_by_trying(name):
    small = small_copy(make_random(name, VOCAB), 4)
    small.use(TREE)
    wanted = HYBRIDS[name][0] if name in HYBRIDS else OTHERS.get(name, "")
    assert ", ".join(sorted(find_mixers(small.backbone))) == wanted


@pytest.mark.parametrize("buckets", [None, BUCKETS], ids=["as they pay", "exactly"])
@pytest.mark.parametrize("lengths", [(5, 3), (90, 400, 17, 395, 60, 8, 91, 300), (700,) * 9], ids=str)
def test_rows_are_the_paths_of_the_leaves(buckets, lengths):
    rng = np.random.default_rng(0)
    system = rng.integers(0, 99, 40)
    tree = PrefixTree.build([np.concatenate([system, rng.integers(0, 99, length)]) for length in lengths])
    rows = Rows.of(tree.nodes, buckets)
    assert len(rows.index) == buckets or (buckets is None and 1 <= len(rows.index) <= BUCKETS)
    flattened = torch.cat([index.flatten() for index in rows.index])
    assert torch.equal(flattened[rows.back], torch.arange(len(tree.token_ids)))
    found = set()
    for index in rows.index:
        for row in index.tolist():
            length = max((at + 1 for at in range(len(row)) if row[at]), default=1)
            if length > 1:
                assert tree.depths[row[:length]].tolist() == list(range(length))
                found.add(tuple(tree.token_ids[row[:length]]))
    assert found == {tuple(tree.token_ids[tree.positions(each, 0, 40 + length)]) for each, length in enumerate(lengths)}
    padded = len(lengths) * max(lengths) + 40 * len(lengths)
    assert (
        flattened.numel() < 0.8 * padded
        if min(lengths) == 8
        else flattened.numel() <= padded + 16 * (len(lengths) + BUCKETS)
    )


def loud(name, **settings):
    """A random model whose layers matter more than those of a new one."""
    model = make_random(name, VOCAB, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def test_without_rows_the_state_of_one_completion_reaches_the_next():
    model = LogpModel(loud("qwen3_next"))
    choose_layout(model, CPU)
    right = flat(model.score(groups(), CPU))
    model.use(PADDED)
    assert np.abs(flat(model.score(groups(), CPU)) - right).max() < 1e-5
    model.use(TREE)
    model.wrap_mixers(())
    assert np.abs(flat(model.score(groups(), CPU)) - right).max() > 1e-2


class MeanBefore(nn.Module):
    """A causal module: the mean of all positions up to each."""

    def forward(self, x):
        return x.cumsum(1) / torch.arange(1, 1 + x.shape[1])[:, None]


class Shifted(nn.Module):
    """Mixes positions itself, before a part that does so too."""

    def __init__(self):
        super().__init__()
        self.mean = MeanBefore()

    def forward(self, x):
        return self.mean(x + x.roll(1, 1))


class Beside(nn.Module):
    """Mixes positions in its part only."""

    def __init__(self):
        super().__init__()
        self.mean, self.linear = MeanBefore(), nn.Linear(32, 32)

    def forward(self, x):
        return x + 1e-6 * self.mean(self.linear(x))


@pytest.mark.parametrize(("kind", "found"), [(MeanBefore, {"MeanBefore"}), (Shifted, {"Shifted"}), (Beside, {"MeanBefore"})])
def test_the_innermost_module_that_explains_the_mixing_is_found(kind, found):
    small = LogpModel(make_random("llama", VOCAB))
    small.causal_lm.model.layers[1].mlp = kind()
    small.use(TREE)
    assert find_mixers(small.backbone) == found


@pytest.mark.parametrize("name", ["jamba", "lfm2", "bamba", "mamba2"])
def test_bfloat16_is_checked_with_a_small_copy_too(name):
    model = LogpModel(make_random(name, VOCAB).bfloat16())
    report = choose_layout(model, CPU)
    assert report.method == TREE and HYBRIDS[name][0] in report.line


def test_it_is_said_if_layers_with_state_could_not_be_sought(monkeypatch):
    def fails(_):
        raise TypeError("another forward")

    monkeypatch.setattr(selfcheck, "find_mixers", fails)
    report = choose_layout(LogpModel(make_random("llama", VOCAB)), CPU)
    assert report.method == TREE and report.line.startswith("warning: layout: tree (sdpa attention), ")
    assert report.line.endswith("could not be tried (TypeError: another forward): if one does, set model.layout=padded")


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
def test_a_layout_can_be_forced(layout):
    model = LogpModel(make_random("lfm2", VOCAB))
    assert choose_layout(model, CPU, layout).method.layout == layout
    assert model.mixers.kinds == (() if layout == "padded" else ("Lfm2ShortConv",))


def test_a_layer_that_sees_later_tokens_is_refused(monkeypatch):
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    plain = Lfm2ShortConv.forward
    monkeypatch.setattr(Lfm2ShortConv, "forward", lambda self, *args, **kwargs: _spread(plain(self, *args, **kwargs)))
    with pytest.raises(ModelError, match=r"Lfm2ForCausalLM cannot be scored exactly: .*tree .*packed .*padded: "):
        choose_layout(LogpModel(loud("lfm2")), CPU)


def _spread(output):
    return output + output.mean(1, keepdim=True)


def test_what_is_remembered_includes_the_layers(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines, scores = [], []
    for _ in range(2):
        model = LogpModel(loud("falcon_h1"))
        lines.append(choose_layout(model, CPU, recall=Recall("falcon_h1 of a test", CPU)).line)
        scores.append(flat(model.score(groups(), CPU)))
        assert model.mixers.kinds == ("FalconH1Mixer",)
    assert "checked earlier" in lines[1] and "checked earlier" not in lines[0]
    assert np.array_equal(*scores)


@pytest.mark.parametrize("name", ["jamba", "qwen3_5_text"])
def test_layers_that_compute_again_take_the_rows_of_their_pack(name):
    """jamba's layers do not pass the pack on to their mixers. Two forward passes come before both backward passes."""
    gradients, calls = [], []
    for again in (False, True):
        model = LogpModel(add_lora(loud(name), LoraSettings(r=4, alpha=8), seed=0))
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_B" in key:
                    value.normal_(std=0.1, generator=torch.Generator().manual_seed(len(key)))
        choose_layout(model, CPU)
        if again:
            model.recompute_layers()
        model.train()
        (mixer, *_) = (module for module in model.modules() if type(module).__name__ == HYBRIDS[name][0])
        calls.append(0)
        mixer.register_forward_pre_hook(lambda *_: calls.append(calls.pop() + 1))
        passes = [model(model.lay_out(groups(seed))) for seed in (0, 1)]
        for logps in passes:
            (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert calls == [2, 4]
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        assert torch.allclose(value, gradients[1][key], atol=1e-6), key


@pytest.mark.parametrize("name", ["granitemoehybrid", pytest.param("zamba2", marks=pytest.mark.slow)])
def test_a_trained_model_is_saved_and_loaded(name, tmp_path):
    """Trained in the tree, it gives its log-probs again when it is loaded, in padded rows too."""
    model = LogpModel(make_random(name, VOCAB))
    choose_layout(model, CPU)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = flat(model.score(groups(), CPU))
    for _ in range(2):
        model(model.lay_out(groups())).mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = flat(model.score(groups(), CPU))
    assert np.abs(trained - before).mean() > 0.1
    model.policy.save_pretrained(tmp_path)
    loaded = LogpModel(load_causal_lm(tmp_path, "float32", rope_length=None))
    for layout in ("padded", "tree"):
        choose_layout(loaded, CPU, layout)
        assert np.abs(flat(loaded.score(groups(), CPU)) - trained).max() < 2e-5

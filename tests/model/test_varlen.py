"""The call of variable-length kernels, with the arguments that each release of torch knows, in values and gradients."""

import pytest
import torch
from dense_mask import HEADS, assert_same, by_definition, tensors, tree
from varlen_releases import flash_attn, have, torch_2_10, torch_2_11, torch_2_12

from raydpo.errors import ModelError
from raydpo.model import varlen
from raydpo.model.segments import Segments, Terms


@pytest.fixture(autouse=True)
def forget():
    yield
    varlen.torch_kernel.cache_clear()
    varlen.flash_kernel.cache_clear()


@pytest.mark.parametrize("key_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("release", [torch_2_11, torch_2_12, flash_attn], ids=lambda release: release.__name__)
def test_each_release_computes_the_definition(release, window, key_heads, monkeypatch):
    body, name = ("flash", "flash_attn_varlen_func") if release is flash_attn else ("varlen", "varlen_attn")
    have(monkeypatch, name, release)
    pack = tree()
    arguments = tensors(pack, key_heads=key_heads)
    found = varlen.attend(*arguments, Segments.of(pack, body), Terms(scaling=0.7, window=window))
    assert_same(found, by_definition(pack, *arguments, window=window, scaling=0.7), arguments)


def test_a_release_without_scale_and_window_is_not_used(monkeypatch):
    have(monkeypatch, "varlen_attn", torch_2_10)
    told = varlen.torch_kernel()
    assert told == f"varlen_attn of torch {torch.__version__} has no scale and no window_size; install torch 2.11 or newer"
    with pytest.raises(ModelError, match=r"no scale .*2\.11"):
        varlen.attend(*tensors(tree()), Segments.of(tree(), "varlen"), Terms(scaling=1.0))
    have(monkeypatch, "nothing", None)
    assert "has no varlen_attn (no varlen_attn); install torch 2.11" in varlen.torch_kernel()
    assert varlen.flash_kernel() == "flash_attn cannot be imported (no flash_attn_varlen_func); install flash-attn"


def test_the_installed_torch_has_a_kernel():
    assert callable(varlen.torch_kernel())

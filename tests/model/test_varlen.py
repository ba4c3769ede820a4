"""The call of variable-length kernels, with the arguments that each release of torch knows, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from dense_mask import HEADS, assert_same, by_definition, tensors, tree

from raydpo.errors import ModelError
from raydpo.model import varlen
from raydpo.model.segments import Segments, Terms


def kernel(query, key, value, query_ends, key_ends, longest_query, longest_key, scale, window_size):
    """The CUDA kernel's result in plain torch: segments, a causal mask aligned to the last key, a window."""
    assert longest_query == query_ends.diff().max() and longest_key == key_ends.diff().max() and window_size[1] == 0
    outputs = []
    for (q0, q1), (k0, k1) in zip(query_ends.unfold(0, 2, 1).tolist(), key_ends.unfold(0, 2, 1).tolist(), strict=True):
        back = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        sees = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        rows = (rows[None].transpose(1, 2) for rows in (query[q0:q1], key[k0:k1], value[k0:k1]))
        out = F.scaled_dot_product_attention(*rows, attn_mask=sees, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


# Signatures of torch/nn/attention/varlen.py in these releases. Before 2.12, nothing compares the numbers of heads.


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("scores would be scaled by the default, and windows ignored")


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):  # fmt: skip
    return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    if not enable_gqa and query.size(1) != key.size(1):
        raise ValueError("Expect query and key/value to have the same number of heads")
    assert num_splits == 1
    return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def flash_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    assert causal and not softcap
    return kernel(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, window_size)


@pytest.fixture(autouse=True)
def forget():
    yield
    varlen.torch_kernel.cache_clear()
    varlen.flash_kernel.cache_clear()


def have(monkeypatch, name, found):
    monkeypatch.setattr(varlen, "_imported", lambda _, wanted: found if wanted == name else f"no {wanted}")
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

"""Stand-ins for variable-length kernels on a CPU: torch's of several releases, and flash-attn's, computed by SDPA."""

import torch
import torch.nn.functional as F

from raydpo.model import varlen


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


def have(monkeypatch, name, found):
    monkeypatch.setattr(varlen, "_imported", lambda _, wanted: found if wanted == name else f"no {wanted}")
    varlen.torch_kernel.cache_clear()
    varlen.flash_kernel.cache_clear()

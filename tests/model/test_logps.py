"""Log-probs of completions against the definition: log softmax of the model's own logits, one sequence at a time."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raydpo.config import LoraSettings
from raydpo.model import head
from raydpo.model.load import add_lora
from raydpo.model.logps import ROW_MULTIPLE, LogpModel, PromptGroup, lay_out

VOCAB = 97
COMMON = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=256)
ARCHITECTURES = {
    "llama": {},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 64},
    "mixtral": {"num_local_experts": 4},
}


def make(name, seed=0):
    settings = dict(ARCHITECTURES[name])
    kind = settings.pop("model_type", name)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**COMMON, **settings}, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    return AutoModelForCausalLM.from_config(config).eval()


def groups(seed=0, shapes=((7, 5, 9), (30, 1, 2), (1, 12, 3), (16, 16, 16))):
    rng = np.random.default_rng(seed)
    return [PromptGroup(rng.integers(3, VOCAB, prompt).astype(np.int32),
                        tuple(rng.integers(3, VOCAB, length).astype(np.int32) for length in lengths))
            for prompt, *lengths in shapes]


def by_definition(model, group, completion):
    ids = torch.from_numpy(np.concatenate([group.prompt, completion]).astype(np.int64))[None]
    logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[len(group.prompt) - 1 :, 0]


@pytest.mark.parametrize("alone", [False, True], ids=["batch", "rows"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_and_gradients_are_those_of_the_definition(name, alone):
    model = make(name)
    wanted = torch.cat([by_definition(model, group, one) for group in groups() for one in group.completions])
    weights = torch.linspace(-1, 1, len(wanted))
    (wanted * weights).sum().backward()
    gradients = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)

    ours = LogpModel(model)
    layout = lay_out(groups())
    logps = ours(layout.input_ids, layout.positions, layout.targets, layout.lengths, layout.widths if alone else None)
    assert logps.dtype == torch.float32
    assert torch.allclose(logps, wanted, atol=2e-5)
    (logps * weights).sum().backward()
    for key, value in model.named_parameters():
        if key in gradients:
            size = gradients[key].norm().clamp_min(1e-2)  # some are zero but for rounding
            gap = (value.grad - gradients[key]).norm() / size
            assert gap < 1e-4, (key, gap)
    ours.check(torch.device("cpu"))


def test_an_unknown_transform_of_logits_is_found_out():
    from raydpo.errors import ModelError

    model = make("granite")
    model.config.logits_scaling = 1.0  # what we would read
    model.logits_scaling = 3.0
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits / 3.0
        return output

    model.forward = scaled
    with pytest.raises(ModelError, match="cannot be scored exactly"):
        LogpModel(model).check(torch.device("cpu"))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_chunks_change_nothing(name, monkeypatch):
    results = []
    for rows in (10_000, 3):
        monkeypatch.setattr(head, "CHUNK_BYTES", 4 * VOCAB * rows)
        model = make(name)
        layout = lay_out(groups())
        logps = LogpModel(model)(layout.input_ids, layout.positions, layout.targets, layout.lengths)
        logps.sum().backward()
        results.append((logps.detach(), model.get_output_embeddings().weight.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)


def test_the_chunk_bounds_the_memory(monkeypatch):
    """No tensor of [tokens, vocab] is ever made: the largest that the head allocates is one chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            is_weight = isinstance(result, torch.Tensor) and tuple(result.shape) == (COMMON["hidden_size"], VOCAB)
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (VOCAB,) and not is_weight:
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * VOCAB * 5)
    model = LogpModel(make("llama"))
    layout = lay_out(groups())
    with Watch():
        model(layout.input_ids, layout.positions, layout.targets, layout.lengths).sum().backward()
    assert len(layout.targets) > 50 and 0 < largest <= 5 * VOCAB


def test_lora_on_the_head_gets_its_gradient():
    model = add_lora(make("llama"), LoraSettings(r=4, alpha=8, target_modules=["lm_head", "q_proj"]), seed=0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.normal_(std=0.1)
    group = groups()[0]
    inner = model.get_base_model()
    wanted = torch.cat([by_definition(inner, group, one) for one in group.completions])
    wanted.sum().backward()
    gradients = {key: value.grad.clone() for key, value in model.named_parameters() if value.requires_grad}
    model.zero_grad(set_to_none=True)
    layout = lay_out([group])
    logps = LogpModel(model)(layout.input_ids, layout.positions, layout.targets, layout.lengths)
    assert torch.allclose(logps, wanted, atol=2e-5)
    logps.sum().backward()
    for key, value in model.named_parameters():
        if value.requires_grad:
            assert torch.allclose(value.grad, gradients[key], atol=1e-4), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(dtype):
    model = LogpModel(make("llama").to(dtype))
    device = torch.device("cpu")
    many = groups(shapes=((7, 5, 9), (30, 1, 2), (1, 12, 3), (150, 60, 16), (200, 40, 3), (100, 131, 90)))
    together = model.score(many, device)
    alone = [model.score([group], device)[0] for group in many]
    gap = max(np.abs(one - other).max() for left, right in zip(together, alone, strict=True)
              for one, other in zip(left, right, strict=True))
    assert gap <= 1e-6  # in bfloat16 too


def test_layout_points_at_predictors():
    layout = lay_out([PromptGroup(np.array([10, 11]), (np.array([20, 21]), np.array([30])))])
    assert layout.input_ids.shape == (2, ROW_MULTIPLE)
    assert layout.positions.tolist() == [1, 2, ROW_MULTIPLE + 1]
    assert layout.targets.tolist() == [20, 21, 30]
    assert (layout.lengths, layout.widths) == ((2, 1), (ROW_MULTIPLE, ROW_MULTIPLE))

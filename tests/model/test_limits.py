"""Token ids without a row in the embedding, and sequences longer than the model was made for."""

import json
import shutil

import pytest
import torch
from kernel import tiny_pairs
from safetensors.torch import save_file

from raydpo.data.tokenise import load_tokenizer
from raydpo.errors import FilesError
from raydpo.model.budget import probe_groups
from raydpo.model.limits import ModelLimits, check_limits, tokenizer_warnings


def made(directory, tensors, **config):
    directory.mkdir()
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return ModelLimits.of(directory)


EMBEDDING = {"model.embed_tokens.weight": (80, 4)}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
KINDS = {
    "rows of the file, not of config.json": (EMBEDDING, {"vocab_size": 96}, ModelLimits(80, None, False)),
    "a smaller head": (EMBEDDING | {"lm_head.weight": (72, 4)}, {}, ModelLimits(72, None, False)),
    "rotary": (EMBEDDING, {"max_position_embeddings": 512}, ModelLimits(80, 512, False)),
    "stretched": (EMBEDDING, {"max_position_embeddings": 512, "rope_scaling": YARN}, ModelLimits(80, 2048, False)),
    "stretched, in the newer form": (
        EMBEDDING,
        {"max_position_embeddings": 512, "rope_parameters": {"full_attention": YARN}},
        ModelLimits(80, 2048, False),
    ),
    "llama 3 counts its stretched ones": (
        EMBEDDING,
        {"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ModelLimits(80, 4096, False),
    ),
    "learned": ({"wte.weight": (80, 4), "wpe.weight": (64, 4)}, {"n_positions": 64}, ModelLimits(80, 64, True)),
    "learned, two rows more": (
        {"model.decoder.embed_tokens.weight": (80, 4), "model.decoder.embed_positions.weight": (66, 4)},
        {"max_position_embeddings": 64},
        ModelLimits(80, 64, True),
    ),
    "a table that is computed": (
        {"transformer.wte.weight": (80, 4)},
        {"model_type": "gptj", "n_positions": 64},
        ModelLimits(80, 64, True),
    ),
    "of text beside a picture": (
        {"language_model.model.embed_tokens.weight": (80, 4), "vision_tower.embeddings.position_embedding.weight": (9, 4)},
        {"text_config": {"max_position_embeddings": 512, "vocab_size": 80}},
        ModelLimits(80, 512, False),
    ),
    "unknown names": ({"tokens": (80, 4)}, {"vocab_size": 96}, ModelLimits(96, None, False)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_limits_of_a_model(kind, tmp_path):
    tensors, config, expected = KINDS[kind]
    assert made(tmp_path / "model", tensors, **config) == expected


def test_pairs_beyond_the_limits():
    table = tiny_pairs(8)
    rows = [[row[f"{part}_ids"] for part in ("prompt", "chosen", "rejected")] for row in table.to_pylist()]
    highest = [max(map(max, row)) for row in rows]
    tokens = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in rows]
    fits = ModelLimits(max(highest) + 1, max(tokens), True)
    assert check_limits([table], {"model": fits}) == []
    many, top = highest.count(max(highest)), max(highest)
    with pytest.raises(FilesError, match=rf"^{many} pair.* have token ids up to {top}, but .* of model has {top} rows"):
        check_limits([table.slice(0, 0), table], {"sound": fits, "model": ModelLimits(top, None, False)})
    short = max(tokens) - 1
    with pytest.raises(FilesError, match=rf"up to {short + 1} tokens, .* {short} positions, .*data.max_length={short}"):
        check_limits([table], {"model": ModelLimits(None, short, True)})
    (line,) = check_limits([table], {"model": ModelLimits(None, short, False)})
    assert f"{short} positions" in line and "not trained for" in line


def test_a_model_of_few_positions_is_checked_and_measured_within_them(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from raydpo.reference.identity import identify
    from raydpo.reference.score import ReferenceSpec, Scorer

    config = GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    spec = ReferenceSpec(path=str(tmp_path / "model"), adapter=None, identity=identify(tmp_path / "model", "float32"))
    layout, budget = Scorer(spec, device="cpu", tokens_per_batch="auto").notes
    assert layout.startswith("layout: tree") and "positions" in budget


@pytest.mark.parametrize(
    ("tokens", "longest", "sizes"), [(256, None, [256]), (768, 300, [300, 300, 168]), (601, 300, [300, 300])]
)
def test_made_up_pairs_are_no_longer_than_the_model_allows(tokens, longest, sizes):
    groups = probe_groups(tokens, 96, longest)
    assert [len(group.prompt) + sum(map(len, group.completions)) for group in groups] == sizes
    assert all(len(part) for group in groups for part in (group.prompt, *group.completions))


def test_a_tokenizer_that_is_not_the_models_is_warned_of(tiny_llama, tmp_path):
    tokenizer = load_tokenizer(str(tiny_llama))
    assert tokenizer_warnings(tokenizer, {"model": str(tiny_llama)}) == []
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    assert tokenizer_warnings(tokenizer, {"model": str(other)}) == []
    config = json.loads((other / "config.json").read_text())
    config["eos_token_id"] = [tokenizer.eos_token_id + 1, tokenizer.eos_token_id + 2]
    (other / "config.json").write_text(json.dumps(config))
    (other / "generation_config.json").unlink(missing_ok=True)
    (end,) = tokenizer_warnings(tokenizer, {"model": str(other)})
    assert f"(eos_token_id {tokenizer.eos_token_id}), but eos_token_id in config.json of model is" in end
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    assert tokenizer_warnings(tokenizer, {"model": str(other)}) == []
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    (tiny_end := json.loads((tiny_llama / "config.json").read_text()))["eos_token_id"] = tokenizer.eos_token_id
    (other / "config.json").write_text(json.dumps(tiny_end))
    (end,) = tokenizer_warnings(tokenizer, {"model": str(other)})
    assert "but eos_token_id in generation_config.json of model is 7, 8: text that the model generates may not stop" in end
    (other / "generation_config.json").unlink()
    config["eos_token_id"].append(tokenizer.eos_token_id)
    (other / "config.json").write_text(json.dumps(config))
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    words["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    (other / "tokenizer.json").write_text(json.dumps(words))
    (vocabulary,) = tokenizer_warnings(tokenizer, {"model": str(other)})
    assert vocabulary.startswith("the tokenizer and that of model differ in ")
    (other / "tokenizer.json").unlink()
    assert tokenizer_warnings(tokenizer, {"model": str(other)}) == []

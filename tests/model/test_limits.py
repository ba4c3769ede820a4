"""Token ids without a row in the embedding, and sequences longer than the model was made for."""

import json

import pytest
import torch
from kernel import tiny_pairs
from safetensors.torch import save_file

from raydpo.errors import FilesError
from raydpo.model.limits import ModelLimits, check_limits


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

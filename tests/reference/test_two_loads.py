"""A model that is not a function of its files is refused where its log-probs would be stored."""

import json
import shutil

import numpy as np
import pytest
from kernel import tiny_pairs

import raydpo.reference.build as module
from raydpo.cluster.resources import Resources
from raydpo.errors import ModelError
from raydpo.model.layout import PromptGroup
from raydpo.reference.identity import identify
from raydpo.reference.score import ReferenceSpec, Scorer
from raydpo.reference.shards import Wanted
from raydpo.reference.store import ReferenceCache

CODE = """
import torch
from transformers import LlamaForCausalLM

class Drawn(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        with torch.device("cpu"):
            self.noise = 0.1 * torch.randn(config.vocab_size)

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + self.noise.to(out.logits.device)
        return out
"""
ROWS = [PromptGroup(np.arange(5, 25, dtype=np.int32), (np.arange(9, dtype=np.int32), np.arange(30, 35, dtype=np.int32)))]


@pytest.fixture
def drawn(tiny_llama, tmp_path):
    """A model whose own code adds numbers that it draws when it is loaded."""
    directory = shutil.copytree(tiny_llama, tmp_path / "drawn")
    config = json.loads((directory / "config.json").read_text())
    code = {"architectures": ["Drawn"], "auto_map": {"AutoModelForCausalLM": "modeling_drawn.Drawn"}}
    (directory / "config.json").write_text(json.dumps(config | code))
    (directory / "modeling_drawn.py").write_text(CODE)
    return directory


def spec_of(directory, trusted):
    identity = identify(directory, "float32", trust_remote_code=trusted)
    return ReferenceSpec(path=str(directory), adapter=None, identity=identity, trust_remote_code=trusted)


def test_one_worker_loads_it_twice(drawn, tiny_llama):
    sound = [
        Scorer(spec_of(tiny_llama, False), device="cpu", tokens_per_batch=64, check_rows=ROWS, alone=True) for _ in "12"
    ]
    assert len(sound[0].sample) == 14 and np.array_equal(sound[0].sample, sound[1].sample)
    with pytest.raises(ModelError, match=r"not a function of its files: loaded twice by one worker.* nats a token"):
        Scorer(spec_of(drawn, True), device="cpu", tokens_per_batch=64, check_rows=ROWS, alone=True)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_two_workers_compare_the_same_rows_and_nothing_of_the_build_stays(noise, tiny_llama, tmp_path, monkeypatch):
    spec, table = spec_of(tiny_llama, False), tiny_pairs(12)
    cache = ReferenceCache.open(str(tmp_path / "cache"), spec.identity)
    earlier, *others = Wanted([table])
    cache.commit([earlier.key], [np.full(len(earlier.tokens), -1, np.float32)], {})
    ours = ReferenceCache.open(str(tmp_path / "cache"), spec.identity)

    def score(shards, source, *arguments):
        """What two workers answer, the second with other numbers."""
        for worker, share in enumerate((others[::2], others[1::2])):
            logps = [np.full(len(one.tokens), -1, np.float32) for one in share]
            part = ours.commit([one.key for one in share], logps, {})
            counts = {"completions": len(share), "by_others": 0, "left": 0, "tokens": 9, "seconds": 0.1, "notes": []}
            yield counts | {"part": part, "sample": [-1.0 - noise * worker] * 5}

    monkeypatch.setattr(module, "_score_on_ray", score)
    settings = dict(tokens_per_batch=100, tokens_per_part=1000, progress=lambda *_: None)
    if not noise:
        assert module.build([table], spec, ours, Resources(2, 0, None), **settings).scored == len(others)
        return
    with pytest.raises(ModelError, match=r"scored by two workers, .* differ by 0\.3 nats a token"):
        module.build([table], spec, ours, Resources(2, 0, None), **settings)
    left = ReferenceCache.open(str(tmp_path / "cache"), spec.identity)
    assert left.keys().to_pylist() == [earlier.key], "only what another build has stored"

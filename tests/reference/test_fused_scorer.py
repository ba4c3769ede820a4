"""A reference scored with fused functions: the same identity and log-probs up to rounding, named in each part."""

import numpy as np
import pytest
from kernel import MAX_LENGTH

from raydpo.model.layout import PromptGroup
from raydpo.reference.identity import identify
from raydpo.reference.score import ReferenceSpec, Scorer


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_fused_reference_says_so(dtype, tiny_llama):
    rng = np.random.default_rng(0)
    groups = [PromptGroup(rng.integers(3, 90, 20), (rng.integers(3, 90, 9), rng.integers(3, 90, 14)))]
    found = {}
    for fused in (False, True):
        identity = identify(tiny_llama, dtype, max_length=MAX_LENGTH)
        spec = ReferenceSpec(path=str(tiny_llama), adapter=None, identity=identity, fused=fused)
        scorer = Scorer(spec, device="cpu", tokens_per_batch=512)
        found[fused] = scorer, np.concatenate(scorer.score(groups)[0])
        assert any(note.startswith("fused: ") for note in scorer.notes) is fused
    (plain, expected), (scorer, values) = found[False], found[True]
    if dtype == "float32":  # nothing to fuse
        assert np.array_equal(values, expected) and scorer.provenance == plain.provenance
    else:
        assert 0 < np.abs(values - expected).mean() < 0.02
        assert scorer.provenance["layout"] == f"{plain.provenance['layout']}, fused"

"""FlexAttention over a tree: its block mask against torch's own, its values, and how often it compiles."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from architectures import make_random
from definition import VOCAB, groups
from dense_mask import HEADS, assert_same, by_definition, tensors, tree
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention

from raydpo.model import flex
from raydpo.model.attention import watch_demands
from raydpo.model.layout import Method
from raydpo.model.logps import LogpModel
from raydpo.model.segments import BLOCK, Segments, Terms
from raydpo.model.tree import PrefixTree

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def random_tree(seed, longest=400):
    """Up to three levels with nodes of 1 to ``longest`` tokens, some of them exactly one block."""
    rng = np.random.default_rng(seed)

    def tokens():
        size = int(rng.choice([1, 7, BLOCK, BLOCK + 1, rng.integers(1, longest)]))
        return rng.integers(0, 1000, size)

    sequences = []
    for _ in range(rng.integers(1, 4)):
        system = tokens()
        for _ in range(rng.integers(1, 4)):
            prompt = np.concatenate([system, tokens()])
            sequences += [np.concatenate([prompt, tokens()]) for _ in range(rng.integers(1, 3))]
    return PrefixTree.build(sequences, min_saved=int(rng.choice([1, 8])))


@pytest.mark.parametrize("window", [None, 1, 6, BLOCK, 300])
@pytest.mark.parametrize("seed", range(6))
def test_the_block_mask_is_torchs_own(seed, window):
    pack = random_tree(seed)
    segments = Segments.of(pack, "flex")
    ours, size = flex.block_mask(segments, window), len(segments.ends)
    theirs = flex_attention.create_block_mask(ours.mask_mod, None, None, size, size, device="cpu")
    for name in (
        "kv_num_blocks",
        "kv_indices",
        "full_kv_num_blocks",
        "full_kv_indices",
        "q_num_blocks",
        "full_q_num_blocks",
    ):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    # The mask function itself is the definition: a token sees its path and itself, nothing in the padding.
    sees = flex_attention.create_mask(ours.mask_mod, 1, 1, size, size, device="cpu")[0, 0]
    expected = torch.zeros(size, size, dtype=torch.bool)
    for node in pack.nodes:
        path = np.concatenate([np.arange(start, start + length) for start, length in node.with_path])
        for depth in range(node.depth, node.depth + node.length):
            first = 0 if window is None else max(0, depth + 1 - window)
            expected[path[depth], path[first : depth + 1]] = True
    assert torch.equal(sees, expected)


def test_some_of_these_masks_have_full_blocks():
    full = [flex.visible_blocks(random_tree(seed).nodes, window)[1].sum() for seed in range(6) for window in (None, 300)]
    assert sum(found > 0 for found in full) >= 6, full


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(flex, "_kernel", lambda: flex_attention.flex_attention)
    # torch refuses gradients on CPUs, though the uncompiled function has them.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_values_and_gradients_are_the_definition(key_heads, more, window, uncompiled):
    pack = tree(longest=150)
    arguments = tensors(pack, key_heads=key_heads)
    wanted = list(arguments)
    if more.get("sinks"):
        more = {"sinks": torch.linspace(-2, 3, HEADS, requires_grad=True)}
        wanted.append(more["sinks"])
    found = flex.attend(*arguments, Segments.of(pack, "flex"), Terms(scaling=0.7, window=window, **more))
    assert_same(found, by_definition(pack, *arguments, window=window, scaling=0.7, **more), wanted, 1e-5)


def test_values_of_another_head_size(uncompiled):
    pack = tree(longest=150)
    query, key, _ = tensors(pack)
    value = tensors(pack, size=12)[2]
    found = flex.attend(query, key, value, Segments.of(pack, "flex"), Terms(scaling=0.7))
    assert_same(found, by_definition(pack, query, key, value, scaling=0.7), [query, key, value])


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_models_with_soft_caps_windows_and_sinks(name, uncompiled):
    """Log-probs are those of node-by-node attention."""
    model = LogpModel(make_random(name, VOCAB))
    found = []
    for body in ("sdpa", "flex"):
        model.use(Method("tree", body))
        with watch_demands() as demands:
            found.append(np.concatenate([one for group in model.score(groups(), torch.device("cpu")) for one in group]))
        assert {demand.window is None for demand in demands} == {True, False}
        assert all(demand.sinks if name == "gpt_oss" else demand.softcap for demand in demands)
    assert np.allclose(*found, atol=1e-5)


@pytest.fixture
def compiled(monkeypatch):
    """Counts compilations: traced by torch, forward and backward pass, but run without Triton."""
    counter = CompileCounterWithBackend("aot_eager")
    kernel = flex._compiled(counter)
    monkeypatch.setattr(flex, "_kernel", lambda: kernel)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    flex._settings.cache_clear()
    yield counter
    torch._dynamo.reset()
    flex._settings.cache_clear()


def test_other_layouts_do_not_compile_again(compiled):
    """20 trees of 2 to 5 blocks: layers with a window and a soft cap, and with sinks, each take one compilation."""
    rng, sizes = np.random.default_rng(0), set()
    for turn in range(20):
        prompt, *rest = (rng.integers(0, 1000, size) for size in rng.integers(1, 160, rng.integers(2, 5)))
        pack = PrefixTree.build([np.concatenate([prompt, one]) for one in rest])
        arguments, segments = tensors(pack), Segments.of(pack, "flex")
        sizes.add((len(segments.ends), len(pack.nodes)))
        terms = ({"window": 40 + turn, "softcap": 2.0 + turn}, {"sinks": torch.zeros(HEADS) + turn})[turn % 2]
        found = flex.attend(*arguments, segments, Terms(scaling=0.3, **terms))
        assert_same(found, by_definition(pack, *arguments, scaling=0.3, **terms), arguments)
    assert len(sizes) >= 5 and compiled.frame_count == 2, (sizes, compiled.frame_count)


def test_too_many_compilations_are_an_error(compiled, monkeypatch):
    """torch by itself would warn once and go on with the uncompiled function, with all scores."""
    monkeypatch.setattr(flex, "MOST_VARIANTS", 1)
    pack = tree()
    arguments = [tensor.detach() for tensor in tensors(pack)]
    flex.attend(*arguments, Segments.of(pack, "flex"), Terms(scaling=0.3))
    with pytest.raises(FailOnRecompileLimitHit):
        flex.attend(*arguments, Segments.of(pack, "flex"), Terms(scaling=0.3, window=6))


def test_heads_and_scale_are_constants_and_more_kinds_than_torchs_limit_are_compiled(compiled, monkeypatch):
    """Also in another thread, as gradient checkpointing computes a layer again on a GPU."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    pack, placeholders = tree(), []
    segments = Segments.of(pack, "flex")

    def look(graph, inputs):
        placeholders.append([node for node in graph.graph.nodes if node.op == "placeholder"])
        return graph.forward

    kernel = flex._compiled(look)
    monkeypatch.setattr(flex, "_kernel", lambda: kernel)

    def attend(size, scaling):
        flex.attend(*(tensor.detach() for tensor in tensors(pack, size=size)), segments, Terms(scaling=scaling))

    attend(8, 0.3)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(attend, 8, 0.4).result()
        pool.submit(attend, 16, 0.4).result()
    attend(8, 0.3)
    assert len(placeholders) == 3
    for found in placeholders:
        names = [node.name.lower() for node in found]
        assert not any("scale" in name for name in names)
        query = next(node for node in found if node.name.lower().startswith("l_query"))
        batch, heads, positions, size = query.meta["example_value"].shape
        assert (type(batch), type(heads), type(positions), type(size)) == (int, int, torch.SymInt, int)

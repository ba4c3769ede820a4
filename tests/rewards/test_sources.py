"""What identifies the source of a built-in reward function."""

import pytest

from raydpo.config.rewards import BUILT_IN
from raydpo.rewards import sources
from raydpo.rewards.sources import built_in_digest


@pytest.fixture
def digest_of(tmp_path, monkeypatch):
    """Return the digest of ``regex`` with this source."""
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "sources.py"))

    def digest(source):
        (tmp_path / "pattern.py").write_text(source)
        return built_in_digest("regex")

    return digest


def test_comments_docstrings_and_layout_do_not_count(digest_of):
    plain = digest_of("def make(reward):\n    return 1\n")
    assert digest_of('"""What it is."""\n\n\ndef make(reward):\n    "How."\n    return (1)  # why\n') == plain
    assert digest_of("def make(reward):\n    return 2\n") != plain
    assert digest_of("def make(reward):\n    return '# 1'\n") != digest_of("def make(reward):\n    return '# 2'\n")


def test_a_module_that_is_named_counts(digest_of, tmp_path):
    (tmp_path / "equality.py").write_text("A = 1\n")
    one = digest_of("from raydpo.rewards.equality import A\n")
    (tmp_path / "equality.py").write_text("A = 2\n")
    assert digest_of("from raydpo.rewards.equality import A\n") != one


def test_each_built_in_function_has_its_own():
    assert len({built_in_digest(name) for name in BUILT_IN}) == len(BUILT_IN)

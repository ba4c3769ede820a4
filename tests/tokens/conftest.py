"""Modules of tests/data that tests of sets need, and the kit."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "data"))


@pytest.fixture
def kit(tmp_path):
    from making import Kit

    return Kit(tmp_path)

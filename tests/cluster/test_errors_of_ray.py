"""The one sentence that a long Ray exception is reduced to."""

import pytest

from raydpo.cluster.actors import original_error
from raydpo.errors import CacheError

OUT_OF_MEMORY = """Training failed due to controller error:
9 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.2, ID: 071dcbcdca025bb3) was \
22.40GB used / 23.54GB limit (0.951656)
OOM kill reason: Memory usage 24053878784B exceeded threshold of 24012677120B (95.0% of 25276502016B limit)
Object store memory usage: [- objects spillable: 1
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/en/latest/debug-memory.html.
"""
"""Message of Ray 2.60 when a training and a sweep ran on one machine."""


def test_a_node_without_memory_is_named_with_what_it_had():
    told = str(original_error(RuntimeError(OUT_OF_MEMORY), "training"))
    assert told.startswith("training failed: node 10.0.0.2 ran low on memory (22.40GB of 23.54GB used"), told
    assert "tokens_per_batch" in told and "docs.ray.io" not in told


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda cause: cause,
        lambda cause: _caused(RuntimeError("the actor died"), cause),
        lambda cause: RuntimeError(f"The actor died in its constructor:\nraydpo.errors.CacheError: {cause}"),
    ],
)
def test_an_error_of_ours_arrives_as_it_was(wrapped):
    told = original_error(wrapped(CacheError("part x is damaged")), "scoring")
    assert type(told) is CacheError and str(told) == "part x is damaged"


def test_of_other_errors_the_last_that_says_something_is_told():
    told = original_error(_caused(RuntimeError("Task failed\n"), ValueError("first line\nthe reason")), "scoring")
    assert str(told) == "scoring failed: ValueError: the reason"


def _caused(error, cause):
    error.__cause__ = cause
    return error

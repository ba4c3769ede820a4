"""Setting of torch's allocator on GPUs. Imports no Ray."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ALLOCATOR", "ALLOCATOR_OLD", "allocator_setting"]

ALLOCATOR = "PYTORCH_ALLOC_CONF"
"""Variable with the settings of torch's allocator on GPUs."""
ALLOCATOR_OLD = "PYTORCH_CUDA_ALLOC_CONF"
"""Its old name, which counts where the new one is not set."""


def allocator_setting(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables to add to ``environment`` for a process that scores or trains on a GPU; none if it has a setting.

    Micro-batches differ in size, and torch's blocks of fixed size would leave gaps between them. torch reads the setting
    when a GPU is first used.
    """
    return {} if {ALLOCATOR, ALLOCATOR_OLD} & environment.keys() else {ALLOCATOR: "expandable_segments:True"}

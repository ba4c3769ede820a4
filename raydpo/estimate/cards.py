"""GPUs with their peak rates and memory, from the vendors' data sheets."""

from __future__ import annotations

import re

__all__ = ["DEVICES", "MEMORY", "is_card", "known_peak"]

_DATA_SHEETS = {  # peak TFLOP/s, GiB of memory
    "H100": (989.4, 80),
    "H200": (989.4, 141),
    "A100-80GB": (311.8, 80),
    "A100-40GB": (311.8, 40),
    "L40S": (362.1, 48),
    "A10G": (70.0, 24),
    "L4": (121.0, 24),
    "T4": (65.1, 16),
}
DEVICES = {name: peak for name, (peak, _) in _DATA_SHEETS.items()}
"""Peak TFLOP/s of dense bfloat16 products (float16 on a T4, which has no bfloat16). Source: the vendors' data sheets. NVIDIA
H100 SXM, H200 SXM, A100 SXM, L40S, A10G, L4 and T4, whose figures with sparsity are halved. GPUs of other makers are
not listed: raydpo was never run with ROCm."""
CARDS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H200 NVL": 835.0}
"""The same for cards whose name begins with a name in ``DEVICES``, from NVIDIA's data sheets."""
MEMORY = {name: size for name, (_, size) in _DATA_SHEETS.items()}
"""GiB of memory, from the same data sheets. A program gets less of it (``modes.USABLE``)."""


def is_card(known: str, name: str) -> bool:
    """Whether a GPU that calls itself ``name``, such as NVIDIA H100 80GB HBM3, is a ``known`` one of ``DEVICES``."""
    return all(re.search(rf"\b{part}\b", name) for part in known.split("-"))


def known_peak(name: str) -> float | None:
    """Peak bfloat16 operations per second of the GPU called ``name``, or None if it is unknown or a MIG slice."""
    if "MIG" in name.split():
        return None
    fitting = [peak for card, peak in CARDS.items() if card in name] or [
        peak for known, peak in DEVICES.items() if is_card(known, name)
    ]
    return fitting[0] * 1e12 if fitting else None

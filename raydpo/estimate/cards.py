"""GPUs with their peak rates and memory, from the vendors' data sheets."""

from __future__ import annotations

import re

__all__ = ["BANDWIDTH", "DEVICES", "MEMORY", "PER_MACHINE", "is_card", "known_memory", "known_peak", "link_of"]

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
"""GiB of memory, from the same data sheets. A program gets less of it (``ledger.USABLE``)."""

BANDWIDTH = {
    "H100": 3.35e12,
    "H200": 4.8e12,
    "A100-80GB": 2.039e12,
    "A100-40GB": 1.555e12,
    "L40S": 8.64e11,
    "A10G": 6e11,
    "L4": 3e11,
    "T4": 3.2e11,
}
"""Bytes per second from a device's memory, from the same data sheets."""

PER_MACHINE = 8
"""GPUs of a machine that are assumed where none is known."""

_PCIE_3, _PCIE_4, _PCIE_5 = ("PCIe 3", 9.0, 12.0), ("PCIe 4", 18.0, 25.0), ("PCIe 5", 35.0, 50.0)
_LINKS = {
    "H100 PCIe": _PCIE_5,
    "H100 NVL": _PCIE_5,
    "H200 NVL": _PCIE_5,
    "A100-PCIE": _PCIE_4,
    "A100-PCIe": _PCIE_4,
    "H100": ("NVLink", 350.0, 50.0),
    "H200": ("NVLink", 350.0, 50.0),
    "A100-80GB": ("NVLink", 235.0, 25.0),
    "A100-40GB": ("NVLink", 235.0, 25.0),
    "T4": _PCIE_3,
}
"""Link of a GPU to the others of its machine, and GB/s that it receives over it when all gather at once, and from the host's
memory. Assumed: about four fifths of the data sheets' figure in one direction (NVLink 4: 450, NVLink 3: 300 GB/s). NVL cards
are linked in pairs only. Cards that are not listed: PCIe 4."""


def link_of(name: str) -> tuple[str, float, float]:
    """Kind of the link of the GPU called ``name``, bytes per second from other GPUs of its machine, and from its host."""
    fitting = [link for card, link in _LINKS.items() if card in name or is_card(card, name)] or [_PCIE_4]
    kind, gather, host = fitting[0]
    return kind, gather * 1e9, host * 1e9


def known_memory(accelerator: str) -> float | None:
    """Bytes of memory of the GPU that Ray names ``accelerator``; None if unknown, as of an A100, which has 40 or 80 GB."""
    name = {"A100-80G": "A100-80GB", "A100-40G": "A100-40GB"}.get(accelerator, accelerator)
    return MEMORY[name] * 2.0**30 if name in MEMORY else None


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

"""raydpo: DPO on Ray, with the frozen reference scored once.

``import raydpo`` is light; torch, ray and deepspeed are imported by the functions that need them.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from raydpo.version import __version__ as __version__

if TYPE_CHECKING:
    from raydpo.config import Config, load_config
    from raydpo.pipeline.audit import audit
    from raydpo.pipeline.evaluate import evaluate
    from raydpo.pipeline.run import run
    from raydpo.pipeline.score import score
    from raydpo.pipeline.train import train
    from raydpo.reference.store import ReferenceCache
    from raydpo.rounds.run import rounds
    from raydpo.sweeps.run import sweep

__all__ = ["Config", "ReferenceCache", "audit", "evaluate", "load_config", "rounds", "run", "score", "sweep", "train"]

_LAZY = {
    "Config": "raydpo.config",
    "ReferenceCache": "raydpo.reference.store",
    "audit": "raydpo.pipeline.audit",
    "evaluate": "raydpo.pipeline.evaluate",
    "load_config": "raydpo.config",
    "rounds": "raydpo.rounds.run",
    "run": "raydpo.pipeline.run",
    "score": "raydpo.pipeline.score",
    "sweep": "raydpo.sweeps.run",
    "train": "raydpo.pipeline.train",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'raydpo' has no attribute {name!r}")


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets each subpackage as an attribute. raydpo.rounds is the function, whatever was imported first.
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

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
    from raydpo.evaluation.run import evaluate
    from raydpo.pipeline import audit, run, score, train
    from raydpo.reference.store import ReferenceCache
    from raydpo.sweeps.run import sweep

__all__ = ["Config", "ReferenceCache", "audit", "evaluate", "load_config", "run", "score", "sweep", "train"]

_LAZY = {"Config": "raydpo.config", "load_config": "raydpo.config", "audit": "raydpo.pipeline",
         "evaluate": "raydpo.evaluation.run", "score": "raydpo.pipeline", "train": "raydpo.pipeline",
         "run": "raydpo.pipeline", "ReferenceCache": "raydpo.reference.store", "sweep": "raydpo.sweeps.run"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'raydpo' has no attribute {name!r}")


class _Functions(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # ``raydpo.audit`` and ``raydpo.sweep`` are also packages, which Python sets here when it imports them; the function
        # wins, which is what ``raydpo.audit(config)`` means.
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Functions

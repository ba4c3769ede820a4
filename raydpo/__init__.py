"""raydpo: DPO on Ray, with the frozen reference scored once.

``import raydpo`` is light; torch, ray and deepspeed are imported by the functions that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raydpo.config import Config, load_config

if TYPE_CHECKING:
    from raydpo.evaluation.run import evaluate
    from raydpo.pipeline import audit, run, score, train
    from raydpo.reference.store import ReferenceCache

__version__ = "0.1.0"
__all__ = ["Config", "ReferenceCache", "audit", "evaluate", "load_config", "run", "score", "train"]

_LAZY = {"audit": "raydpo.pipeline", "evaluate": "raydpo.evaluation.run", "score": "raydpo.pipeline",
         "train": "raydpo.pipeline", "run": "raydpo.pipeline", "ReferenceCache": "raydpo.reference.store"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        # ``raydpo.train`` is also a package; the function wins, which is what ``raydpo.train(config)`` means.
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'raydpo' has no attribute {name!r}")

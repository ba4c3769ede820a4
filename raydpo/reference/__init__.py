"""The frozen reference: what it is (identity), its log-probs (score, build) and where they are kept (store)."""

from raydpo.reference.identity import ReferenceIdentity, identify
from raydpo.reference.store import ReferenceCache

__all__ = ["ReferenceCache", "ReferenceIdentity", "identify"]

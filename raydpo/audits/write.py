"""Writes an audit to its run directory."""

from __future__ import annotations

import json

from raydpo.audits.audit import Audit
from raydpo.audits.page import render_page
from raydpo.rundir.directory import AUDIT_JSON, AUDIT_PAGE
from raydpo.storage.files import Storage

__all__ = ["write_audit"]


def write_audit(audit: Audit, storage: Storage) -> None:
    """Write ``audit.json`` and ``audit.html`` into ``storage``."""
    storage.write(AUDIT_JSON, json.dumps(audit.to_dict(), indent=1, allow_nan=False).encode())
    storage.write(AUDIT_PAGE, render_page(audit).encode())

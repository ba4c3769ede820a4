"""Audits preference data from token lengths and cached log-probs. Needs no model and no GPU."""

from raydpo.audits.audit import Audit, audit_pairs, summary_lines
from raydpo.audits.sample import draw
from raydpo.audits.write import write_audit

__all__ = ["Audit", "audit_pairs", "draw", "summary_lines", "write_audit"]

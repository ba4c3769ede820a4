"""What will this data teach? From lengths and cached log-probs alone: no model and no GPU."""

from raydpo.audit.audit import Audit, audit_pairs, summary_lines
from raydpo.audit.write import write_audit

__all__ = ["Audit", "audit_pairs", "summary_lines", "write_audit"]

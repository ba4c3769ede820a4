"""URIs as text: whether one is one, and what of it may be shown. Opening them is ``raydpo.storage``'s."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qsl, urlencode

__all__ = ["CREDENTIALS", "HARMLESS", "carries_secret", "is_uri", "redact", "redacted"]

HARMLESS = ("endpoint_override", "scheme", "region", "allow_bucket_creation", "allow_bucket_deletion")
"""Options of a URI that may be shown."""
CREDENTIALS = re.compile(r"^(?P<scheme>[^:/]+://)(?P<secret>[^/?#]*:[^?#]*)@")  # an unquoted key may hold slashes
"""User and password at the beginning of a URI."""


def is_uri(path: str) -> bool:
    """Whether ``path`` carries a scheme such as ``s3://``."""
    return re.match(r"^[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def redact(uri: str) -> str:
    """``uri`` without the secrets that it may carry: user and password, and the values of all but harmless options."""
    if not is_uri(uri):
        return uri
    place, _, query = CREDENTIALS.sub(r"\g<scheme>***@", uri).partition("?")
    options = urlencode([(key, value if key in HARMLESS else "***") for key, value in parse_qsl(query)], safe="*:/")
    return f"{place}?{options}" if options else place


def carries_secret(uri: str) -> bool:
    """Whether there is something that ``redact`` takes away."""
    return is_uri(uri) and (CREDENTIALS.match(uri) is not None
                            or any(key not in HARMLESS for key, _ in parse_qsl(uri.partition("?")[2])))


def redacted(tree: Any) -> Any:
    """``tree`` of dictionaries and lists, with every URI in it redacted."""
    if isinstance(tree, dict):
        return {key: redacted(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [redacted(value) for value in tree]
    return redact(tree) if isinstance(tree, str) and carries_secret(tree) else tree

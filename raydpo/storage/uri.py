"""URIs as text: recognise them, and hide secrets in URIs and other settings. ``raydpo.storage.files`` opens URIs."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["HARMLESS", "KEYS", "carries_secret", "hidden", "is_uri", "redact", "redacted", "secrets_of", "shown"]

HARMLESS = ("endpoint_override", "scheme", "region", "allow_bucket_creation", "allow_bucket_deletion")
"""Options of a URI whose values may be shown."""
KEYS = (
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)|"
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{30,}\b|"
    r"\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bsk-[A-Za-z0-9_-]{40,}|\bAIza[0-9A-Za-z_-]{35}\b"
)
"""Pattern of texts that can only be keys."""
_CREDENTIALS = re.compile(r"^(?P<scheme>[^:/]+)://(?P<secret>[^/?#]*:[^?#]*|[^/?#:]+)@")  # an unquoted key may hold slashes
_NAMED_BEFORE_AT = ("abfs", "abfss", "adl", "az", "hdfs", "sftp", "ssh", "wasb", "wasbs")
"""Schemes with a container or user before ``@``, which is no secret unless a password follows."""
_SECRET_NAME = re.compile(r"(?:^|[._-])(?:key|token|auth)$|secret|passw|credential|api_?key", re.IGNORECASE)
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]*[^\s'\".,;:)\]}]")


def is_uri(path: str) -> bool:
    """Whether ``path`` begins with a scheme such as ``s3://``."""
    return re.match(r"^[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def secrets_of(text: str) -> list[str]:
    """Parts of a value that must not be shown: texts that look like keys. In a URI also user and password, values of options
    that are not ``HARMLESS``, and options without a value."""
    found = re.findall(KEYS, text)
    if not is_uri(text):
        return found
    credentials = _credentials(text)
    options = [option.partition("=") for option in text.partition("?")[2].split("&")]
    return (
        found
        + ([] if credentials is None else [credentials["secret"]])
        + [secret for name, sign, value in options if name not in HARMLESS and (secret := value if sign else name)]
    )


def _credentials(uri: str) -> re.Match[str] | None:
    found = _CREDENTIALS.match(uri)
    alone = found is not None and ":" not in found["secret"] and found["scheme"].lower() in _NAMED_BEFORE_AT
    return None if alone else found


def redact(text: str) -> str:
    """Replace each of ``secrets_of(text)`` by ``***``."""
    if is_uri(text):
        if (credentials := _credentials(text)) is not None:
            text = f"{credentials['scheme']}://***@{text[credentials.end() :]}"
        place, mark, query = text.partition("?")
        options = [option.partition("=") for option in query.split("&") if option]
        text = (
            place
            + mark * bool(options)
            + "&".join(
                name + sign + value if name in HARMLESS else f"{name}={'***' if value else ''}" if sign else "***"
                for name, sign, value in options
            )
        )
    return re.sub(KEYS, "***", text)


def carries_secret(text: str) -> bool:
    """Whether ``redact`` would replace anything."""
    return bool(secrets_of(text))


def redacted(tree: Any) -> Any:
    """Redact every text in a tree of dictionaries and lists."""
    if isinstance(tree, dict):
        return {key: redacted(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [redacted(value) for value in tree]
    return redact(tree) if isinstance(tree, str) and carries_secret(tree) else tree


def hidden(message: str) -> str:
    """Redact every URI and key in a message."""
    return re.sub(KEYS, "***", _IN_TEXT.sub(lambda uri: redact(uri[0]) if carries_secret(uri[0]) else uri[0], message))


def shown(value: Any, key: str = "") -> str:
    """The redacted value of setting ``key``, for a message. If the key is named like a password, all of it is hidden."""
    if value is not None and _SECRET_NAME.search(key):
        return "'***'"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {shown(below, str(name))}" for name, below in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(shown, value)) + "]"
    return repr(redact(value) if isinstance(value, str) else value)

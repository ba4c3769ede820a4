"""A judge: a model with an OpenAI-compatible API that compares or scores answers."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from raydpo.config.section import Float, Int, Section

__all__ = ["JudgeConfig"]


class JudgeConfig(Section):
    """A model with an OpenAI-compatible API that decides which of two answers is better. It is asked twice, with the answers
    in both orders; only equal verdicts count."""

    url: str
    """Base URL of the API, such as https://host/v1. Requests go to ``/chat/completions`` below it."""
    model: str
    """Name of the model in the API."""
    key: str | None = None
    """NAME of the environment variable with the API key, such as JUDGE_KEY; not the key itself, which is neither printed nor
    stored. null = no key."""
    timeout: Float = Field(default=60.0, gt=0)
    """Seconds to wait for a reply."""
    retries: Int = Field(default=3, ge=0)
    """Retries after a timeout, a lost connection, or status 408, 409, 429 or 5xx. The wait doubles each time."""
    parallel: Int = Field(default=8, ge=1)
    """Number of concurrent requests."""
    max_tokens: Int = Field(default=16, ge=1)
    """Longest reply, in tokens. A model that reasons first needs hundreds. The last line of a reply is the verdict."""
    criterion: str = "more helpful, honest and harmless"
    """Criterion for the better answer, in the words that the judge gets."""

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected an address such as https://host/v1")
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                "the address carries a user or password; set key to the name of an environment variable instead"
            )
        return value.rstrip("/")

    @field_validator("key")
    @classmethod
    def _key(cls, value: str | None) -> str | None:
        # The value is not shown: it may be the key itself.
        if value is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", value):
            raise ValueError(
                "expected the NAME of an environment variable, in capitals such as JUDGE_KEY, not the key itself"
            )
        return value

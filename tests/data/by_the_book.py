"""The plain way to token ids: each rendering by ``apply_chat_template``, each text tokenised whole."""

from __future__ import annotations

from raydpo.data.tokenise import Tokeniser


def by_the_book(tokenizer) -> Tokeniser:
    """A tokeniser that takes no shorter way."""
    tokeniser = Tokeniser(tokenizer)
    tokeniser.template._forms._use = False
    for segments in tokeniser._segments.values():
        segments._token_ids = {}
    return tokeniser

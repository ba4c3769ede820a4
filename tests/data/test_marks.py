"""Which tokens of a completion are the assistant's, its last turn, its answer and its reasoning."""

from __future__ import annotations

import numpy as np
import templates
from samples import bot, user

from raydpo.data.marks import ANSWER, ASSISTANT, LAST_TURN, MARK_BITS, REASONING
from raydpo.data.preference import Preference
from raydpo.data.tokenise import Tokeniser

PARTS = {"assistant": ASSISTANT, "last_turn": LAST_TURN, "answer": ANSWER, "reasoning": REASONING}


def marked(template, preference, bos=False):
    """Ids, marks and remarks of one preference, and the tokenizer."""
    marks, tokenizer = [], templates.tokenizer_for(template, bos)
    ((ids, found),) = Tokeniser(tokenizer).encode_noted([preference], marks)
    return tokenizer, ids, marks[0], {(remark.kind, remark.what) for remark in found}


def counted(tokenizer, ids, runs, part):
    """The texts of successive tokens that count."""
    starts = [mark >> MARK_BITS for mark in runs.marks.tolist()] + [len(ids)]
    counts = np.zeros(len(ids), bool)
    for start, stop, mark in zip(starts, starts[1:], runs.marks.tolist(), strict=False):
        counts[start:stop] = part == "completion" or mark & PARTS[part]
    edges = np.flatnonzero(np.diff([0, *counts.astype(int), 0]))
    return [tokenizer.decode(ids[start:stop]) for start, stop in edges.reshape(-1, 2)]


def test_turns_of_chatml():
    said = [bot("<think>\nhm\n</think>\n\nblue"), user("sure?"), bot("yes 🙂")]
    tokenizer, ids, pair, _ = marked(templates.CHATML, Preference([user("sky?")], said, [bot("green")]))
    found = {part: counted(tokenizer, ids.chosen, pair.chosen, part) for part in ["completion", *PARTS]}
    assert found == {
        "completion": [
            "<think>\nhm\n</think>\n\nblue<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n"
            "<|im_start|>assistant\nyes 🙂<|im_end|>\n"
        ],
        "assistant": ["<think>\nhm\n</think>\n\nblue<|im_end|>", "yes 🙂<|im_end|>"],
        "last_turn": ["yes 🙂<|im_end|>"],
        "answer": ["blue<|im_end|>", "yes 🙂<|im_end|>"],
        "reasoning": ["<think>\nhm\n</think>\n\n"],
    }
    assert counted(tokenizer, ids.rejected, pair.rejected, "answer") == ["green<|im_end|>"]

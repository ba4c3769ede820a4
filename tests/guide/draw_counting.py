"""Draws raydpo/guide/counting.svg: which tokens of one pair count under each setting, by the project's own marks.

``python tests/guide/draw_counting.py``
"""

from __future__ import annotations

import html
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from draw_betas import BLUE, GREY, GUIDE, STYLE

from raydpo.config.counting import part_weights, train_on_text
from raydpo.data.counting import weight_runs
from raydpo.data.marks import MARK_COLUMNS
from raydpo.data.preference import Preference
from raydpo.data.tokenise import Tokeniser

__all__ = ["PICTURE", "SETTINGS", "lines_of", "picture"]

PICTURE = GUIDE / "counting.svg"
TEMPLATE = Path(__file__).parents[1] / "data" / "thinking.jinja"
SETTINGS = ("completion", "assistant", "last_turn", "answer", "reasoning", ({"answer": 1.0}, {"reasoning": 0.1}))
PALE = "#a8c8e6"
WIDTH, LEFT, FIRST, COLUMN, BAR, LINE = 780, 24, 470, 52, 32, 18
MONO = ".mono{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace}.soft{fill:#767676}"
ASKED = "What should I wear in Oslo today?"
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
PAIR = Preference(
    [{"role": "user", "content": ASKED}],
    [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "That depends on the weather; look it up.",
            "tool_calls": [CALL],
        },
        {"role": "tool", "content": "4 degrees, rain"},
        {"role": "assistant", "content": "A rain coat: 4 degrees and wet.", "reasoning_content": "Cold and wet, so a coat."},
    ],
    [{"role": "assistant", "content": "It is probably warm.", "reasoning_content": "I guess."}],
)


def lines_of() -> dict[str, list[tuple[str, list[float]]]]:
    """The completions by side, as lines: their text, and the weight of their tokens under each of ``SETTINGS``. A line that
    counts in part is several."""
    sys.path.append(str(TEMPLATE.parent))
    from templates import tokenizer_for

    tokenizer, marks = tokenizer_for(TEMPLATE.read_text()), []
    ((ids, _),) = Tokeniser(tokenizer).encode_noted([PAIR], marks)
    found = {}
    for side in ("chosen", "rejected"):
        each, runs = getattr(ids, side), getattr(marks[0], side)
        columns = {f"{side}_marks": [runs.marks], f"{side}_factors": [runs.factors]}
        light = pa.table({name: pa.array(columns[name], kind) for name, kind in MARK_COLUMNS if name in columns})
        used = np.array([len(each)], np.int32)
        weights = [weight_runs(light, side, used, part_weights(one)).token_weights() for one in SETTINGS]
        found[side] = _lines([tokenizer.decode([token]) for token in each], np.stack(weights, 1))
    return found


def _lines(tokens: list[str], weights: np.ndarray) -> list[tuple[str, list[float]]]:
    lines: list[tuple[str, list[float]]] = [("", [])]
    for token, each in zip(tokens, weights.astype(float).round(6).tolist(), strict=True):
        for char in token:
            said, counted = lines[-1]
            if char == "\n":
                lines.append(("", []))
            elif said and counted != each:
                lines.append((char, each))
            else:
                lines[-1] = (said + char, each)
    return [line for line in lines if line[0].strip()]


def picture() -> str:
    """The SVG: the lines of both completions on the left, a column of bars for each setting on the right."""
    top = 128
    parts = [
        _text(LEFT, 30, "Which tokens count, by data.train_on", style="font-size:16px;font-weight:600"),
        *_legend(LEFT, 54),
        *(_heading(number, train_on_text(one), top - 14) for number, one in enumerate(SETTINGS)),
        _text(LEFT, top, "prompt", style="font-weight:600"),
        _text(LEFT, top + LINE, f"<|im_start|>user {ASKED}<|im_end|>", "mono soft"),
        _text(LEFT, top + 2 * LINE, "<|im_start|>assistant", "mono soft"),
    ]
    down = top + 2 * LINE
    for side, lines in lines_of().items():
        down += 30
        parts.append(_text(LEFT, down, side, style="font-weight:600"))
        for said, weights in lines:
            down += LINE
            parts.append(_text(LEFT, down, said, "mono"))
            parts += [_bar(number, down, weight) for number, weight in enumerate(weights)]
    height = down + 24
    return (
        "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
                "<title>Which tokens of a pair count under each setting</title>",
                f"<style>{STYLE}{MONO}</style>",
                f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#ffffff"/>',
                *parts,
                "</svg>",
            ]
        )
        + "\n"
    )


def _legend(across: float, down: float) -> list[str]:
    parts = []
    for colour, said, width in ((BLUE, "counts", 70), (PALE, "counts 0.1", 96), (GREY, "does not count", 0)):
        high = 12 if colour != GREY else 2
        parts.append(f'<rect x="{across}" y="{down - 4 - high / 2:g}" width="18" height="{high}" fill="{colour}"/>')
        parts.append(_text(across + 24, down, said, "small"))
        across += 24 + width
    return parts


def _heading(number: int, said: str, down: float) -> str:
    across = FIRST + number * COLUMN + BAR / 2
    return (
        f'<text x="{across:g}" y="{down:g}" text-anchor="end" class="small" transform="rotate(32 {across:g} {down:g})">'
        f"{html.escape(said)}</text>"
    )


def _bar(number: int, down: float, weight: float) -> str:
    across = FIRST + number * COLUMN
    if not weight:
        return f'<rect x="{across}" y="{down - 5}" width="{BAR}" height="2" fill="{GREY}"/>'
    return f'<rect x="{across}" y="{down - 13}" width="{BAR}" height="{LINE}" fill="{BLUE if weight == 1 else PALE}"/>'


def _text(across: float, down: float, said: str, kind: str = "", style: str = "") -> str:
    more = (f' class="{kind}"' if kind else "") + (f' style="{style}"' if style else "")
    return f'<text x="{across:g}" y="{down:g}" xml:space="preserve"{more}>{html.escape(said)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")

"""Draws raydpo/guide/betas.svg from the table of measured figures in sweeps.md: ``python tests/guide/draw_betas.py``."""

from __future__ import annotations

import math
import re
from pathlib import Path

__all__ = ["PICTURE", "TABLE", "picture"]

GUIDE = Path(__file__).parents[2] / "raydpo" / "guide"
TABLE, PICTURE = GUIDE / "sweeps.md", GUIDE / "betas.svg"
BLUE, ORANGE, INK, GREY = "#1f5f99", "#b8540f", "#222222", "#d9d9d9"
WIDTH, HEIGHT, TOP, BOTTOM = 780, 326, 78, 252
STYLE = f"text{{font:13px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:{INK}}}.small{{font-size:12px}}"


def measured() -> list[tuple[float, ...]]:
    """Beta, accuracy, drift and its error on politeness, drift and its error on HH-RLHF, one tuple for each beta."""
    rows = re.findall(
        r"^\| ([\d.]+) \| ([\d.]+) \| [\d.]+ \| ([\d.]+) ± ([\d.]+) \| [\d.]+ \| ([\d.]+) ± ([\d.]+) \|$",
        TABLE.read_text(),
        re.MULTILINE,
    )
    return [tuple(map(float, row)) for row in rows]


def picture() -> str:
    """The SVG: on the left drift against beta with standard errors, on the right held-out accuracy against beta."""
    rows = measured()
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>Five betas, one reference pass</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#ffffff"/>',
        _text(24, 28, "Five betas trained against one reference pass", size=16),
        *_panel(
            64,
            400,
            rows,
            (0.0, 0.25, 0.05),
            "drift from the reference, nats a token",
            [
                ("politeness", BLUE, [row[2] for row in rows], [row[3] for row in rows]),
                ("HH-RLHF", ORANGE, [row[4] for row in rows], [row[5] for row in rows]),
            ],
        ),
        *_panel(
            480, 756, rows, (0.8, 1.0, 0.05), "held-out accuracy, politeness", [("", BLUE, [row[1] for row in rows], [])]
        ),
        _text(
            24,
            HEIGHT - 14,
            "SmolLM2-135M, LoRA, 40 steps of 8 pairs. Bars: one standard error. Figures and data: sweeps.md",
            kind="small",
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _panel(
    left: int,
    right: int,
    rows: list[tuple[float, ...]],
    scale: tuple[float, float, float],
    title: str,
    series: list[tuple[str, str, list[float], list[float]]],
) -> list[str]:
    low, high, step = scale
    betas = [row[0] for row in rows]

    def across(beta: float) -> float:
        inset = 24
        share = math.log(beta / betas[0]) / math.log(betas[-1] / betas[0])
        return left + inset + share * (right - left - 2 * inset)

    def up(value: float) -> float:
        return BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)

    parts = [_text(left, TOP - 18, title)]
    for number in range(round((high - low) / step) + 1):
        value = low + number * step
        parts += [
            f'<path d="M{left} {up(value):.1f}H{right}" stroke="{GREY}"/>',
            _text(left - 8, up(value) + 4, f"{value:.2f}", anchor="end", kind="small"),
        ]
    parts += [_text(across(beta), BOTTOM + 18, f"{beta:g}", anchor="middle", kind="small") for beta in betas]
    parts.append(_text(right, BOTTOM + 34, "beta", anchor="end", kind="small"))
    for number, (name, colour, values, errors) in enumerate(series):
        places = [across(beta) + 5 * number for beta in betas]  # aside, so that bars do not hide one another
        line = "L".join(f"{place:.1f} {up(value):.1f}" for place, value in zip(places, values, strict=True))
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<path d="M{place:.1f} {up(value - error):.1f}V{up(value + error):.1f}" stroke="{colour}"/>'
            for place, value, error in zip(places, values, errors, strict=False)
        ]
        parts += [
            f'<circle cx="{place:.1f}" cy="{up(value):.1f}" r="4" fill="{colour}"/>'
            for place, value in zip(places, values, strict=True)
        ]
        if name:
            over = series[0][0] == name
            parts.append(
                _text(
                    across(betas[3]) + (10 if over else -10),
                    up(values[3]) + (-8 if over else 14),
                    name,
                    anchor="start" if over else "end",
                    colour=colour,
                )
            )
        else:
            parts += [
                _text(across(beta), up(value) - 10, f"{value:.3f}", anchor="middle", kind="small")
                for beta, value in zip(betas, values, strict=True)
            ]
    return parts


def _text(
    across: float,
    down: float,
    said: str,
    *,
    size: int | None = None,
    anchor: str = "start",
    kind: str = "",
    colour: str = "",
) -> str:
    style = (f"font-size:{size}px;font-weight:600" if size else "") + (f"fill:{colour};font-weight:600" if colour else "")
    return (
        f'<text x="{across:.1f}" y="{down:.1f}" text-anchor="{anchor}"'
        + (f' class="{kind}"' if kind else "")
        + (f' style="{style}"' if style else "")
        + f">{said}</text>"
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")

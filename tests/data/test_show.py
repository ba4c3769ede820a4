import io

from rich.console import Console
from samples import text

from raydpo.config import DataConfig
from raydpo.data.pairs import load_pairs
from raydpo.data.show import render_pairs


def shown(tokeniser, write, record, count=1, **settings):
    sets = load_pairs(DataConfig(train=write([record] * 2), **settings), tokeniser)
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="standard", width=1000, highlight=False)
    for renderable in render_pairs(sets.train, tokeniser, count):
        console.print(renderable)
    return sets.train.to_pylist()[0], stream.getvalue()


def plain(output):
    import re

    return re.sub(r"\x1b\[[\d;]*m", "", output)


def test_everything_is_there(tokeniser, write):
    row, output = shown(tokeniser, write, text(1))
    lines = plain(output)
    assert "prefs:1  (source prefs, weight 1)" in lines and "prefs:2" not in lines
    assert text(1)["prompt"] in lines
    assert f"{text(1)['chosen']}</s>\n" in lines and f"{text(1)['rejected']}</s>\n" in lines
    assert f"{len(row['chosen_ids'])} tokens, key {row['chosen_key'].hex()}" in lines
    assert f"prompt    {len(row['prompt_ids'])} tokens, no loss" in lines
    assert "\x1b[2m" in output and "\x1b[32m" in output and "\x1b[31m" in output  # dim, green, red


def test_truncation_is_marked(tokeniser, write):
    row, output = shown(tokeniser, write, text(1, chosen=" the sky is blue" * 30), max_length=64)
    assert f"tokens of {row['chosen_full']}, TRUNCATED" in plain(output)


def test_hostile_text_is_shown_not_obeyed(tokeniser, write):
    hostile = " [red]no[/red] [/] \x1b]0;title\x07\x1b[2J \u202e \x9b31m \r over \x00 end \U0001f600 \u20ac"
    _, output = shown(tokeniser, write, text(1, chosen=hostile))
    lines = plain(output)
    assert r" [red]no[/red] [/] \x1b]0;title\x07\x1b[2J \u202e \x9b31m \r over \x00 end " in lines
    assert "\U0001f600 \u20ac</s>" in lines
    assert not set("\x07\x9b\r\x00\u202e") & set(output)


def test_count_beyond_the_table(tokeniser, write):
    assert plain(shown(tokeniser, write, text(1), count=9)[1]).count("no loss") == 2

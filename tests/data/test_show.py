import io
import re

import pyarrow as pa
import pytest
from kernel import weighted
from rich.console import Console
from samples import text

from raydpo.config import DataConfig
from raydpo.data.pairs import load_pairs
from raydpo.data.show import render_pairs


def shown(tokeniser, write, record, count=1, **settings):
    sets = load_pairs(DataConfig(train=write([record] * 2), **settings), tokeniser)
    return sets.train.to_pylist()[0], printed(sets.train, tokeniser, count)


def printed(table, tokeniser, count=1, coloured=True):
    stream = io.StringIO()
    looks = {"force_terminal": True, "color_system": "standard"} if coloured else {}
    console = Console(file=stream, width=1000, highlight=False, **looks)
    for renderable in render_pairs(table, tokeniser, count, coloured=coloured):
        console.print(renderable)
    return stream.getvalue()


def styles(output):
    """(style codes, text) of each styled piece, in order."""
    return re.findall(r"\x1b\[([\d;]+)m([^\x1b]*)", output)


def plain(output):
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


@pytest.fixture
def table(tokeniser, write):
    return load_pairs(DataConfig(train=write([text(1, chosen=" the sky is blue", rejected=" no")] * 2)), tokeniser).train


def test_what_does_not_count_is_dim(table, tokeniser):
    """In the chosen completion all but the last two tokens; the rejected one counts as a whole."""
    tokens = len(table["chosen_ids"][0])
    masked = weighted(table, lambda side, _, many: [side == "rejected"] * (many - 2) + [1, 1])
    output = printed(masked, tokeniser)
    assert f"chosen    {tokens} tokens, 2 count, the others are dim, key " in plain(output)
    assert "count" not in plain(output).split("rejected  ")[1] and "[x" not in plain(output)
    pieces = styles(output.split("chosen  ")[1].split("rejected  ")[0])
    dim, counted = ([text for style, text in pieces if one in style.split(";")] for one in ("2", "32"))
    assert "".join(dim) + "".join(counted) == " the sky is blue</s>" and len(counted) == 2 and counted[-1] == "</s>"
    assert plain(output).split("chosen")[1].splitlines()[1] == " the sky is blue</s>", "nothing stands between the tokens"


def test_weights_are_told_where_they_are_not_one(table, tokeniser):
    tokens = len(table["chosen_ids"][0])
    masked = weighted(table, lambda _, row, many: [0.1] * (many - 1) + [1])
    output = plain(printed(masked, tokeniser))
    assert f"{tokens} tokens, {tokens} count with weights that sum to {0.1 * (tokens - 1) + 1:g}, key" in output
    assert "[x0.1] the sky is blue[x1]</s>" in output


def test_without_colours_runs_have_lines(table, tokeniser):
    """Also on a terminal that can show ASCII alone."""
    tokens = len(table["chosen_ids"][0])
    masked = weighted(table, lambda _, row, many: [0] * (many - 2) + [0.5, 1])
    output = printed(masked, tokeniser, coloured=False)
    assert output.isascii() and "\x1b" not in output and "dim" not in output
    lines = output.split("chosen  ")[1].split("rejected  ")[0].splitlines()
    assert lines[0].startswith(f"  {tokens} tokens, 2 count with weights that sum to 1.5, key ")
    assert lines[1] == f"  -- {tokens - 2} tokens that do not count:" and lines[3] == "  -- 1 token that counts 0.5:"
    assert lines[5:7] == ["  -- 1 token that counts:", "</s>"] and lines[2] + lines[4] == " the sky is blue"
    assert "--" not in printed(table, tokeniser, coloured=False), "nothing new where all count"


@pytest.mark.parametrize(("label", "side", "name"), [(1, "chosen", "desirable"), (-1, "rejected", "undesirable")])
def test_a_row_with_a_label_has_one_completion(label, side, name, table, tokeniser):
    output = plain(printed(table.append_column("label", pa.array([label, 0], pa.int8())), tokeniser, count=2))
    alone, pair = output.split("prefs:2")
    assert f"\n{name}" in alone and table[f"{side}_key"][0].as_py().hex() in alone and alone.count("key ") == 1
    assert "\nchosen" in pair and "\nrejected" in pair


def test_a_ranked_list_tells_places(table, tokeniser):
    columns = {"list": [7, 7], "chosen_rank": [0, 2], "rejected_rank": [1, 2]}
    for column, values in columns.items():
        table = table.append_column(column, pa.array(values, pa.int64() if column == "list" else pa.int32()))
    output = plain(printed(table, tokeniser, count=2))
    assert output.count("a ranked list") == 1 and [f"\nplace {place} " in output for place in (1, 2, 3)] == [True] * 3
    nothing = pa.array([table["rejected_ids"][0].as_py(), []], table.schema.field("rejected_ids").type)
    odd = table.set_column(table.column_names.index("rejected_ids"), "rejected_ids", nothing)
    odd = odd.set_column(table.column_names.index("rejected_full"), "rejected_full", pa.array([2, 0], pa.int32()))
    assert plain(printed(odd, tokeniser, count=2)).count("key ") == 3

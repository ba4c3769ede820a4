import json

import pyarrow as pa
import pytest
from samples import text

from raydpo.config import DataConfig
from raydpo.data.keys import completion_key
from raydpo.data.pairs import PAIR_SCHEMA, load_pairs
from raydpo.data.select import PLACE_SCHEMA
from raydpo.data.split import held_out, prompt_digest
from raydpo.errors import DataError


def load(tokeniser, path, **settings):
    return load_pairs(DataConfig(train=path, **settings), tokeniser)


def test_table(tokeniser, write):
    seen = []
    path = write([text(number) for number in range(1, 4)])
    sets = load_pairs(DataConfig(train=[{"path": path, "weight": 0.5}]), tokeniser, seen.append)
    assert sets.train.column_names == [*PAIR_SCHEMA.names, *PLACE_SCHEMA.names] and sets.eval is None and seen == [3]
    rows = sets.train.to_pylist()
    assert [row["pair_id"] for row in rows] == ["prefs:1", "prefs:2", "prefs:3"]
    assert {(row["source"], row["weight"]) for row in rows} == {("prefs", 0.5)}
    for row in rows:
        for side in ("chosen", "rejected"):
            assert row[f"{side}_key"] == completion_key(row["prompt_ids"], row[f"{side}_ids"])
            assert row[f"{side}_full"] == len(row[f"{side}_ids"])
    assert tokeniser.tokenizer.decode(rows[1]["chosen_ids"]) == " the sky is blue 2</s>"
    assert sets.report.lines()[0] == "data prefs: 3 records, 3 pairs kept"


def test_chunks_are_joined(tokeniser, write, monkeypatch):
    path = write([text(number) for number in range(7)])
    whole = load(tokeniser, path).train
    monkeypatch.setattr("raydpo.data.pairs.CHUNK", 2)
    seen = []
    assert load_pairs(DataConfig(train=path), tokeniser, seen.append).train.equals(whole)
    assert seen == [2, 4, 6, 7]


def test_more_tokens_than_32_bits_count(tokeniser, write, monkeypatch):
    """Two sources with more than 2^31 tokens, a small held-out file, and the completions wanted of both."""
    from raydpo.reference.shards import Wanted

    train = [
        {"path": write([text(number) for number in range(4)], "a.jsonl")},
        {"path": write([text(number) for number in range(4, 9)], "b.jsonl")},
    ]
    config = DataConfig(train=train, eval={"path": write([text(9)], "c.jsonl")})
    usual = load_pairs(config, tokeniser)
    monkeypatch.setattr("raydpo.data.spool.MOST_SMALL", 60)
    monkeypatch.setattr("raydpo.data.ragged.MOST_SMALL", 60)
    sets = load_pairs(config, tokeniser)
    assert sets.train["prompt_ids"].type == pa.list_view(pa.int32())
    assert (sets.train["prompt_ids"].num_chunks, sets.eval["prompt_ids"].num_chunks) == (4, 1)
    assert sets.train.to_pylist() == usual.train.to_pylist() and sets.eval.to_pylist() == usual.eval.to_pylist()

    def contents(sets):
        return [(one.key, one.prompt.tolist(), one.tokens.tolist()) for one in Wanted([sets.train, sets.eval])]

    assert contents(sets) == contents(usual) and len(contents(sets)) == 20


def test_keep_start_cuts_each_completion_by_itself(tokeniser, write):
    path = write([text(1, chosen=" the sky is blue" * 4)])
    whole = load(tokeniser, path).train.to_pylist()[0]
    prompt, chosen, rejected = (len(whole[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))
    assert chosen > rejected + 2
    sets = load(tokeniser, path, max_length=prompt + rejected)
    (cut,) = sets.train.to_pylist()
    assert cut["rejected_ids"] == whole["rejected_ids"]
    assert cut["chosen_ids"] == whole["chosen_ids"][:rejected]
    assert (cut["chosen_full"], cut["rejected_full"]) == (chosen, rejected)
    assert cut["chosen_key"] == whole["chosen_key"]  # of the completion before truncation
    assert sets.report.sources[0].truncated == 1
    with pytest.raises(DataError, match=r"1 of 1 pairs would be dropped .* 1 prompt leaves no room \(prefs\.jsonl:1\)"):
        load(tokeniser, path, max_length=prompt)


def test_drop_and_its_share(tokeniser, write):
    path = write([text(1), text(2, chosen=" the sky is blue" * 20), text(3)])
    with pytest.raises(
        DataError,
        match=r"1 of 3 pairs .* data\.max_length 40, .*data\.max_dropped \(0\.1\) .*"
        r"1 longer than max_length \(prefs\.jsonl:2\)",
    ):
        load(tokeniser, path, max_length=40, truncation="drop")
    sets = load(tokeniser, path, max_length=40, truncation="drop", max_dropped=0.5)
    assert sets.train["pair_id"].to_pylist() == ["prefs:1", "prefs:3"]
    assert sets.report.to_dict()["sources"][0]["dropped"] == {
        "longer than max_length": {"count": 1, "first": ["prefs.jsonl:2"]}
    }
    assert "data prefs: 1 pairs dropped: 1 longer than max_length (prefs.jsonl:2)" in sets.report.lines()


def test_difference_that_is_cut_off(tokeniser, write):
    path = write([text(1, chosen=" is" * 60 + " blue", rejected=" is" * 60 + " red"), text(2)])
    sets = load(tokeniser, path, max_length=60, max_dropped=0.5)
    assert sets.train["pair_id"].to_pylist() == ["prefs:2"]
    assert sets.report.sources[0].dropped.counts == {"identical after truncation": 1}


def test_malformed_records_are_counted_with_their_lines(tokeniser, write):
    lines = [text(number) for number in range(96)] + ["{", text(97, chosen=""), text(98, chosen=" "), "[]"]
    path = write(lines)
    with pytest.raises(
        DataError,
        match=r"4 of 100 records are malformed, .*data\.max_malformed \(0\.01\).*"
        r"2 chosen is empty \(prefs\.jsonl:98, prefs\.jsonl:99\).*prefs\.jsonl:97",
    ):
        load(tokeniser, path)
    sets = load(tokeniser, path, max_malformed=0.04)
    assert sets.train.num_rows == 96
    report = sets.report.to_dict()["sources"][0]
    assert (report["records"], report["malformed_records"], report["kept"]) == (100, 4, 96)
    assert report["malformed"]["not a JSON object"] == {"count": 1, "first": ["prefs.jsonl:100"]}
    assert any(line.startswith("warning: data prefs: 4 malformed") for line in sets.report.lines())
    json.dumps(report)


def test_only_the_first_places_are_named(tokeniser, write):
    with pytest.raises(
        DataError,
        match=r"5 missing column 'chosen', nearest forms: .*; found 'prompt' \(prefs\.jsonl:1, [^ ]*:2, [^ ]*:3, \.\.\.\)",
    ):
        load(tokeniser, write([{"prompt": "p"}] * 5))


def test_source_without_a_usable_pair(tokeniser, write):
    with pytest.raises(DataError, match=r"none of the 1 records .* gives a usable pair: 1 chosen equals rejected"):
        load(tokeniser, write([text(1, chosen="same", rejected="same")]), max_malformed=1.0)
    with pytest.raises(DataError, match="dropped: 1 prompt leaves no room"):
        load(tokeniser, write([text(1)]), max_length=3, max_dropped=1.0)


def test_ranked_records_expand_and_a_faulty_pair_counts_its_record_once(tokeniser, write):
    good = {"prompt": "the sky", "completions": [" is", " was", " will"], "ranks": [1, 2, 3]}
    same = {"prompt": "the sky", "completions": [" is", " is</s>", " was", " was</s>"], "scores": [4, 3, 2, 1]}
    sets = load(tokeniser, write([good, same, text(3)]), max_malformed=0.34)
    assert sets.train["pair_id"].to_pylist() == [
        "prefs:1",
        "prefs:1#1",
        "prefs:1#2",
        "prefs:2#1",
        "prefs:2#2",
        "prefs:2#3",
        "prefs:2#4",
        "prefs:3",
    ]
    report = sets.report.sources[0]
    assert (report.malformed.counts, report.malformed_records) == ({"chosen and rejected have the same tokens": 2}, 1)


def test_duplicates_are_kept_and_counted_across_sources(tokeniser, write):
    sets = load(tokeniser, [write([text(1), text(1), text(2)], "a.jsonl"), write([text(2)], "b.jsonl")])
    assert sets.train.num_rows == 4
    assert [source.duplicates for source in sets.report.sources] == [1, 1]
    assert "data b: 1 records, 1 pairs kept, 1 exact duplicates kept" in sets.report.lines()


def test_boundary_and_turns_are_warned_of(tokeniser, write):
    chat = [
        {"role": role, "content": content}
        for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    other = [chat[0], {"role": "assistant", "content": "other"}]
    sets = load(tokeniser, write([text(1, prompt="the a", chosen="b", rejected="c"), {"chosen": chat, "rejected": other}]))
    assert [line.split(",")[0] for line in sets.report.lines()[1:3]] == [
        "warning: data prefs: in 1 pairs the prompt is tokenised differently alone and with its completion (tokens merge "
        "across the boundary",
        "warning: data prefs: in 1 pairs a completion continues with user or tool messages",
    ]


def prompts(table):
    return {tuple(ids) for ids in table["prompt_ids"].to_pylist()}


def test_split_is_by_prompt_and_survives_more_data(tokeniser, write):
    records = [text(number % 60, chosen=f" answer {number}") for number in range(120)]
    first = load(tokeniser, write(records[:80]), eval={"fraction": 0.2})
    more = load(tokeniser, write(records[::-1], "more.jsonl"), eval={"fraction": 0.2})
    assert first.train.num_rows + first.eval.num_rows == 80
    assert 0 < len(prompts(more.eval)) < 30
    for sets in (first, more):
        assert not prompts(sets.train) & prompts(sets.eval)
    assert prompts(first.eval) <= prompts(more.eval) and prompts(first.train) <= prompts(more.train)


def test_split_takes_a_prompt_whose_tokens_depend_on_the_completion_as_one(tokeniser, write):
    records = [
        text(1, prompt=f"the {number} a", chosen=chosen, rejected=" sky") for number in range(20) for chosen in ("b", " no")
    ]
    sets = load(tokeniser, write(records), eval={"fraction": 0.3})
    lines = {int(pair_id.split(":")[1]) for pair_id in sets.eval["pair_id"].to_pylist()}
    assert lines == {line for line in lines for line in (line - (line + 1) % 2, line + line % 2)}


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_of_a_split_is_empty(fraction):
    digests = [prompt_digest(f"p{number}") for number in range(5)] * 2
    mask = held_out(digests, fraction)
    assert mask.sum() == (2 if fraction < 0.5 else 8)
    assert held_out(digests[:2], 0.5).sum() == 1


def test_one_prompt_cannot_be_split(tokeniser, write):
    with pytest.raises(DataError, match=r"data\.eval\.fraction 0\.5 cannot split"):
        load(tokeniser, write([text(1), text(1, chosen="other")]), eval={"fraction": 0.5})


def test_share_of_a_large_split():
    mask = held_out([prompt_digest([{"role": "user", "content": str(number)}]) for number in range(4000)], 0.1)
    assert 320 < mask.sum() < 480


def test_held_out_file_and_its_leaks(tokeniser, write):
    train = write([{"q": record.pop("prompt")} | record for record in map(text, range(5))])
    held = write([{"q": text(number)["prompt"], "chosen": " x", "rejected": " y"} for number in (4, 5, 6)], "held.jsonl")
    sets = load(tokeniser, [{"path": train, "columns": {"prompt": "q"}}], eval=held)
    assert (sets.train.num_rows, sets.eval.num_rows, sets.report.leaked) == (5, 3, 1)
    assert set(sets.eval["source"].to_pylist()) == {"held-out"}
    assert sets.report.lines()[-1].startswith("warning: the prompts of 1 held-out pairs are also in the training data")


def test_one_question_on_both_sides_is_a_leak_however_it_is_written(tokeniser, write):
    messages = [{"role": "user", "content": f"{text(1)['prompt']}\n"}]
    held = write([{"prompt": messages, "chosen": "x", "rejected": "y"}, text(9)], "held.jsonl")
    assert load(tokeniser, write([text(number) for number in range(3)]), eval=held).report.leaked == 1
    records = [text(number) | {"prompt": text(number)["prompt"] + end} for number in range(30) for end in ("", " ")]
    sets = load(tokeniser, write(records), eval={"fraction": 0.5}, fraction=0.5)
    assert 0 < sets.report.leaked < sets.eval.num_rows
    assert sets.train.column_names == sets.eval.column_names == [*PAIR_SCHEMA.names, *PLACE_SCHEMA.names]


def test_weights_and_margins_of_pairs(tokeniser, write):
    records = [text(number) | {"importance": number / 2, "gap": -1} for number in range(6)]
    records += [text(7) | {"importance": -1, "gap": 0}, text(8) | {"importance": 1, "gap": None}, text(9)]
    settings = {"weight_column": "importance", "margin_column": "gap", "max_malformed": 1.0}
    sets = load(tokeniser, write(records), eval={"fraction": 0.3}, **settings)
    rows = sets.train.to_pylist() + sets.eval.to_pylist()
    assert sorted((row["pair_id"], row["pair_weight"], row["pair_margin"]) for row in rows) == [
        (f"prefs:{number + 1}", number / 2, -1.0) for number in range(6)
    ]
    told = " ".join(sets.report.lines())
    assert "'importance' is below 0" in told and "'gap' is missing or no number" in told
    assert sets.train.column_names == [*PAIR_SCHEMA.names, "pair_weight", "pair_margin", *PLACE_SCHEMA.names]


def test_weights_and_margins_that_are_hardly_meant(tokeniser, write):
    records = [text(number) | {"importance": number % 2, "gap": number - 1} for number in range(4)]
    told = load(tokeniser, write(records), weight_column="importance", margin_column="gap").report.lines()
    assert "data prefs: 2 records: 'importance' (data.weight_column) is 0, so nothing is learned from these" in told
    (line,) = [line for line in told if "'gap'" in line]
    assert line.startswith("warning: data prefs: 1 records: 'gap' (data.margin_column) is below 0")
    held = write([text(9) | {"importance": 0}], "held.jsonl")
    with pytest.raises(DataError, match="'importance' is 0 for all 1 held-out pairs, so nothing would be measured"):
        load(tokeniser, write(records), weight_column="importance", eval=held)
    records = [text(number) | {"importance": 0} for number in range(4)]
    with pytest.raises(DataError, match="'importance' is 0 for all 4 training pairs, so nothing would be learned"):
        load(tokeniser, write(records), weight_column="importance")


def test_a_user_who_asks_nothing_is_warned_of(tokeniser, write):
    system = {"role": "system", "content": "Answer."}
    record = {"prompt": [system, {"role": "user", "content": ""}], "chosen": "yes", "rejected": "no"}
    told = load(tokeniser, write([record])).report.lines()
    assert any(line.startswith("warning: data prefs: 1 records: the last message of the prompt is empty") for line in told)


def test_a_text_of_megabytes_is_dropped_before_it_is_tokenised(tmp_path, tokeniser, monkeypatch):
    rows = [{"prompt": f"Say {number}.", "chosen": " yes", "rejected": " no"} for number in range(9)]
    rows[3]["chosen"] = " yes" * 300_000
    rows[5]["prompt"] = [{"role": "user", "content": [{"type": "text", "text": "Say it." * 200_000}]}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    longest = []
    encode = tokeniser._ids
    monkeypatch.setattr(
        tokeniser, "_ids", lambda texts, special: longest.append(max(map(len, texts), default=0)) or encode(texts, special)
    )
    report = load_pairs(DataConfig(train=[str(path)], max_dropped=0.5), tokeniser).report
    (line,) = [line for line in report.lines() if "dropped" in line]
    assert line == "data a: 2 pairs dropped: 2 text of more than 1,000,000 characters (a.jsonl:4, a.jsonl:6)"
    assert max(longest) < 100 and report.sources[0].kept == 7
    rows[3]["chosen"] = " yes" * 240_000  # below a million: cut after it is tokenised, as ever
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = load_pairs(DataConfig(train=[str(path)], max_dropped=0.5), tokeniser).report
    assert report.sources[0].truncated == 1 and report.sources[0].kept == 8

"""Text answers that repeat their prompt: it is taken off where all do, and told where only some do."""

import pytest
from samples import bot, decoded, user

from raydpo.data.preference import Preference, normalise
from raydpo.data.repeats import Repeats

REPEATED = [{"prompt": f"What is {number}?\nA:", "chosen": " a", "rejected": " b"} for number in range(5)]


def repeating(record):
    return {"prompt": record["prompt"]} | {side: record["prompt"] + record[side] for side in ("chosen", "rejected")}


def test_answers_that_repeat_the_prompt(write, monkeypatch):
    plain, _ = decoded(write, REPEATED)
    rows, lines = decoded(write, list(map(repeating, REPEATED)))
    assert rows == plain
    assert lines[1] == "data prefs: in 5 pairs both answers repeat the prompt, which was taken off"
    rows, lines = decoded(write, [*REPEATED[:4], repeating(REPEATED[4])])
    assert rows[4] != plain[4] and lines[1].startswith(
        "warning: data prefs: in 1 pairs both answers begin with the prompt, which was kept"
    )
    monkeypatch.setattr("raydpo.data.pairs.CHUNK", 2)
    monkeypatch.setattr("raydpo.data.rows.FIRST_RECORDS", 2)
    rows, lines = decoded(write, [*map(repeating, REPEATED[:4]), REPEATED[4]])
    assert rows == plain
    assert lines[2].startswith("warning: data prefs: in 1 pairs the answers do not repeat the prompt")
    chats = [{"prompt": [user("Hi")], "chosen": [bot("a")], "rejected": [bot("b")]}] * 2
    rows, lines = decoded(write, [*chats, *map(repeating, REPEATED)])
    told = "in 5 pairs both answers begin with the prompt, which was kept, since the first records, which decide, have no"
    assert rows[2:] != plain and any(line.startswith(f"warning: data prefs: {told}") for line in lines)


def test_a_prompt_without_white_space_at_its_end_is_repeated_too(write):
    rows, _ = decoded(write, [{"prompt": "What is it?\n", "chosen": "What is it? a", "rejected": "What is it?\nb"}])
    assert rows == [("What is it?\n", "a</s>", "b</s>")]


def test_a_prompt_of_few_characters_is_not_taken_off_words_that_begin_with_it():
    repeats = Repeats()
    long, short = (
        Preference("What is ice?", "What is ice? Frozen water.", "What is ice? A stone."),
        Preference("Hi", "High tide", "Hiking"),
    )
    first, second = repeats.taken_off([long, short])
    assert (first.chosen, first.rejected) == (" Frozen water.", " A stone.")
    assert second == short and repeats.taken == 1


def test_a_prompt_that_ends_within_a_word_of_an_answer_is_not_taken_off():
    def pair(prompt, *answers):
        return Preference(prompt, *answers)

    repeated = pair("What is ice", "What is ice? Frozen water.", "What is ice: a stone.")
    within = pair("What is tea", "What is teapot", "What is tea in a pot")
    first = Repeats()
    assert first.taken_off([within]) == [within]
    assert (first.take_off, first.taken, first.kept, first.without) == (False, 0, 1, 0)
    assert first.lines()[0].startswith("warning: in 1 pairs both answers begin with the prompt, which was kept, since")
    later = Repeats()
    assert later.taken_off([repeated])[0].chosen == "? Frozen water."
    assert later.taken_off([within, pair("Room 1", "Room 10", "Room 1 is free")])[0] == within
    assert (later.taken, later.kept, later.without) == (1, 2, 0)
    (chinese,) = Repeats().taken_off(
        [pair("\u4ec0\u4e48\u662f\u8336", "\u4ec0\u4e48\u662f\u8336\u8336", "\u4ec0\u4e48\u662f\u8336\u53f6")]
    )
    assert (chinese.chosen, chinese.rejected) == ("\u8336", "\u53f6")


REPEATS = [f"What is {thing} made of?" for thing in ("ice", "fog", "hail", "snow")]


@pytest.mark.parametrize("chosen, rejected", [("User: {}\nBot: yes", "User: {}\nBot: no"), ("{}\nyes", "{}\nno")])
def test_answers_that_hold_the_prompt_near_the_beginning_are_warned_of(chosen, rejected):
    def lines(records):
        repeats = Repeats()
        repeats.taken_off([each for record in records for each in normalise(record)])
        return [line for line in repeats.lines() if line.startswith("warning")]

    chats = [
        {"prompt": [user(asked)], "chosen": [bot(chosen.format(asked))], "rejected": [bot(rejected.format(asked))]}
        for asked in REPEATS
    ]
    (both,) = lines(chats)
    assert both.startswith("warning: in 4 of 4 pairs both answers hold the prompt near the beginning")
    texts = [{"prompt": q, "chosen": chosen.format(q), "rejected": "no"} for q in REPEATS]
    (one,) = lines(texts)
    assert one.startswith("warning: in 4 of 4 pairs one of the answers holds the prompt near the beginning")
    others = [{"prompt": q, "chosen": "yes", "rejected": "no"} for q in REPEATS] * 2
    assert lines([*texts[:3], *others]) == lines([*chats[:3], *others]) == []


def test_answers_that_repeat_the_prompt_but_for_one_are_told_by_number():
    pairs = [{"prompt": asked, "chosen": f"{asked} yes", "rejected": f"{asked} no"} for asked in REPEATS]
    repeats = Repeats()
    repeats.taken_off([normalise(record)[0] for record in (*pairs, {"prompt": "And rain?", "chosen": "a", "rejected": "b"})])
    (line,) = repeats.lines()
    assert line.startswith(
        "warning: in 4 pairs both answers begin with the prompt, which was kept, since 1 of the first 5 p"
    )

"""Scores beside a pair that contradict it are counted and told."""

import json

import pytest

from raydpo.config import DataConfig
from raydpo.data.pairs import load_pairs
from raydpo.data.scores import Contradictions


def pair(number, **more):
    return {"prompt": f"Name thing {number}.", "chosen": f" Chosen {number}.", "rejected": f" Rejected {number}."} | more


def look(**scores):
    found = Contradictions()
    found.look(pair(1, **scores), "a:1")
    return (found.reversed, found.tied, found.compared)


AGREES, TIED, REVERSED, SILENT = (0, 0, 1), (0, 1, 1), (1, 0, 1), (0, 0, 0)


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ({"score_chosen": 3.0, "score_rejected": 8.0}, REVERSED),
        ({"score_chosen": 5, "score_rejected": 5}, TIED),
        ({"score_chosen": 8, "score_rejected": 3}, AGREES),
        ({"chosen_score": "1", "rejected_score": "2"}, REVERSED),
        ({"chosen_rating": 1, "rejected_rating": 2}, REVERSED),
        ({"chosenReward": -3.5, "rejectedReward": -3.4}, REVERSED),
        ({"chosen-avg-rating": 2, "rejected-avg-rating": 1}, AGREES),
        ({"chosen_rank": 1, "rejected_rank": 2}, AGREES),
        ({"chosen_rank": 2, "rejected_rank": 1}, REVERSED),
        ({"margin": -0.5}, REVERSED),
        ({"score_diff": 0}, TIED),
        ({"margin": -0.5, "score_chosen": 2, "score_rejected": 1}, AGREES),
        ({"score_chosen": None, "score_rejected": 1}, SILENT),
        ({"score_chosen": "good", "score_rejected": "bad"}, SILENT),
        ({"score_chosen": float("nan"), "score_rejected": 1}, SILENT),
        ({"score_chosen": True, "score_rejected": False}, SILENT),
        ({"score_chosen": [1, 2], "score_rejected": [3]}, SILENT),
        ({"score_chosen": 3}, SILENT),
        ({"chosen_toxicity_score": 0.1, "rejected_toxicity_score": 0.9}, AGREES),
        ({"chosen_error_score": 0.9, "rejected_error_score": 0.1}, REVERSED),
        ({"chosen_scores": {"help": 1, "truth": 2}, "rejected_scores": {"help": 4, "truth": 4}}, REVERSED),
        ({"chosen_scores": {"help": 1}, "rejected_scores": {"help": "good"}}, SILENT),
        ({"rating": [1, 5]}, REVERSED),
        ({"scores": [5, 1]}, AGREES),
        ({"ranks": [2, 1]}, REVERSED),
        ({"rating": [3, 3]}, TIED),
        ({"rating": [1, 5, 2]}, SILENT),
        ({"rating": 4}, SILENT),
        ({"rating": [1, 5], "generations": ["Rejected 1.", "Chosen 1."]}, AGREES),
        ({"rating": [1, 5], "generations": ["Chosen 1.", " Rejected 1."]}, REVERSED),
        ({"rating": [1, 5], "generations": ["Chosen 1.", "something else"]}, SILENT),
        ({"scores": {"chosen": 2, "rejected": 4}}, REVERSED),
        ({"rewards": {"rejected": 0.5, "chosen": 0.7}}, AGREES),
        ({"scores": {"a": 2, "b": 4}}, SILENT),
        ({"winner": "rejected"}, REVERSED),
        ({"preference": "Chosen"}, AGREES),
        ({"winner": "model_a"}, SILENT),
        ({"ref_chosen_logps": -9.0, "ref_rejected_logps": -3.0}, SILENT),
        ({"chosen_tokens": 3, "rejected_tokens": 9}, SILENT),
        ({"length_margin": -3, "ref_margin": -3, "difference": -3}, SILENT),
    ],
)
def test_each_kind_of_score(scores, told):
    assert look(**scores) == told


def test_reversed_and_tied_pairs_are_one_warning_and_in_the_report(tmp_path, tokeniser):
    path = tmp_path / "a.jsonl"
    rows = [pair(1, score_chosen=3, score_rejected=8), pair(2, score_chosen=5, score_rejected=5)]
    rows += [pair(number, score_chosen=2, score_rejected=1) for number in range(3, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = load_pairs(DataConfig(train=[str(path)]), tokeniser).report
    (line,) = [line for line in report.lines() if "score" in line]
    assert line.startswith(
        "warning: data a: by 'score_chosen' and 'score_rejected', 1 pair scores the rejected answer higher (a.jsonl:1) "
        "and 1 pair scores both answers alike (a.jsonl:2), of 8 scored pairs"
    )
    assert json.loads(json.dumps(report.to_dict()))["sources"][0]["scores"]["reversed"] == 1


def test_pairs_that_agree_with_their_scores_are_no_news(tmp_path, tokeniser):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(pair(number, score_chosen=2, score_rejected=1)) + "\n" for number in range(4)))
    assert not any("score" in line for line in load_pairs(DataConfig(train=[str(path)]), tokeniser).report.lines())


def test_a_margin_beside_a_pair_with_an_implicit_prompt(tmp_path, tokeniser):
    path = tmp_path / "a.jsonl"
    said = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}] for answer in ("a", "b")]
    path.write_text(json.dumps({"chosen": said[0], "rejected": said[1], "margin": -2}))
    (line,) = [line for line in load_pairs(DataConfig(train=[str(path)]), tokeniser).report.lines() if "margin" in line]
    assert line.startswith("warning: data a: by 'margin', 1 pair scores the rejected answer higher (a.jsonl:1)")


def test_the_report_names_the_columns_read_and_counts_well_formed_pairs_alone(tmp_path, tokeniser):
    path = tmp_path / "a.jsonl"
    rows = [pair(number, score_chosen=2, score_rejected=1, weight=1) for number in range(4)]
    rows.append(pair(4, score_chosen=1, score_rejected=2, weight=-1))  # refused for its weight
    rows.append(pair(5, margin=-1, weight=1) | {"prompt": "word " * 500})  # dropped for its length, but well-formed
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=[str(path)], weight_column="weight", max_malformed=0.5, max_dropped=0.5, max_length=200)
    report = load_pairs(config, tokeniser).report
    assert [line.split(" of ")[0] for line in report.lines() if "score" in line] == [
        "warning: data a: by 'score_chosen' and 'score_rejected' and 'margin', 1 pair scores the rejected answer higher "
        "(a.jsonl:6),"
    ]
    (source,) = report.to_dict()["sources"]
    assert source["kept"] == 4
    found = source["scores"]
    assert (found["reversed"], found["tied"], found["compared"]) == (1, 0, 5)
    assert found["columns"] == ["score_chosen", "score_rejected", "margin"]

"""Records with the columns of well-known preference data: read as their cards say, or refused with the columns found."""

import json

import pytest
from samples import bot, user

from raydpo.data.messages import Malformed
from raydpo.data.preference import normalise
from raydpo.data.scores import Contradictions

Q, GOOD, BAD = [user("Which?")], [bot("good")], [bot("bad")]
PART = {"type": "text", "text": "Which?", "image": None, "mimeType": None}
SAFE = {"is_response_0_safe": True, "is_response_1_safe": True, "response_0_severity_level": 0, "response_0_source": "m"}
PUBLIC = {
    "UltraFeedback": (
        {
            "source": "evol_instruct",
            "instruction": "Which?",
            "models": ["a", "b"],
            "completions": [
                {
                    "annotations": {"helpfulness": {"Rating": "1"}},
                    "custom_system_prompt": "Be kind.",
                    "model": "a",
                    "response": "bad",
                    "critique": "So so.",
                    "fine-grained_score": 4.5,
                    "overall_score": 2.0,
                },
                {"model": "b", "response": "good", "critique": "Well.", "fine-grained_score": 1.0, "overall_score": 8.5},
            ],
            "correct_answers": ["None"],
            "incorrect_answers": ["None"],
        },
        "'overall_score' of completions read as scores",
    ),
    "UltraFeedback, binarized": (
        {"prompt": "Which?", "prompt_id": "f", "chosen": Q + GOOD, "rejected": Q + BAD, "messages": Q + GOOD}
        | {"score_chosen": 8.0, "score_rejected": 2.0},
        None,
    ),
    "UltraFeedback, first cleaned form": (
        {"source": "s", "instruction": "Which?", "chosen_response": "good", "rejected_response": "bad"}
        | {"chosen_avg_rating": 4.0, "rejected_avg_rating": 2.0, "chosen_model": "a"},
        "'chosen_response' read as chosen, 'rejected_response' as rejected",
    ),
    "UltraFeedback, cleaned": (
        {"source": "s", "prompt": "Which?", "chosen": Q + GOOD, "chosen-rating": 5.0, "chosen-model": "a"}
        | {"rejected": Q + BAD, "rejected-rating": 2.0, "rejected-model": "b"},
        None,
    ),
    "HH-RLHF": (
        {f"{side}": f"\n\nHuman: Which?\n\nAssistant: {said}" for side, said in (("chosen", "good"), ("rejected", "bad"))},
        None,
    ),
    "SHP": (
        {"post_id": "a", "domain": "d", "history": "Which?", "c_root_id_A": "x", "score_A": 3, "score_B": 9}
        | {"human_ref_A": "bad", "human_ref_B": "good", "labels": 0, "score_ratio": 3.0},
        "'labels' prefers 'human_ref_A' or 'human_ref_B' (1: human_ref_A, 0: human_ref_B)",
    ),
    "PKU-SafeRLHF, one answer better and safer": (
        {"prompt": "Which?", "response_0": "bad", "response_1": "good", "better_response_id": 1, "safer_response_id": 1}
        | SAFE,
        "'better_response_id' read, not 'safer_response_id', another preference; to read it instead set columns: "
        "{better_response_id: safer_response_id}",
    ),
    "PKU-SafeRLHF, the better answer is not the safer": (
        {"prompt": "Which?", "response_0": "good", "response_1": "bad", "better_response_id": 0, "safer_response_id": 1}
        | SAFE,
        "warning: 'better_response_id' read, though 'safer_response_id' says otherwise; to read it instead set columns",
    ),
    "safer_response_id alone": (
        {"prompt": "Which?", "response_0": "good", "response_1": "bad", "safer_response_id": 0},
        "'safer_response_id' prefers 'response_0' or 'response_1' (0: response_0, 1: response_1)",
    ),
    "HelpSteer2, preference": (
        {"prompt": "Which?", "response_1": "bad", "response_2": "good", "preference_strength": 2}
        | {"preference_statement": "2 is better", "preference_elaboration": "It is.", "three_most_similar_preferences": []},
        "'preference_strength' prefers 'response_1' or 'response_2' (below 0: response_1)",
    ),
    "HelpSteer3, preference": (
        {"domain": "code", "language": "python", "context": Q, "response1": "good", "response2": "bad"}
        | {"overall_preference": -3, "individual_preference": [{"score": -3, "reasoning": "r", "feedback1": "f"}]},
        "'overall_preference' prefers 'response1' or 'response2' (below 0: response1)",
    ),
    "Nectar": (
        {
            "prompt": "\n\nHuman: Which?\n\nAssistant: ",
            "answers": [{"answer": "bad", "model": "a", "rank": 7.0}, {"answer": "good", "model": "b", "rank": 1.0}],
            "turns": 1,
            "num_responses": 7,
            "source": ["sharegpt"],
            "good_natured": True,
        },
        "'answers' with ranks read as completions",
    ),
    "Arena, 33k and 100k": (
        {"question_id": "1", "model_a": "x", "model_b": "y", "winner": "model_b", "judge": "human", "turn": 1}
        | {"conversation_a": Q + BAD, "conversation_b": Q + GOOD, "conv_metadata": {"sum": 1}},
        "'winner' prefers 'conversation_a' or 'conversation_b'",
    ),
    "Arena, 140k": (
        {"id": "1", "model_a": "x", "model_b": "y", "winner": "model_a", "evaluation_order": 1}
        | {"conversation_a": [user([PART]), *GOOD], "conversation_b": [user([PART]), *BAD]},
        "'winner' prefers 'conversation_a' or 'conversation_b'",
    ),
    "Arena, 55k": (
        {"id": 1, "model_a": "x", "model_b": "y", "prompt": '["Which?"]', "response_a": '["bad"]', "response_b": '["good"]'}
        | {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        "'winner_model_a' and 'winner_model_b' prefer 'response_a' or 'response_b' (winner_model_a is 1: response_a)",
    ),
    "Arena, of several languages": (
        {
            "id": "1",
            "prompt": "Which?",
            "response_a": "good",
            "response_b": "bad",
            "winner": "model_a",
            "language": "German",
        },
        "'winner' prefers 'response_a' or 'response_b' (a: response_a, b: response_b)",
    ),
    "orca_dpo_pairs": (
        {"system": "Be kind.", "question": "Which?", "chosen": "good", "rejected": "bad"},
        "warning: the column 'system' is not read, since the prompt is text",
    ),
    "distilabel-intel-orca-dpo-pairs": (
        {"system": "", "input": "Which?", "chosen": "good", "rejected": "bad", "generations": ["bad", "good"], "order": []}
        | {"rating": [2.0, 9.0], "status": "swapped", "chosen_score": 9.0, "in_gsm8k_train": False},
        "'input' read as the prompt",
    ),
    "distilabel-capybara-dpo": (
        {"source": "s", "prompt": "Which?", "chosen": Q + GOOD, "rejected": Q + BAD, "original_response": "o"}
        | {"conversation": [{"input": "Which?", "output": "o"}], "rating_chosen": 5, "rating_rejected": 3},
        None,
    ),
    "Skywork-Reward-Preference": ({"chosen": Q + GOOD, "rejected": Q + BAD, "source": "magpie_pro"}, None),
    "tulu-3 preference mixture": (
        {"id": "1", "source": "wildchat", "prompt": "Which?", "chosen": Q + GOOD, "rejected": Q + BAD, "chosen_model": "a"},
        None,
    ),
    "oasst pairs": (
        {"lang": "en", "parent_id": "x", "prompt": "Which?", "chosen": "good", "rejected": "bad"},
        None,
    ),
    "webgpt_comparisons": (
        {"question": {"dataset": "eli5", "id": "1", "full_text": "Which?"}, "answer_0": "good", "answer_1": "bad"}
        | {"score_0": 0.5, "score_1": -0.5, "quotes_0": {"title": ["t"], "extract": ["e"]}, "quotes_1": {"title": []}}
        | {"tokens_0": {"prefix": [1]}, "tokens_1": {"prefix": [2]}},
        "'score_0' and 'score_1' prefer 'answer_0' or 'answer_1' (the higher is better)",
    ),
    "AlpacaFarm": (
        {"instruction": "Which?", "input": "", "output_1": "bad", "output_2": "good", "preference": 2, "raw_preference": 2},
        "'preference' prefers 'output_1' or 'output_2' (1: output_1, 2: output_2)",
    ),
    "AlpacaEval with probabilities": (
        {"instruction": "Which?", "output_1": "good", "generator_1": "a", "output_2": "bad", "preference": 1.0002},
        "'preference' prefers 'output_1' or 'output_2' (1: output_1, 2: output_2)",
    ),
}


def reads(record):
    (preference,) = normalise(record)
    parts = preference.prompt, preference.chosen, preference.rejected
    if isinstance(preference.prompt, str):
        asked, parts = preference.prompt, (preference.chosen, preference.rejected)
        assert asked in ("Which?", "\n\nHuman: Which?\n\nAssistant: ")
        assert parts == ("good", "bad")
    else:
        content = preference.prompt[0]["content"]
        assert content == "Which?" or content[0]["text"] == "Which?"
        assert parts[1:] == (GOOD, BAD) and len(parts[0]) == 1
    return preference.notes


@pytest.mark.parametrize("name", PUBLIC)
def test_public_forms_are_read_right_and_told(name):
    record, note = PUBLIC[name]
    notes = reads(record)
    assert notes == () if note is None else any(each.startswith(note) or note in each for each in notes), notes


@pytest.mark.parametrize("name", [name for name, (record, _) in PUBLIC.items() if "winner" in record])
def test_the_winner_decides_and_not_the_order(name):
    record, _ = PUBLIC[name]
    other = {"model_a": "model_b", "model_b": "model_a"}[record["winner"]]
    (one,), (swapped,) = normalise(record), normalise(record | {"winner": other})
    assert (one.chosen, one.rejected) == (swapped.rejected, swapped.chosen)


REFUSED = {
    "HelpSteer2, one answer a row": (
        {"prompt": "Which?", "response": "good", "helpfulness": 4, "correctness": 4},
        "one answer, and neither another to compare it with nor a label: .*; found 'prompt', 'response', 'helpfulness'",
    ),
    "stack-exchange-paired": (
        {"qid": 1, "question": "Which?", "date": "d", "metadata": ["m"], "response_j": "good", "response_k": "bad"},
        "missing column 'chosen', nearest forms: .*; found 'qid', 'question', 'date', 'metadata', 'response_j'",
    ),
    "oasst, one message a row": (
        {"message_id": "1", "parent_id": "0", "text": "good", "role": "assistant", "rank": 0, "lang": "en"},
        "missing column 'chosen', nearest forms: .*; found 'message_id'",
    ),
    "summarize_from_feedback": (
        {"info": {"id": "1", "post": "Which?"}, "summaries": [{"text": "good"}, {"text": "bad"}], "choice": 0},
        "missing column 'chosen', nearest forms: .*; found 'info', 'summaries', 'choice'",
    ),
    "Arena, 55k, several turns": (
        {"prompt": '["a", "b"]', "response_a": '["c", "d"]', "response_b": '["e", "f"]', "winner_model_a": 1}
        | {"winner_model_b": 0, "winner_tie": 0},
        "are lists of several turns, and the first answers differ",
    ),
    "UltraInteract": (
        {"task": "Coding", "trajectory": [user("Which?")], "chosen": "Step 1: good", "rejected": "Step 1: bad"},
        "missing column 'prompt', but 'trajectory' may be it",
    ),
}
ALIKE = {
    "AlpacaEval": PUBLIC["AlpacaFarm"][0] | {"preference": 1.5},
    "HelpSteer2": PUBLIC["HelpSteer2, preference"][0] | {"preference_strength": 0},
    "HelpSteer3": PUBLIC["HelpSteer3, preference"][0] | {"overall_preference": 0},
    "webgpt": PUBLIC["webgpt_comparisons"][0] | {"score_0": 0.0, "score_1": 0.0},
    "Arena, 33k": PUBLIC["Arena, 33k and 100k"][0] | {"winner": "tie"},
    "Arena, both bad": PUBLIC["Arena, 33k and 100k"][0] | {"winner": "tie (bothbad)"},
    "Arena, 140k": PUBLIC["Arena, 140k"][0] | {"winner": "both_bad"},
    "Arena, 55k": PUBLIC["Arena, 55k"][0] | {"winner_model_b": 0, "winner_tie": 1},
}
UNCLEAR = {
    "a number for letters": ({"response_a": "good", "response_b": "bad", "winner": 1}, "is a number, which names neither"),
    "a model's name": ({"response_1": "good", "response_2": "bad", "winner": "claude-1"}, "is text that names neither"),
    "0 for answers from 1": ({"output_1": "good", "output_2": "bad", "preference": 0}, "is neither 1 nor 2, by which"),
    "below 0": ({"output_1": "good", "output_2": "bad", "preference": -1}, "is neither 1 nor 2, by which"),
    "a probability": ({"response_0": "good", "response_1": "bad", "preference": 0.8}, "is neither 0 nor 1, by which"),
    "a truth value": ({"response_0": "good", "response_1": "bad", "preference": True}, "'preference' is no number"),
    "not a number": ({"answer_0": "good", "answer_1": "bad", "score_0": float("nan"), "score_1": 1}, "'score_0' is no num"),
    "two winners": (
        {"response_a": "good", "response_b": "bad", "winner_model_a": 1, "winner_model_b": 1},
        "are not one 1 and else 0",
    ),
    "three answers": (
        {"response_0": "good", "response_1": "bad", "response_2": "so", "preference": 0},
        "missing column 'chosen', nearest forms",
    ),
    "four answers": (
        {"answer_a": "good", "answer_b": "bad", "answer_c": "so", "answer_d": "no", "choice": "a"},
        "missing column 'chosen', nearest forms",
    ),
    "ten answers": (
        {f"response_{number}": f"a {number}" for number in range(1, 11)} | {"preference": 1},
        "missing column 'chosen', nearest forms",
    ),
    "two kinds of answers": (
        {"response_a": "good", "response_b": "bad", "answer_a": "so", "answer_b": "no", "winner": "a"},
        "missing column 'chosen', nearest forms",
    ),
    "no preference": ({"response_0": "good", "response_1": "bad"}, "missing column 'chosen', nearest forms"),
    "labels of another set": ({"answer_0": "good", "answer_1": "bad", "labels": 1}, "missing column 'chosen', nearest"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_public_forms_that_are_refused_name_their_columns(name):
    record, reason = REFUSED[name]
    with pytest.raises(Malformed, match=reason):
        normalise(record)


@pytest.mark.parametrize("name", ALIKE)
def test_a_tie_is_refused_as_such(name):
    with pytest.raises(Malformed, match=r"are alike \(a tie\), so no answer is preferred"):
        normalise(ALIKE[name])


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_preference_that_is_not_clear_is_refused(name):
    record, reason = UNCLEAR[name]
    with pytest.raises(Malformed, match=reason) as caught:
        normalise({"prompt": "Which?"} | record)
    assert len(str(caught.value)) <= 250


@pytest.mark.parametrize(
    "value, better",
    [("response_a", "a"), ("A", "a"), ("Response B", "b"), ("assistant_b", "b"), (" model_a ", "a"), ("(b)", "b")],
)
def test_names_of_the_better_answer(value, better):
    (preference,) = normalise({"prompt": "Which?", "response_a": "a", "response_b": "b", "preferred": value})
    assert preference.chosen == better


@pytest.mark.parametrize(
    "names", [("responseA", "responseB"), ("Answer 1", "Answer 2"), ("output0", "output1"), ("text-a", "text-b")]
)
def test_names_of_two_answers(names):
    record = dict(zip(names, ("good", "bad"), strict=True))
    (preference,) = normalise({"prompt": "Which?", "responses": 2, "answers": "x", "winner": names[0].upper()} | record)
    assert (preference.chosen, preference.rejected) == ("good", "bad")


def test_ranks_are_lower_for_the_better_answer():
    (preference,) = normalise({"prompt": "Which?", "response_a": "bad", "response_b": "good", "rank_a": 2, "rank_b": 1})
    assert (preference.chosen, preference.rejected) == ("good", "bad")
    assert "(the lower is better)" in preference.notes[0]


def test_columns_that_contradict_the_one_that_is_read_are_warned_of():
    record = PUBLIC["SHP"][0] | {"score_A": 9, "score_B": 3}
    assert normalise(record)[0].notes[1].startswith("warning: 'labels' read, though 'score_A' and 'score_B' say otherwise")
    record = {"prompt": "Which?", "response_a": "a", "response_b": "b", "winner": "A", "preference": "B"}
    (preference,) = normalise(record)
    assert preference.chosen == "a" and preference.notes[1].startswith("warning: 'winner' read, though 'preference' says")


def test_a_preference_that_was_read_contradicts_nothing():
    found = Contradictions()
    for record, _ in PUBLIC.values():
        found.look(record, "a:1")
    found.look(PUBLIC["HelpSteer2, preference"][0] | {"preference_strength": -3}, "a:2")
    assert (found.reversed, found.tied) == (0, 0)


def test_pairs_that_a_status_calls_a_tie_are_counted():
    found = Contradictions()
    found.look(PUBLIC["distilabel-intel-orca-dpo-pairs"][0] | {"status": "tie"}, "a:1")
    found.look(PUBLIC["distilabel-intel-orca-dpo-pairs"][0], "a:2")
    assert (found.tied, found.reversed, list(found.columns)) == (1, 0, ["status", "rating"])
    assert json.dumps(found.to_dict()) and "1 pair scores both answers alike (a:1)" in next(found.lines(2))

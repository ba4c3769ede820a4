"""Which pairs are measured, which prompts are answered, and what judges are shown of them."""

import json

import pytest
from tiny import make_tokenizer, preferences, write_preferences

from raydpo.config import load_config
from raydpo.data.pairs import load_pairs
from raydpo.data.preference import as_text
from raydpo.data.tokenise import Tokeniser
from raydpo.errors import ConfigError
from raydpo.evaluation.prompts import choose_prompts, evaluation_data, prompt_texts, reading, trained_on


def rewardbench(path, count=12):
    """Columns as RewardBench has them, two subsets."""
    rows = [
        {
            "prompt": record["prompt"],
            "chosen": record["chosen"],
            "chosen_model": "x",
            "rejected": record["rejected"],
            "rejected_model": "y",
            "subset": ("alpaca", "math")[number % 2],
            "id": number,
        }
        for number, record in enumerate(preferences(count, seed=4))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture
def place(tmp_path):
    (tmp_path / "model").mkdir()
    write_preferences(tmp_path / "a.jsonl", preferences(20))
    return tmp_path


def configured(place, data=None, evaluate=None):
    return load_config(
        {
            "output": str(place / "runs"),
            "model": {"path": str(place / "model")},
            "data": {"train": str(place / "a.jsonl")} | (data or {}),
            "evaluate": evaluate or {},
        }
    )


def loaded(config):
    data, on_training_side = evaluation_data(config)
    sets = load_pairs(data, Tokeniser(make_tokenizer()), reader=reading(config.evaluate))
    return sets.train if on_training_side else sets.eval


def test_subsets_are_sources(place):
    rows = rewardbench(place / "bench.jsonl")
    pairs = loaded(configured(place, evaluate={"data": str(place / "bench.jsonl")}))
    assert pairs["source"].to_pylist() == [row["subset"] for row in rows]
    assert pairs["pair_id"].to_pylist()[:2] == ["bench:1", "bench:2"]
    plain = loaded(configured(place, evaluate={"data": str(place / "bench.jsonl"), "subsets": None}))
    assert set(plain["source"].to_pylist()) == {"bench"}


def test_pairs_that_were_trained_on_are_noticed(place):
    """The training file itself counts, as text and as messages, except for what is held out of it."""
    rows = [json.loads(line) for line in (place / "a.jsonl").read_text().splitlines()]
    said = [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        for row in rows[:5]
    ]
    other = [row | {"prompt": f"{row['prompt']} Really?"} for row in rows[5:8]]
    (place / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said + other))
    for data, path, count in (
        ({}, "mixed", 5),
        ({}, "a", 20),
        ({"eval": {"fraction": 0.4}}, "a", None),
        ({"fraction": 0.5}, "a", None),
    ):
        config = configured(place, data, {"data": str(place / f"{path}.jsonl")})
        trained = load_pairs(config.data, Tokeniser(make_tokenizer())).train.num_rows if count is None else count
        assert trained_on(loaded(config), config, config.data) == trained
        assert count is not None or 0 < trained < 20
    rewardbench(place / "bench.jsonl")
    config = configured(place, {}, {"data": str(place / "bench.jsonl")})
    assert trained_on(loaded(config), config, config.data) == 0


def test_the_training_filter_is_not_for_evaluation(place):
    rewardbench(place / "bench.jsonl")
    config = configured(place, {"filter": "chosen_tokens < 3"}, {"data": str(place / "bench.jsonl")})
    assert loaded(config).num_rows == 12


def test_text_as_conversation(place):
    rows = rewardbench(place / "bench.jsonl", 2)
    tokenizer = make_tokenizer()
    pairs = loaded(configured(place, evaluate={"data": str(place / "bench.jsonl"), "chat": True}))
    shown = tokenizer.decode(pairs["prompt_ids"][0].as_py())
    assert shown == f"<s>user\n{rows[0]['prompt']}</s>\n<s>assistant\n"
    # A completion with a label is given in the same form.
    label = {"prompt": rows[0]["prompt"], "completion": rows[0]["chosen"], "label": True}
    (place / "labels.jsonl").write_text(json.dumps(label))
    alone = loaded(configured(place, evaluate={"data": str(place / "labels.jsonl"), "chat": True}))
    assert alone["chosen_key"][0] == pairs["chosen_key"][0] and alone["label"].to_pylist() == [1]


@pytest.mark.parametrize("data", [{"eval": {"fraction": 0.4}}, {"eval": "held.jsonl"}])
def test_judges_are_shown_the_words_of_the_file(data, place, monkeypatch):
    monkeypatch.chdir(place)
    records = [
        {
            "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Question {number}"}],
            "chosen": "yes",
            "rejected": f"no {number}",
        }
        for number in range(20)
    ]
    for name in ("a", "held"):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = configured(place, data)
    pairs = loaded(config)
    tokenizer = make_tokenizer()
    prompts = choose_prompts(pairs, 5, seed=0)
    for prompt, words in zip(prompts, prompt_texts(prompts, config), strict=True):
        rendered = tokenizer.apply_chat_template(words, tokenize=False, add_generation_prompt=True)
        assert rendered == tokenizer.decode(prompt.ids)
        assert as_text(words).startswith("system: Be kind.\n\nuser: Question ")


def test_prompts_of_a_ranking_record(place):
    (place / "a.jsonl").write_text(
        json.dumps({"prompt": "rank", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]})
        + "\n"
        + json.dumps({"prompt": "other", "chosen": "x", "rejected": "y"})
        + "\n"
    )
    config = configured(place, evaluate={"data": str(place / "a.jsonl")})
    prompts = choose_prompts(loaded(config), 5, seed=0)
    assert sorted(prompt_texts(prompts, config)) == ["other", "rank"], "the same prompt is answered once"


def test_the_choice_of_prompts_does_not_depend_on_their_order(place):
    pairs = loaded(configured(place, evaluate={"data": str(place / "a.jsonl")}))
    chosen = [prompt.ids.tolist() for prompt in choose_prompts(pairs, 6, seed=0)]
    backwards = pairs.take(list(range(pairs.num_rows))[::-1])
    assert [prompt.ids.tolist() for prompt in choose_prompts(backwards, 6, seed=0)] == chosen
    assert [prompt.ids.tolist() for prompt in choose_prompts(pairs, 6, seed=1)] != chosen
    assert [prompt.ids.tolist() for prompt in choose_prompts(pairs, 4, seed=0)] == chosen[:4]
    assert len(choose_prompts(pairs, 1000, seed=0)) == 20


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"policy": "/nowhere/at/all"}, "evaluate.policy"),
        ({"data": "nowhere.jsonl"}, "evaluate.data.0.path"),
        ({"modes": []}, "modes [] is empty"),
        ({"modes": ["greedy", "greedy"]}, "names one twice"),
        ({"modes": ["greedy"], "temperature": 0.7}, "temperature 0.7 has no effect"),
        ({"modes": ["greedy"], "samples": 3}, "samples 3 has no effect"),
        ({"chat": True}, "chat True has no effect without evaluate.data"),
        ({"prompts": 0, "score_with": "a:b"}, "score_with has no answers to judge"),
        ({"score_with": "a.b"}, "module:function"),
        ({"base": "."}, "no effect without policy"),
        ({"beta": 0}, "evaluate.beta"),
        ({"judge": {"url": "ftp://x", "model": "m"}}, "https://host/v1"),
        ({"judge": {"url": "http://me:hunter2@x/v1", "model": "m"}}, "name of an environment variable"),
        ({"judge": {"url": "http://x/v1", "model": "m", "key": "sk-live-123"}}, "NAME of an environment variable"),
        ({"judge": {"url": "http://x/v1"}}, "evaluate.judge.model"),
        ({"judge": {"url": "http://x/v1", "model": "m", "api_key": "sk-live-123"}}, "did you mean 'evaluate.judge.key'"),
        ({"promts": 3}, "did you mean 'evaluate.prompts'"),
    ],
)
def test_settings_that_cannot_be_meant(evaluate, said, place):
    with pytest.raises(ConfigError) as caught:
        configured(place, evaluate=evaluate)
    assert said in str(caught.value)
    assert "sk-live-123" not in str(caught.value) and "hunter2" not in str(caught.value)


def test_nothing_to_evaluate_on(place):
    with pytest.raises(ConfigError, match=r"set evaluate\.data"):
        evaluation_data(configured(place))

"""Rewards by a reward model and by a judge: duels and scores against a real local server, and what fails."""

import collections
import json
import math
import shutil
import threading

import pyarrow as pa
import pytest
from judge_server import longer, serving
from safetensors.torch import load_file, save_file
from test_wins import make_classifier

from raydpo.answers import judge as judging
from raydpo.answers.rating import read_score
from raydpo.answers.reward import RewardModel
from raydpo.cluster.resources import resources_for
from raydpo.cluster.session import session
from raydpo.config import load_config
from raydpo.config.rewards import RewardConfig, duels_of, requests_of
from raydpo.errors import ConfigError, RaydpoError
from raydpo.rewards.functions import reward_settings
from raydpo.rewards.models import _duels, _opponents, model_rewards
from raydpo.storage.files import Storage

WORDS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg", "hhhhhhhh"]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(judging, "LONGEST_WAIT", 0.01)


def answers(by_prompt, first=0):
    """Rows of ``task.ANSWERS`` that matter here; ``first`` = -1 if the first answer to each prompt is greedy."""
    rows = [
        {"prompt_id": prompt.encode().ljust(16)[:16], "sample": sample, "prompt": json.dumps(prompt), "completion": text}
        for prompt, texts in by_prompt.items()
        for sample, text in enumerate(texts, first)
    ]
    return pa.Table.from_pylist(rows)


def rewarded(server, tmp_path, by_prompt, warn=pytest.fail, judge=(), against=None, first=0, **settings):
    reward = RewardConfig.model_validate({"judge": {"url": server.url, "model": "tiny", **dict(judge)}, **settings})
    storage = Storage(str(tmp_path / "cache"))
    mine, theirs = answers(by_prompt, first), None if against is None else answers(against, first)
    return model_rewards(reward, mine, None, storage, None, lambda done, total: None, warn, theirs).to_pylist()


@pytest.mark.parametrize(("count", "opponents"), [(1, 1), (2, 1), (2, 3), (3, 1), (5, 2), (6, 2), (6, 3), (7, 9), (8, 1)])
def test_each_answer_has_twice_as_many_duels_as_it_begins_or_one_with_each_other(count, opponents):
    asked = [(json.dumps("p"), text) for text in WORDS[:count]] + [(json.dumps("q"), "another")]
    pairs = list(_duels(asked, opponents))
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == duels_of(count, opponents)
    had = [sum(place in pair for pair in pairs) for place in range(count)]
    assert had == [min(2 * opponents, count - 1)] * count and all(place < count for pair in pairs for place in pair)
    texts = [{asked[place][1] for place in pair} for pair in pairs]
    turned = list(_duels(asked[::-1], opponents))
    assert sorted(map(sorted, texts)) == sorted(sorted(asked[::-1][place][1] for place in pair) for pair in turned)


def test_requests_are_counted_before_any_is_sent():
    def reward(**settings):
        return RewardConfig.model_validate({"judge": {"url": "http://x/v1", "model": "m"}, **settings})

    assert requests_of(reward(), 10, 8) == 10 * 2 * 8 and requests_of(reward(opponents=2), 10, 8) == 10 * 4 * 8
    assert requests_of(reward(opponents=99), 1, 8) == 2 * 28 and requests_of(reward(), 5, 1) == 0
    assert requests_of(reward(scale="score"), 10, 8) == 80 and requests_of(reward(scale="score"), 10, 8, 3) == 80
    assert (
        requests_of(reward(opponents=2), 10, 5, 5) == 10 * 5 * 4 and requests_of(reward(opponents=9), 10, 5, 3) == 10 * 5 * 6
    )
    assert requests_of(RewardConfig.model_validate({"use": "math"}), 10, 8) == 0


def test_duels(tmp_path):
    """With a duel against each other answer, rewards are ranks; each duel is asked in both orders, and once only."""
    with serving(longer) as server:
        found = rewarded(server, tmp_path, {"p": WORDS[::-1], "q": ["x", "yy"]}, opponents=8)
        assert [one["reward"] for one in found] == [*[rank / 7 for rank in range(8)][::-1], 0, 1]
        assert len(server.requests) == 2 * (28 + 1)
        assert json.loads(found[0]["details"]) == {"duels": 7, "judged": 7}
        assert all(one["error"] is None and one["seconds"] > 0 for one in found)
        again = rewarded(server, tmp_path, {"p": WORDS[::-1], "q": ["x", "yy"]}, opponents=8)
        assert [one["reward"] for one in again] == [one["reward"] for one in found] and len(server.requests) == 58


def test_few_duels_are_chosen_by_the_texts_alone(tmp_path):
    with serving(longer) as server:
        found = rewarded(server, tmp_path, {"p": WORDS})
        assert len(server.requests) == requests_of(RewardConfig(judge={"url": "http://x", "model": "m"}), 1, 8) == 16
        assert {one["reward"] for one in found} <= {0.0, 0.5, 1.0} and sum(one["reward"] for one in found) == 4
        assert found[0]["reward"] == 0 and found[-1]["reward"] == 1
        turned = rewarded(server, tmp_path / "other", {"p": WORDS[::-1]})
    assert [one["reward"] for one in turned[::-1]] == [one["reward"] for one in found]


def test_duels_with_the_answers_of_another_model(tmp_path):
    """The rewards are a win rate: better answers win more, though among each other answers win half of their duels."""
    theirs = {"p": ["bb", "dddd"], "q": ["x"]}
    with serving(longer) as server:
        same = rewarded(server, tmp_path, theirs, against=theirs)
        assert [one["reward"] for one in same] == [0.5] * 3 and not server.requests, "each meets itself"
        found = rewarded(server, tmp_path, {"p": ["a", "bb", "ccc", "ccc"], "q": ["yy"]}, against=theirs, opponents=9)
        assert [one["reward"] for one in found] == [0, 0.25, 0.5, 0.5, 1]
        assert json.loads(found[0]["details"]) == {"duels": 2, "judged": 2} and len(server.requests) == 2 * (2 + 1 + 2 + 1)
        assert [one["reward"] for one in rewarded(server, tmp_path, {"r": ["a"]}, against=theirs)] == [0.5], "no opponent"
        longest = rewarded(server, tmp_path, {"p": ["eeeee", "ffffff"]}, against=theirs)
        assert [one["reward"] for one in longest] == [1, 1]


def test_a_model_that_gives_only_the_best_answers_of_another_wins(tmp_path):
    """Its answers meet the other's worse ones, too, and each of them as often as the other model gives it."""
    with serving(longer) as server:
        for theirs, share in ((["a", "a", "a", "bb"], 7 / 8), (["a", "bb", "bb", "bb"], 5 / 8)):
            for opponents in (1, 3, 4, 9):
                found = rewarded(server, tmp_path, {"p": ["bb"] * 4}, against={"p": theirs}, opponents=opponents)
                assert [one["reward"] for one in found] == [share] * 4
        assert len(server.requests) == 2, "the one question is asked once"


@pytest.mark.parametrize("opponents", [1, 2, 3, 4, 5, 6, 99])
def test_a_model_wins_half_of_its_duels_with_itself(opponents):
    """Each answer that meets another one is met by it, too."""
    for count in range(1, 8):
        table = answers({"p": WORDS[:count]})
        met = _opponents(table, table, opponents)
        duels = collections.Counter((one, other) for one, others in zip(WORDS, met, strict=False) for other in others)
        assert all(number == duels[other, one] == 1 for (one, other), number in duels.items())
        assert [len(others) for others in met] == [min(opponents, count)] * count


@pytest.mark.parametrize(("scale", "requests"), [("duels", 48), ("score", 24)])
def test_as_many_requests_are_sent_at_once_as_the_judge_takes(tmp_path, scale, requests):
    """Each reply waits until all requests are there."""
    all_there = threading.Barrier(requests)

    def opinion(first, second):
        all_there.wait(20)
        return "A" if second else "5"

    with serving(opinion) as server:
        mine = {"p": [f"answer {number}" for number in range(24)]}
        found = rewarded(server, tmp_path, mine, judge={"parallel": requests, "retries": 0}, scale=scale)
    assert len(server.requests) == requests and not any(one["error"] for one in found)


def test_greedy_answers_have_duels_with_greedy_ones(tmp_path):
    with serving(longer) as server:
        mine, theirs = {"p": ["bb", "bb", "ccc"]}, {"p": ["a", "dddd", "bb"]}
        found = rewarded(server, tmp_path, mine, against=theirs, first=-1, opponents=9)
    assert [one["reward"] for one in found] == [1, 0.25, 0.5]


def test_the_weights_of_a_reward_model_decide_its_rewards(tmp_path, tiny_llama):
    """Other weights in the same directory are another reward model; the same ones elsewhere are not."""
    config = load_config({"output": "x", "model": {"path": str(tiny_llama)}, "data": {"train": __file__}})
    place = make_classifier(tmp_path / "model", labels=1)
    reward = RewardConfig.model_validate({"reward_model": str(place)})
    before = reward_settings(reward, config)
    copy = shutil.copytree(place, tmp_path / "copy")
    assert before == reward_settings(RewardConfig.model_validate({"reward_model": str(copy)}), config)
    weights = load_file(place / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, place / "model.safetensors", {"format": "pt"})
    after = reward_settings(reward, config)
    assert {name for name in after if after[name] != before[name]} == {"weights"}


def test_verdicts_that_change_with_the_order_are_ties(tmp_path):
    with serving(lambda first, second: "A") as server:
        assert [one["reward"] for one in rewarded(server, tmp_path, {"p": WORDS})] == [0.5] * 8
    with serving(lambda first, second: "tie") as server:
        assert [one["reward"] for one in rewarded(server, tmp_path / "other", {"p": WORDS})] == [0.5] * 8


def test_equal_answers_are_asked_about_once_and_have_equal_rewards(tmp_path):
    with serving(longer) as server:
        found = rewarded(server, tmp_path, {"p": ["same"] * 3, "q": ["yes", "no", "yes", "yes"]})
        assert [one["reward"] for one in found] == [0.5] * 3 + [1, 0, 1, 1]
        assert len(server.requests) == 2 and json.loads(found[0]["details"]) == {"duels": 0}


def test_what_fails_is_an_error_of_those_answers_and_is_asked_again(tmp_path):
    def opinion(first, second):
        return "no idea" if {first, second} & {"a"} else longer(first, second)

    told = []
    with serving(opinion) as server:
        server.trouble = lambda number: 400 if "yy" in json.dumps(server.requests[number - 1]) else None
        by_prompt = {"p": ["a", "bb", "ccc"], "q": ["x", "yy"], "r": ["i", "jj"]}
        found = rewarded(server, tmp_path, by_prompt, warn=told.append)
        assert [one["reward"] for one in found] == [None, 0, 1, None, None, 0, 1]
        assert found[0]["error"] == "the judge tiny at 127.0.0.1 gave no verdict in any of its 2 duels"
        assert json.loads(found[1]["details"]) == {"duels": 2, "judged": 1} and found[3]["error"] == found[4]["error"]
        assert told == ["reward tiny: 3 of 5 duels have no verdict (4 replies had none, 2 requests failed)"]
        asked = len(server.requests)
        server.trouble = lambda number: None
        again = rewarded(server, tmp_path, by_prompt, warn=told.append)
        assert len(server.requests) == asked + 2, "only what failed is asked again"
        assert [one["reward"] for one in again] == [None, 0, 1, 0, 1, 0, 1]


def test_a_resumed_command_asks_only_what_has_no_reply(tmp_path):
    """The key is refused in the middle: the command ends, and what was said until then is kept."""
    by_prompt = {f"prompt {number}": ["short", "a long answer"] for number in range(40)}
    with serving(longer) as server:
        server.trouble = lambda number: 401 if number > 50 else None
        with pytest.raises(RaydpoError, match=r"status 401; check reward tiny: judge \(url, model, key\)"):
            rewarded(server, tmp_path, by_prompt, judge={"parallel": 1})
        server.trouble, asked = (lambda number: None), len(server.requests)
        assert 51 <= asked < 54, "questions that wait are not asked any more"
        found = rewarded(server, tmp_path, by_prompt)
        assert [one["reward"] for one in found] == [0, 1] * 40 and len(server.requests) == asked + 30


def test_nobody_there(tmp_path):
    """A judge that is away ends the command after a few requests, not after all of them."""
    with serving(longer) as server:
        pass
    by_prompt = {f"prompt {number}": ["short", "a long answer"] for number in range(200)}
    with pytest.raises(
        RaydpoError, match=r"failed on 32 requests in a row \(the last: ConnectError\); check reward tiny: judge"
    ):
        rewarded(server, tmp_path, by_prompt, judge={"retries": 0})
    for scale in ("duels", "score"):
        with pytest.raises(RaydpoError, match=r"(no verdict on any of 1 contests|scored none of 2 answers): 0 replies"):
            rewarded(server, tmp_path, {"p": ["x", "yy"]}, judge={"retries": 0}, scale=scale)


def test_scores(tmp_path):
    said = {"good": "I like it.\n\n**10/10**", "bad": "1", "fair": "Score: 5.5", "odd": "Great!", "gone": "7"}
    with serving(lambda answer, _: said[answer]) as server:
        server.trouble = lambda number: 400 if "gone" in json.dumps(server.requests[number - 1]) else None
        by_prompt = {"p": ["good", "bad", "good", "fair"], "q": ["odd", "gone"]}
        found = rewarded(server, tmp_path, by_prompt, scale="score")
        assert [one["reward"] for one in found] == [1, 0, 1, 0.5, None, None] and len(server.requests) == 5
        assert json.loads(found[3]["details"]) == {"score": 5.5}
        assert [one["error"] for one in found[4:]] == [
            "the judge tiny at 127.0.0.1 gave no number from 1 to 10",
            "the judge tiny at 127.0.0.1 gave no reply",
        ]
        server.trouble = lambda number: None
        again = rewarded(server, tmp_path, by_prompt, scale="score")
        assert len(server.requests) == 6 and again[5]["reward"] == pytest.approx(6 / 9)
    assert "with a number from 1 to 10" in server.requests[0]["messages"][0]["content"]


@pytest.mark.parametrize(
    ("line", "score"),
    [
        ("8", "8"),
        ("**8**", "8"),
        ("8/10", "8"),
        ("Score: 7.5 out of 10.", "7.5"),
        ("My rating is 3", "3"),
        ("10/10", "10"),
        ("10", "10"),
        ("0", "refused"),
        ("11", "refused"),
        ("-3", "refused"),
        ("8 or 9", "refused"),
        ("8-9", "refused"),
        ("not 8", "refused"),
        ("8/100", "refused"),
        ("eight", "refused"),
        ("", "refused"),
    ],
)
def test_scores_are_read_strictly(line, score):
    assert read_score(line) == score


def test_the_key_is_named_and_never_told(tmp_path, monkeypatch, capsys):
    with serving(longer) as server:
        with pytest.raises(ConfigError, match=r"reward tiny: judge\.key is JUDGE_KEY, but this environment variable"):
            rewarded(server, tmp_path, {"p": ["x", "yy"]}, judge={"key": "JUDGE_KEY"})
        monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
        found = rewarded(server, tmp_path, {"p": ["x", "yy"]}, judge={"key": "JUDGE_KEY"})
    assert set(server.keys) == {"Bearer sk-very-secret"}
    stored = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert "sk-very-secret" not in f"{found}{capsys.readouterr()}" and b"sk-very-secret" not in stored


def test_a_reward_model_on_ray(tmp_path, tiny_llama, on_cluster):
    """Scores are those of the model, equal answers have equal ones, and one that cannot be scored is its own error."""
    path = str(make_classifier(tmp_path / "reward", labels=1))
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    tree = {"name": "run", "output": str(tmp_path), "model": {"path": str(tiny_llama), "dtype": "float32"}}
    config = load_config(tree | {"data": {"train": str(tmp_path / "a.jsonl")}})
    by_prompt = {"The sky is": [" blue", " green", " blue", "sky " * 300], "Why": ["?", " not"]}
    told, done = [], []
    cache, progress = Storage(str(tmp_path / "cache")), lambda *each: done.append(each)
    with session(config):
        args = RewardConfig(reward_model=path), answers(by_prompt), config, cache, resources_for("score", config), progress
        found = model_rewards(*args, told.append).to_pylist()
        seen = len(done)
        assert seen and model_rewards(*args, told.append).to_pylist() == found and len(done) == seen, "scores are stored"
    alone = RewardModel.at(path, "float32", False).open("cpu")
    for prompt, row in (("The sky is", 0), ("Why", 5)):
        table = pa.table({"prompt": [json.dumps(prompt)], "answer": [answers(by_prompt)["completion"][row].as_py()]})
        assert found[row]["reward"] == pytest.approx(alone(table)["score"][0].as_py(), abs=1e-6)
    assert found[0]["reward"] == found[2]["reward"] != found[1]["reward"] and not told
    assert found[3]["reward"] is None and "the reward model takes at most 128" in found[3]["error"]
    assert all(math.isfinite(one["reward"]) and one["seconds"] > 0 for one in found if one["error"] is None)

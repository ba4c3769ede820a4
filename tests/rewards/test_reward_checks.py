"""What is refused before anything is sampled: functions, columns, and prompts that no function can read."""

from __future__ import annotations

from pathlib import Path

import pytest
from answers import MISBEHAVING

from raydpo.config.rewards import RewardConfig
from raydpo.errors import ConfigError
from raydpo.rewards.checks import check_readable, check_rewards


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(MISBEHAVING)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("reward", "columns", "said"),
    [
        ({"use": "nowhere:f"}, None, "nowhere:f cannot be opened: ModuleNotFoundError: No module named 'nowhere'; its mod"),
        (
            {"use": "my_rewards:min"},
            None,
            "AttributeError: module 'my_rewards' has no attribute 'min'; did you mean 'mine'[?]$",
        ),
        ({"use": "my_rewards:number"}, None, "TypeError: number is not a function but a int"),
        ({"use": "broken:f"}, None, "SyntaxError"),
        ({"use": "my_rewards:needs"}, ["solutions", "x"], "'solution' of the prompts, which have 'solutions', 'x'; did you"),
        ({"use": "my_rewards:needs"}, [], "needs the column 'solution' of the prompts, which have no other columns; add it"),
        ({"use": "my_rewards:strict"}, ["x"], r"strict \(my_rewards:strict\) has no \*\*kwargs and takes no 'completion_id"),
        (
            {"use": "my_rewards:by_place"},
            ["x"],
            r"by_place \(my_rewards:by_place\) takes 'completions' by position only",
        ),
        (
            {"use": "my_rewards:Called"},
            ["x"],
            "TypeError: Called is a class; name an object of it, as in: my_called = Called",
        ),
        ({"use": "my_rewards:yields"}, ["x"], "TypeError: yields is an asynchronous generator; return a list$"),
        ({"use": "my_rewards:strict", "name": "x"}, ["prompt"], "takes no 'completion_ids'"),
        ({"use": "json", "column": "prompt"}, ["x"], "needs the column 'prompt' .*; functions get it as 'prompts', a list"),
        ({"use": "json", "column": "schema"}, ["shema"], "json needs the column 'schema' .* did you mean 'shema'"),
        ({"use": "json", "column": "completion"}, ["completion"], "reads the column 'completion', which it is not given"),
        ({"use": "regex", "pattern": "(?=x)"}, None, r"the pattern '\(\?=x\)' of the reward regex is not a regular expr"),
        ({"judge": {"url": "http://localhost:1", "model": "m", "key": "NO_KEY"}}, None, "NO_KEY"),
    ],
)
def test_refused_before_anything_runs(place, reward, columns, said):
    (place / "broken.py").write_text("def f(\n")
    with open(place / "my_rewards.py", "a") as module:
        module.write(
            "\ndef by_place(completions, /, **kwargs):\n    return [1.0 for _ in completions]\n"
            "async def yields(completions, **kwargs):\n    yield 1.0\n"
        )
    with pytest.raises(ConfigError, match=said):
        check_rewards([RewardConfig.model_validate(reward)], columns)


def test_accepted(place):
    for use in ("my_rewards:mine", "my_rewards:called", "my_rewards:state", "json"):
        read = check_rewards([RewardConfig(use=use)], ["kind", "prompt"])
        assert list(read.values()) == [{"kind": True} if use == "my_rewards:mine" else {}]
    check_rewards([RewardConfig(use="my_rewards:strict")], None)


UNREADABLE = {
    "math": ("answer", ["4", "10-15 minutes", None, r"\frac{1}{2}", r"\foo{"], "would be read as arithmetic, or in part"),
    "json": ("schema", ['{"type": "object"}', "{", None, True, {"$ref": "http://h/s"}], "the prompt's schema is not JSON"),
    "constraints": ("asked", [[{"id": "punctuation:no_comma"}], [{"id": "no:such"}], None, [], "x"], "'no:such' is unknown"),
    "code": (
        "tests",
        [["assert f(1) == 2"], ["f(1)"], None, [{"input": "", "output": ""}], []],
        "must compare with a literal",
    ),
}


@pytest.mark.parametrize("use", UNREADABLE)
def test_prompts_that_a_function_cannot_read_are_refused_or_told(use):
    """Two of five cannot be read: the second and the last."""
    pytest.importorskip("math_verify" if use == "math" else "jsonschema")
    column, values, said = UNREADABLE[use]
    reward = RewardConfig.model_validate({"use": use, "column": column} | ({"unsafe": True} if use == "code" else {}))
    columns, places = [{column: value} for value in values], [f"record {row}" for row in range(5)]
    told = f"the reward {use} cannot read '{column}' of 2 of 5 held-out prompt(s) (first: record 1: "
    for most in (0.4, None):
        (line,) = check_readable([reward], columns, places, "held-out", most)
        assert line.startswith(told) and said in line and line.endswith("; answers to them get no reward"), line
    with pytest.raises(ConfigError) as error:
        check_readable([reward], columns, places, "held-out", 0.39)
    assert str(error.value).startswith(told)
    assert str(error.value).endswith(
        ", more than rounds.max_errors (0.39) allows; correct or remove these prompts, or raise it"
    )
    assert check_readable([reward], [columns[row] for row in (0, 2, 3)], places[:3], "held-out", 0.0) == []


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        (["assert f(1) == {[1]: 2}"], "must compare with a literal"),
        (["assert f(1) == " + "-" * 3000 + "1"], "must compare with a literal"),
        ("[" * 100000, "no JSON; expected a list of"),
        ([{"call": "f(", "output": 1}], "its call must be an expression"),
        ([{"call": "x = 1", "output": 1}], "its call must be an expression"),
        ([{"call": "f()", "output": float("inf")}], "without NaN and Infinity"),
    ],
)
def test_tests_that_no_program_can_pass_are_told(tests, said):
    reward = RewardConfig(use="code", unsafe=True)
    (line, none) = check_readable([reward], [{"tests": tests}], ["record 7"], "training", None)
    assert said in line and none.startswith(
        "no reward with a weight applies to any of 1 training prompt(s), such as record 7"
    )


def test_prompts_to_which_no_reward_applies_are_refused():
    math, measured = RewardConfig(use="math"), RewardConfig(use="json", column="schema", weight=0)
    pattern = RewardConfig(use="regex", pattern="x")
    pytest.importorskip("math_verify")
    columns, both = [{"answer": None, "schema": "{"}, {"other": 1}], ["a", "b"]
    said = r"no reward with a weight applies to any of 2 training prompt\(s\), such as a: the columns that"
    with pytest.raises(ConfigError, match=said):
        check_readable([math, measured], columns, both, "training", 1.0)
    assert said.replace("\\", "") in check_readable([math, measured], columns, both, "training", None)[1]
    with pytest.raises(ConfigError, match=r"of 1 training prompt\(s\), such as a: the right answer is a list, expected"):
        check_readable([math, measured], [{"answer": [1]}], ["a"], "training", 1.0)
    assert check_readable([math, pattern], columns, both, "training", 0.0) == []
    assert check_readable([RewardConfig(use="math", weight=0)], columns, both, "training", 0.0) == []
    assert check_readable([math], [], [], "training", 0.0) == []


def test_modules_of_the_working_directory_do_not_disturb_mathematics(place):
    """A file named as a module of the standard library is not imported in its place."""
    pytest.importorskip("math_verify")
    for name in ("numbers", "re", "json"):
        (place / f"{name}.py").write_text("print('not the real one')\nraise RuntimeError\n")
    assert check_readable([RewardConfig(use="math")], [{"answer": 7}], ["record 1"], "training", 0.0) == []


def test_a_function_whose_module_imports_torch_is_found(place):
    """torch.classes calls its file _classes.py, as if it were in the working directory."""
    (place / "heavy.py").write_text("import torch\ndef mine(completions, **kwargs): return [1.0 for _ in completions]\n")
    assert check_rewards([RewardConfig(use="heavy:mine")], []) == {"mine": {}}

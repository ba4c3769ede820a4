import pytest
import yaml

from raydpo.config import load_config
from raydpo.errors import ConfigError


def write(place, **trees):
    for name, tree in trees.items():
        (place / f"{name}.yaml").parent.mkdir(exist_ok=True)
        (place / f"{name}.yaml").write_text(yaml.safe_dump(tree))


def test_a_file_is_what_differs_from_its_base(tree, tmp_path):
    (tmp_path / "below").mkdir()
    write(
        tmp_path,
        root=tree | {"train": {"beta": 0.3, "lr": 1e-6, "zero": 3, "clip": 2.0}},
        middle={"base": "root.yaml", "train": {"beta": 0.2, "clip": None}, "model": {"freeze": ["embed", "norm"]}},
    )
    write(tmp_path / "below", leaf={"base": "../middle.yaml", "train": {"zero": 1}, "model": {"freeze": ["head"]}})
    config = load_config(tmp_path / "below" / "leaf.yaml", ["train.lr=2e-6"])
    assert (config.train.beta, config.train.zero, config.train.lr, config.train.clip) == (0.2, 1, 2e-6, None)
    assert config.model.freeze == ("head",) and config.model.path == tree["model"]["path"]
    assert load_config(tmp_path / "middle.yaml").train.zero == 3
    assert "base" not in config.to_yaml().split()


def test_a_later_setting_replaces_one_of_a_base_that_contradicts_it(tree, tmp_path):
    held_out = {"path": tree["data"]["train"], "split": "test_prefs"}
    write(
        tmp_path,
        base=tree | {"data": tree["data"] | {"eval": held_out}, "train": {"checkpoint_minutes": 20, "epochs": 3}},
        steps={"base": "base.yaml", "data": {"eval": {"fraction": 0.25}}, "train": {"checkpoint_every": 100, "steps": 7}},
        both={"base": "base.yaml", "train": {"checkpoint_every": 50, "checkpoint_minutes": 5}},
        none={"base": "base.yaml", "train": {"checkpoint_every": None}, "data": {"eval": {"fraction": None}}},
    )
    found = load_config(tmp_path / "steps.yaml")
    assert (found.data.eval.path, found.data.eval.fraction) == (None, 0.25)
    assert (found.train.checkpoint_minutes, found.train.steps, found.train.epochs) == (None, 7, 1)
    found = load_config(
        tmp_path / "base.yaml", ["train.checkpoint_every=100", "data.eval={fraction: 0.25}", "train.steps=7"]
    )
    assert (found.train.checkpoint_minutes, found.data.eval.fraction, found.train.steps) == (None, 0.25, 7)
    back = ["train.checkpoint_minutes=5", f"data.eval.path={tree['data']['train']}", "train.epochs=2"]
    found = load_config(tmp_path / "steps.yaml", back)
    assert (found.train.checkpoint_minutes, found.data.eval.fraction, found.train.steps) == (5, None, None)
    for file, overrides in (("both", []), ("base", ["train.checkpoint_every=50", "train.checkpoint_minutes=5"])):
        with pytest.raises(ConfigError, match=r"checkpoint_minutes \(5\) and checkpoint_every \(50\) contradict"):
            load_config(tmp_path / f"{file}.yaml", overrides)
    with pytest.raises(ConfigError, match=r"'train.checkpoint_every' is None"):  # null replaces nothing else
        load_config(tmp_path / "none.yaml")


def test_a_base_in_a_circle_is_refused(tree, tmp_path):
    write(
        tmp_path,
        a=tree | {"base": "b.yaml"},
        b={"base": "c.yaml"},
        c={"base": str(tmp_path / "b.yaml")},
        me={"base": "./me.yaml"},
    )
    with pytest.raises(ConfigError, match=r"circular: \S*a\.yaml -> \S*b\.yaml -> \S*c\.yaml -> \S*b\.yaml"):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match=r"circular: \S*me\.yaml -> \S*me\.yaml"):
        load_config(tmp_path / "me.yaml")


def test_a_base_that_is_not_there_is_named(tree, tmp_path):
    write(tmp_path, a=tree | {"base": "nowhere.yaml"}, two=tree | {"base": ["a.yaml", "b.yaml"]})
    with pytest.raises(ConfigError, match=r"'nowhere\.yaml', but there is no file '\S*/nowhere\.yaml'"):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match=r"'base' in \S*two\.yaml is \['a\.yaml', 'b\.yaml'\], expected the path of one"):
        load_config(tmp_path / "two.yaml")


def test_a_section_may_replace_a_value_and_the_reverse(tree, tmp_path):
    write(
        tmp_path,
        a=tree,
        b={"base": "a.yaml", "data": {"train": [{"path": tree["data"]["train"], "weight": 2.0}]}},
        c={"base": "b.yaml", "model": tree["model"]["path"]},
    )
    assert load_config(tmp_path / "b.yaml").data.train[0].weight == 2.0
    with pytest.raises(ConfigError, match=r"'model' is .* expected a section"):
        load_config(tmp_path / "c.yaml")

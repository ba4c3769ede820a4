"""What the guides and README say of options, settings and messages is so."""

import ast
import dataclasses
import inspect
import re

import pytest
import yaml
from documented import DOCUMENTS, GUIDES, ROOT, block, not_run

from raydpo.config import Config, load_config
from raydpo.config.load import _all_keys

GUIDE = {file.stem: file for file in GUIDES}
SWITCHING, TROUBLESHOOTING = GUIDE["switching"], GUIDE["troubleshooting"]
KEYS = set(_all_keys())


def tables(file):
    """By its first column's name: the rows of all tables of a file, each a list of cells."""
    found = {}
    for text in re.findall(r"(?:^\|.*\n)+", file.read_text(), re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines())
        found.setdefault(head[0].strip("| "), []).extend([cell.strip("| ") for cell in row] for row in rows)
    return found


def prose(file):
    return re.sub(r"^```.*?^```", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)


def quoted(text):
    return re.findall(r"`([^`]+)`", text)


def test_every_setting_that_is_named_exists():
    named = {text.split("=")[0].split(":")[0] for file in DOCUMENTS for text in quoted(prose(file))
             if re.match(rf"({'|'.join(Config.model_fields)})\.[a-z_.]+([=:]|$)", text)}
    assert len(named) > 80
    assert {name for name in named - KEYS if not name.endswith((".json", ".yaml", ".py"))} == set()


@pytest.mark.parametrize("trainer", ["TRL", "open-instruct"])
def test_the_second_column_holds_settings_of_ours(trainer):
    rows = tables(SWITCHING)[trainer]
    assert len(rows) > 20
    for _, ours, *remark in rows:
        assert ours == "none" or (quoted(ours) and set(quoted(ours)) <= KEYS), ours
        assert ours != "none" or any(remark) or trainer == "open-instruct", "why there is none"


def test_trls_options_are_all_there_and_exist():
    trl = pytest.importorskip("trl")
    from transformers import TrainingArguments

    named = [name for theirs, *_ in tables(SWITCHING)["TRL"] for name in quoted(theirs)]
    known = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    assert set(named) <= known and len(named) == len(set(named))
    assert set(inspect.get_annotations(trl.DPOConfig)) <= set(named), "those that DPOConfig has of its own"
    assert {"per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "seed"} <= set(named) & {
        field.name for field in dataclasses.fields(TrainingArguments)}


def test_metrics_of_ours_exist():
    written = strings(ROOT / "raydpo" / "training")
    for _, ours, *_ in tables(SWITCHING)["TRL or open-instruct"]:
        assert ours == "none" or all(name in written for name in quoted(ours)), ours


def strings(directory):
    """The constant parts of every string in the code, without docstrings."""
    found = set()
    for file in directory.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        found |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
                  and id(node) not in docstrings}
    return found


def test_messages_are_those_of_the_code():
    written = "\n".join(strings(ROOT / "raydpo"))
    rows = tables(TROUBLESHOOTING)["you see"]
    assert len(rows) > 45
    for seen, why, what in rows:
        assert why and what
        for message in quoted(seen):
            for part in message.split("..."):
                assert part.strip(" ;") in written, f"nothing prints {message!r}"


def test_every_symptom_of_the_issue_is_there():
    heads = re.findall(r"^## (.*)$", TROUBLESHOOTING.read_text(), re.MULTILINE)
    for word in ("ln 2", "0.5", "chosen", "longer", "memory", "start", "401", "cache", "finite", "Disk", "secret"):
        assert any(word in head for head in heads), word


def test_readmes_settings_load(tmp_path, monkeypatch):
    """The block that shows a whole configuration, with every section in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "a.jsonl").write_text("{}\n")
    text = block(ROOT / "README.md", "yaml", "name: politeness")
    config = load_config(yaml.safe_load(text))
    assert set(yaml.safe_load(text)) == set(Config.model_fields)
    defaults = load_config({"output": "runs/", "model": {"path": "./model"}, "data": {"train": "a.jsonl"}})
    shown = yaml.safe_load(text)["train"].keys() - {"workers"}
    assert {key: getattr(config.train, key) for key in shown} == {key: getattr(defaults.train, key) for key in shown}


def test_readmes_sweep_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "a.jsonl").write_text("{}\n")
    sweep = yaml.safe_load(block(ROOT / "README.md", "yaml", "log_uniform"))
    assert load_config({"output": "runs/", "model": {"path": "./model"},
                        "data": {"train": "a.jsonl", "eval": {"fraction": 0.1}}} | sweep).sweep.grid


def test_reasons_not_to_run_a_command_are_found():
    assert not_run("make docs") and not_run("raydpo plan jobs/x.yaml") and not not_run("raydpo plan config.yaml")

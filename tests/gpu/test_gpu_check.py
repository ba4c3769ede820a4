"""The command ``raydpo gpu check``: what it runs, prints, writes and returns."""

import json
import math
import re
import subprocess
import sys
import time

import jsonschema
import pytest
import torch
from command import raydpo
from documented import GUIDE, block

from raydpo.errors import ConfigError
from raydpo.gpu import blocks, command
from raydpo.gpu.blocks import Block
from raydpo.gpu.figures import Findings, Report, Skip
from raydpo.terminal.console import Console

FIGURE = {
    "type": "object",
    "required": ["value", "unit", "rule", "limit", "ok", "says"],
    "additionalProperties": False,
    "properties": {
        "value": {"type": ["number", "null"]},
        "unit": {"type": "string"},
        "rule": {"enum": ["at most", "at least", "goal", None]},
        "limit": {"type": ["number", "null"]},
        "ok": {"type": ["boolean", "null"]},
        "says": {"type": "string", "minLength": 3},
    },
}
BLOCK = {
    "type": "object",
    "required": ["number", "name", "status", "seconds", "figures", "note", "error"],
    "additionalProperties": False,
    "properties": {
        "number": {"type": "integer", "minimum": 0, "maximum": 11},
        "name": {"type": "string"},
        "status": {"enum": ["pass", "fail", "skip", "error", "timeout"]},
        "seconds": {"type": "number", "minimum": 0},
        "figures": {"type": "object", "additionalProperties": FIGURE},
        "note": {"type": "string"},
        "error": {"type": ["string", "null"]},
    },
}
NUMBERS = {"type": "object", "additionalProperties": {"type": ["number", "null"]}}
SCHEMA = {
    "type": "object",
    "required": ["format", "raydpo", "started", "seconds", "device", "versions", "measured", "model", "blocks", "summary"],
    "additionalProperties": False,
    "properties": {
        "format": {"const": 1},
        "raydpo": {"type": "string"},
        "started": {"type": "string"},
        "seconds": {"type": "number"},
        "device": {"type": "object", "required": ["type", "name"]},
        "versions": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
        "measured": NUMBERS,
        "model": {"type": "object", "required": ["shape", "layers", "whole"]},
        "blocks": {"type": "array", "items": BLOCK},
        "summary": {**NUMBERS, "required": ["pass", "fail", "skip", "score_mfu_32", "full_mfu_32", "plan_worst"]},
    },
}


def check(monkeypatch, tmp_path, *blocks, **options):
    """The report of some blocks on the CPU, and the JSON that holds it."""
    monkeypatch.setattr(command, "BLOCKS", blocks)
    monkeypatch.setattr(command, "LIBRARIES", ())
    out = tmp_path / "report.json"
    report = command.check(Console(), out=out, device="cpu", **options)
    written = json.loads(out.read_text())
    jsonschema.validate(written, SCHEMA)
    return report, written


def passes(world, found):
    found.at_most("gap", 0.001, 0.02, "a gap")


def fails(world, found):
    found.at_least("share", math.nan, 0.5, "a share")


def skips(world, found):
    raise Skip("no deepspeed")


def breaks(world, found):
    found.value("before", 1.0, "found before it broke")
    raise ValueError("illegal memory access")


def sleeps(world, found):
    found.value("before", 1.0, "found before it was stopped")
    while True:
        try:
            time.sleep(0.01)
        except Exception:  # libraries catch everything
            continue


def test_outcomes_are_counted_and_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "BLOCK_SECONDS", 0.2)
    blocks = [Block(number, one.__name__, one) for number, one in enumerate((passes, fails, skips, breaks, sleeps))]
    report, written = check(monkeypatch, tmp_path, *blocks)
    assert [block["status"] for block in written["blocks"]] == ["pass", "fail", "skip", "error", "timeout"]
    assert written["blocks"][3]["error"] == "ValueError: illegal memory access"
    assert all("before" in written["blocks"][number]["figures"] for number in (3, 4))
    assert (report.summary["pass"], report.summary["fail"], report.summary["skip"]) == (1, 3, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("raydpo ") and f"torch {torch.__version__}" in lines[0]
    assert lines[1].startswith("warning: --device cpu")
    assert lines[-1] == "PASS 1, FAIL 3, SKIP 1"
    told = "\n".join(lines)
    assert "a gap: 0.001 (at most 0.02)" in told and "a share: not finite (at least 0.5) FAIL" in told
    assert "skipped: no deepspeed" in told


def test_the_report_is_written_after_each_block(monkeypatch, tmp_path):
    """A machine that is lost in the second block leaves what the first one found."""

    def lost(world, found):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(monkeypatch, tmp_path, Block(0, "first", passes), Block(1, "second", lost))
    written = json.loads((tmp_path / "report.json").read_text())
    assert [block["name"] for block in written["blocks"]] == ["first"]


def test_no_block_begins_after_the_time_of_all(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "ALL_SECONDS", 0.0)
    _, written = check(monkeypatch, tmp_path, Block(0, "first", passes))
    assert written["blocks"][0]["status"] == "timeout" and written["blocks"][0]["figures"] == {}


def test_which_blocks_run():
    assert [block.number for block in command.chosen_blocks("1, 5", False)] == [1, 5]
    assert {block.number for block in command.chosen_blocks(None, True)} == {0, 1, 2, 3, 4, 5, 8}
    for numbers, quick, told in (("1,12", False, "'12'"), ("one", False, "'one'"), ("1", True, "contradict")):
        with pytest.raises(ConfigError, match=told):
            command.chosen_blocks(numbers, quick)


@pytest.mark.parametrize(
    ("value", "rule", "limit", "ok"),
    [
        (1.0, "at_most", 1.0, True),
        (1.1, "at_most", 1.0, False),
        (0.9, "at_least", 1.0, False),
        (math.inf, "at_least", 1.0, False),
        (math.nan, "at_most", 1.0, False),
        (0.1, "goal", 0.5, None),
        (9.0, "at_most", None, None),
    ],
)
def test_figures_against_their_limits(value, rule, limit, ok):
    found = Findings()
    getattr(found, rule)("name", value, limit, "something")
    assert found.figures["name"].ok is ok


def test_exit_status_and_messages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without = raydpo("gpu", "check")
    assert without.returncode == 2 and "found no GPU that torch can use" in without.stderr
    assert "--device cpu" in without.stderr and not list(tmp_path.glob("*.json"))
    assert raydpo("gpu", "check", "--device", "cpu", "--blocks", "77").returncode == 2
    lost = raydpo("gpu", "check", "--device", "cpu", "--out", "nowhere/report.json")
    assert lost.returncode == 2 and "existing folder" in lost.stderr
    assert raydpo("gpu", "check", "--device", "cpu", "--out", "new/").returncode == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("{}/" + "n" * 255, "File name too long"),
        ("/proc/x.json", "cannot be written"),
        ("{}/nowhere/x.json", "No such file or directory"),
        ("{}/new/", "names no file"),
        ("{}/.", "names no file"),
        ("{}", "names no file"),
        ("", "names no file"),
        ("/dev/null", "names no file"),
        ("s3://bucket/x.json", "s3://bucket/x.json is a URI, which is not supported"),
        ("{}/a\0b", "cannot be written"),
    ],
)
def test_a_report_that_cannot_be_written_is_told_before_the_first_block(monkeypatch, tmp_path, name, told):
    ran = []
    monkeypatch.setattr(command, "BLOCKS", (Block(0, "first", lambda world, found: ran.append(1)),))
    with pytest.raises(ConfigError, match=re.escape(told)):
        command.check(Console(), out=name.format(tmp_path), device="cpu")
    assert not ran and not list(tmp_path.iterdir())


def test_a_report_that_stands_is_kept_until_a_block_ends(monkeypatch, tmp_path):
    (tmp_path / "report.json").write_text("old")
    seen = []
    check(monkeypatch, tmp_path, Block(0, "first", lambda world, found: seen.append((tmp_path / "report.json").read_text())))
    assert seen == ["old"] and [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_failure_is_status_1(monkeypatch, tmp_path):
    from raydpo.cli.entry import main

    monkeypatch.setattr(command, "BLOCKS", (Block(0, "fails", fails),))
    monkeypatch.setattr(command, "LIBRARIES", ())
    out = str(tmp_path / "report.json")
    assert main(["gpu", "check", "--device", "cpu", "--out", out]) == 1
    monkeypatch.setattr(command, "BLOCKS", (Block(0, "passes", passes), Block(1, "skips", skips)))
    assert main(["gpu", "check", "--device", "cpu", "--out", out]) == 0


BARE = """
import sys

class Absent:
    '''Packages that a machine with a GPU and no network may lack.'''
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "polars", "deepspeed", "bitsandbytes", "datasets", "matplotlib"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
def find_spec(name, package=None):
    try:
        return found(name, package)
    except ModuleNotFoundError:
        return None
importlib.util.find_spec = find_spec
from raydpo.cli import main
status = main(["gpu", "check", "--device", "cpu", "--blocks", "0,3,4,5,8,9", "--out", sys.argv[1]])
assert not {"ray", "polars"} & set(sys.modules)
sys.exit(status)
"""


def test_without_ray_polars_deepspeed_and_bitsandbytes(tmp_path):
    """What is not installed is skipped by name, and the rest passes."""
    out = tmp_path / "report.json"
    done = subprocess.run([sys.executable, "-c", BARE, str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS 3, FAIL 0, SKIP 3" in done.stdout
    blocks = {block["number"]: block for block in json.loads(out.read_text())["blocks"]}
    assert all(blocks[number]["note"] == "skipped: no deepspeed" for number in (4, 5, 8))
    assert "qlora_4bit skipped: no bitsandbytes" in blocks[3]["note"]
    assert "steps skipped: no deepspeed" in blocks[9]["note"]


def test_a_reader_never_sees_half_a_report(tmp_path):
    report = Report(raydpo="1", started="now", device={"type": "cpu", "name": "a CPU"}, versions={}, model={})
    (tmp_path / "a.json").write_text("old")
    report.write(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["format"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_the_guide_shows_the_form_of_a_report():
    jsonschema.validate(json.loads(block(GUIDE["gpus"], "json", '"format"')), SCHEMA)


def test_the_guide_names_every_block():
    rows = [line.split("|")[1].strip() for line in GUIDE["gpus"].read_text().splitlines() if line.startswith("| ")]
    told = {row for row in rows if row.split()[0].isdigit()}
    assert told == {f"{block.number} {block.name}" for block in blocks.BLOCKS}

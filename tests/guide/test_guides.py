"""What the guides and README say of options, settings and messages is so."""

import ast
import dataclasses
import inspect
import json
import re

import draw_betas
import draw_counting
import pytest
import yaml
from documented import DOCUMENTS, GUIDE, GUIDES, ROOT, block, blocks, commands, not_run

from raydpo.config import LOSSES, Config, load_config
from raydpo.config.load import _OTHER_NAMES, _all_keys

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
    named = {
        text.split("=")[0].split(":")[0]
        for file in DOCUMENTS
        for text in quoted(prose(file))
        if re.match(rf"({'|'.join(Config.model_fields)})\.[a-z_.]+([=:]|$)", text)
    }
    assert len(named) > 80
    assert {name for name in named - KEYS if not name.endswith((".json", ".yaml", ".py"))} == set()


@pytest.mark.parametrize("trainer", ["TRL", "open-instruct"])
def test_the_second_column_holds_settings_of_ours(trainer):
    rows = tables(SWITCHING)[trainer]
    assert len(rows) > 20
    for _, ours, *remark in rows:
        assert ours == "none" or (quoted(ours) and set(quoted(ours)) <= KEYS), ours
        assert ours != "none" or any(remark) or trainer == "open-instruct", "why there is none"


@pytest.mark.parametrize("trainer", ["TRL", "open-instruct"])
def test_a_message_names_the_setting_that_the_page_names(trainer):
    own = {key.rpartition(".")[2] for key in KEYS}
    for names, ours, *_ in tables(SWITCHING)[trainer]:
        for name in quoted(names) if ours != "none" else []:
            if not name.isupper() and name not in own:
                said = f"{_OTHER_NAMES[name]}."
                assert any(said.startswith(f"{key}.") or f"{key}.".startswith(said) for key in quoted(ours)), name


def test_trls_options_are_all_there_and_exist():
    trl = pytest.importorskip("trl")
    from transformers import TrainingArguments

    named = [name for theirs, *_ in tables(SWITCHING)["TRL"] for name in quoted(theirs)]
    known = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    assert set(named) <= known and len(named) == len(set(named))
    assert set(inspect.get_annotations(trl.DPOConfig)) <= set(named), "those that DPOConfig has of its own"
    assert {"per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "seed"} <= set(named) & {
        field.name for field in dataclasses.fields(TrainingArguments)
    }


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
        found |= {
            node.value
            for node in nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        }
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


EXAMPLE = ("prompt ", "before ", "after ", "- ", "job ", "data ")
"""Beginnings of printed lines that hold the text of a model or names of an example."""
INTERPOLATED = {
    "GB in bfloat",
    "GB/s by NVLink",
    "GiB gathered on each of",
    "x H",
    "nats a token from one completion at a time",
    "optimizer on host",
    "records of train",
    "sdpa attention",
    "shorter is better",
    "The shorter answer is better",
    "train.gradient_checkpointing=true train.offload_optimizer=cpu",
    "tree layout",
    "watch the length",
}
"""Phrases that the code puts together."""


def test_what_pages_show_as_printed_is_what_the_code_prints():
    """Phrases of blocks without a command, cut where figures and names stand. Drawings and the formula are left out."""
    written = "\n".join(strings(ROOT / "raydpo"))
    seen = 0
    for file in DOCUMENTS:
        for text in (text for language, text in blocks(file) if not language and not commands(text)):
            if "->" in text or "errors.py   version.py" in text or text.startswith(("-log sigmoid(", "<cache>/")):
                continue
            for line in text.splitlines():
                if not line.startswith(EXAMPLE):
                    phrases = re.split(r"[\d.,%+-]*\d\S*|\.\.\.|[│┃;:(),'*]|\b[a-z]+-[a-z-]+\b", line)
                    for phrase in (phrase.strip() for phrase in phrases if len(phrase.split()) > 1):
                        seen += 1
                        assert phrase in written or phrase in INTERPOLATED, f"{file.name}: nothing prints {phrase!r}"
    assert seen > 40


def test_every_symptom_of_the_issue_is_there():
    heads = re.findall(r"^## (.*)$", TROUBLESHOOTING.read_text(), re.MULTILINE)
    for word in ("ln 2", "0.5", "chosen", "longer", "memory", "start", "401", "cache", "finite", "Disk", "secret"):
        assert any(word in head for head in heads), word


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with what the configurations name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for name in ("a.jsonl", "b.jsonl", "held-out.jsonl", "prompts.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    return tmp_path


CONFIGURATIONS = [
    (f"{file.name} {number}", text)
    for file in DOCUMENTS
    for number, text in enumerate(text for language, text in blocks(file) if language == "yaml")
]
LEAST = {"output": "runs/", "model": {"path": "./model"}}
PAIRS = {"data": {"train": "a.jsonl", "eval": {"fraction": 0.1}}}
ROUNDS = {"prompts": "prompts.jsonl", "rewards": [{"use": "math"}]}


@pytest.mark.parametrize("text", [text for _, text in CONFIGURATIONS], ids=[name for name, _ in CONFIGURATIONS])
def test_every_configuration_loads(place, text):
    """As a file, as the page shows it; one that shows some sections only is completed."""
    shown = yaml.safe_load(text)
    if "base" not in shown:
        shown = LEAST | (PAIRS if "rounds" not in shown else {"rounds": ROUNDS | shown.pop("rounds")}) | shown
    (place / "config.yaml").write_text(yaml.safe_dump(shown))
    assert load_config("config.yaml", elsewhere="s3://" in text).output == shown["output"]


def test_configurations_are_found():
    assert {"README.md 0", "sweeps.md 0", "switching.md 0", "clusters.md 0", "configuration.md 2"} <= {
        name for name, _ in CONFIGURATIONS
    }


def test_a_whole_configuration_has_every_section_and_the_defaults(place):
    text = block(GUIDE["configuration"], "yaml", "name: politeness")
    config = load_config(yaml.safe_load(text))
    assert set(yaml.safe_load(text)) | {"rounds"} == set(Config.model_fields)  # they have no data.train
    defaults = load_config({"output": "runs/", "model": {"path": "./model"}, "data": {"train": "a.jsonl"}})
    shown = yaml.safe_load(text)["train"].keys() - {"workers"}
    assert {key: getattr(config.train, key) for key in shown} == {key: getattr(defaults.train, key) for key in shown}


def test_the_commented_sweeps_load_too(place):
    text = block(GUIDE["sweeps"], "yaml", "log_uniform")
    for kind in ("grid", "list", "random"):
        lines = [
            line.replace("# ", "", 1) if line.strip().startswith(f"# {kind}:") else line
            for line in text.splitlines()
            if line.strip().startswith((f"{kind}:", f"# {kind}:", "sweep:", "metric:"))
        ]
        assert getattr(load_config(LEAST | PAIRS | yaml.safe_load("\n".join(lines))).sweep, kind)


def test_names_of_the_guide_are_those_of_the_code():
    """How many losses there are, and which of them TRL's DPOTrainer has."""
    text = GUIDE["objectives"].read_text()
    head, rest = text.split("## Names")
    assert set(LOSSES) <= set(quoted(head)) and f"{len(LOSSES)} losses" in GUIDE["index"].read_text()
    assert f"{len(LOSSES)} losses" in (ROOT / "README.md").read_text()
    theirs = set(quoted(rest.split("settings: ")[1].split(". `kto`")[0]))
    trl = pytest.importorskip("trl")
    documented = next(field for field in dataclasses.fields(trl.DPOConfig) if field.name == "loss_type")
    assert len(theirs) == 15 and all(
        f'"{name}"' in documented.metadata["help"] or f"'{name}'" in documented.metadata["help"] for name in theirs
    )
    assert set(re.findall(r"`([a-z_]+)`", rest.split(" are not from TRL.")[0].rsplit(". ", 1)[1])) == {
        "ipo_sum",
        "dpop",
        "bco",
        "plackett_luce",
    }
    assert theirs | {"kto", "simpo", "cpo", "orpo", "ipo_sum", "dpop", "bco", "plackett_luce"} == set(LOSSES)


def test_pages_are_short_and_the_front_door_too():
    for file in GUIDES:
        assert len(file.read_text().splitlines()) <= 250, file
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 220 and len(readme.split()) <= 2500
    first = commands(readme)[0]
    assert readme.splitlines().index(next(line for line in readme.splitlines() if line.startswith(first))) < 30


def test_every_link_leads_to_a_file():
    for file in [*DOCUMENTS, ROOT / "cluster" / "README.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\((?![a-z]+:|#)([^)#]+)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_every_page_is_linked_from_the_index_and_from_readme():
    for file in (GUIDE["index"], ROOT / "README.md"):
        linked = {target.rsplit("/", 1)[-1] for target in re.findall(r"\]\(([^)#]+\.md)", file.read_text())}
        assert {page.name for page in GUIDES} - {"index.md"} <= linked


def test_the_picture_shows_the_table():
    place = draw_betas.PICTURE
    assert place.read_text() == draw_betas.picture(), "run: python tests/guide/draw_betas.py"
    assert all(figure in place.read_text() for figure in ("0.877", "0.947")) and place.stat().st_size < 100_000


def test_the_picture_of_what_counts_is_what_counts():
    """By hand: the parts of each line of a conversation with a call of a tool."""
    place, lines = draw_counting.PICTURE, draw_counting.lines_of()
    assert place.read_text() == draw_counting.picture(), "run: python tests/guide/draw_counting.py"
    assert place.stat().st_size < 30_000
    thought, answer, other = [1, 1, 0, 0, 1, 0.1], [1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0]
    last = lambda each: [*each[:2], 1, *each[3:]]  # noqa: E731
    turns = [*[thought] * 3, *[answer] * 3, *[other] * 5, *[last(thought)] * 3, last(answer)]
    assert [weights for _, weights in lines["chosen"]] == turns
    assert [weights for _, weights in lines["rejected"]] == [*[last(thought)] * 3, last(answer)]
    assert lines["chosen"][6][0] == "<|im_start|>user" and lines["chosen"][-1][0].endswith("<|im_end|>")


def test_pages_show_what_the_benchmark_measured():
    """Results of the present benchmark are in the guide and in README exactly as ``--show`` prints them."""
    pytest.importorskip("trl")
    from raydpo.benchmark.tables import markdown, summary_row

    for file in sorted((ROOT / "tests" / "benchmarks" / "results").glob("*.json")):
        record = json.loads(file.read_text())
        if record.get("format") == 2:
            assert markdown(record) in GUIDE["speed"].read_text(), f"python jobs/benchmark.py --show {file.name}"
            assert summary_row(record) in (ROOT / "README.md").read_text()


def test_reasons_not_to_run_a_command_are_found():
    assert not_run("make docs") and not_run("raydpo plan jobs/x.yaml") and not not_run("raydpo plan config.yaml")

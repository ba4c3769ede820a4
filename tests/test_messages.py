"""Messages are short, hold no text of the data, and are printed on any terminal."""

import os
import pickle
import subprocess
import sys

import pytest

from raydpo import errors
from raydpo.cluster.actors import original_error
from raydpo.data.refusal import refusal
from raydpo.data.tally import DataReport, Faults, SourceReport
from raydpo.errors import MOST_BYTES, RaydpoError, bounded, reason
from raydpo.terminal.guard import guarded

LONG = {
    "words": "word " * 20_000,
    "one word": "x" * 70_000,
    "lines": "\n".join(f"'key{number}' is unknown" for number in range(400)),
    "not ASCII": "ice 氷 " * 5_000,
    "half of a surrogate pair": "a \udcff b " * 2_000,
}
KINDS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RaydpoError)
]  # fmt: skip


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
@pytest.mark.parametrize("kind", KINDS)
def test_no_error_is_longer_than_2_kb(kind, text, capsys):
    def fail(console):
        raise kind(f"beginning {text} the fix")

    assert guarded(fail) == errors.exit_status(kind("x"))
    told = capsys.readouterr().err
    assert len(told.encode("utf-8", "backslashreplace")) < 2000 and told.startswith("error: beginning ")
    assert told.rstrip().endswith("the fix"), "the end of a message has the fix"


def test_many_lines_are_counted_and_the_last_one_is_kept():
    told = bounded("\n".join([*(f"key {number}" for number in range(30)), "set data.max_length=64", ""]))
    assert told.splitlines() == [*(f"key {number}" for number in range(10)), "... and 20 more", "set data.max_length=64"]
    whole = "\n".join(f"key {number}" for number in range(12))
    assert bounded(whole) == whole


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_neither_is_what_nobody_foresaw_nor_a_warning_nor_what_ray_tells(text, capsys):
    def fail(console):
        console.warn(text)
        raise KeyError(text)

    assert guarded(fail) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: unexpected KeyError: ") and err.count("\n") == 1
    for told in (out, err, str(original_error(ValueError(text), "scoring"))):
        assert len(told.encode("utf-8", "backslashreplace")) < 2000


def test_a_short_message_stays_as_it_is():
    for text in ("x", "a" * MOST_BYTES, "one\ntwo", "\n".join("x" * 11)):
        assert bounded(text) == text == str(pickle.loads(pickle.dumps(RaydpoError(text))))
    for text in LONG.values():
        assert bounded(bounded(text)) == bounded(text)


def test_a_secret_is_not_cut_in_two(capsys):
    """What is left of a URI must still be recognised as one."""

    def fail(console):
        raise RaydpoError(" ".join(f"s3://user{number}:secret{number}@bucket/part" for number in range(300)))

    guarded(fail)
    assert "secret" not in capsys.readouterr().err


def test_at_most_ten_reasons_are_told():
    report = SourceReport("a", "a.jsonl", records=400, malformed_records=400)
    for number in range(400):
        report.malformed.add(f"reason {number} " + "because " * 100, f"a.jsonl:{number}")
    told = str(report.malformed)
    assert told.count("1 reason ") == 10 and told.endswith("; and 390 more reasons")
    for line in report.lines():
        assert line.startswith("data a") or len(bounded(line)) < 2000
    with pytest.raises(errors.DataError, match=r"data\.max_malformed") as caught:
        report.check(_allows_nothing())
    assert len(str(caught.value)) < 2000
    assert DataReport([report]).to_dict()
    few = Faults()
    few.add("short", "a:1")
    assert str(few) == "1 short (a:1)"


def _allows_nothing():
    from raydpo.config import DataConfig

    return DataConfig(train=["a.jsonl"])


class TemplateError(Exception):
    """Named as the exception of a template's raise_exception."""


TEMPLATE = "{% if x %}{{ raise_exception('Only short messages, not: ' ~ text ~ ' as a ' ~ role) }}{% endif %}{{ a['name'] }}"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            TemplateError("Only short messages, not: my diary as a user"),
            "Only short messages, not: ... as a ... (TemplateError)",
        ),
        (TemplateError("my diary"), "TemplateError"),
        (KeyError("my secret diary"), "'...' (KeyError)"),
        (KeyError("name"), "'name' (KeyError)"),
        (TypeError("'dict object' has no attribute 'diary'"), "'dict object' has no attribute '...' (TypeError)"),
        (TypeError('can only join str (not "list") to str'), 'can only join str (not "list") to str (TypeError)'),
        (IndexError(""), "IndexError"),
        (ValueError("bad character in position 17"), "bad character in position N (ValueError)"),
    ],
)
def test_a_refusal_of_the_template_is_told_without_words_of_the_data(error, told):
    assert refusal(error, TEMPLATE) == told


def test_records_with_words_of_their_own_are_one_reason(tmp_path):
    import json

    from tiny import make_tokenizer

    from raydpo.config import DataConfig
    from raydpo.data.pairs import load_pairs
    from raydpo.data.tokenise import Tokeniser

    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ raise_exception('No room for ' ~ m['content']) }}{% endfor %}"
    path = tmp_path / "a.jsonl"
    with open(path, "w") as lines:
        for number in range(100):
            record = {
                "prompt": [{"role": "user", "content": f"diary {number} " + "of mine " * 30}],
                "chosen": "a",
                "rejected": "b",
            }
            record |= {side: [{"role": "assistant", "content": record[side]}] for side in ("chosen", "rejected")}
            lines.write(json.dumps(record) + "\n")
    with pytest.raises(errors.DataError) as caught:
        load_pairs(DataConfig(train=[str(path)]), Tokeniser(tokenizer))
    told = str(caught.value)
    assert "100 the chat template refuses it: No room for ... (TemplateError) (a.jsonl:1, " in told and "diary" not in told
    assert len(told) < 600


def test_lists_of_classes_and_hints_at_other_output_are_left_out():
    text = (
        "Unrecognized configuration class X for this kind of AutoModel: Y. Model type should be one of " + "AConfig, " * 400
    )
    assert reason(ValueError(text)) == "Unrecognized configuration class X for this kind of AutoModel: Y. (ValueError)"
    assert reason(RuntimeError("It failed. For details look at the above report!")) == "It failed. (RuntimeError)"
    assert reason(ValueError("")) == "no details (ValueError)" and len(reason(ValueError("word " * 900))) < 330


PROGRAM = """
import sys
from raydpo.terminal.console import Console
from raydpo.terminal.guard import guarded
from raydpo.errors import DataError

def act(console):
    print("print 氷")
    console.say("say 氷")
    console.warn("warn 氷")
    console.table("table 氷", ("", "value"), [("ß", "2")])
    with console.noise_to(sys.argv[1]):
        print("noise 氷")
        print("more noise 氷", file=sys.stderr)
        console.say("inside 氷")
    with console.progress("part 氷", 2, "things") as line:
        line.update(2)
    raise DataError("fault 氷")

import pathlib
sys.argv[1] = pathlib.Path(sys.argv[1])
sys.exit(guarded(act))
"""


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "latin-1"}]
)
def test_an_ascii_terminal_shows_escapes_and_the_log_is_utf_8(variables, tmp_path):
    log, script = tmp_path / "driver.log", tmp_path / "act.py"
    script.write_text(PROGRAM, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    done = subprocess.run([sys.executable, script, log], capture_output=True, env=environment | variables, timeout=60)
    assert done.returncode == 2, done.stderr
    out, err = done.stdout.decode("ascii", "replace"), done.stderr.decode("ascii")
    assert err == "error: fault \\u6c37\n"
    for line in ("print", "say", "warning: warn", "table", "inside", "  part"):
        assert f"{line} \\u6c37" in out, out
    if variables.get("PYTHONIOENCODING") != "latin-1":
        assert "\\xdf" in out and "+--" in out
    noise = log.read_text(encoding="utf-8")
    assert "noise 氷" in noise and "more noise 氷" in noise


def test_a_reader_that_ends_early_is_no_error(tmp_path):
    script = tmp_path / "act.py"
    script.write_text(
        "import sys\nfrom raydpo.terminal.guard import guarded\n"
        "sys.exit(guarded(lambda console: [print('x' * 99) for _ in range(9999)] and 0))\n"
    )
    command = f"{sys.executable} {script} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout == "x" * 99 + "\n"
    done = subprocess.run(f"{{ {command.replace('|', '2>&1; echo $? >&2; } |')}", shell=True, capture_output=True, text=True)
    assert done.stderr == "1\n" and done.stdout == "x" * 99 + "\n"


def test_a_pipe_that_breaks_elsewhere_is_an_error(capsys):
    def fail(console):
        raise BrokenPipeError(32, "Broken pipe: the socket of a worker")

    assert guarded(fail) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: unexpected BrokenPipeError: ") and "the socket of a worker" in told
    assert "traceback in" in told


@pytest.mark.parametrize(
    ("encoding", "error", "status"),
    [
        ("iso-8859-1", UnicodeEncodeError("latin-1", "氷", 0, 1, "ordinal not in range(256)"), 2),
        ("ascii", UnicodeDecodeError("ascii", b"\xc3", 0, 1, "ordinal not in range(128)"), 2),
        ("iso8859-15", UnicodeEncodeError("charmap", "氷", 0, 1, "character maps to <undefined>"), 2),
        ("ascii", UnicodeEncodeError("utf-8", "k\udcc3\udcb6ln", 1, 3, "surrogates not allowed"), 2),
        ("ascii", UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), 1),
        ("ascii", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 1),
        ("iso-8859-1", UnicodeEncodeError("idna", "x" * 80, 0, 64, "label too long"), 1),
        ("iso-8859-1", UnicodeDecodeError("made up", b"\xff", 0, 1, "no such codec"), 1),
        ("ascii", UnicodeError("label empty or too long"), 1),
        ("utf-8", UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), 1),
    ],
)
def test_only_errors_of_the_locales_codec_are_those_of_the_locale(encoding, error, status, capsys, monkeypatch):
    def fail(console):
        raise error

    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    assert guarded(fail) == status
    told = capsys.readouterr().err
    assert told.startswith("error: this locale (" if status == 2 else "error: unexpected Unicode") and "traceback in" in told


def test_a_name_that_the_locale_cannot_express_is_no_traceback(tmp_path):
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    variables |= {"LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "raydpo.cli", "cache", "ls", str(tmp_path / "köln").encode()]
    done = subprocess.run(command, capture_output=True, env=variables, timeout=60)
    assert done.returncode == 2 and b"set PYTHONUTF8=1" in done.stderr and done.stderr.count(b"\n") == 1, done.stderr


def test_only_what_is_required_is_named_as_required(capsys):
    from raydpo.cli.entry import main

    with pytest.raises(SystemExit):
        main(["run"])
    assert "the following arguments are required: CONFIG\n" in capsys.readouterr().err


def test_a_sample_prompt_is_whole_words_with_its_roles_apart():
    from tiny import make_tokenizer

    from raydpo.pipeline.train import _readable
    from raydpo.rundir.summary import _end, _figure

    tokenizer = make_tokenizer()
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why is the sky blue " * 20}]
    ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))["input_ids"]
    text = _readable(tokenizer, ids)
    assert text.startswith("system\nBe brief.\nuser\nwhy is") and text.endswith("\nassistant")
    words = _end(text).split()
    assert (
        words[0] == "..." and set(words[1:]) <= {"why", "is", "the", "sky", "blue", "assistant"} and len(_end(text)) <= 124
    )
    assert _figure(-0.0001) == "0.000" and _figure(-0.01) == "-0.010"

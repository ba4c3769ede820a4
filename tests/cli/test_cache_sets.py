"""The verbs of ``raydpo cache`` on tokenised sets."""

import io
import json
import os
import time
from argparse import ArgumentParser
from pathlib import Path

import pytest
from made_sets import IDENTITY, another, lines, make, rows_of

from raydpo.cli.cache import add_cache_verbs
from raydpo.errors import CacheError
from raydpo.reference.store import ReferenceCache
from raydpo.storage.files import Storage
from raydpo.terminal.console import Console
from raydpo.tokens import block, inspect
from raydpo.tokens.store import TokenSet


@pytest.fixture
def run(capsys):
    """Runs a verb in this process, and returns what it prints."""
    parser = ArgumentParser()
    add_cache_verbs(parser)

    def run(*arguments):
        args, out = parser.parse_args(list(map(str, arguments))), io.StringIO()
        args.act(args, Console(out))
        return json.loads(capsys.readouterr().out) if args.json else out.getvalue()

    return run


@pytest.fixture
def reference(tmp_path):
    """A reference with one part in the same cache."""
    import numpy as np

    from raydpo.reference.identity import ReferenceIdentity

    identity = ReferenceIdentity(weights="1" * 64, architecture="2" * 64, adapter=None, dtype="float32")
    cache = ReferenceCache(Storage(str(tmp_path)), identity)
    cache.prepare({"model": "some"})
    cache.commit([bytes(16)], [np.array([-1.0], np.float32)], {})
    return identity


def test_ls_and_show_beside_references(run, reference, tmp_path):
    make(tmp_path)
    TokenSet(Storage(str(tmp_path)), another(limit=5)).commit(lines(0), rows_of(4))
    table = run("ls", tmp_path)
    assert "tokenised sets" in table and "/data/a.jsonl" in table and IDENTITY.digest in table and "some" in table
    first, *sets = run("ls", tmp_path, "--json")
    assert (first["kind"], first["identity"], first["rows"]) == ("reference", reference.digest, 1)
    assert {one["identity"]: (one["rows"], one["complete"]) for one in sets} == {
        IDENTITY.digest: (30, True),
        another(limit=5).digest: (4, False),
    }
    assert all(one.keys() >= first.keys() and one["kind"] == "set" for one in sets)
    assert [one.digest for one in ReferenceCache.identities(Storage(str(tmp_path)))] == [reference.digest]
    shown = run("show", tmp_path, IDENTITY.digest[:6], "--json")
    assert shown["identity"]["path"] == "/data/a.jsonl" and shown["contents"]["records"] == 33 and shown["problems"] == []
    assert shown["contents"]["complete"] and shown["tokens_of_a_pair"]["longest_prompt_and_completion"] > 2
    assert "special tokens" in run("show", tmp_path, IDENTITY.digest) and "weights" in run("show", tmp_path)
    with pytest.raises(CacheError, match="holds 0 identities that begin with 'zz'"):
        run("show", tmp_path, "zz")


def test_a_cache_with_sets_and_no_reference(run, tmp_path):
    with pytest.raises(CacheError, match=r"there is no cache at .*, neither a reference nor a tokenised set"):
        run("ls", tmp_path)
    make(tmp_path)
    assert "holds no reference, only tokenised sets; 'raydpo score' makes one" in run("ls", tmp_path)
    assert run("show", tmp_path, "--json")["identity"]["digest"] == IDENTITY.digest
    assert "tokenised sets: 1 complete, 0 not, 3 sound block(s), 30 pairs" in run("verify", tmp_path)
    make(tmp_path, identity=another(limit=5))
    with pytest.raises(CacheError, match=r"holds 2 references and tokenised sets \(.*, .*\); choose one"):
        run("show", tmp_path)
    assert run("verify", tmp_path, "--json")["sets"]["pairs"] == 60
    assert run("gc", tmp_path, "--json")["files"] == []
    with pytest.raises(CacheError, match=r"holds no reference, only tokenised sets; 'raydpo score' makes one"):
        run("compact", tmp_path)
    with pytest.raises(CacheError, match=r"holds no reference; 'raydpo score' makes one"):
        run("compact", tmp_path / "nowhere")


DAMAGE = {"block": ("blocks", "is damaged: its"), "index": ("index", "is damaged: its"), "missing": (None, "is missing or")}


@pytest.mark.parametrize("what", DAMAGE)
def test_verify_reads_every_file(what, run, reference, tmp_path):
    make(tmp_path)
    assert "files: 1 sound part(s)" in run("verify", tmp_path)
    folder, told = DAMAGE[what]
    file = sorted((tmp_path / "sets" / IDENTITY.digest / (folder or "blocks")).iterdir())[1]
    if folder is None:
        file.unlink()
    else:
        stat, data = file.stat(), bytearray(file.read_bytes())
        data[300] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    out = io.StringIO()
    parser = ArgumentParser()
    add_cache_verbs(parser)
    args = parser.parse_args(["verify", str(tmp_path)])
    with pytest.raises(CacheError, match=r"1 file\(s\) of tokenised sets in .* are damaged and not used; the next command"):
        args.act(args, Console(out))
    assert told in " ".join(out.getvalue().split()) and IDENTITY.digest in out.getvalue()
    assert "files: 1 sound part(s)" in run("verify", tmp_path, reference.digest), "the reference alone"
    with pytest.raises(CacheError, match="are damaged"):
        run("verify", tmp_path, IDENTITY.digest)


def test_gc_lists_and_deletes_what_no_set_needs(run, reference, tmp_path, monkeypatch):
    tokens, _ = make(tmp_path)
    place = tmp_path / "sets" / IDENTITY.digest
    (place / "index" / "notes.txt").write_text("mine")
    tokens.blocks()
    tokens.set_aside()
    left = place / "blocks" / f".tmp-{os.uname().nodename}-999999999-{'0' * 32}"
    left.write_bytes(b"half")
    unfinished = TokenSet(Storage(str(tmp_path)), another(limit=5))
    unfinished.prepare()
    unfinished.commit(lines(0), rows_of(4))
    tokens.commit(lines(7), rows_of(3, 7))  # of a maker that cut the lines otherwise
    listed = {Path(one["path"]).name: one["reason"] for one in run("gc", tmp_path, "--json")["files"]}
    assert listed == {"notes.txt": "damaged or foreign, set aside", left.name: "left half-written"}
    now = time.time()
    monkeypatch.setattr(inspect, "now", lambda storage: now + 2 * 24 * 3600)
    reasons = [one["reason"] for one in run("gc", tmp_path, "--json")["files"]]
    assert reasons.count("not part of the complete set") == 2 and len(reasons) == 4
    monkeypatch.setattr(inspect, "now", lambda storage: now + 8 * 24 * 3600)
    reasons = [one["reason"] for one in run("gc", tmp_path, "--json")["files"]]
    assert reasons.count("of a set that was never completed") == 3 and len(reasons) == 7
    assert "7 file(s)" in run("gc", tmp_path, "--delete") and run("gc", tmp_path, "--json")["files"] == []
    assert TokenSet(Storage(str(tmp_path)), IDENTITY).complete() is not None
    assert [one["identity"] for one in run("ls", tmp_path, "--json")] == [reference.digest, IDENTITY.digest]


def test_gc_leaves_a_complete_set_whose_files_another_version_wrote(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(block, "FORMAT_VERSION", b"2")
        make(tmp_path)
    now = time.time()
    monkeypatch.setattr(inspect, "now", lambda storage: now + 8 * 24 * 3600)
    assert run("gc", tmp_path, "--json")["files"] == []

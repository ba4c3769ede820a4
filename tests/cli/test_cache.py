"""The verbs of ``raydpo cache`` as a user runs them, one after another on the same files."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from command import as_a_user, raydpo
from tiny import preferences, write_preferences


def answer(*arguments):
    result = raydpo(*arguments, "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama):
    """A cache in several parts, filled without Ray."""
    import io

    from raydpo.config import load_config
    from raydpo.pipeline.prepare import Prepared
    from raydpo.reference.score import Scorer
    from raydpo.reference.shards import Wanted, plan_shards, prompt_groups, read_groups
    from raydpo.terminal.console import Console

    place = tmp_path_factory.mktemp("cache-cli")
    write_preferences(place / "a.jsonl", preferences(30))
    tree = {
        "name": "run",
        "output": str(place / "runs"),
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(place / "a.jsonl"), "eval": {"fraction": 0.2}},
        "train": {"workers": 1, "pairs_per_step": 4, "steps": 2},
    }
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    prepared = Prepared.of(load_config(place / "config.yaml"), Console(io.StringIO()))
    prepared.cache.prepare({"model": str(tiny_llama)})
    scorer = Scorer(prepared.reference, device="cpu", tokens_per_batch=1000)
    wanted = Wanted(prepared.tables)
    for shard in plan_shards(wanted, 600):
        groups = read_groups(shard, wanted.source)
        scored = [values for group in scorer.score(prompt_groups(groups)) for values in group]
        prepared.cache.commit([one.key for group in groups for one in group], scored, scorer.provenance)
    return place


@pytest.fixture
def cache(place, tmp_path):
    return shutil.copytree(place / "runs" / "cache", tmp_path / "cache")


def parts(cache):
    return sorted(cache.glob("*/parts/*.parquet"))


def test_ls_and_show(place, cache):
    one, *sets = answer("cache", "ls", cache)
    assert [each["kind"] for each in (one, *sets)] == ["reference", "set"] and sets[0]["path"] == str(place / "a.jsonl")
    assert one["rows"] == 60 and one["parts"] == len(parts(cache)) > 3 and one["unverified_rows"] == 0
    assert one["age_seconds"] < 3600 and one["dtype"] == "float32"
    shown = answer("cache", "show", cache, one["identity"][:5])
    assert shown["contents"]["completions"] == 60 and shown["identity"]["digest"] == one["identity"]
    assert shown["made_by"]["provenance"][0]["layout"] and shown["contents"]["bytes_per_token"] > 0
    assert shown["logps_per_token"]["median"] < 0 < shown["tokens_of_a_completion"]["least"]
    text = raydpo("cache", "show", cache).stdout
    assert "weights" in text and "bytes per token" in text
    assert "model" in raydpo("cache", "ls", cache).stdout
    assert raydpo("cache", "ls", cache / "nowhere").returncode == 1


def test_verify_files_and_scores(place, cache):
    found = answer("cache", "verify", cache, "--config", place / "config.yaml", "--all")
    assert found["files"]["problems"] == [] and found["scores"]["checked"] == found["scores"]["stored"] == 60
    assert found["scores"]["passed"] and found["scores"]["quantiles"]["max"] < 1e-5 and found["scores"]["worst"]["name"]
    sample = raydpo("cache", "verify", cache, "--config", place / "config.yaml", "--sample", "10")
    assert sample.returncode == 0 and "10 of 60 stored" in sample.stdout and "worst: a:" in sample.stdout
    alone = raydpo("cache", "verify", cache)
    assert alone.returncode == 0 and "not checked" in alone.stdout


def test_verify_finds_damage_and_wrong_values(place, cache):
    from raydpo.reference.store import ReferenceCache

    file = parts(cache)[1]
    file.write_bytes(file.read_bytes()[:-40])
    result = raydpo("cache", "verify", cache)
    assert result.returncode == 1 and file.name in result.stdout and "raydpo score" in result.stderr
    # A row whose checksum is right and whose values are not: somebody stored another model's.
    opened = ReferenceCache.open(str(cache))
    key = opened.keys()[0].as_py()
    (row,) = opened.lookup([key])["logps"].to_pylist()
    for path in parts(cache):
        path.unlink()
    opened.commit([key], [np.array(row, np.float32) - 1], {})
    result = as_a_user("cache", "verify", cache, "--config", place / "config.yaml")
    assert result.returncode == 1 and "differs by 1 nats" in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1
    lenient = raydpo("cache", "verify", cache, "--config", place / "config.yaml", "--tolerance", "2")
    assert lenient.returncode == 0, lenient.stderr


def test_verify_of_another_model_names_what_differs(place, cache, tmp_path):
    from tiny import make_model

    other = make_model(tmp_path / "other", seed=5)
    result = raydpo("cache", "verify", cache, "--config", place / "config.yaml", f"model.path={other}")
    assert result.returncode == 1 and "weights:" in result.stderr and result.stderr.count("\n") == 1


def test_diff(place, cache, tmp_path):
    from raydpo.reference.store import ReferenceCache

    same = answer("cache", "diff", cache, place / "runs" / "cache")
    assert same["fields"] == {} and same["common"] == 60 and same["difference"]["most"] == 0
    opened = ReferenceCache.open(str(cache))
    other = ReferenceCache.open(str(tmp_path / "b"), dataclasses.replace(opened.identity, dtype="bfloat16"))
    keys = opened.keys().slice(0, 7)
    rows = opened.lookup(keys)["logps"].to_pylist()
    other.commit(keys.to_pylist(), [np.array(row, np.float32) - 0.25 for row in rows], {})
    found = answer("cache", "diff", cache, f"{tmp_path / 'b'}#{other.identity.digest[:8]}")
    assert found["fields"] == {"dtype": ["float32", "bfloat16"]} and found["completions"] == [60, 7] and found["common"] == 7
    assert found["difference"]["median"] == pytest.approx(0.25, abs=1e-6)
    assert "dtype" in raydpo("cache", "diff", cache, tmp_path / "b").stdout


def test_compact_then_gc(place, cache):
    many = len(parts(cache))
    assert "1 after" in raydpo("cache", "compact", cache).stdout
    assert len(parts(cache)) == many + 1
    assert answer("cache", "ls", cache)[0]["parts"] == 1
    listed = raydpo("cache", "gc", cache)
    assert f"{many} file(s)" in listed.stdout and "--delete" in listed.stdout and len(parts(cache)) == many + 1
    assert answer("cache", "gc", cache, "--delete")["deleted"] and len(parts(cache)) == 1
    assert answer("cache", "verify", cache, "--config", place / "config.yaml")["scores"]["passed"]


def exported(place, out, *overrides):
    assert answer("cache", "export", place / "config.yaml", out, *overrides)["pairs"] == pq.read_table(out).num_rows
    return pq.read_table(out)


def test_export_has_trls_columns(place, tmp_path):
    table = exported(place, tmp_path / "out.parquet", "data.eval=null")
    row = table.to_pylist()[3]
    assert row["ref_chosen_logps"] == pytest.approx(sum(row["ref_chosen_token_logps"]), abs=1e-4)
    assert len(row["ref_rejected_token_logps"]) == len(row["rejected_ids"]) and row["prompt"].startswith("Question:")
    assert row["pair_id"] == "a:4" and table.num_rows == 30


@pytest.mark.parametrize("means", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_import_counts_only_when_verified(place, tmp_path, means, on_cluster):
    """Sums of log-probs of these pairs under this model, as another trainer stores them."""
    records = [json.loads(line) for line in (place / "a.jsonl").read_text().splitlines()]
    table = exported(place, tmp_path / "out.parquet", "data.eval=null")
    rows = {row["pair_id"]: row for row in table.to_pylist()}
    for number, record in enumerate(records, 1):
        for side in ("chosen", "rejected"):
            tokens = len(rows[f"a:{number}"][f"{side}_ids"])
            record[f"ref_{side}_logps"] = rows[f"a:{number}"][f"ref_{side}_logps"] / (tokens if means else 1)
        record |= {"mine": -500.0, "theirs": -600.0}
    write_preferences(tmp_path / "with.jsonl", records)
    cache = tmp_path / "cache"
    run = [
        place / "config.yaml",
        f"data.train={[{'path': str(tmp_path / 'with.jsonl'), 'name': 'a'}]}",
        f"cache.uri={cache}",
        f"output={tmp_path / 'runs'}",
        "data.eval=null",
    ]
    assert answer("cache", "import", *run, "--chosen", "mine", "--rejected", "theirs")["contradicts"] == 0
    report = answer("cache", "import", *run, *(["--means"] if means else []))
    assert report["pairs"] == 30 and report["columns"] == ["ref_chosen_logps", "ref_rejected_logps"]
    assert report["contradicts"] == 60, "the wrong columns came first; the last ones answer"
    assert answer("cache", "ls", cache)[0]["unverified_rows"] == 120

    refused = raydpo("train", *run)
    assert refused.returncode == 1 and "not verified" in refused.stderr and "allow_unverified" in refused.stderr
    if means:
        told = raydpo("train", *run, "cache.allow_unverified=true", "name=unverified")
        assert told.returncode == 0 and "first loss 0.693147" in told.stdout, told.stdout + told.stderr
    verified = answer("cache", "verify", cache, "--config", *run)
    assert verified["promoted"] == 60 and verified["scores"]["sums_only"] == 60
    assert answer("cache", "ls", cache)[0]["unverified_rows"] == 0
    if means:
        return
    trained = raydpo("train", *run, "name=verified")
    assert trained.returncode == 0 and "first loss 0.693147" in trained.stdout, trained.stdout + trained.stderr


def test_wrong_imports_are_refused(place, tmp_path):
    records = [json.loads(line) for line in (place / "a.jsonl").read_text().splitlines()]
    run = [place / "config.yaml", f"data.train={tmp_path / 'with.jsonl'}", f"cache.uri={tmp_path / 'cache'}"]
    write_preferences(tmp_path / "with.jsonl", records)
    none = raydpo("cache", "import", *run)
    assert none.returncode == 2 and "ref_chosen_logps" in none.stderr and "columns present: " in none.stderr
    write_preferences(tmp_path / "with.jsonl", [record | {"mine": -30.0, "theirs": -40.0} for record in records])
    assert answer("cache", "import", *run, "--chosen", "mine", "--rejected", "theirs")["rows"] == 60
    wrong = raydpo("cache", "verify", tmp_path / "cache", "--config", *run[:2])
    assert wrong.returncode == 1 and "not of this model" in wrong.stderr
    assert len(list(tmp_path.glob("cache/*/unverified/*.parquet"))) == 1, "what did not pass stays unverified"
    write_preferences(tmp_path / "with.jsonl", [record | {"mine": 0.7, "theirs": -40.0} for record in records])
    positive = raydpo("cache", "import", *run, "--chosen", "mine", "--rejected", "theirs")
    assert positive.returncode == 2 and "log-probs are negative" in positive.stderr
    assert raydpo("cache", "import", *run, "--chosen", "mine").returncode == 2


def test_a_cache_that_may_only_be_read(place, cache):
    if os.getuid() == 0:
        pytest.skip("root may write anywhere")
    for directory in (cache, *cache.iterdir()):
        directory.chmod(0o555)
    assert raydpo("cache", "ls", cache).returncode == 0

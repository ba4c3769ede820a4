"""Two users run sweeps at the same time over one cache in a bucket."""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pyarrow.parquet as pq
import pytest
import yaml
from s3_server import s3_server
from tiny import preferences, write_preferences

from raydpo.reference.claims import Claims
from raydpo.reference.part import builder_of
from raydpo.reference.store import ReferenceCache

PAIRS = 400
SHARDS = 30
"""At least, of each user's pass."""


@pytest.mark.slow
def test_each_row_is_scored_once_but_for_what_is_in_hand_as_the_other_begins(tmp_path, tiny_llama):
    write_preferences(tmp_path / "a.jsonl", preferences(PAIRS, low=5, high=15))

    def start(user, betas):
        home = tmp_path / user
        home.mkdir()
        tree = {
            "name": f"{user}s-sweep",
            "output": str(home / "runs"),
            "cache": {"uri": s3.uri("shared")},
            "model": {"path": str(tiny_llama), "dtype": "float32"},
            "data": {"train": str(tmp_path / "a.jsonl"), "eval": {"fraction": 0.1}},
            "score": {"tokens_per_batch": 2048, "tokens_per_part": 600},
            "train": {"pairs_per_step": 8, "lr": 1e-3, "steps": 3, "tokens_per_batch": 512},
            "sweep": {"grid": {"train.beta": betas}},
        }
        (home / "config.yaml").write_text(yaml.safe_dump(tree))
        return subprocess.Popen(
            [sys.executable, "-m", "raydpo.cli", "sweep", "config.yaml"],
            cwd=home,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")},
        )

    with s3_server() as s3:
        s3.faults(slow=0.2)  # so that both are at it at the same time
        sweeps = {"ann": start("ann", [0.1, 0.3]), "bob": start("bob", [0.1, 0.5])}
        said = {user: sweep.communicate(timeout=500)[0] for user, sweep in sweeps.items()}
        assert [sweep.returncode for sweep in sweeps.values()] == [0, 0], said
        s3.faults(slow=0)
        cache = ReferenceCache.open(s3.uri("shared"))
        parts, wanted = cache.parts(), len(cache.keys())
        rows = Counter()
        for part in parts:
            rows[builder_of(part.name)] += part.rows
        print(
            f"{wanted} rows wanted, scored by builder {dict(rows)}, {len(parts)} parts of at most "
            f"{max(part.rows for part in parts)} rows"
        )
        assert len(rows) == 2 and len(parts) >= SHARDS and min(rows.values()) > 0.2 * wanted, said
        # Twice is what a user's one worker had in hand when the other began to look, a shard that it scored and one that it
        # stored, and no more: after that each leaves to the other what it has claimed.
        assert wanted <= sum(rows.values()) <= wanted + 2 * max(part.rows for part in parts), said
        assert Claims.names(cache) == [], "all claims are taken back"

    found = {user: json.loads((tmp_path / user / "runs" / f"{user}s-sweep" / "sweep.json").read_text()) for user in sweeps}
    assert found["ann"]["cache"]["identity"] == found["bob"]["cache"]["identity"]
    for user in sweeps:
        assert [trial["status"] for trial in found[user]["trials"]] == ["done", "done"]
        assert max(found[user]["cache"]["hit_rates"]) < 1.0, "neither found all of it when it began"
        hits, scored = re.search(r"cache: (\d+) of \d+ completions were there .*?, (\d+) scored", said[user]).groups()
        assert int(hits) + int(scored) < wanted and "another build filled the same cache" in said[user], said
    # The trial that both have sees the same reference values: the same pairs give the same losses.
    ann, bob = (
        pq.read_table(tmp_path / user / "runs" / f"{user}s-sweep" / "beta=0.1" / "metrics.parquet").to_pylist()
        for user in sweeps
    )
    for one, two in zip(ann, bob, strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert one[name] == pytest.approx(two[name], abs=1e-5)

"""Answers to score, a configuration to score them with, and reward functions that misbehave."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from raydpo.config.rewards import RewardConfig
from raydpo.rewards.apply import apply
from raydpo.rewards.task import ANSWERS
from raydpo.terminal.console import Console

MISBEHAVING = r"""
import asyncio, os, signal, subprocess, sys, time
from pathlib import Path

def value(kind):
    if kind == "raise": return 1 / 0
    if kind == "surrogate": raise OSError("no file \udcff")
    if kind == "exit": os._exit(3)
    if kind == "quit": sys.exit("no more")
    if kind == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "hang": time.sleep(600)
    if kind == "child":
        child = subprocess.Popen(["sleep", "600"])
        Path("child").write_text(str(child.pid))
        time.sleep(600)
    if kind == "fork":
        if os.fork() == 0: time.sleep(600)
        os._exit(4)
    if kind == "print": print("a line", flush=True); os.write(1, b"bytes"); os.write(2, b"bytes")
    if kind == "alarm":
        def rung(number, frame): raise TimeoutError("rang")
        signal.signal(signal.SIGALRM, rung); signal.setitimer(signal.ITIMER_REAL, 0.05); time.sleep(5)
    if kind == "leave an alarm": signal.signal(signal.SIGALRM, signal.SIG_DFL); signal.setitimer(signal.ITIMER_REAL, 0.2)
    if kind == "input": return float(len(sys.stdin.read()))
    odd = {"nan": float("nan"), "infinite": -float("inf"), "huge": -1e200, "text": "good", "none": None, "true": True}
    return odd.get(kind, 1.0)

def mine(completions, kind, **kwargs):
    return [value(each) for each in kind]

def short(completions, kind, **kwargs):
    return [1.0 for each in kind if each != "ok 3"] if len(kind) > 1 else [1.0]

def whole(completions, kind, **kwargs):
    returned = {"ok 0": "text", "ok 1": {}, "ok 2": None, "ok 3": 0.5, "ok 4": (each for each in [1.0]), "ok 5": []}
    return returned[kind[0]] if len(kind) == 1 else "text"

async def waiting(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [float(len(completion)) for completion in completions]

class Called:
    async def __call__(self, completions, **kwargs):
        return [2.0] * len(completions)

called = Called()

def state(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
    import numpy
    log_extra("twice", [2 * len(each) for each in completion_ids])
    log_extra("arrays", [numpy.float32(0.5), numpy.arange(2), numpy.array([numpy.nan]), numpy.int64(3), 1j][: len(prompts)])
    log_metric("mean", 1.0); log_metric("mean", 2.0)
    assert set(columns) == {"kind", "gold"}, columns
    return [trainer_state.global_step + 100 * trainer_state.round] * len(prompts)

def misaligned(completions, log_extra, **kwargs):
    log_extra("column", ["one"])
    return [1.0] * len(completions)

def strict(prompts, completions): return [1.0] * len(prompts)
def needs(completions, solution, **kwargs): return [1.0] * len(completions)
number = 3
"""


def answers_of(kinds: Sequence[str], n: int = 4, **columns: Any) -> pa.Table:
    """``n`` answers to each prompt, whose column ``kind`` says how a function of ``MISBEHAVING`` misbehaves."""
    rows = []
    for row, kind in enumerate(kinds):
        prompt = f"prompt {row // n}"
        rows.append(
            {
                "prompt_id": hashlib.blake2b(prompt.encode(), digest_size=16).digest(),
                "sample": row % n,
                "prompt": json.dumps(prompt),
                "completion": f"answer {row}",
                "completion_ids": list(range(row % 7 + 1)),
                "columns": json.dumps({"kind": kind, "prompt": "dropped", "completions": 1} | columns),
            }
        )
    return pa.Table.from_pylist(rows, ANSWERS)


def config_at(place: Path) -> Any:
    """What ``apply`` reads of a configuration: where the cache is."""
    return SimpleNamespace(cache_uri=str(place / "cache"))


def score(place: Path, answers: pa.Table, *rewards: dict[str, Any], **state: int) -> tuple[list[dict[str, Any]], str]:
    """The rows that ``apply`` returns with these rewards, and what it prints."""
    console = Console(io.StringIO())
    made = [RewardConfig.model_validate(each) for each in rewards]
    return apply(made, answers, config_at(place), console, **state).to_pylist(), console.stream.getvalue()

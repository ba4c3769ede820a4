"""TRL's own reward functions give the numbers that they give when TRL's GRPOTrainer calls them."""

from __future__ import annotations

import collections
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from answers import score

from raydpo.rewards.task import ANSWERS

THINKING = [
    "<think>\nx\n</think>\ny",
    "<think>x",
    "x",
    "<think>a<think>b</think>c",
    "a <think>x</think>",
    "<think></think>",
    "",
]
MATHEMATICS = [
    ("$\\boxed{\\frac{1}{2}}$", "$0.5$"),
    ("so it is \\boxed{3}", "$4$"),
    ("\\boxed{x^2}", "$x^2$"),
    ("no mathematics", "$1$"),
    ("\\boxed{2}", "words only"),  # not applicable
]
OWN = """
from trl.rewards import get_soft_overlong_punishment
overlong = get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=10)

def mixed(completions, solution, **kwargs):
    import numpy, torch
    kinds = [True, numpy.float32(0.5), torch.tensor(2), None, numpy.int64(3), 4, 0.25]
    return tuple(kinds[len(one) % 7] for one in solution)

async def later(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, solution):
    log_extra("same", solution)
    log_metric("one", 1.0)
    return numpy_array([trainer_state.global_step + len(ids) for ids in completion_ids])

def numpy_array(values):
    import numpy
    return numpy.array(values)
"""


def trl_rewards(functions, prompts, completions, ids, columns, state):
    """What GRPOTrainer computes: [answers, functions], NaN = not applicable."""
    import asyncio
    import threading

    from trl import GRPOTrainer

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    logs = collections.defaultdict(list)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu"), is_main_process=True),
        reward_funcs=functions,
        reward_processing_classes=[None] * len(functions),
        reward_func_names=[str(number) for number in range(len(functions))],
        state=state,
        environments=None,
        async_loop=loop,
        args=SimpleNamespace(report_to=[]),
        _log_completion_extra=lambda column, values: logs[column].extend(values),
        _log_metric=lambda name, value: logs[name].append(value),
    )
    inputs = [{"prompt": prompt, **row} for prompt, row in zip(prompts, columns, strict=True)]
    try:
        return GRPOTrainer._calculate_rewards.__wrapped__(trainer, inputs, prompts, completions, ids).numpy()
    finally:
        loop.call_soon_threadsafe(loop.stop)


@pytest.mark.parametrize("conversation", [True, False])
def test_the_numbers_of_trl(tmp_path, monkeypatch, conversation):
    import importlib

    from trl.rewards import accuracy_reward, think_format_reward

    (tmp_path / "own_of_trl.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_of_trl")
    functions = {
        "own_of_trl:overlong": own.overlong,
        "own_of_trl:mixed": own.mixed,
        "own_of_trl:later": own.later,
    }
    if conversation:  # these two read the content of messages only
        functions |= {"trl.rewards:think_format_reward": think_format_reward, "trl.rewards:accuracy_reward": accuracy_reward}
    made = [(text, "$1$") for text in THINKING] + MATHEMATICS
    texts, solutions = [text for text, _ in made], [gold for _, gold in made]
    prompts = [
        [{"role": "user", "content": f"q {row // 4}"}] if conversation else f"q {row // 4}" for row in range(len(made))
    ]
    completions = [[{"role": "assistant", "content": text}] if conversation else text for text in texts]
    ids = [list(range(3 * row)) for row in range(len(made))]
    columns = [{"solution": gold} for gold in solutions]
    state = SimpleNamespace(global_step=5)
    theirs = trl_rewards(list(functions.values()), prompts, completions, ids, columns, state)
    rows = [
        {
            "prompt_id": hashlib.blake2b(json.dumps(prompt).encode(), digest_size=16).digest(),
            "sample": row % 4,
            "prompt": json.dumps(prompt),
            "completion": texts[row],
            "completion_ids": ids[row],
            "columns": json.dumps(columns[row]),
        }
        for row, prompt in enumerate(prompts)
    ]
    weights = [0.5, 1.0, -0.25, 2.0, 3.0][: len(functions)]
    rewards = [{"use": use, "weight": weight} for use, weight in zip(functions, weights, strict=True)]
    scored, _ = score(tmp_path, pa.Table.from_pylist(rows, ANSWERS), *rewards, step=5)
    ours = np.array([[value for _, value in row["parts"]] for row in scored], float)
    np.testing.assert_array_equal(ours.astype(np.float32), theirs)
    assert not any(row["error"] for row in scored) and np.isnan(theirs).any()
    total = (torch.tensor(theirs) * torch.tensor(weights)).nansum(1)  # as GRPOTrainer does next
    np.testing.assert_allclose([row["reward"] for row in scored], total, rtol=1e-6)
    if conversation:
        assert theirs[:7, 3].tolist() == [1, 0, 0, 0, 0, 1, 0]
        assert theirs[7:, 4].tolist()[:4] == [1, 0, 1, 0] and np.isnan(theirs[11, 4])

"""Run and sweep directories as the real writers leave them, without a training: log-probs of pairs that drift as they do
under DPO go through the project's own losses, sums and records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydpo.config import load_config
from raydpo.losses import PairLogps, preference_loss
from raydpo.rundir.records import to_parquet
from raydpo.storage.files import Storage
from raydpo.training.metrics import PairSums

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> $x$ --> </script>"
PHASES = {
    "data": 0.004,
    "forward": 0.31,
    "backward": 0.55,
    "optimizer": 0.05,
    "checkpoint": 0.0,
    "evaluation": 0.0,
    "wait": 0.02,
    "other": 0.01,
}


def made_run(
    output: Path,
    name: str,
    *,
    beta: float | dict[str, Any] = 0.1,
    loss: Any = "sigmoid",
    lr: float = 5e-6,
    steps: int = 120,
    held_out: int = 200,
    sources: tuple[str, ...] = ("helpful",),
    finished: bool = True,
    evaluation: bool = False,
    seed: int = 0,
    prompt: str = "How do bees make honey?",
    data: dict[str, Any] | None = None,
) -> Path:
    """Make a run directory ``<output>/<name>``; ``held_out`` 0 = no held-out pairs. A beta schedule counts as its end.

    Args:
        data: further settings of section ``data``.
    """
    directory = output / name
    storage = Storage(str(directory))
    config = load_config(
        {
            "name": name,
            "output": str(output),
            "model": {"path": "HuggingFaceTB/SmolLM2-135M-Instruct"},
            "data": {
                "train": [{"path": f"org/{source}"} for source in sources],
                "eval": {"fraction": 0.1} if held_out else None,
            }
            | (data or {}),
            "train": {"beta": beta, "loss": loss, "lr": lr, "steps": steps, "sample_prompts": 1},
        }
    )
    storage.write("config.yaml", config.to_yaml().encode())
    beta = config.train.beta_at(steps, steps)
    random = np.random.default_rng(seed)
    rows = [_row(step, steps, beta, loss, lr, sources, 16, random) for step in range(1, steps + 1)]
    evals = (
        [
            {"step": step}
            | {
                f"eval_{key}": value
                for key, value in _metrics(step / steps, beta, loss, lr, sources, held_out, np.random.default_rng(7)).items()
            }
            for step in range(0, steps + 1, max(1, steps // 6))
        ]
        if held_out
        else []
    )
    storage.write("metrics.parquet", to_parquet(rows))
    if evals:
        storage.write("eval.parquet", to_parquet(evals))
    if finished:
        storage.write("summary.json", json.dumps(_summary(name, steps, rows, evals, held_out, prompt)).encode())
    if evaluation:
        storage.write("evaluation.json", json.dumps(made_evaluation(beta, prompt)).encode())
    return directory


def made_sweep(
    output: Path, betas: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0), *, measured: bool = False, steps: int = 60
) -> Path:
    """A sweep directory ``<output>/betas``: done trials, then one that waits and one that failed."""
    directory = output / "betas"
    runs = {f"beta{beta:g}": ({"train.beta": beta}, {"beta": beta}) for beta in betas}
    trials = made_trials(directory, runs, steps=steps)
    for trial in trials:
        trial["evaluation"] = made_evaluation(trial["settings"]["train.beta"]) if measured else None
    for name, status, error in (("beta3", "waiting", None), ("beta10", "failed", HOSTILE)):
        trials.append(
            {
                "name": name,
                "run_dir": str(directory / name),
                "settings": {"train.beta": float(name[4:])},
                "status": status,
                "error": error,
                "steps": 0,
                "seconds": 0.0,
                "eval": None,
                "evaluation": None,
            }
        )
    write_sweep(directory, trials)
    return directory


def made_trials(
    directory: Path, runs: dict[str, tuple[dict[str, Any], dict[str, Any]]], *, steps: int = 20, held_out: int = 400
) -> list[dict[str, Any]]:
    """Done trials as sweep.json has them, from names to (settings, what ``made_run`` is told)."""
    trials = []
    for name, (settings, told) in runs.items():
        run = made_run(directory, name, **{"steps": steps, "held_out": held_out} | told)
        summary = json.loads((run / "summary.json").read_text())
        trials.append(
            {
                "name": name,
                "run_dir": str(run),
                "settings": settings,
                "status": "done",
                "error": None,
                "steps": steps,
                "seconds": 61.5,
                "eval": summary["eval_after"],
                "evaluation": None,
            }
        )
    return trials


def write_sweep(directory: Path, trials: list[dict[str, Any]]) -> None:
    (directory / "sweep.json").write_text(
        json.dumps(
            {
                "raydpo": "0.1.0",
                "name": "betas",
                "metric": "eval_rewards/accuracies",
                "parameters": list(dict.fromkeys(key for trial in trials for key in trial["settings"])),
                "cache": {
                    "uri": "runs/cache",
                    "identity": "14dd257b16e65da53154083de8df6305",
                    "hit_rates": [1.0] * len(trials),
                },
                "trials": trials,
            }
        )
    )


def made_evaluation(beta: float = 0.1, prompt: str = "How do bees make honey?") -> dict[str, Any]:
    """What evaluation.json holds."""

    def within(value: float, spread: float) -> dict[str, float]:
        return {"value": value, "low": value - spread, "high": value + spread}

    def preferences(pairs: int, accuracy: float) -> dict[str, Any]:
        spread = 1.96 * (accuracy * (1 - accuracy) / pairs) ** 0.5
        bins = [
            {
                "from": edge / 20,
                "to": edge / 20 + 0.05,
                "pairs": 0,
                "predicted": None,
                "observed": None,
                "low": None,
                "high": None,
            }
            if edge == 19
            else {
                "from": edge / 20,
                "to": edge / 20 + 0.05,
                "pairs": 20,
                "predicted": edge / 20 + 0.02,
                "observed": edge / 20,
                "low": edge / 20 - 0.2,
                "high": min(1.0, edge / 20 + 0.15),
            }
            for edge in range(10, 20)
        ]
        return {
            "pairs": pairs,
            "accuracy": within(accuracy, spread),
            "margin": within(0.9, 0.1),
            "loss": 0.52,
            "log_likelihood_accuracy": within(0.61, spread),
            "calibration_error": 0.061,
            "calibration": bins,
            "calibration_chance": 0.048,
            "longer_is_wrong": {"pairs": pairs // 2, "accuracy": within(accuracy - 0.1, spread)},
            "longer_is_right": {"pairs": pairs - pairs // 2, "accuracy": within(accuracy + 0.1, spread)},
            "chosen_fell": within(0.62, spread),
        }

    answers = {"repetition": 0.04, "distinct_1": 0.41, "distinct_2": 0.8, "cut": 0.07}
    generation = {
        "prompts": 64,
        "max_tokens": 256,
        "modes": {
            mode: {
                "policy": {"tokens": within(142, 9)} | answers,
                "reference": {"tokens": within(118, 8)} | answers,
                "length_growth": within(0.06 / beta**0.5, 0.02),
            }
            for mode in ("greedy", "sampled")
        },
    }
    return {
        "raydpo": "0.1.0",
        "policy": "final",
        "data": ["helpful"],
        "beta": beta,
        "held_out": True,
        "trained_on": 0,
        "rewards": "sum",
        "reward_of": "log-ratios",
        "reference": {"path": "HuggingFaceTB/SmolLM2-135M-Instruct", "adapter": None, "identity": "14dd257b16e65da5"},
        "preferences": {
            "total": preferences(400, 0.74),
            "by_source": {"helpful": preferences(250, 0.77), "harmless": preferences(150, 0.69)},
            "by_length": [
                {"from": low, "to": high} | preferences(100, accuracy)
                for low, high, accuracy in ((None, -50, 0.6), (-49, 0, 0.7), (1, 50, 0.78), (51, None, 0.86))
            ],
        },
        "generation": generation,
        "drift": {
            "kl": within(0.9 / beta**0.5, 0.2),
            "kl_per_token": within(0.008 / beta**0.5, 0.002),
            "samples": 256,
            "std_error": 0.1,
        },
        "wins": [
            {
                "judge": "reward model",
                "mode": "sampled",
                "win_rate": within(0.63, 0.06),
                "equal_length": within(0.55, 0.07),
                "wins": 150,
                "ties": 14,
                "losses": 92,
                "not_judged": 0,
            }
        ],
        "samples": [{"prompt": prompt, "policy": "Bees collect nectar.", "reference": "Bees make honey."}],
    }


def _metrics(
    progress: float, beta: float, loss: str, lr: float, sources: tuple[str, ...], pairs: int, random: np.random.Generator
) -> dict[str, float]:
    """Metrics of ``pairs`` pairs part-way through training. Smaller beta and larger rate drift further."""
    reach = (1 - np.exp(-3 * progress)) * min(1.0, lr / 5e-6) / beta**0.6
    spread = (0.6 + 0.02 * reach**2) * (1 - np.exp(-9 * progress))
    tokens = random.integers(20, 200, (2, pairs)).astype(float)
    quality = random.normal(0.55, 1.0, pairs)
    noise = random.normal(0, 1.0, (2, pairs))
    reference = -1.4 * tokens + random.normal(0, 8, (2, pairs))
    length = 0.002 * (tokens[0] - tokens[1])
    moved = reach * np.stack([0.2 * quality + length - 0.2, -0.3 * quality - length - 0.4]) + spread * noise
    chosen, rejected = reference + moved
    logps = PairLogps(*(torch.from_numpy(np.asarray(each)) for each in (chosen, rejected, *reference, *tokens)))
    sums = PairSums(sources, torch.device("cpu"))
    sums.add(preference_loss(loss, logps, beta=beta), logps, torch.arange(pairs) % len(sources))
    return sums.metrics()


def _row(
    step: int,
    steps: int,
    beta: float,
    loss: str,
    lr: float,
    sources: tuple[str, ...],
    pairs: int,
    random: np.random.Generator,
) -> dict[str, float]:
    times = {name: seconds * random.uniform(0.9, 1.2) for name, seconds in PHASES.items()}
    times["checkpoint"] = 0.4 if step % 20 == 1 else 0.0
    times["evaluation"] = 2.1 if step % max(1, steps // 6) == 1 else 0.0
    seconds = sum(times.values()) - times["checkpoint"] - times["evaluation"]
    return (
        {"step": step}
        | _metrics(step / steps, beta, loss, lr, sources, pairs, random)
        | {
            "grad_norm": float(random.lognormal(0.5, 0.4)),
            "learning_rate": lr * min(1.0, 10 * step / steps) * (1 - step / (steps + 1)),
            "epoch": step / steps,
            "pairs": float(pairs),
            "tokens": 5000.0,
            "seconds": seconds,
            "tokens_per_second": 5000 / seconds,
            "pairs_per_second": pairs / seconds,
            "peak_memory_bytes": 3.1e9,
            "skipped": 0.0,
        }
        | {f"time/{name}": value for name, value in times.items()}
        | {"time/step": sum(times.values()), "slowest_rank": 1.0, "slowest_lag": 0.02}
    )


def _summary(
    name: str, steps: int, rows: list[dict[str, float]], evals: list[dict[str, float]], held_out: int, prompt: str
) -> dict[str, Any]:
    seconds = sum(row["time/step"] for row in rows)
    return {
        "name": name,
        "run_dir": name,
        "raydpo": "0.1.0",
        "steps": steps,
        "pairs_seen": 16 * steps,
        "train_seconds": seconds,
        "checkpoint_seconds": sum(row["time/checkpoint"] for row in rows),
        "checkpoint_bytes": 5_400_000,
        "skipped_steps": 0,
        "tokens_per_second": 5000 * steps / seconds,
        "gate": "step-0 gate: 32 pairs scored again, cached and live log-probs differ by 9e-07 nats a token on "
        "average, 1.5e-05 at most (pair helpful:190); loss 0.693147",
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
        "training_pairs": 1600,
        "held_out_pairs": held_out,
        "eval_before": evals[0] if evals else None,
        "eval_after": evals[-1] if evals else None,
        "reference": {
            "path": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "adapter": None,
            "identity": "14dd257b16e65da53154083de8df6305",
            "cache": "runs/cache",
        },
        "cache_hit_rate": 1.0,
        "samples": [
            {
                "prompt": prompt,
                "before": 'Bees make honey using a process called "honey production."',
                "after": "Bees collect nectar from flowers and other sources to make honey.",
            }
        ],
    }

"""Model card of a trained policy: base model, reference, settings and measured metrics."""

from __future__ import annotations

from typing import Any

import yaml

from raydpo.config import Config, RoundsConfig, is_hub_name, reward_name
from raydpo.config.counting import EVERYTHING, counting_texts
from raydpo.rundir.summary import EVALUATION_TABLE
from raydpo.storage.uri import redact

__all__ = ["model_card"]

FIXED = (
    "Preference tuning on a fixed set of pairs takes over that set's biases, favours length where the set does, and does "
    "not explore beyond it; the figures above are of pairs of the same origin."
)
ON_POLICY = (
    "The pairs are answers of the model itself, chosen by the reward functions above. Training on them strengthens whatever "
    "these functions pay for, also where they are wrong, and makes answers more alike."
)


def model_card(config: Config, summary: dict[str, Any]) -> str:
    """README.md of ``final/``, with the front matter that the Hugging Face hub reads.

    Args:
        summary: what summary.json holds.
    """
    adapts = config.model.adapts
    front: dict[str, Any] = {
        "library_name": "peft" if adapts else "transformers",
        "tags": ["dpo", "raydpo"],
        "pipeline_tag": "text-generation",
    }
    if is_hub_name(config.model.path):
        front["base_model"] = config.model.path
    train, reference, unit = config.train, summary["reference"], summary.get("unit", "pairs")
    method = "direct preference optimization (arXiv 2305.18290)" if train.loss == "sigmoid" else "preference optimization"
    start = _named(config.model.path, config)
    if config.model.adapter:
        start += f" with adapter {_named(config.model.adapter, config)}"
    name = summary.get("name", config.run_name)
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {name}", ""]
    lines += [f"Trained from {start} by {method} with raydpo {summary['raydpo']}.", "", "| | |", "|---|---|"]
    how = (
        "the adapter that it began with"
        if config.model.adapter
        else f"LoRA, r {config.model.lora.r}, alpha {config.model.lora.alpha:g}"
        if config.model.lora
        else "all weights"
    )
    data = ", ".join(f"`{_last(source.path)}`" for source in config.data.train or config.rounds.prompts)
    compared = reference["path"] and f"{_named(reference['path'], config)}, identity `{reference['identity']}`"
    counted, _ = counting_texts(config.model_dump(mode="json", include={"data"})["data"])
    rows = [
        ("what trained", how),
        ("quantization of frozen weights", config.model.quantization or "none"),
        *([] if counted == EVERYTHING else [("tokens that count", counted)]),
        ("loss", train.loss_text),
        ("beta", train.beta_text),
        ("label smoothing", f"{train.label_smoothing:g}"),
        *((name.replace("_", " "), str(value)) for name, value in train.shaped().items()),
        ("learning rate", f"{train.lr:g}, {train.schedule}"),
        ("steps", f"{summary['steps']:,}"),
        (f"{unit} a step", f"{train.pairs_per_step:,}"),
        (f"{unit} seen", f"{summary['pairs_seen']:,}"),
        ("seed", f"{train.seed}"),
        ("data", f"{'answers to prompts of ' if config.rounds else ''}{data}, {summary['training_pairs']:,} {unit}"),
        *([("rewards", _rewards(config.rounds))] if config.rounds else []),
        ("reference", compared or "none"),
        ("step-0 gate", (summary["gate"] or "not run").removeprefix("step-0 gate: ")),
    ]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows]
    before, after = summary["eval_before"], summary["eval_after"]
    if before and after:
        lines += ["", f"## Held-out {unit} ({summary['held_out_pairs']:,})", "", "| | before | after |", "|---|---|---|"]
        lines += [
            f"| {label} | {before[key]:.3f} | {after[key]:.3f} |"
            for key, label in EVALUATION_TABLE
            if key in after and key in before
        ]
    lines += ["", ON_POLICY if config.rounds else FIXED, ""]
    return "\n".join(lines)


def _rounds_of(config: Config) -> str:
    """Directory of the rounds to which a training belongs."""
    return config.output.rstrip("/").rpartition("/")[0]


def _named(path: str, config: Config) -> str:
    """The name of a model in the card: of the policy of an earlier round, that round."""
    begin = f"{_rounds_of(config)}/"
    if config.rounds and path.startswith(f"{begin}round-"):
        return f"the policy of `{path.removeprefix(begin).partition('/')[0]}`"
    return f"`{_last(path)}`"


def _rewards(rounds: RoundsConfig) -> str:
    return ", ".join(f"{reward_name(reward)} (weight {reward.weight:g})" for reward in rounds.rewards)


def _last(path: str) -> str:
    """A hub name unchanged; the last part of a local path or URI, since the rest describes a machine."""
    return path if is_hub_name(path) else redact(path).rstrip("/").rsplit("/", 1)[-1]


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")

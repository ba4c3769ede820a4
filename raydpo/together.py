"""Several settings of one LoRA training, trained together over one copy of the model: ``train`` for a list of runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from raydpo.config import Config
from raydpo.config.uri import redact
from raydpo.console import Console, ProgressLine
from raydpo.errors import ConfigError, RaydpoError
from raydpo.pipeline import Prepared, Shared, begin_run, end_run, finished_before, join_sets, report_on, training_job
from raydpo.ray_runtime import resources_for, session
from raydpo.training.earlier import leaves
from raydpo.training.launch_together import launch_together

__all__ = ["check_together", "train_prepared_together", "train_together"]

SHARED_SECTIONS = ("model", "reference", "data", "cache", "score", "ray")
SHARED_KEYS = ("workers", "gpus_per_worker", "pairs_per_step", "tokens_per_batch", "epochs", "steps",
               "gradient_checkpointing", "offload_activations", "max_failures", "max_preemptions", "collective_timeout")
"""Of section ``train``, beside the seed where it decides the order of pairs. All else may differ from setting to setting."""


def train_together(configs: Sequence[Config], console: Console | None = None) -> list[dict[str, Any] | RaydpoError]:
    """Train against the stored log-probs, all settings in one process over one copy of the model.

    Each leaves the run directory that ``train`` would leave, with equal results up to rounding (1e-5). Continues where
    interrupted runs of the same names stopped, together or alone.

    Returns:
        In the order of ``configs`` what summary.json holds, or why that setting could not come to its end.

    Raises:
        ConfigError: if the settings cannot be trained together, with the keys and values that differ.
        CacheMissError: if log-probs are missing; ``score`` fills them.
        RaydpoError: what ended all of them.
        KeyboardInterrupt: if someone stopped it; there are checkpoints then.
    """
    console = console or Console()
    check_together(configs)
    with session(configs[0]):
        first = Prepared.of(configs[0], console)
        return train_prepared_together([dataclasses.replace(first, config=config) for config in configs], console)


def train_prepared_together(prepared: Sequence[Prepared], console: Console, hit_rate: float | None = None, *,
                            shared: Shared | None = None) -> list[dict[str, Any] | RaydpoError | None]:
    """``train_together`` for runs whose data are prepared, on a Ray that is there; None for those that pause where
    ``shared`` wants them to.

    Args:
        hit_rate: share of the completions that the cache held when they began, where that is known.
        shared: its display hears (kind, (name, content)).
    """
    check_together([one.config for one in prepared])
    results: list[Any] = [finished_before(one, console) for one in prepared]
    todo = [number for number, result in enumerate(results) if result is None]
    if not todo:
        return results
    joined = join_sets(prepared[0], console) if shared is None else shared.joined
    resources = resources_for("train", prepared[0].config)
    until = None if shared is None else shared.until
    jobs = [training_job(prepared[number], resources, until) for number in todo]
    configs = [prepared[number].config for number in todo]
    for number, job in zip(todo, jobs, strict=True):
        begin_run(prepared[number], job, console)
    with _Display(console, [config.run_name for config in configs]) if shared is None else shared.display as display:
        trained = launch_together(jobs, [(config.run_dir, config.run_name, config.track) for config in configs],
                                  joined.pairs, joined.held_out, resources, base_name=prepared[0].base_name,
                                  tokenizer=prepared[0].tokeniser.tokenizer, listener=display.listen,
                                  board=None if shared is None else shared.board)
    stopped = False
    for number, job, result in zip(todo, jobs, trained, strict=True):
        name = prepared[number].config.run_name
        if isinstance(result, RaydpoError):
            console.warn(f"{name} could not come to its end: {result}")
            results[number] = result
        elif result["interrupted"] and result["steps"] != until:
            stopped = True
            place = redact(prepared[number].config.run_dir)
            console.say(f"{name} stopped after step {result['steps']:,}; its checkpoint is in {place}")
        elif not result["interrupted"]:
            results[number] = end_run(prepared[number], job, result, hit_rate, joined.training_pairs)
            report_on(prepared[number].config.run_dir, console)
            console.say(f"{name}: {result['steps']:,} steps, last loss {results[number]['last_loss']:.6f}")
    if stopped:
        raise KeyboardInterrupt
    return results


def check_together(configs: Sequence[Config]) -> None:
    """Raises ConfigError if these settings cannot share a process: what must be equal and is not, by key, or what cannot be
    done for any of them."""
    if not configs:
        raise ConfigError("there is no setting to train; give at least one configuration")
    for config in configs:
        train = config.train
        refused = [
            (not config.model.adapts, "model.lora is null", "settings share a model that does not train; set model.lora"),
            (config.model.lora is not None and config.model.lora.dora, "model.lora.dora is true",
             "only plain LoRA is computed for several settings at once; set it to false"),
            (train.zero == 3, "train.zero is 3", "the model is held whole by each worker; set it to 2"),
            (train.sequence_parallel > 1, f"train.sequence_parallel is {train.sequence_parallel}", "set it to 1"),
            (train.offload_optimizer is not None, f"train.offload_optimizer is {train.offload_optimizer}",
             "adapters' moments stay on the device; set it to null"),
            (config.track.wandb is not None, "track.wandb is set",
             "it keeps one run a process; set it to null, and track.mlflow in its place"),
        ]
        for wrong, what, why in refused:
            if wrong:
                raise ConfigError(f"{config.run_name} cannot be trained together with others: {what}; {why}")
    first, *others = configs
    ours = _shared(first)
    for other in others:
        theirs = _shared(other)
        differ = [f"{key}: {ours.get(key)!r} and {theirs.get(key)!r}" for key in sorted({*ours, *theirs})
                  if ours.get(key) != theirs.get(key)]
        if differ:
            raise ConfigError(f"{first.run_name} and {other.run_name} cannot be trained together: {'; '.join(differ)}. Make "
                              "them equal, or train them one by one; beta, loss and its settings, lr, schedule, warmup, "
                              "weight_decay, clip and optimizer may differ")
    places = [config.run_dir for config in configs]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise ConfigError(f"two settings have the same run directory {redact(twice)}; give each its own name (name=...)")


def _shared(config: Config) -> dict[str, Any]:
    """What must be equal, by key."""
    # The order of pairs is the seed's, unless they come as they lie in their files.
    keys = {*SHARED_KEYS} | ({"seed"} if config.data.shuffle else set())
    tree = config.model_dump(mode="json", include=dict.fromkeys(SHARED_SECTIONS, True) | {"train": keys})
    tree["cache"]["uri"] = config.cache_uri
    tree["train"]["loss (needs a reference)"] = config.train.needs_reference
    return leaves(tree)


class _Display:
    """Turns what several settings tell at once into one progress line, and lines with their names."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console = console
        self._done = dict.fromkeys(names, 0)
        self._losses: dict[str, float] = {}
        self._said: set[str] = set()
        self._bar = contextlib.ExitStack()
        self._line: ProgressLine | None = None
        self._total = 0

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def listen(self, kind: str, content: Any) -> None:
        """One event: see ``training.launch_together``. What the board says by itself carries no name."""
        name, content = content if isinstance(content, tuple) else ("", content)
        getattr(self, f"_{kind}")(name, content)

    def _begin(self, name: str, facts: dict[str, Any]) -> None:
        self._done[name], self._total = facts["first_step"], facts["total_steps"]
        after = f" after step {facts['first_step']}" if facts["first_step"] else ""
        self._say(f"training{after}: {facts['pairs']:,} pairs, {self._total:,} steps ({facts['steps_per_epoch']:,} an "
                  f"epoch), {facts['world_size']} worker(s), {len(self._done)} settings together")

    def _step(self, name: str, row: dict[str, float]) -> None:
        self._done[name], self._losses[name] = int(row["step"]), row["loss"]
        if self._line is None:  # from the first step on: gate and first evaluation would spoil the rate
            self._line = self._bar.enter_context(
                self.console.progress("training", self._total, "steps", done=min(self._done.values())))
        self._line.update(min(self._done.values()), "losses " + " ".join(f"{loss:.4f}" for loss in self._losses.values()))

    def _evaluated(self, name: str, row: dict[str, float]) -> None:
        self.console.say(f"  {name}, held out, step {int(row['step'])}: loss {row['eval_loss']:.4f}, accuracy "
                         f"{row['eval_rewards/accuracies']:.3f}, margin {row['eval_rewards/margins']:.3f}")

    def _note(self, name: str, line: str) -> None:
        if line.startswith("warning: ") and name:
            self.console.warn(f"{name}: {line.removeprefix('warning: ')}")
        else:
            self._say(line)

    def _say(self, line: str) -> None:
        """What all settings say in the same words, once."""
        if line not in self._said:
            self._said.add(line)
            self.console.note(line)

"""Trackers of metrics: Weights & Biases, MLflow, Prometheus through Ray. A tracker that fails is left out with a warning."""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from raydpo.config.track import MlflowConfig, TrackConfig, WandbConfig
from raydpo.errors import one_line
from raydpo.storage.files import Storage

__all__ = ["GAUGES", "Gauges", "Trackers", "export_pass"]

T = TypeVar("T")
GAUGES = (
    *("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected"),
    *("logps/chosen", "logps/rejected", "grad_norm", "learning_rate", "skipped"),
    *("tokens_per_second", "pairs_per_second", "peak_memory_bytes", "slowest_rank", "slowest_lag"),
    *("cache_hits", "score_tokens_per_second"),
    *("time/data", "time/forward", "time/backward", "time/optimizer", "time/checkpoint", "time/evaluation"),
    *("time/wait", "time/other", "time/step"),
)
"""Metrics of a step or of the reference pass that become gauges, named ``raydpo_<name>`` with ``_`` for ``/``. Metrics of
evaluations all do."""


class WandbTracker:
    """Weights & Biases. A restart continues the same run, whose id is a hash of the run directory."""

    def __init__(self, config: WandbConfig, run: str, run_dir: str, settings: Mapping[str, Any]) -> None:
        import wandb

        local = Storage(run_dir)
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            name=run,
            id=_run_id(run_dir),
            resume="allow",
            config=dict(settings),
            dir=local.path() if local.is_local else None,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log(dict(row) | {"step": step})

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """MLflow. A restart continues the same run, found by a tag with a hash of the run directory."""

    def __init__(self, config: MlflowConfig, run: str, run_dir: str, settings: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            storage = Storage(run_dir)
            uri = storage.path() if storage.is_local else "."
        if "://" not in uri:
            Path(uri).mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{Path(uri).absolute()}/mlflow.db"
        self._client = MlflowClient(uri)
        experiment = self._client.get_experiment_by_name(config.experiment)
        number = self._client.create_experiment(config.experiment) if experiment is None else experiment.experiment_id
        tag = _run_id(run_dir)
        found = self._client.search_runs([number], f"tags.raydpo_run = '{tag}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(number, run_name=run, tags={"raydpo_run": tag}).info.run_id
            for name, value in settings.items():
                # MLflow accepts no other characters in a name.
                self._client.log_param(self._run, re.sub(r"[^\w./: -]", "", name), str(value)[:500])

    def log(self, step: int, row: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run, [Metric(name, float(value), now, step) for name, value in row.items() if math.isfinite(value)]
        )

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Gauges:
    """Ray's gauges, which every Ray node serves to Prometheus on its metrics port.

    Args:
        asked: whether the configuration names ``track.prometheus``. Only then is a Ray that cannot serve them an error.
    """

    def __init__(self, run: str, *, asked: bool) -> None:
        if asked:
            import prometheus_client  # noqa: F401 - without it Ray serves no metrics, silently

        self._run, self._began = run, time.time()
        self._gauges: dict[str, Any] = {}

    def log(self, step: int, row: Mapping[str, float]) -> None:
        from ray.util.metrics import Gauge

        shown = {name: value for name, value in row.items() if name in GAUGES or name.startswith("eval_")}
        if step:  # a restart of the workers changes the time of their start
            shown |= {"step": float(step), "began_seconds": self._began}
        for name, value in shown.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(
                    "raydpo_" + "".join(c if c.isalnum() else "_" for c in name),
                    description=f"raydpo: {name} of the newest step",
                    tag_keys=("run",),
                )
            self._gauges[name].set(value, tags={"run": self._run})

    def close(self) -> None:
        pass


_Tracker = WandbTracker | MlflowTracker | Gauges


class Trackers:
    """All configured trackers.

    Args:
        settings: shown as the run's configuration.
        warn: called once for each tracker that fails; the tracker is left out from then on.
    """

    def __init__(
        self, config: TrackConfig, run: str, run_dir: str, settings: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        self._warn = warn
        makers: dict[str, Callable[[], _Tracker]] = {
            "wandb": lambda: WandbTracker(config.wandb, run, run_dir, settings),
            "mlflow": lambda: MlflowTracker(config.mlflow, run, run_dir, settings),
            "prometheus": lambda: Gauges(run, asked="prometheus" in config.model_fields_set),
        }
        self._trackers: dict[str, _Tracker] = {}
        for name, make in makers.items():
            if getattr(config, name) and (made := self._try(name, make)) is not None:
                self._trackers[name] = made

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Send the metrics of a step or an evaluation to all trackers."""
        row = {name: value for name, value in row.items() if name != "step"}
        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.log(step, row))

    def close(self) -> None:
        """Close all trackers."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.close)

    def _try(self, name: str, act: Callable[[], T]) -> T | None:
        try:
            return act()
        except Exception as error:  # trackers may raise anything, and must not end the run
            self._trackers.pop(name, None)
            why = f"{type(error).__name__}: {one_line(error, 300)}"
            if isinstance(error, ModuleNotFoundError):
                extra = "cluster" if name == "prometheus" else "track"
                why = f"the package {error.name!r} is missing; pip install 'raydpo[{extra}]'"
            self._warn(f"warning: track.{name} is left out from here on: {why}. metrics.parquet has everything")
            return None


def export_pass(
    config: TrackConfig, run: str, hit_rate: float, tokens_per_second: float, warn: Callable[[str], None]
) -> None:
    """Set the gauges of the reference pass. The driver serves them until it ends.

    Args:
        hit_rate: share of the completions that were already cached.
        tokens_per_second: rate of scoring the others; 0 if there were none.
    """
    only = config.model_copy(update={"wandb": None, "mlflow": None})
    Trackers(only, run, "", {}, warn).log(0, {"cache_hits": hit_rate, "score_tokens_per_second": tokens_per_second})


def _run_id(run_dir: str) -> str:
    return hashlib.sha256(run_dir.encode()).hexdigest()[:16]

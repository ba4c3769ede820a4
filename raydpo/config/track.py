"""Section ``track``: where metrics go beside the run directory's own Parquet and TensorBoard files."""

from __future__ import annotations

from typing import Literal

from raydpo.config.section import PathOrUri, Section

__all__ = ["MlflowConfig", "TrackConfig", "WandbConfig"]


class WandbConfig(Section):
    """Weights & Biases. The API key comes from $WANDB_API_KEY or ~/.netrc, never from here."""

    project: str = "raydpo"
    """Project."""
    entity: str | None = None
    """User or team; null = the key's own."""
    mode: Literal["online", "offline"] = "online"
    """offline = into <run directory>/wandb, for 'wandb sync' later."""


class MlflowConfig(Section):
    """MLflow."""

    uri: PathOrUri | None = None
    """Tracking server, or a directory for a database of its own; null = $MLFLOW_TRACKING_URI, else
    <run directory>/mlflow.db."""
    experiment: str = "raydpo"
    """Experiment."""


class TrackConfig(Section):
    """Trackers, off unless asked for. A tracker that fails costs a warning, never the run."""

    wandb: WandbConfig | None = None
    """Weights & Biases, for example {project: mine}; null = off."""
    mlflow: MlflowConfig | None = None
    """MLflow; null = off."""
    prometheus: bool = True
    """Gauges on Ray's metrics port, which a Ray with its dashboard's packages has (raydpo[cluster]); cluster/grafana.json
    shows them."""

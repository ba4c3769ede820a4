"""Section ``track``: trackers that receive metrics, besides the Parquet and TensorBoard files of the run directory."""

from __future__ import annotations

from typing import Literal

from raydpo.config.section import PathOrUri, Section

__all__ = ["MlflowConfig", "TrackConfig", "WandbConfig"]


class WandbConfig(Section):
    """Weights & Biases. The API key is read from $WANDB_API_KEY or ~/.netrc."""

    project: str = "raydpo"
    """Name of the project."""
    entity: str | None = None
    """User or team; null = the owner of the API key."""
    mode: Literal["online", "offline"] = "online"
    """offline = write to <run directory>/wandb, for 'wandb sync' later."""


class MlflowConfig(Section):
    """MLflow tracking."""

    uri: PathOrUri | None = None
    """Tracking server, or a directory for a new database; null = $MLFLOW_TRACKING_URI if set, else
    <run directory>/mlflow.db."""
    experiment: str = "raydpo"
    """Name of the experiment."""


class TrackConfig(Section):
    """Trackers. A tracker that fails causes a warning; the run continues."""

    wandb: WandbConfig | None = None
    """Weights & Biases, for example {project: mine}; null = off."""
    mlflow: MlflowConfig | None = None
    """MLflow; null = off."""
    prometheus: bool = True
    """Export gauges on Ray's metrics port. Needs the packages of Ray's dashboard (raydpo[cluster]). cluster/grafana.json
    shows them."""

"""The whole run: every section, and what follows from them."""

from __future__ import annotations

import re
from typing import Annotated

import yaml
from pydantic import AfterValidator, Field, model_validator

from raydpo.config.data import DataConfig, source_name
from raydpo.config.evaluate import EvaluateConfig
from raydpo.config.metric import check_metric, depends_on_scale, held_out_metrics
from raydpo.config.model import ModelConfig, ReferenceConfig
from raydpo.config.objective import BetaSchedule
from raydpo.config.section import PathOrUri, Section
from raydpo.config.sweep import SweepConfig
from raydpo.config.track import TrackConfig
from raydpo.config.train import ScoreConfig, TrainConfig
from raydpo.config.uri import redacted

__all__ = ["CacheConfig", "Config", "RayConfig"]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._=,+~-]{0,127}$"


def _no_root(output: str) -> str:
    if not output.strip("/"):
        raise ValueError(f"{output!r} is the root of the disk; was it made of a variable that is not set?")
    return output


class CacheConfig(Section):
    """Where reference log-probs are kept."""

    uri: PathOrUri | None = None
    """Local directory or URI, shared by any number of runs; null = <output>/cache."""
    allow_unverified: bool = False
    """Train on imported log-probs that 'raydpo cache verify' has not checked yet."""


class RayConfig(Section):
    """Where Ray runs."""

    address: str | None = None
    """Address of a running cluster; null = $RAY_ADDRESS where set, else a local Ray for the length of the command."""
    autoscaling: bool = False
    """The cluster brings nodes on demand: wait for resources that it does not have yet instead of refusing to start."""


class Config(Section):
    """A whole run."""

    name: Annotated[str | None, Field(pattern=NAME_PATTERN)] = None
    """Name of the run directory below output, or of the sweep's; null = model, loss and beta, or model and 'sweep'."""
    output: Annotated[PathOrUri, AfterValidator(_no_root)]
    """Local path or URI below which run directories lie."""
    model: ModelConfig
    reference: ReferenceConfig = Field(default_factory=ReferenceConfig)
    data: DataConfig
    cache: CacheConfig = Field(default_factory=CacheConfig)
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    track: TrackConfig = Field(default_factory=TrackConfig)
    ray: RayConfig = Field(default_factory=RayConfig)
    sweep: SweepConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.model.quantization is not None and self.train.zero == 3:
            raise ValueError("train.zero 3 cannot partition quantized weights (model.quantization "
                             f"{self.model.quantization}); set train.zero=2, which partitions what trains")
        if self.model.lora is not None and self.model.lora.dora and self.train.zero == 3:
            raise ValueError("model.lora.dora needs whole weights, which train.zero 3 partitions; set train.zero=2")
        if self.reference_quantization != self.model.quantization and self.reference.path in (None, self.model.path) \
                and not self.reference.allow_other_quantization:
            raise ValueError(f"reference.quantization is {self.reference_quantization or 'none'}, model.quantization "
                             f"{self.model.quantization or 'none'}: policy and reference would differ from the first step "
                             "on by what quantization loses. Set reference.quantization=model, or "
                             "reference.allow_other_quantization=true if that is meant")
        if self.train.merge_adapter and self.model.lora is None and self.model.adapter is None:
            raise ValueError("train.merge_adapter has no effect: model.lora and model.adapter are null, so all weights are "
                             "trained and exported. Drop it, or set model.lora")
        for column in ("weight_column", "margin_column"):
            if getattr(self.data, column) is not None:
                self.train.check_heeded(column, f"({getattr(self.data, column)!r} of data)", f"set data.{column} to null")
        if self.train.keep_best is not None and self.data.eval is None:
            raise ValueError(f"train.keep_best is {self.train.keep_best}, but there are no held-out pairs to measure it on; "
                             "set data.eval, for example data.eval.fraction=0.05")
        if self.train.keep_best is not None:
            check_metric("train.keep_best", self.train.keep_best, self.held_out_metrics)
            if isinstance(self.train.beta, BetaSchedule) and depends_on_scale(self.train.keep_best):
                raise ValueError(f"train.keep_best is {self.train.keep_best!r}, which does not compare between steps: "
                                 f"train.beta moves ({self.train.beta_text}), and its scale with it. Set it to "
                                 "eval_rewards/accuracies, or train.beta to a number")
        if self.sweep is not None and self.sweep.stop_early is not None and self.data.eval is None:
            raise ValueError("sweep.stop_early is set, but there are no held-out pairs to compare trials on; set data.eval, "
                             "for example data.eval.fraction=0.05")
        return self

    @property
    def held_out_metrics(self) -> list[str]:
        """Names of what each evaluation of the held-out pairs measures; none where nothing is held out."""
        if self.data.eval is None:
            return []
        # Held-out pairs of a file are one source. A filter may read the reference where the loss does not.
        return held_out_metrics([source_name(source) for source in self.data.train] if self.data.eval.path is None else [],
                                reference=self.train.needs_reference or self.data.filter is not None)

    @property
    def needs_reference(self) -> bool:
        """Whether the log-probs of a reference are needed: by the loss, or by the condition on pairs."""
        if self.train.needs_reference or self.data.filter is None:
            return self.train.needs_reference
        from raydpo.data.filter import PairFilter

        return PairFilter(self.data.filter).needs_reference

    @property
    def reference_adapter(self) -> str | None:
        """The adapter on the reference, if any."""
        same = self.reference.path is None and self.reference.adapter is None
        return self.model.adapter if same else self.reference.adapter

    @property
    def reference_quantization(self) -> str | None:
        wish = self.reference.quantization
        return self.model.quantization if wish == "model" else None if wish == "none" else wish

    @property
    def run_name(self) -> str:
        if self.name is not None:
            return self.name
        stem = re.sub(r"[^A-Za-z0-9.-]+", "-", self.model.path.rstrip("/").rsplit("/", 1)[-1]).strip("-.") or "model"
        return f"{stem}-{self.train.loss_name}-beta{self.train.beta_text}" if self.sweep is None else f"{stem}-sweep"

    @property
    def run_dir(self) -> str:
        """Local path or URI of the run directory, ``<output>/<name>``."""
        return f"{self.output.rstrip('/')}/{self.run_name}"

    @property
    def cache_uri(self) -> str:
        return self.cache.uri if self.cache.uri is not None else f"{self.output.rstrip('/')}/cache"

    @property
    def reference_path(self) -> str:
        return self.reference.path if self.reference.path is not None else self.model.path

    def to_yaml(self) -> str:
        """The resolved configuration: what ``load_config`` would read to give this very run, but for secrets of URIs."""
        resolved = self.model_dump(mode="json")
        resolved["name"] = self.run_name
        resolved["cache"]["uri"] = self.cache_uri
        resolved["reference"] |= {"path": self.reference_path, "adapter": self.reference_adapter}
        return yaml.safe_dump(redacted(resolved), sort_keys=False, width=120, allow_unicode=True)

"""The whole configuration: all sections, and values derived from them."""

from __future__ import annotations

import re
from typing import Annotated

import yaml
from pydantic import AfterValidator, Field, model_validator

from raydpo.config.data import DataConfig, source_name
from raydpo.config.evaluate import EvaluateConfig
from raydpo.config.filter import REFERENCE_FACTS, PairFilter
from raydpo.config.metric import check_metric, depends_on_scale, held_out_metrics
from raydpo.config.model import ModelConfig, ReferenceConfig
from raydpo.config.objective import LOSSES, BetaSchedule
from raydpo.config.rounds import RoundsConfig
from raydpo.config.section import PathOrUri, Section
from raydpo.config.sweep import SweepConfig
from raydpo.config.track import TrackConfig
from raydpo.config.train import ScoreConfig, TrainConfig
from raydpo.storage.uri import redacted

__all__ = ["CacheConfig", "Config", "RayConfig"]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._=,+~-]{0,127}$"


def _no_root(output: str) -> str:
    if not output.strip("/"):
        raise ValueError(f"{output!r} is the root of the disk; was it made of a variable that is not set?")
    return output


class CacheConfig(Section):
    """The cache of reference log-probs."""

    uri: PathOrUri | None = None
    """Local directory or URI, which any number of runs may share; null = <output>/cache."""
    allow_unverified: bool = False
    """Train with imported log-probs that 'raydpo cache verify' has not checked."""


class RayConfig(Section):
    """The Ray cluster."""

    address: str | None = None
    """Address of a running cluster; null = $RAY_ADDRESS if set, else a local Ray that each command starts."""
    autoscaling: bool = False
    """The cluster starts nodes on demand: wait for missing resources instead of refusing to start."""


class Config(Section):
    """The configuration of a run."""

    name: Annotated[str | None, Field(pattern=NAME_PATTERN)] = None
    """Name of the directory of the run or sweep below output; null = made of model, loss and beta; of a sweep or rounds, its
    model."""
    output: Annotated[PathOrUri, AfterValidator(_no_root)]
    """Directory of the run directories, a local path or URI."""
    model: ModelConfig
    reference: ReferenceConfig = Field(default_factory=ReferenceConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    track: TrackConfig = Field(default_factory=TrackConfig)
    ray: RayConfig = Field(default_factory=RayConfig)
    sweep: SweepConfig | None = None
    rounds: RoundsConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.model.quantization is not None and self.train.zero == 3:
            raise ValueError(
                "train.zero 3 cannot partition quantized weights (model.quantization "
                f"{self.model.quantization}); set train.zero=2, which partitions what trains"
            )
        if self.model.lora is not None and self.model.lora.dora and self.train.zero == 3:
            raise ValueError("model.lora.dora needs whole weights, which train.zero 3 partitions; set train.zero=2")
        if (
            self.reference_quantization != self.model.quantization
            and self.reference.path in (None, self.model.path)
            and not self.reference.allow_other_quantization
        ):
            raise ValueError(
                f"reference.quantization is {self.reference_quantization or 'none'}, model.quantization "
                f"{self.model.quantization or 'none'}: policy and reference would differ from the first step "
                "on, by the error of quantization. Set reference.quantization=model, or "
                "reference.allow_other_quantization=true to train nevertheless"
            )
        divided = self.score.partition not in ("auto", 1)
        if self.reference_quantization is not None and (divided or self.score.offload == "cpu"):
            field = f"partition ({self.score.partition})" if divided else "offload (cpu)"
            raise ValueError(
                f"score.{field} is for whole weights, not for quantized ones (reference.quantization "
                f"{self.reference_quantization}); set reference.quantization=none to score a large model in bfloat16, or "
                "leave score.partition and score.offload at auto"
            )
        if self.train.merge_adapter and self.model.lora is None and self.model.adapter is None:
            raise ValueError(
                "train.merge_adapter has no effect: model.lora and model.adapter are null, so all weights are "
                "trained and exported. Drop it, or set model.lora"
            )
        self._check_data()
        self._check_refinements()
        self._check_lists()
        for column in ("weight_column", "margin_column"):
            if getattr(self.data, column) is not None:
                self.train.check_heeded(column, f"({getattr(self.data, column)!r} of data)", f"set data.{column} to null")
        if self.train.keep_best is not None and self.data.eval is None:
            raise ValueError(
                f"train.keep_best is {self.train.keep_best}, but there are no held-out pairs to measure it on; "
                "set data.eval, for example data.eval.fraction=0.05"
            )
        if self.train.keep_best is not None:
            check_metric("train.keep_best", self.train.keep_best, self.held_out_metrics)
            if isinstance(self.train.beta, BetaSchedule) and depends_on_scale(self.train.keep_best):
                raise ValueError(
                    f"train.keep_best is {self.train.keep_best!r}, which cannot be compared between steps: "
                    f"train.beta changes ({self.train.beta_text}), and its scale with it. Set it to "
                    "eval_rewards/accuracies, or train.beta to a number"
                )
        if self.sweep is not None and self.sweep.stop_early is not None and self.data.eval is None:
            raise ValueError(
                "sweep.stop_early is set, but there are no held-out pairs to compare trials on; set data.eval, "
                "for example data.eval.fraction=0.05"
            )
        return self

    def _check_data(self) -> None:
        """Refuse a run without pairs, and pairs beside rounds, which make their own.

        Raises:
            ValueError: with the setting and the fix.
        """
        if self.rounds is None:
            if "train" in self.data.model_fields_set and not self.data.train:
                raise ValueError("'data.train' is empty; at least one entry is needed")
            if not self.data.train:
                raise ValueError(
                    "'data.train' is missing; every run needs a model (model.path), data (data.train) and an output (output)"
                )
            return
        if self.data.train:
            raise ValueError(
                f"data.train ({self.data.train[0].path}) has no effect beside rounds.prompts: rounds train on pairs of "
                "their own answers. Drop one; to begin with a model that was trained on pairs, name its final/ in model.path"
            )
        if self.sweep is not None:
            raise ValueError("sections sweep and rounds contradict each other; drop one")
        why = "on rounds, which make their pairs of sampled answers; drop it"
        of_pairs = ("eval", "fraction", "filter", "weight_column", "margin_column", "train_on", "spans_column", "ranked")
        self.data.refuse_idle(of_pairs, why, "data.")
        self.train.refuse_idle(
            ["keep_best", "sample_prompts"], "on rounds, which measure held-out prompts; drop it", "train."
        )
        unfit = [name for name, traits in self.train.traits.items() if traits.lists]
        if unfit:
            raise ValueError(
                f"train.loss {unfit[0]!r} is over ranked lists, but rounds make pairs; set it to one over pairs"
            )
        if not self.train.needs_reference and self.rounds.reference != "initial":
            raise ValueError(
                f"rounds.reference has no effect on train.loss {self.train.loss_text}, which compares with no reference; "
                "drop it"
            )
        if self.rounds.optimizer == "carry" and self.train.steps is None:
            raise ValueError(
                "rounds.optimizer carry continues one schedule over all rounds, but train.steps is null, so that its length "
                "would depend on the number of pairs of rounds to come; set train.steps, the steps of one round"
            )
        if self.rounds.sample.max_tokens >= self.data.max_length:
            raise ValueError(
                f"rounds.sample.max_tokens ({self.rounds.sample.max_tokens}) leaves no room for a prompt in data.max_length "
                f"({self.data.max_length}); raise data.max_length"
            )

    def _check_lists(self) -> None:
        """Refuse ranked lists with a loss of pairs, and the other way round.

        Raises:
            ValueError: with both values and the fix.
        """
        if self.sweep is not None and (self.sweep.varies("train.loss") or self.sweep.varies("data.ranked")):
            return  # its trials are checked
        lists = self.data.ranked == "lists"
        unfit = [name for name, traits in self.train.traits.items() if traits.lists != lists]
        if unfit and lists:
            fit = ", ".join(name for name, traits in LOSSES.items() if traits.lists)
            raise ValueError(
                f"data.ranked is lists, but {' and '.join(map(repr, unfit))} of train.loss is over pairs; set train.loss to "
                f"one over lists ({fit}), or data.ranked to pairs"
            )
        if unfit:
            raise ValueError(
                f"train.loss {self.train.loss_text!r} is over ranked lists, but data.ranked is {self.data.ranked}; set "
                "data.ranked to lists, or train.loss to one over pairs, such as sigmoid"
            )

    def _check_refinements(self) -> None:
        """Refuse settings that only refine another one, which is not set.

        Raises:
            ValueError: with setting, value and the fix.
        """

        def absent(key: str) -> bool:
            """Whether no file or override sets the key, which the resolved configuration of a run does; nor a sweep."""
            section, name = key.split(".")
            return name not in getattr(self, section).model_fields_set and not (self.sweep and self.sweep.varies(key))

        held_out, either = self.data.eval, ("data.eval.path", "data.eval.fraction")
        varied = self.sweep is not None and any(map(self.sweep.varies, either))
        if held_out is not None and held_out.path is None and held_out.fraction is None and not varied:
            raise ValueError(
                "data.eval names no held-out pairs; set data.eval.fraction, for example to 0.05, or data.eval.path; or "
                "data.eval=null"
            )
        one_worker = self.train.most_workers == 1 and not (self.sweep and self.sweep.varies("train.workers"))
        if self.train.overlap_communication and one_worker:
            raise ValueError(
                "train.overlap_communication has no effect with train.workers 1, which sums no gradients over workers; drop "
                "it, or set train.workers to 2 or more"
            )
        if self.model.fused and self.model.dtype == "float32" and self.score.dtype in (None, "float32"):
            raise ValueError(
                "model.fused has no effect on model.dtype float32: only bfloat16 models are fused; drop it, or set "
                "model.dtype=bfloat16"
            )
        if absent("data.fraction"):
            self.data.refuse_idle(["fraction_seed"], "without data.fraction; drop it, or set data.fraction", "data.")
        if absent("train.sample_prompts"):
            self.train.refuse_idle(["sample_tokens"], "without train.sample_prompts; drop it, or set that", "train.")
        if not self._may_need_reference:
            why = f"on loss {self.train.loss_text}, which needs no reference: there is no step-0 gate; drop it"
            self.train.refuse_idle(["gate_pairs"], why, "train.")

    @property
    def _may_need_reference(self) -> bool:
        """Whether the loss needs a reference, or ``data.filter`` may. The filter's text is searched, since polars, which
        parses it, may not be installed on this machine."""
        return self.train.needs_reference or any(fact in (self.data.filter or "") for fact in REFERENCE_FACTS)

    @property
    def held_out_metrics(self) -> list[str]:
        """Names of the metrics of each held-out evaluation; empty if nothing is held out."""
        if self.data.eval is None:
            return []
        return held_out_metrics(
            # Held-out pairs from a file are one source.
            [source_name(source) for source in self.data.train] if self.data.eval.path is None else [],
            reference=self._may_need_reference,
            labels=all(traits.unpaired for traits in self.train.traits.values()),
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the log-probs of a reference are needed, by the loss or by ``data.filter``."""
        if self.train.needs_reference or self.data.filter is None:
            return self.train.needs_reference
        return PairFilter(self.data.filter).needs_reference

    @property
    def reference_adapter(self) -> str | None:
        """The adapter on the reference, if any."""
        same = self.reference.path is None and self.reference.adapter is None
        return self.model.adapter if same else self.reference.adapter

    @property
    def reference_quantization(self) -> str | None:
        """Quantization of the reference: 4bit, 8bit or None."""
        wish = self.reference.quantization
        return self.model.quantization if wish == "model" else None if wish == "none" else wish

    @property
    def run_name(self) -> str:
        """Name of the run directory."""
        if self.name is not None:
            return self.name
        stem = re.sub(r"[^A-Za-z0-9.-]+", "-", self.model.path.rstrip("/").rsplit("/", 1)[-1]).strip("-.") or "model"
        if self.rounds is not None:
            return f"{stem}-rounds"
        return f"{stem}-{self.train.loss_name}-beta{self.train.beta_text}" if self.sweep is None else f"{stem}-sweep"

    @property
    def run_dir(self) -> str:
        """Local path or URI of the run directory, ``<output>/<name>``."""
        return f"{self.output.rstrip('/')}/{self.run_name}"

    @property
    def cache_uri(self) -> str:
        """Local path or URI of the cache."""
        return self.cache.uri if self.cache.uri is not None else f"{self.output.rstrip('/')}/cache"

    @property
    def reference_path(self) -> str:
        """Directory or hub name of the reference."""
        return self.reference.path if self.reference.path is not None else self.model.path

    def to_yaml(self) -> str:
        """The resolved configuration as YAML. ``load_config`` reads it back to the same run, apart from secrets in URIs."""
        resolved = self.model_dump(mode="json")
        resolved["name"] = self.run_name
        resolved["cache"]["uri"] = self.cache_uri
        resolved["reference"] |= {"path": self.reference_path, "adapter": self.reference_adapter}
        return yaml.safe_dump(redacted(resolved), sort_keys=False, width=120, allow_unicode=True)

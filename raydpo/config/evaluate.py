"""Section ``evaluate``: what ``raydpo eval`` measures. Only ``raydpo eval`` and ``raydpo sweep`` read this section."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from raydpo.config.data import SourceConfig, as_sources, source_name
from raydpo.config.judge import JudgeConfig
from raydpo.config.rewards import RewardConfig, as_rewards, check_names
from raydpo.config.section import Float, Int, PathOrUri, Section

__all__ = ["EvaluateConfig"]

Mode = Literal["greedy", "sampled"]


def _as_data(value: Any) -> Any:
    return None if value is None else as_sources(value)


class EvaluateConfig(Section):
    """What ``raydpo eval`` measures: a policy, compared with the reference of this configuration. The workers of section
    score also write the answers."""

    policy: PathOrUri | None = None
    """The policy: a run directory, the directory of a model or of a PEFT adapter, or a hub name; null = final/ of this run.
    An adapter is applied to the model that it names, quantized as model.quantization; a full model is not quantized."""
    base: PathOrUri | None = None
    """Base model of an adapter, if the one that adapter_config.json names is not on this machine."""
    data: Annotated[tuple[SourceConfig, ...] | None, BeforeValidator(_as_data)] = None
    """Preference pairs to measure on, one or more sources; null = data.eval."""
    subsets: str | None = "subset"
    """Column of evaluate.data with the subset of a pair, as in RewardBench; results are given for each. Records without it
    are counted under the name of their source."""
    chat: bool = False
    """Convert text prompts of evaluate.data to user messages, and completions to assistant messages."""
    beta: Float | None = Field(default=None, gt=0)
    """Scale of the implicit rewards; null = beta of the run that trained the policy, else train.beta."""
    log_ratios: Literal["sum", "per_token"] | None = None
    """Log-ratios of completions as sums or means over tokens; null = as in the loss of the run that trained the policy, else
    in train.loss."""
    score_missing: bool = True
    """Score pairs that the caches of policy and reference lack; false = missing pairs are an error, and no model is loaded
    to score."""
    prompts: Int = Field(default=64, ge=0)
    """Number of distinct prompts that policy and reference answer. A hash of prompt and seed decides which."""
    max_tokens: Int = Field(default=128, ge=1)
    """Longest answer, in tokens."""
    modes: tuple[Mode, ...] = ("greedy", "sampled")
    """How answers are generated. The drift from the reference is measured on sampled answers."""
    samples: Int = Field(default=1, ge=1)
    """Number of sampled answers to each prompt."""
    temperature: Float = Field(default=1.0, gt=0)
    """Temperature of sampling, without top-k or top-p. The drift is only measured at 1."""
    seed: Int = Field(default=0, ge=0, lt=2**63)
    """Seed for the choice of prompts and for sampling."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Engine that generates the answers. vLLM needs an environment of its own, see vllm_python; its speed is not yet
    measured. Its samples repeat with the seed, but policy and reference use different random numbers."""
    vllm_python: str | None = None
    """Python of an environment with vLLM, such as /opt/vllm/bin/python, under this path on every node that scores. It needs
    nothing of raydpo. null = vLLM is in raydpo's own environment."""
    batch: Int = Field(default=16, ge=1)
    """Number of answers that a worker generates at once, with transformers."""
    exact_steps: bool = True
    """Also estimate the drift from the full distributions at each token of the samples, which has a lower variance. Policy
    and reference must then fit on one device together."""
    judge: JudgeConfig | None = None
    """Model that judges the answers, for example {url: 'http://host:8000/v1', model: name}; null = none."""
    reward_model: PathOrUri | None = None
    """Directory or hub name of a reward model (a sequence classifier with one output) that judges the answers."""
    score_with: str | None = None
    """module:function of your own that scores answers: from prompt and answer as text to a number, higher is better."""
    rewards: tuple[RewardConfig, ...] = ()
    """Reward functions, as rounds.rewards, that score the answers of policy and reference."""

    @field_validator("vllm_python")
    @classmethod
    def _python(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("/"):
            raise ValueError(
                f"{value!r} is not an absolute path, such as /opt/vllm/bin/python, and must be the same on all nodes"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _earlier_name(cls, values: Any) -> Any:
        """Earlier versions named ``log_ratios`` rewards."""
        if isinstance(values, dict) and values.get("rewards") in ("sum", "per_token") and values.get("log_ratios") is None:
            return {**values, "log_ratios": values["rewards"], "rewards": ()}
        return values

    @field_validator("rewards", mode="before")
    @classmethod
    def _no_rewards(cls, value: Any) -> Any:
        return () if value is None else as_rewards(value)

    @model_validator(mode="after")
    def _check(self) -> EvaluateConfig:
        check_names(self.rewards)
        if not self.modes or len(set(self.modes)) != len(self.modes):
            raise ValueError(f"modes {list(self.modes)} is empty or names one twice; use greedy, sampled or both")
        for name in ("judge", "reward_model", "score_with", "rewards"):
            if not self.prompts and getattr(self, name):
                raise ValueError(f"{name} has no answers to judge, since prompts is 0; set prompts")
        if not self.prompts:
            of_answers = (
                "max_tokens",
                "modes",
                "samples",
                "temperature",
                "seed",
                "engine",
                "vllm_python",
                "batch",
                "exact_steps",
            )
            self.refuse_idle(of_answers, "on prompts 0, with which nothing is answered; drop it, or set prompts")
        if "sampled" not in self.modes:
            self.refuse_idle(("samples", "temperature", "exact_steps"), f"on modes {list(self.modes)}; add sampled")
        if self.temperature != 1:
            self.refuse_idle(["exact_steps"], f"on temperature {self.temperature:g}: the drift is only measured at 1")
        if self.engine == "vllm":
            self.refuse_idle(["batch"], "on engine vllm, which decides how many answers it generates at once; drop it")
        else:
            self.refuse_idle(["vllm_python"], "on engine transformers; drop it, or set engine to vllm")
        if self.data is None:
            self.refuse_idle(("subsets", "chat"), "without evaluate.data")
        if self.data is not None:
            names = [source_name(source) for source in self.data]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"two sources of data are both named {twice[0]!r}; give each its own name")
        if self.base is not None and self.policy is None:
            raise ValueError(
                f"base ({self.base}) has no effect without policy: the model below this run's adapter is model.path"
            )
        if self.score_with is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.score_with):
            raise ValueError(
                f"score_with {self.score_with!r} does not have the form module:function, for example my_scores:politeness"
            )
        return self

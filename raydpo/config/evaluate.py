"""Section ``evaluate``: what ``raydpo eval`` measures of a policy. No other command reads it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from raydpo.config.data import SourceConfig, as_sources, source_name
from raydpo.config.section import Float, Int, PathOrUri, Section

__all__ = ["EvaluateConfig", "JudgeConfig"]

Mode = Literal["greedy", "sampled"]


class JudgeConfig(Section):
    """A model behind an OpenAI-compatible address that says which of two answers is better. It is asked twice, in both
    orders; a verdict counts only if it is the same."""

    url: str
    """Base address, such as https://host/v1; ``/chat/completions`` below it is asked."""
    model: str
    """Name of the model there."""
    key: str | None = None
    """NAME of the environment variable that holds the API key, such as JUDGE_KEY. Never the key itself; it is read when it
    is needed and neither printed nor stored. null = no key."""
    timeout: Float = Field(60.0, gt=0)
    """Seconds to wait for one reply."""
    retries: Int = Field(3, ge=0)
    """Further attempts after a timeout, a lost connection, or status 408, 409, 429 or 5xx, each after twice the wait."""
    parallel: Int = Field(8, ge=1)
    """Requests under way at once."""
    max_tokens: Int = Field(16, ge=1)
    """Longest reply. A model that reasons before it answers needs hundreds; its last line counts."""
    criterion: str = "more helpful, honest and harmless"
    """What the better answer is."""

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("an address such as https://host/v1 is wanted")
        if parts.username is not None or parts.password is not None:
            raise ValueError("the address carries a user or password; set evaluate.judge.key to the name of an environment "
                             "variable instead")
        return value.rstrip("/")

    @field_validator("key")
    @classmethod
    def _key(cls, value: str | None) -> str | None:
        # The value is not repeated: it may be the key itself.
        if value is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", value):
            raise ValueError("the NAME of an environment variable is wanted, in capitals such as JUDGE_KEY, never the key "
                             "itself")
        return value


def _as_data(value: Any) -> Any:
    return None if value is None else as_sources(value)


class EvaluateConfig(Section):
    """What ``raydpo eval`` measures of a policy, against the reference of this configuration. score.workers and
    score.gpus_per_worker are also the actors that answer."""

    policy: PathOrUri | None = None
    """A run directory, the directory of a model or of a PEFT adapter, or a hub name; null = final/ of this run. An adapter
    is put on the model that it names, quantized as model.quantization; a whole model is never quantized."""
    base: PathOrUri | None = None
    """The model below an adapter, where adapter_config.json names one that is not here."""
    data: Annotated[tuple[SourceConfig, ...] | None, BeforeValidator(_as_data)] = None
    """Preferences to measure on, one or more sources; null = data.eval."""
    subsets: str | None = "subset"
    """A column of evaluate.data whose value is the source of a pair, as in RewardBench. Records without it go by the name of
    their source."""
    chat: bool = False
    """Text prompts of evaluate.data become a user's message and their answers the assistant's, by the chat template."""
    beta: Float | None = Field(None, gt=0)
    """Scale of the implicit rewards; null = that of the run that trained the policy, else train.beta."""
    rewards: Literal["sum", "per_token"] | None = None
    """Log-ratios as sums over a completion, or per token; null = as the loss of the run that trained the policy, else
    train.loss."""
    score_missing: bool = True
    """Score the pairs that the caches of policy and reference lack; false = that is an error, and no model is loaded for
    them."""
    prompts: Int = Field(64, ge=0)
    """Distinct prompts of the data that policy and reference answer; 0 = none. Which ones depends on their content and on
    seed alone."""
    max_tokens: Int = Field(128, ge=1)
    """Longest answer."""
    modes: tuple[Mode, ...] = ("greedy", "sampled")
    """How answers are made. The drift from the reference is measured on sampled ones."""
    samples: Int = Field(1, ge=1)
    """Sampled answers to each prompt."""
    temperature: Float = Field(1.0, gt=0)
    """Of sampled answers, without top-k or top-p. The drift is measured at 1 alone."""
    seed: Int = Field(0, ge=0)
    """Of the choice of prompts and of the samples."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What makes the answers. vLLM is many times faster on GPUs, must be installed, and draws its own samples: they repeat
    with the seed, but those of policy and reference do not share their luck."""
    batch: Int = Field(16, ge=1)
    """Answers made at once by an actor, with transformers."""
    exact_steps: bool = True
    """Also estimate the drift from whole distributions at each token of the samples, which varies less. Policy and reference
    are then on one device at once."""
    judge: JudgeConfig | None = None
    """A judge of the answers, for example {url: 'http://host:8000/v1', model: name}; null = none."""
    reward_model: PathOrUri | None = None
    """Directory or hub name of a sequence classifier with one output, a reward model, that judges the answers."""
    score_with: str | None = None
    """module:function of one's own: called with prompt and answer as text, returns a number, higher is better."""

    @model_validator(mode="after")
    def _check(self) -> EvaluateConfig:
        given = self.model_fields_set
        if not self.modes or len(set(self.modes)) != len(self.modes):
            raise ValueError(f"modes {list(self.modes)} is empty or names one twice; use greedy, sampled or both")
        for name in ("judge", "reward_model", "score_with"):
            if not self.prompts and getattr(self, name) is not None:
                raise ValueError(f"{name} has no answers to look at, since prompts is 0; set prompts")
        if "sampled" not in self.modes:
            for name in ("samples", "temperature", "exact_steps"):
                if name in given and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} {getattr(self, name)} has no effect on modes {list(self.modes)}; add sampled")
        if self.data is None:
            for name in ("subsets", "chat"):
                if name in given and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} {getattr(self, name)} has no effect without evaluate.data")
        else:
            names = [source_name(source) for source in self.data]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"two sources of data are both named {twice[0]!r}; give each its own name")
        if self.base is not None and self.policy is None:
            raise ValueError(f"base ({self.base}) has no effect without policy: the model below this run's adapter is "
                             "model.path")
        if self.score_with is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.score_with):
            raise ValueError(f"score_with {self.score_with!r} does not have the form module:function, for example "
                             "my_scores:politeness")
        return self

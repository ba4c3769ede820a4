"""Section ``rounds``: on-policy training. Each round samples answers of the current policy, scores them with reward
functions, and trains on pairs of better and worse ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from raydpo.config.data import as_sources, source_name
from raydpo.config.rewards import RewardConfig, as_rewards, check_names
from raydpo.config.section import Float, Int, PathOrUri, Section

__all__ = [
    "STAGES",
    "EveryConfig",
    "HeldOutConfig",
    "MeasureConfig",
    "PairingConfig",
    "PromptSource",
    "RoundsConfig",
    "SampleConfig",
    "StopConfig",
]

STAGES = ("sample", "score", "pair", "train", "measure")
"""Stages of a round, in order."""


class PromptSource(Section):
    """One file, directory, URI or hub data set of prompts. Its records have a column ``prompt``, text or messages; the
    reward functions get every other column."""

    path: PathOrUri
    """As data.train.path."""
    name: str | None = None
    """Name of the source in counts; null = the file's stem."""
    split: str = "train"
    """Split of a hub data set, and of a directory whose files name their split."""
    subset: str | None = None
    """Configuration of a hub data set, or a directory below ``path``; null = the only one."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Maps our column names to the file's, for example {prompt: question}."""
    limit: Int | None = Field(default=None, ge=1)
    """Number of records to read; null = all."""


class HeldOutConfig(Section):
    """Prompts that are measured and never sampled for training: a share of the prompts, or a file of their own."""

    fraction: Float | None = Field(default=None, gt=0, lt=1)
    """Share of the prompts. A hash of each prompt decides."""
    path: PathOrUri | None = None
    """A file of held-out prompts (anything a source can be). The columns map of rounds.prompts applies to it, too, if all
    sources have the same."""

    @model_validator(mode="after")
    def _check(self) -> HeldOutConfig:
        if (self.path is None) == (self.fraction is None):
            raise ValueError("held-out prompts are one of fraction (for example 0.15) and path")
        return self


class SampleConfig(Section):
    """Sampling of answers from the policy."""

    n: Int = Field(default=8, ge=2)
    """Number of answers to each prompt."""
    temperature: Float = Field(default=1.0, gt=0)
    """Temperature of sampling. The drift is only measured at 1."""
    top_p: Float = Field(default=1.0, gt=0, le=1)
    """Smallest probability mass of the tokens that are sampled from; 1 = the whole vocabulary. The drift needs 1."""
    max_tokens: Int = Field(default=512, ge=1)
    """Longest answer, in tokens."""
    seed: Int = Field(default=0, ge=0, lt=2**63)
    """Seed of the random numbers. Each round, prompt and sample has its own."""
    engine: Literal["auto", "transformers", "vllm", "ray"] = "auto"
    """Engine that generates the answers; auto = vllm where there are GPUs and vLLM, else transformers. ray = ray.data.llm,
    for models that need several GPUs a replica."""
    vllm_python: str | None = None
    """Python of an environment with vLLM, as evaluate.vllm_python."""
    tensor_parallel: Int = Field(default=1, ge=1)
    """Number of GPUs of a replica, with engine ray."""
    batch: Int = Field(default=64, ge=1)
    """Number of answers that a worker generates at once, with transformers."""

    @model_validator(mode="after")
    def _check(self) -> SampleConfig:
        if self.vllm_python is not None and not self.vllm_python.startswith("/"):
            raise ValueError(
                f"vllm_python {self.vllm_python!r} is not an absolute path, such as /opt/vllm/bin/python, and must be the "
                "same on all nodes"
            )
        if self.engine in ("transformers", "ray"):
            self.refuse_idle(["vllm_python"], f"on engine {self.engine}; drop it, or set engine to vllm")
        if self.engine != "ray":
            self.refuse_idle(["tensor_parallel"], f"on engine {self.engine}; drop it, or set engine to ray")
        if self.engine in ("vllm", "ray"):
            self.refuse_idle(
                ["batch"], f"on engine {self.engine}, which decides how many answers it generates at once; drop it"
            )
        return self


class PairingConfig(Section):
    """Which answers to a prompt become pairs."""

    choose: Literal["best_worst", "all"] = "best_worst"
    """best_worst = one pair of the best and the worst answer; all = disjoint pairs of a better and a worse answer, the best
    with the worst first, at most per_prompt, which must then be set."""
    margin: Float = Field(default=0.0, ge=0)
    """The rewards of a pair differ by more than this. Ties are never pairs."""
    per_prompt: Int = Field(default=1, ge=1)
    """Largest number of pairs of a prompt."""

    @model_validator(mode="after")
    def _check(self) -> PairingConfig:
        if self.choose == "best_worst" and self.per_prompt > 1:
            raise ValueError(
                f"per_prompt {self.per_prompt} contradicts choose best_worst, which makes one pair of a prompt; set "
                "choose to all"
            )
        if self.choose == "all" and "per_prompt" not in self.model_fields_set:
            raise ValueError(
                "choose all makes at most per_prompt pairs of a prompt, and per_prompt is not set, so 1 as with best_worst; "
                "set it, for example to 4"
            )
        return self


class EveryConfig(Section):
    """A reference that moves every k rounds."""

    every: Int = Field(ge=1)
    """Number of rounds with one reference."""


class MeasureConfig(Section):
    """Measurement on held-out prompts before the first round and after each."""

    prompts: Int = Field(default=256, ge=1)
    """Largest number of held-out prompts that are answered."""
    n: Int = Field(default=4, ge=1)
    """Number of sampled answers to each."""
    greedy: bool = True
    """Also answer greedily."""
    success: Float = 0.5
    """Reward above which an answer counts as a success. If only a judge's duels reward, the success is their win rate."""


class StopConfig(Section):
    """When to stop before the last round. null = never for this reason."""

    success: Float | None = Field(default=None, gt=0, le=1)
    """Share of successes among held-out answers that is enough."""
    drift: Float | None = Field(default=None, gt=0)
    """Drift from the initial model, in nats an answer, that is too much."""
    mixed: Float | None = Field(default=0.02, ge=0, le=1)
    """Least share of the prompts of a round that have answers of different reward."""


def _as_held_out(value: Any) -> Any:
    if isinstance(value, str):
        return {"path": value}
    return {"fraction": value} if isinstance(value, (int, float)) and not isinstance(value, bool) else value


class RoundsConfig(Section):
    """On-policy rounds. Section ``train`` is that of one round: its ``steps`` are the steps between two samplings."""

    count: Int = Field(default=3, ge=1)
    """Number of rounds. More may be added later; the first ones stay."""
    prompts: Annotated[tuple[PromptSource, ...], BeforeValidator(as_sources)] = Field(min_length=1)
    """One or more sources of prompts, or a single path."""
    held_out: Annotated[HeldOutConfig, BeforeValidator(_as_held_out)] = HeldOutConfig(fraction=0.15)
    """Prompts that are measured and never trained on."""
    per_round: Int = Field(default=1024, ge=1)
    """Number of prompts of a round. Rounds take disjoint slices of the prompts in an order that sample.seed decides; once
    all were used, they come again with new random numbers."""
    sample: SampleConfig = Field(default_factory=SampleConfig)
    """Sampling of answers."""
    rewards: Annotated[tuple[RewardConfig, ...], BeforeValidator(as_rewards)] = Field(min_length=1)
    """Reward functions. The reward of an answer is the sum of weight times value over those that apply to it."""
    cut: Literal["zero", "drop", "keep"] = "zero"
    """What an answer of max_tokens tokens without an end is worth: zero = its reward is at most 0, drop = no pair uses it,
    keep = what the functions say."""
    max_errors: Float = Field(default=0.01, ge=0, le=1)
    """Largest share of answers that a reward function may fail on; more is an error, after all rewards are stored. Also the
    largest share of prompts that a built-in function may be unable to read; more is an error before anything is sampled."""
    pairs: PairingConfig = Field(default_factory=PairingConfig)
    """Which answers become pairs."""
    reference: Literal["initial", "previous"] | EveryConfig = "initial"
    """The reference of a round: the model before the first round, the policy that the round begins with, or {every: k},
    which moves to the policy of every k-th round. R rounds with a moving reference divide beta by R."""
    replay: Float = Field(default=0.0, ge=0, lt=1)
    """Share of the pairs of a round that come from earlier rounds."""
    offline: bool = False
    """Sample in the first round only, and train every round on its answers: offline DPO, to compare with."""
    optimizer: Literal["fresh", "carry"] = "fresh"
    """Whether a round begins with new moments and a schedule of its own, or continues those of the round before. carry needs
    train.steps: its schedule is over count times so many steps. Then count may be raised later only if train.schedule is
    constant, train.warmup a number of steps, and train.beta a number."""
    measure: MeasureConfig = Field(default_factory=MeasureConfig)
    """Measurement on held-out prompts."""
    stop: StopConfig = Field(default_factory=StopConfig)
    """When to stop early."""

    @model_validator(mode="after")
    def _check(self) -> RoundsConfig:
        check_names(self.rewards)
        names = [source_name(source) for source in self.prompts]
        if len(set(names)) < len(names):
            twice = min(name for name in names if names.count(name) > 1)
            raise ValueError(f"two sources of rounds.prompts are both named {twice!r}; give each its own name")
        if all(one.weight == 0 for one in self.rewards):
            raise ValueError("every reward has weight 0, so all answers are equal; give one a weight")
        if self.stop.drift is not None and (self.sample.top_p < 1 or self.sample.temperature != 1):
            raise ValueError(
                f"stop.drift ({self.stop.drift:g}) is estimated on unmodified samples, but sample.top_p is "
                f"{self.sample.top_p:g} and sample.temperature {self.sample.temperature:g}; set both to 1, or drop it"
            )
        if self.offline and self.replay:
            raise ValueError("replay has no effect on offline rounds, which all train on the same pairs; drop one")
        return self

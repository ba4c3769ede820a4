"""A caller from Python, read by 'make types': a section needs only its required keys."""

from raydpo import Config, load_config, run
from raydpo.config import (
    BetaSchedule,
    CacheConfig,
    DataConfig,
    EvalConfig,
    EvaluateConfig,
    JudgeConfig,
    LoraSettings,
    ModelConfig,
    ReferenceConfig,
    ScoreConfig,
    SourceConfig,
    StopEarlyConfig,
    SweepConfig,
    TrackConfig,
    TrainConfig,
)


def smallest() -> Config:
    """The configuration with nothing but what it must have."""
    return Config(output="runs", model=ModelConfig(path="model"), data=DataConfig(train=(SourceConfig(path="pairs.jsonl"),)))


def larger() -> Config:
    """A configuration with each of its sections."""
    return Config(
        output="runs",
        model=ModelConfig(path="model", lora=LoraSettings(r=8)),
        reference=ReferenceConfig(path="sft"),
        data=DataConfig(train=(SourceConfig(path="pairs.jsonl", weight=0.5),), eval=EvalConfig(fraction=0.1)),
        cache=CacheConfig(uri="cache"),
        score=ScoreConfig(workers=2),
        train=TrainConfig(loss="ipo", beta=BetaSchedule(start=0.2, end=0.1), lr=1e-6),
        evaluate=EvaluateConfig(prompts=8, judge=JudgeConfig(url="http://host/v1", model="judge")),
        track=TrackConfig(),
        sweep=SweepConfig(grid={"train.beta": (0.05, 0.1)}, stop_early=StopEarlyConfig(grace=10)),
    )


def act() -> str:
    """A run from a file."""
    config = load_config("config.yaml", ["train.beta=0.05"])
    run(config)
    return config.run_dir

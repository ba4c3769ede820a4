"""The configuration of a run: YAML and ``key.sub=value`` overrides, checked and then frozen.

Imports neither torch nor ray nor deepspeed, so that a laptop can check a configuration before it submits a job. These
modules hold all defaults. The docstring below a field is its documentation.
"""

from raydpo.config.data import DataConfig, EvalConfig, SourceConfig, source_name
from raydpo.config.evaluate import EvaluateConfig
from raydpo.config.judge import JudgeConfig
from raydpo.config.load import is_hub_name, load_config, with_setting
from raydpo.config.metric import check_metric, depends_on_scale, lower_is_better
from raydpo.config.model import LoraSettings, ModelConfig, ReferenceConfig
from raydpo.config.objective import LOSSES, SCALE_KEYS, BetaSchedule, ObjectiveConfig
from raydpo.config.rewards import RewardConfig, reward_name
from raydpo.config.rounds import RoundsConfig
from raydpo.config.run import CacheConfig, Config, RayConfig
from raydpo.config.sweep import RandomConfig, StopEarlyConfig, SweepConfig
from raydpo.config.track import TrackConfig
from raydpo.config.train import ScoreConfig, TrainConfig
from raydpo.config.verbs import Verb, check_verb

__all__ = [
    "LOSSES",
    "SCALE_KEYS",
    "BetaSchedule",
    "CacheConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "EvaluateConfig",
    "JudgeConfig",
    "LoraSettings",
    "ModelConfig",
    "ObjectiveConfig",
    "RandomConfig",
    "RayConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RoundsConfig",
    "ScoreConfig",
    "SourceConfig",
    "StopEarlyConfig",
    "SweepConfig",
    "TrackConfig",
    "TrainConfig",
    "Verb",
    "check_metric",
    "check_verb",
    "depends_on_scale",
    "is_hub_name",
    "load_config",
    "lower_is_better",
    "reward_name",
    "source_name",
    "with_setting",
]

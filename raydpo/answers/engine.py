"""The engine that answers for rounds, and the work that it does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

from raydpo.answers.answering import Answering
from raydpo.answers.ray_engine import RayAnswering, check_ray_llm
from raydpo.answers.vllm_engine import check_servable, unservable
from raydpo.cluster.preflight import workers_without_vllm
from raydpo.cluster.resources import resources_for
from raydpo.config import Config
from raydpo.config.rounds import SampleConfig
from raydpo.errors import ConfigError
from raydpo.model.files import adapter_files
from raydpo.reference.score import ReferenceSpec

__all__ = ["SECTION", "Engine", "pick_engine", "sampling"]

Engine = Literal["transformers", "vllm", "ray"]
"""An engine that generates answers."""
SECTION = "rounds.sample"
"""Section of the configuration with the settings of this module."""


def pick_engine(config: Config, spec: ReferenceSpec) -> tuple[Engine, str]:
    """Choose the engine of ``rounds.sample``, within a Ray session.

    Args:
        spec: the policy.

    Returns:
        The engine, and a line that says which it is and why.

    Raises:
        ConfigError: if the engine that is set is missing or does not serve the policy. ``auto`` never raises it for that.
    """
    sample = _settings(config)
    python = sample.vllm_python or sys.executable
    if sample.engine == "auto":
        why = _why_no_vllm(config, spec, python)
        engine: Engine = "vllm" if why is None else "transformers"
        why = "the workers have GPUs and vLLM" if why is None else why
        return engine, f"answers: engine {engine} ({SECTION}.engine is auto: {why})"
    if sample.engine == "ray":
        check_ray_llm(SECTION)
    if sample.engine in ("vllm", "ray"):
        check_servable(spec.quantization, spec.identity.rope_length, _adapter(spec), SECTION, sample.engine)
    if sample.engine == "vllm" and (found := workers_without_vllm(config, python)) is not None:
        raise ConfigError(
            f"{SECTION}.engine is vllm, but {found}; make an environment with vLLM on each node that scores and set "
            f"{SECTION}.vllm_python to its Python, or set {SECTION}.engine=transformers"
        )
    return sample.engine, f"answers: engine {sample.engine} ({SECTION}.engine)"


def _why_no_vllm(config: Config, spec: ReferenceSpec, python: str) -> str | None:
    if resources_for("score", config).device == "cpu":
        return "the workers of section score have no GPU"
    why = unservable(spec.quantization, spec.identity.rope_length, _adapter(spec))
    return workers_without_vllm(config, python) if why is None else f"vLLM {why}"


def _adapter(spec: ReferenceSpec) -> dict[str, Any] | None:
    """Content of adapter_config.json; None without an adapter."""
    return None if spec.adapter is None else adapter_files(spec.adapter).config


def sampling(
    config: Config, spec: ReferenceSpec, engine: Engine, stop: Sequence[int], longest: int
) -> Answering | RayAnswering:
    """Return the work of answering as ``rounds.sample`` says, for ``cluster.work.do_work``.

    Args:
        spec: the policy.
        engine: as ``pick_engine`` returned it.
        stop: token ids that end an answer.
        longest: tokens of the longest prompt.
    """
    sample = _settings(config)
    same = {"spec": spec, "max_tokens": sample.max_tokens, "stop": tuple(stop), "section": SECTION}
    positions = longest + sample.max_tokens
    if engine == "ray":
        return RayAnswering(**same, positions=positions, tensor_parallel=sample.tensor_parallel)
    return Answering(
        **same,
        batch=sample.batch,
        engine=engine,
        python=sample.vllm_python,
        positions=positions,
        memory_share=resources_for("score", config).memory_share,
    )


def _settings(config: Config) -> SampleConfig:
    if config.rounds is None:
        raise ValueError("the configuration has no section 'rounds'")
    return config.rounds.sample

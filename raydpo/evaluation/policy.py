"""Finds and identifies the model that ``evaluate.policy`` names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydpo.config import Config, is_hub_name
from raydpo.errors import ConfigError, FilesError
from raydpo.model.files import model_files
from raydpo.model.rotary import ROTARY, rope_length
from raydpo.reference.identity import identify, resolve_model
from raydpo.reference.score import ReferenceSpec
from raydpo.rundir.directory import FINAL, RUN, RunDirectory
from raydpo.storage.files import Storage
from raydpo.storage.local_copy import RemoteDirectory
from raydpo.storage.uri import is_uri, redact

__all__ = ["Policy", "PolicyFiles", "find_policy", "harness_arguments", "policy_files"]


@dataclass(frozen=True, kw_only=True)
class PolicyFiles:
    """The files of a policy.

    Attributes:
        name: the name that the user gave, without secrets.
        base: local directory of the model. adapter: local directory of the adapter on it, or None.
        run: the run directory that contains it, or None.
        origin: where workers on other machines copy it from, or None.
        trained: fingerprint of that run: what its result depended on, by setting; empty if unknown.
    """

    name: str
    base: str
    adapter: str | None
    run: Storage | None
    origin: RemoteDirectory | None
    trained: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Policy(PolicyFiles):
    """The policy to evaluate, with its identity. ``spec``: how to load it."""

    spec: ReferenceSpec

    @property
    def slug(self) -> str:
        """The last part of the name, safe as part of a file name."""
        return "".join(char if char.isalnum() or char in "._-" else "-" for char in self.name.rstrip("/").rsplit("/", 1)[-1])

    def beta(self, config: Config) -> float:
        """Return the beta of the rewards: evaluate.beta, or else the last beta of the training, or else train.beta."""
        if config.evaluate.beta is not None:
            return config.evaluate.beta
        trained = self.trained.get("train.beta", config.train.model_dump(mode="json")["beta"])
        return trained["end"] if isinstance(trained, dict) else trained


def policy_files(config: Config) -> PolicyFiles:
    """Find the files of ``evaluate.policy``. Weights are not read.

    Raises:
        ConfigError: if it is not there, or was trained with other rotary frequencies.
        ModelError: if it is no model, or an adapter whose model is not there.
    """
    wish = config.evaluate.policy
    given = config.run_dir if wish is None else wish
    run = _run_at(given)
    origin = None if run is None or run.is_local else RemoteDirectory.now(run, FINAL)
    if run is None:
        if wish is None:
            raise ConfigError(
                f"there is no trained policy in {redact(given)}/final; run 'raydpo run' first, or set "
                "evaluate.policy to a run directory, a model, an adapter or a hub name"
            )
        directory = resolve_model(wish)
    else:
        directory = run.path(FINAL) if origin is None else origin.here()
    adapter = directory if (Path(directory) / "adapter_config.json").is_file() else None
    base = directory if adapter is None else _base(config, Path(directory), own=wish is None)
    trained = {} if run is None else _fingerprint(run)
    now = rope_length(model_files(base, config.model.trust_remote_code).config, config.data.max_length)
    length = trained.get(ROTARY, now)
    if length != now:
        raise ConfigError(
            f"{redact(given)} was trained with rotary frequencies for {length:,} positions, but "
            f"data.max_length {config.data.max_length} makes them for {now:,}; set "
            "data.max_length as it was in the training"
        )
    return PolicyFiles(name=redact(given), base=base, adapter=adapter, run=run, origin=origin, trained=trained)


def find_policy(config: Config, dtype: str) -> Policy:
    """Find the policy of ``evaluate.policy``, in precision ``dtype``. Reads every weight once, for its identity.

    Raises:
        ConfigError, ModelError: as ``policy_files``.
    """
    files, trust = policy_files(config), config.model.trust_remote_code
    quantization = None if files.adapter is None else config.model.quantization
    identity = identify(files.base, dtype, files.adapter, quantization, trust, max_length=config.data.max_length)
    spec = ReferenceSpec(
        path=files.base,
        adapter=files.adapter,
        identity=identity,
        quantization=quantization,
        trust_remote_code=trust,
        layout=config.model.layout,
        fused=config.model.fused,
        origin=files.origin,
    )
    return Policy(**vars(files), spec=spec)


def _run_at(path: str) -> Storage | None:
    """Return the run directory at ``path`` if it has a trained policy, None if it is a model or adapter."""
    if not is_uri(path) and not Path(path).is_dir():
        return None
    storage = Storage(path)
    if any(storage.exists(f"final/{name}") for name in ("config.json", "adapter_config.json")):
        return storage
    if storage.exists(RUN):
        raise ConfigError(
            f"the run in {storage} has no final/ yet: it was not trained to its end; continue it with 'raydpo train'"
        )
    if is_uri(path):
        raise ConfigError(
            f"evaluate.policy {storage} is not a run directory with a trained policy; a model must be on a "
            "local disk or on the hub"
        )
    return None


def _base(config: Config, adapter: Path, *, own: bool) -> str:
    """Return the directory of the model that an adapter belongs to."""
    if own:
        return resolve_model(config.model.path)
    named = config.evaluate.base
    if named is None:
        try:
            named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError) as error:
            raise FilesError(
                f"cannot read the model's name in {adapter}/adapter_config.json: {error!r}; set evaluate.base to where it is"
            ) from None
    if not named or not (Path(named).is_dir() or is_hub_name(named)):
        raise FilesError(
            f"the adapter {adapter} belongs to the model {named!r}, which is not here; set evaluate.base to where it is"
        )
    return resolve_model(named)


def _fingerprint(run: Storage) -> dict[str, Any]:
    try:
        return RunDirectory(run).fingerprint() or {}
    except (OSError, ValueError, KeyError):
        return {}


def harness_arguments(policy: Policy) -> str:
    """Return ``--model_args`` of lm-evaluation-harness (``--model hf``) for this policy."""
    spec = policy.spec
    adapter = "" if spec.adapter is None else f",peft={spec.adapter},tokenizer={spec.adapter}"
    return f"pretrained={spec.path}{adapter},dtype={spec.identity.dtype}"

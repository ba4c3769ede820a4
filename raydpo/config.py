"""The run as validated data: YAML plus ``key.sub=value`` overrides, frozen once loaded.

Imports neither torch nor ray nor deepspeed, so that a laptop can check a configuration before it submits it.
A default lives here and nowhere else; the docstring below a field is its documentation.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from raydpo.errors import ConfigError

__all__ = [
    "CacheConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LoraSettings",
    "ModelConfig",
    "RayConfig",
    "ReferenceConfig",
    "ScoreConfig",
    "SourceConfig",
    "TrainConfig",
    "is_hub_name",
    "is_uri",
    "load_config",
]

Dtype = Literal["auto", "float32", "bfloat16"]
LossName = Literal["sigmoid", "hinge", "ipo", "sigmoid_norm"]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._=,+~-]{0,127}$"
DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")
COMPRESSION_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]


def _expand_home(value: Any) -> Any:
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value


PathOrUri = Annotated[str, BeforeValidator(_expand_home)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class LoraSettings(_Section):
    """Low-rank adapters (arXiv 2106.09685), saved as a standard PEFT adapter."""

    r: Int = Field(16, ge=1)
    """Rank of each adapter."""
    alpha: Float = Field(32.0, gt=0)
    """Scale of the adapter's output: alpha / r."""
    dropout: Float = Field(0.0, ge=0, lt=1)
    """Must stay 0: a policy with dropout is not the reference at step 0, whatever the weights."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """PEFT's target modules: ``all-linear``, a list of module names, or a regular expression."""

    @model_validator(mode="after")
    def _check(self) -> LoraSettings:
        if self.dropout:
            raise ValueError(f"dropout is {self.dropout}, but DPO compares policy and reference without noise; "
                             "set it to 0")
        return self


class ModelConfig(_Section):
    """The policy as it starts."""

    path: PathOrUri
    """Local directory of a Hugging Face model (safetensors), or its name on the hub."""
    tokenizer: PathOrUri | None = None
    """Directory or hub name of the tokenizer; null = the model's own."""
    dtype: Dtype = "auto"
    """Precision of training. auto = bfloat16 on GPUs and on CPUs with matrix units for it (AMX), else float32.
    With bfloat16 the optimizer keeps float32 master weights."""
    lora: LoraSettings | None = None
    """Adapters to train; null = full fine-tuning."""
    layout: Literal["auto", "tree", "packed", "padded"] = "auto"
    """How a micro-batch is computed: as a prefix tree, as a pack without shared prefixes, or as padded rows. auto = the
    first of them that a check at load finds exact for this model."""
    trust_remote_code: bool = False
    """Run Python code that the model's directory carries. Named loudly when on."""


class ReferenceConfig(_Section):
    """The frozen model whose log-probs are cached. Default: the policy as it starts."""

    path: PathOrUri | None = None
    """Directory or hub name; null = model.path."""
    adapter: PathOrUri | None = None
    """Directory of a PEFT adapter applied on top of it."""


class SourceConfig(_Section):
    """One file, directory, URI or hub data set of preferences."""

    path: PathOrUri
    """jsonl, json or parquet (also .gz, .zst, .bz2, .xz), a directory of such files, any URI that pyarrow or fsspec
    opens, or the name of a data set on the Hugging Face hub."""
    name: str | None = None
    """Name of the source in counts and metrics; null = the file's stem."""
    weight: Float = Field(1.0, gt=0)
    """How often an epoch passes over this source: 0.5 takes half of its pairs (others each epoch), 2 takes all twice."""
    split: str = "train"
    """Split of a hub data set; ignored by files."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Maps our column names to the file's, for example {chosen: good_answer, rejected: bad_answer}."""
    limit: Int | None = Field(None, ge=1)
    """Reads only the first so many records."""


class EvalConfig(_Section):
    """The held-out pairs."""

    path: PathOrUri | None = None
    """A file of held-out pairs (anything a source can be)."""
    fraction: Float | None = Field(None, gt=0, lt=1)
    """Or a share of the training pairs, split off by prompt: the same prompt is never on both sides."""
    split: str = "test"
    """Split of a hub data set; ignored by files."""
    columns: dict[str, str] | None = None
    """Column map of the held-out file; null = that of the training sources, where they agree on one."""

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.path is not None and self.fraction is not None:
            raise ValueError(f"path ({self.path}) and fraction ({self.fraction}) contradict each other; keep one")
        return self


def _as_sources(value: Any) -> Any:
    entries = value if isinstance(value, (list, tuple)) else [value]
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


def _as_eval(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class DataConfig(_Section):
    """Preferences and how they become token ids."""

    train: Annotated[tuple[SourceConfig, ...], BeforeValidator(_as_sources)] = Field(min_length=1)
    """One or more sources; a bare path works too."""
    eval: Annotated[EvalConfig | None, BeforeValidator(_as_eval)] = None
    """Held-out pairs; null = none."""
    max_length: Int = Field(1024, ge=2)
    """Longest prompt + completion, in tokens."""
    truncation: Literal["keep_start", "drop"] = "keep_start"
    """What becomes of a longer one: its completion is cut at the end, or the pair is dropped."""
    shuffle: bool = True
    """false = every epoch in file order, for comparisons."""
    filter: str | None = None
    """A condition that training pairs must meet, an SQL expression over the fields of the audit, for example
    'chosen_tokens < 1024 and ref_margin > -20'. See raydpo/data/facts.py for the fields. Held-out pairs are left alone."""
    chat_template: str | None = None
    """A Jinja chat template, or the path of one, in place of the tokenizer's."""
    max_malformed: Float = Field(0.01, ge=0, le=1)
    """Largest share of malformed records of a source; more is an error."""
    max_dropped: Float = Field(0.1, ge=0, le=1)
    """Largest share of well-formed pairs of a source that length may drop; more is an error."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        names = [source_name(source) for source in self.train]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two sources are both named {sorted(twice)[0]!r}; give each its own name")
        return self


class CacheConfig(_Section):
    """Where reference log-probs are kept."""

    uri: PathOrUri | None = None
    """Local directory or URI, shared by any number of runs; null = <output>/cache."""
    allow_unverified: bool = False
    """Train on imported log-probs that 'raydpo cache verify' has not checked yet."""


class ScoreConfig(_Section):
    """The reference pass."""

    workers: Int = Field(1, ge=1)
    """Ray Data actors, one device each."""
    gpus_per_worker: Float | None = Field(None, ge=0)
    """GPUs of each actor, fractions too; null = 1 where the cluster has GPUs, else 0."""
    tokens_per_batch: Literal["auto"] | Annotated[Int, Field(ge=1)] = "auto"
    """Token positions of one forward pass, each shared prefix counted once; auto = as many as fit, measured at start."""
    tokens_per_part: Int = Field(262144, ge=1)
    """Tokens scored between two commits: what a kill can cost at most, per actor."""
    dtype: Dtype | None = None
    """Precision of the reference; null = model.dtype."""


class TrainConfig(_Section):
    """The training of the policy."""

    workers: Int = Field(1, ge=1)
    """Ray Train workers, one device each."""
    gpus_per_worker: Float | None = Field(None, ge=0)
    """GPUs of each worker; null = 1 where the cluster has GPUs, else 0."""
    pairs_per_step: Int = Field(64, ge=1)
    """Pairs of one optimizer step, over all workers."""
    tokens_per_batch: Literal["auto"] | Annotated[Int, Field(ge=1)] = "auto"
    """Token positions of one forward and backward pass of a worker, each shared prefix counted once; auto = as many as fit,
    measured at start. Accumulation follows from it."""
    epochs: Int = Field(1, ge=1)
    """Passes over the data."""
    steps: Int | None = Field(None, ge=1)
    """Optimizer steps; null = as epochs say."""
    lr: Float = Field(5.0e-7, gt=0)
    """Peak learning rate. LoRA usually wants about 1e-5 to 5e-4."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after warm-up."""
    warmup: Float = Field(0.1, ge=0)
    """Below 1 a share of all steps, else a number of steps."""
    weight_decay: Float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    clip: Float | None = Field(1.0, gt=0)
    """Largest global gradient norm; null = no clipping."""
    zero: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    loss: LossName = "sigmoid"
    """The objective, see raydpo.losses."""
    beta: Float = Field(0.1, gt=0)
    """Strength of the pull to the reference. Small drifts far, large stays close."""
    label_smoothing: Float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of flipped preferences (conservative DPO); for loss sigmoid and sigmoid_norm."""
    seed: Int = Field(0, ge=0)
    """Order of the pairs and initial values of adapters."""
    checkpoint_every: Int = Field(100, ge=1)
    """Steps between checkpoints. The last step is always one."""
    keep_checkpoints: Int = Field(2, ge=1)
    """How many of the newest checkpoints stay."""
    eval_every: Int = Field(50, ge=1)
    """Steps between held-out evaluations. There is always one before the first and one after the last step."""
    max_failures: Int = Field(3, ge=0)
    """Restarts from the newest checkpoint after a worker died."""
    gate_pairs: Int = Field(32, ge=1)
    """Pairs that the step-0 gate scores again: those of the first step, the most extreme ones, and some at random."""
    sample_prompts: Int = Field(0, ge=0)
    """Held-out prompts answered greedily before and after training."""
    sample_tokens: Int = Field(64, ge=1)
    """Longest sample, in tokens."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.label_smoothing and self.loss not in ("sigmoid", "sigmoid_norm"):
            raise ValueError(f"label_smoothing {self.label_smoothing} has no effect on loss {self.loss!r}; "
                             "set it to 0, or loss to sigmoid or sigmoid_norm")
        if self.steps is not None and "epochs" in self.model_fields_set and self.epochs != 1:
            raise ValueError(f"steps ({self.steps}) and epochs ({self.epochs}) contradict each other; keep one")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup {self.warmup} is neither a share below 1 nor a whole number of steps")
        if self.gpus_per_worker is not None and 0 < self.gpus_per_worker < 1:
            raise ValueError(f"gpus_per_worker {self.gpus_per_worker} is a fraction; NCCL needs a whole GPU for each "
                             "training worker")
        return self


class RayConfig(_Section):
    """Where Ray runs."""

    address: str | None = None
    """Address of a running cluster; null = $RAY_ADDRESS where set, else a local Ray for the length of the command."""
    autoscaling: bool = False
    """The cluster brings nodes on demand: wait for resources that it does not have yet instead of refusing to start."""


class Config(_Section):
    """A whole run."""

    name: Annotated[str | None, Field(pattern=NAME_PATTERN)] = None
    """Name of the run directory below output; null = model, loss and beta."""
    output: PathOrUri
    """Local path or URI below which run directories lie."""
    model: ModelConfig
    reference: ReferenceConfig = ReferenceConfig()
    data: DataConfig
    cache: CacheConfig = CacheConfig()
    score: ScoreConfig = ScoreConfig()
    train: TrainConfig = TrainConfig()
    ray: RayConfig = RayConfig()

    @property
    def run_name(self) -> str:
        if self.name is not None:
            return self.name
        stem = re.sub(r"[^A-Za-z0-9.-]+", "-", self.model.path.rstrip("/").rsplit("/", 1)[-1]).strip("-.") or "model"
        return f"{stem}-{self.train.loss}-beta{self.train.beta:g}"

    @property
    def run_dir(self) -> str:
        """Local path or URI of the run directory, ``<output>/<name>``."""
        return f"{self.output.rstrip('/') or '/'}/{self.run_name}"

    @property
    def cache_uri(self) -> str:
        return self.cache.uri if self.cache.uri is not None else f"{self.output.rstrip('/')}/cache"

    @property
    def reference_path(self) -> str:
        return self.reference.path if self.reference.path is not None else self.model.path

    def to_yaml(self) -> str:
        """The resolved configuration: what ``load_config`` would read to give this very run."""
        resolved = self.model_dump(mode="json")
        resolved["name"] = self.run_name
        resolved["cache"]["uri"] = self.cache_uri
        resolved["reference"]["path"] = self.reference_path
        return yaml.safe_dump(resolved, sort_keys=False, width=120, allow_unicode=True)


def source_name(source: SourceConfig) -> str:
    """The name a source goes by in counts and metrics."""
    if source.name is not None:
        return source.name
    stem = source.path.rstrip("/").rsplit("/", 1)[-1]
    for suffix in (*COMPRESSION_SUFFIXES, *DATA_SUFFIXES):
        stem = stem.removesuffix(suffix)
    return stem


def is_uri(path: str) -> bool:
    """Whether ``path`` carries a scheme such as ``s3://``."""
    return re.match(r"^[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def is_hub_name(path: str) -> bool:
    """Whether ``path``, which does not exist locally, has the form of a hub name such as ``org/name``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) is not None and not _is_data_file(path)


def load_config(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read, override and check a configuration.

    Args:
        source: path of a YAML file, or its content as a dictionary.
        overrides: ``key.sub=value`` strings, values in YAML; they win over the file.

    Raises:
        ConfigError: with one message that names every bad key, its value and the fix.
    """
    tree = source if isinstance(source, dict) else _read_yaml(Path(source))
    for override in overrides:
        tree = _override(tree, override)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(tree, problem) for problem in error.errors())) from None
    _check_paths(config)
    if config.data.filter is not None:
        _check_filter(config.data.filter)
    return config


def _check_filter(expression: str) -> None:
    """Where what evaluates it is installed; a laptop that only submits may lack it."""
    try:
        from raydpo.data.filter import PairFilter
    except ImportError:
        return
    PairFilter(expression)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {str(path)!r}; give the path of a YAML file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, not a mapping of settings such as 'model: {{path: ...}}'")
    return tree


def _override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    key, sign, text = override.partition("=")
    if not sign or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ConfigError(f"override {override!r} does not have the form key.sub=value, for example train.beta=0.05")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of override {override!r} is not valid YAML: {' '.join(str(error).split())}") from None
    head, *rest = key.split(".")
    tree = dict(tree)
    node: Any = tree
    for step, nxt in zip([head, *rest], rest, strict=False):
        child = node.get(step)
        if isinstance(child, (list, tuple)) and nxt.isdigit():
            child = list(child)
        elif child is None or isinstance(child, dict):
            child = dict(child or {})
        else:
            raise ConfigError(f"override {override!r} sets a key below {step!r}, whose value is {child!r}, "
                              "not a section")
        node[step] = child
        if isinstance(child, list):
            index = int(nxt)
            if index >= len(child):
                raise ConfigError(f"override {override!r}: {step} has {len(child)} entries, there is no entry {index}")
            node = _ListView(child)
        else:
            node = child
    node[rest[-1] if rest else head] = value
    return tree


class _ListView:
    """Lets ``_override`` walk through a list by the text of an index, as through a mapping."""

    def __init__(self, entries: list[Any]) -> None:
        self.entries = entries

    def get(self, index: str) -> Any:
        entry = self.entries[int(index)]
        return {"path": entry} if isinstance(entry, str) else entry

    def __setitem__(self, index: str, value: Any) -> None:
        self.entries[int(index)] = value


def _explain(tree: dict[str, Any], problem: dict[str, Any]) -> str:
    where = [str(part) for part in problem["loc"] if not str(part).startswith(("function-", "tuple[", "constrained-"))]
    key, value = ".".join(where) or "configuration", problem["input"]
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        known = list(_section_at(where[:-1]).model_fields)
        near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        elsewhere = [full for full in _all_keys() if full.rsplit(".", 1)[-1] == where[-1]]
        meant = elsewhere[0] if elsewhere else ".".join([*where[:-1], near[0]]) if near else None
        hint = f"did you mean {meant!r}?" if meant else f"known here: {', '.join(known)}"
        return f"unknown key {key!r} (value {value!r}); {hint}"
    if kind == "missing":
        return f"{key!r} is missing; every run needs a model (model.path), data (data.train) and an output (output)"
    if kind == "literal_error":
        choices = context.get("expected", "")
        near = difflib.get_close_matches(str(value), re.findall(r"'([^']+)'", choices), n=1, cutoff=0.5)
        return f"{key!r} is {value!r}, expected {choices}" + (f"; did you mean {near[0]!r}?" if near else "")
    if kind == "value_error":
        return f"{key!r}: {context['error']}"
    if kind == "model_type":
        return f"{key!r} is {value!r}, expected a section of keys: {', '.join(_section_at(where).model_fields)}"
    if kind == "too_short":
        return f"{key!r} is empty; at least one entry is needed"
    if kind == "string_pattern_mismatch":
        return f"{key!r} is {value!r}; use letters, digits and any of . _ - = , + ~ and start with a letter or digit"
    message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{key!r} is {value!r}, expected {message}"


def _section_at(where: Sequence[str]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for part in where:
        if part in section.model_fields:
            section = _inner_section(section.model_fields[part].annotation) or section
    return section


def _inner_section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _inner_section(inner))), None)


def _all_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        inner = _inner_section(field.annotation)
        if inner is not None:
            keys += _all_keys(inner, f"{prefix}{name}.")
    return keys


def _is_data_file(path: str) -> bool:
    for suffix in COMPRESSION_SUFFIXES:
        path = path.removesuffix(suffix)
    return path.endswith(DATA_SUFFIXES)


def _check_paths(config: Config) -> None:
    """Every local input that is named must be there. Hub names and URIs are left to those who open them."""
    inputs = [("model.path", config.model.path, True), ("model.tokenizer", config.model.tokenizer, True),
              ("reference.path", config.reference.path, True), ("reference.adapter", config.reference.adapter, True)]
    inputs += [(f"data.train.{i}.path", source.path, False) for i, source in enumerate(config.data.train)]
    if config.data.eval is not None:
        inputs.append(("data.eval.path", config.data.eval.path, False))
    problems = []
    for key, value, is_model in inputs:
        if value is None or is_uri(value) or Path(value).exists():
            if value is not None and is_model and Path(value).is_file():
                problems.append(f"{key!r} is {value!r}, a file; a directory with config.json and safetensors is wanted")
            continue
        if is_hub_name(value) and "/" in value and not Path(value).parent.is_dir():
            continue
        near = difflib.get_close_matches(Path(value).name, _siblings(value), n=1, cutoff=0.6)
        hint = f"; did you mean {str(Path(value).parent / near[0])!r}?" if near else ""
        problems.append(f"{key!r} is {value!r}, but there is no such {'directory' if is_model else 'file'}{hint}")
    if problems:
        raise ConfigError("\n".join(problems))


def _siblings(path: str) -> list[str]:
    parent = Path(path).parent
    return [entry.name for entry in parent.iterdir()] if parent.is_dir() else []

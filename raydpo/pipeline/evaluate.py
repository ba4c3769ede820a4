"""``raydpo eval``: scores pairs with policy and reference, lets both answer prompts, and writes the figures."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from raydpo.answers.answering import Answering
from raydpo.answers.contests import by_scores, count_wins, own_scores
from raydpo.answers.draws import ROWS
from raydpo.answers.judge import Judge, judge_contests
from raydpo.answers.reward import RewardModel, check_prompts
from raydpo.cluster.preflight import check_cluster
from raydpo.cluster.resources import Resources, resources_for
from raydpo.cluster.session import session, starts_own_ray
from raydpo.cluster.work import BlockTask, do_work
from raydpo.config import Config, ObjectiveConfig, load_config
from raydpo.config.counting import EVERYTHING, counting_texts
from raydpo.config.rewards import reward_name
from raydpo.data.counting import counts
from raydpo.data.facts import prompt_numbers
from raydpo.data.lists import all_pairs
from raydpo.data.messages import Notes
from raydpo.data.pairs import load_pairs
from raydpo.data.select import COUNT_COLUMNS, LABEL
from raydpo.data.tokenise import Tokeniser
from raydpo.errors import CacheMissError, ConfigError, RaydpoError
from raydpo.evaluation.display import print_evaluation
from raydpo.evaluation.drift import ExactSteps, measure_drift
from raydpo.evaluation.policy import Policy, find_policy, harness_arguments, policy_files
from raydpo.evaluation.preferences import ScoredPairs, measure_preferences
from raydpo.evaluation.prompts import (
    Prompt,
    choose_prompts,
    evaluation_data,
    prompt_records,
    prompt_texts,
    reading,
    trained_on,
)
from raydpo.evaluation.rewards import Rewarded, answers_to_score
from raydpo.evaluation.samples import Answers
from raydpo.model.limits import ModelLimits, check_limits
from raydpo.model.rotary import rope_line
from raydpo.pipeline.checks import check, check_models, pythons_of
from raydpo.pipeline.partition import check_alone, place_reference
from raydpo.pipeline.prepare import measured_pairs, open_reference, reference_line
from raydpo.pipeline.score import fill_cache
from raydpo.pipeline.tokenised import limits_of, open_pairs, open_tokeniser
from raydpo.reference.identity import resolve_model
from raydpo.reference.pairs import reference_values
from raydpo.reference.score import ReferenceSpec
from raydpo.reference.store import ReferenceCache
from raydpo.reports.write import write_report_or_warn
from raydpo.rewards.apply import apply
from raydpo.rewards.checks import check_readable, check_rewards
from raydpo.rewards.functions import reward_settings
from raydpo.rundir.directory import CONFIG
from raydpo.storage.files import Storage
from raydpo.storage.uri import redacted
from raydpo.terminal.console import Console
from raydpo.version import __version__

__all__ = ["evaluate", "pairs_to_evaluate", "protocol"]

WORK_BLOCK = 64
"""Rows that an actor computes and stores together; a kill loses at most this many for each actor."""
_NOT_IN_PROTOCOL = dict.fromkeys(
    ("policy", "base", "data", "subsets", "chat", "score_missing", "batch", "vllm_python", "rewards"), True
) | {"judge": {"key", "timeout", "retries", "parallel"}}
"""Settings that do not change how a figure is measured. The pairs are in the protocol by their digest."""


def evaluate(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Measure a policy against the reference of ``config``, as section ``evaluate`` says.

    Log-probs, answers and verdicts are stored by content in the cache, so neither a second call nor another evaluation
    computes them again.

    Returns:
        The content of evaluation.json.

    Raises:
        RaydpoError: a subclass that says what is wrong.
    """
    console = console or Console()
    check(config, "eval", console)
    check_models(config, "eval", console)
    settings = config.evaluate
    read = _read_pairs(config, console) if starts_own_ray(config) else None  # bad pairs end the command before that
    with session(config):
        check_cluster(
            config,
            ["score"],
            console,
            (settings.policy, settings.base, settings.reward_model, *(one.reward_model for one in settings.rewards)),
            pythons_of([config]),
        )
        evaluation = _Evaluation.of(config, console, read)
        found, samples = evaluation.measure()
    evaluation.write(found, samples)
    print_evaluation(console, found)
    console.say(f"evaluation: {evaluation.storage}/{evaluation.file('evaluation', 'json')}")
    if evaluation.policy.run is not None:
        write_report_or_warn(evaluation.policy.run.uri, console)  # the page now also shows the evaluation
    console.say(
        f"harness: lm_eval --model hf --model_args {harness_arguments(evaluation.policy)} --apply_chat_template --tasks ..."
    )
    return found


def pairs_to_evaluate(config: Config, tokeniser: Tokeniser, console: Console) -> tuple[pa.Table, int | None]:
    """Load the pairs to measure, of ranked lists all pairs of a better and a worse completion, and count those of data.eval
    that have a prompt of the training data.

    The count is None for evaluate.data.

    Raises:
        ConfigError: if there is neither evaluate.data nor data.eval.
        DataError: if they cannot be read.
    """
    data, on_training_side = evaluation_data(config)
    if on_training_side:  # read in ways of their own, such as by subsets
        sets = load_pairs(data, tokeniser, console.counter("reading", "records"), reading(config.evaluate))
    else:
        sets, _ = open_pairs(config, lambda: tokeniser, console)
    for line in sets.report.lines():
        console.say(line)
    return (all_pairs(sets.train), None) if on_training_side else (all_pairs(sets.eval), sets.report.leaked)


def _read_pairs(config: Config, console: Console) -> tuple[Tokeniser, pa.Table, int | None]:
    """The tokeniser and what ``pairs_to_evaluate`` gives, compared with the limits of reference and policy."""
    tokeniser = open_tokeniser(config)
    pairs, seen = pairs_to_evaluate(config, tokeniser, console)
    console.say(f"pairs to evaluate on: {pairs.num_rows:,}")
    limits, settings = limits_of(config, policy_files(config).base), config.evaluate
    for line in check_limits([pairs], limits):
        console.warn(line)
    prompts = choose_prompts(pairs, settings.prompts, settings.seed)
    _check_lengths(prompts, settings.max_tokens, limits)
    if settings.reward_model is not None:
        texts = prompt_texts(prompts, config)
        check_prompts(resolve_model(settings.reward_model), config.model.trust_remote_code, texts)
    if settings.rewards:
        _check_columns(prompts, config, console)
    return tokeniser, pairs, seen


def _check_columns(prompts: Sequence[Prompt], config: Config, console: Console) -> None:
    """Refuse reward functions that need a column which no record has, and tell of records that they cannot read."""
    notes: Notes = {}
    records = prompt_records(prompts, config, notes)
    for note in notes:
        console.warn(note.removeprefix("warning: "))
    columns = [json.loads(text) for _, text in records]
    rewards = config.evaluate.rewards
    check_rewards(rewards, {name for each in columns for name in each})
    for line in check_readable(rewards, columns, [f"pair {prompt.pair_id}" for prompt in prompts], "evaluated", None):
        console.warn(line)


def _check_lengths(prompts: Sequence[Prompt], max_tokens: int, models: Mapping[str, ModelLimits]) -> None:
    """Refuse answers that are longer than a model was made for: no engine generates them."""
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    for path, limits in models.items() if prompts else ():
        if limits.positions is not None and longest + max_tokens > limits.positions:
            raise ConfigError(
                f"evaluate.max_tokens {max_tokens} after a prompt of {longest} tokens is more than the {limits.positions} "
                f"positions of {path}; lower it, or data.max_length"
            )


def protocol(config: Config, pairs: pa.Table, reference: ReferenceSpec) -> dict[str, Any]:
    """Return how a policy is measured. The figures of two evaluations can be compared if their protocols are equal."""
    settings = config.evaluate.model_dump(mode="json", exclude=_NOT_IN_PROTOCOL)
    settings["rewards"] = settings.pop("log_ratios")  # its name in evaluations that are stored
    if config.evaluate.rewards:
        settings["reward_functions"] = {reward_name(one): reward_settings(one, config) for one in config.evaluate.rewards}
    whole = pairs.drop_columns([name for name in COUNT_COLUMNS if name in pairs.column_names])
    digests = {"pairs": measured_pairs(whole)}
    if (counted := measured_pairs(pairs)) != digests["pairs"]:  # drift and answers do not depend on what counts
        digests["counted"] = counted
    return redacted(settings) | digests | {"reference": reference.identity.digest}


def _counted(config: Config) -> str | None:
    """What counts in the pairs to measure, in words; None if everything does."""
    data, on_training_side = evaluation_data(config)
    words = counting_texts(data.model_dump(mode="json"))[0 if on_training_side else 1]
    return None if words == EVERYTHING else words


@dataclass(frozen=True)
class _Evaluation:
    """The inputs of an evaluation. ``trained_on``: pairs whose prompt the policy was trained on, None if unknown."""

    config: Config
    console: Console
    policy: Policy
    reference: ReferenceSpec
    tokeniser: Tokeniser
    pairs: pa.Table
    trained_on: int | None

    @classmethod
    def of(cls, config: Config, console: Console, read: tuple[Tokeniser, pa.Table, int | None] | None = None) -> _Evaluation:
        """Find the models, and read the pairs unless ``read`` has them (the result of ``_read_pairs``)."""
        reference, _ = open_reference(config)
        console.say(reference_line(config, reference))
        if reference.identity.rope_length is not None:
            console.say(rope_line(reference.identity.rope_length, config.data.max_length))
        policy = find_policy(config, reference.identity.dtype)
        identity = policy.spec.identity
        precision = ", ".join(filter(None, (identity.dtype, identity.quantisation)))
        console.say(f"policy: {policy.name} in {precision}, identity {identity.digest}")
        against = policy.trained.get("reference identity")  # None for a loss without a reference
        if against not in (None, reference.identity.digest):
            console.warn(
                f"the policy was trained against reference {against}, and is compared with {reference.identity.digest}"
            )
        tokeniser, pairs, seen = read or _read_pairs(config, console)
        if seen is None or config.evaluate.policy is not None:  # what another run trained on is not data.train
            seen = _trained_on(config, policy, pairs, console)
        if seen:
            console.warn(
                f"the policy was trained on the prompts of {seen:,} of {pairs.num_rows:,} pairs; "
                "their figures also measure what it memorised"
            )
        return cls(config, console, policy, reference, tokeniser, pairs, seen)

    @property
    def storage(self) -> Storage:
        """Run directory of the policy. For a model that no run made, the directory of this run."""
        return self.policy.run or Storage(self.config.run_dir)

    def file(self, name: str, ending: str) -> str:
        """Name a file. A model that no run made gets its own names, so that they are not taken for those of this run."""
        return f"{name}.{ending}" if self.policy.run is not None else f"{name}-{self.policy.slug}.{ending}"

    def measure(self) -> tuple[dict[str, Any], pa.Table | None]:
        """Return the content of evaluation.json and of samples.parquet."""
        config, settings = self.config, self.config.evaluate
        prompts = choose_prompts(self.pairs, settings.prompts, settings.seed)
        modes = self._answers(prompts) if prompts else {}
        drifting = modes.get("sampled") if settings.temperature == 1 else None
        if "sampled" in modes and drifting is None:
            self.console.say(f"drift: not measured, because evaluate.temperature is {settings.temperature:g}; it needs 1")
        sampled = None if drifting is None else drifting.pairs()
        self._score_missing(sampled)
        beta, objective = self.policy.beta(config), self._objective()
        reference = {"path": config.reference_path, "adapter": config.reference_adapter}
        reference["identity"] = self.reference.identity.digest
        found: dict[str, Any] = {
            "raydpo": __version__,
            "policy": self.policy.name,
            "policy_identity": self.policy.spec.identity.digest,
            "reference": reference,
            "data": list(dict.fromkeys(self.pairs["source"].to_pylist())),
            "held_out": settings.data is None,
            "trained_on": self.trained_on,
            "beta": beta,
            "rewards": "per_token" if objective.per_token else "sum",
            "reward_of": _reward_of(objective),
            "train_on": _counted(config),
            "protocol": protocol(config, self.pairs, self.reference),
            "preferences": measure_preferences(self._scored_pairs(), beta, objective),
            "generation": None,
            "drift": None,
            "wins": [],
            "reward_functions": [],
            "samples": [],
        }
        if not modes:
            return found, None
        found["generation"] = {
            "prompts": len(prompts),
            "max_tokens": settings.max_tokens,
            "modes": {mode: answers.style() for mode, answers in modes.items()},
        }
        ratios = steps = None
        if drifting is not None:
            (policy, _), (base, _) = self._log_probs(sampled)
            ratios, steps = policy - base, self._exact_steps(sampled) if settings.exact_steps else None
            lengths = np.array([len(answer) for answer in drifting.policy])
            found["drift"] = measure_drift(ratios, lengths, drifting.places, steps)
        found["wins"], verdicts = self._wins(prompts, modes)
        rewarded = self._rewards(prompts, modes)
        found["reward_functions"] = [each for one in rewarded.values() for each in one.figures(settings.rewards)]
        found["samples"] = next(iter(modes.values())).shown()
        samples = []
        for mode, answers in modes.items():
            drift = (ratios, steps) if answers is drifting else (None, None)
            columns = rewarded[mode].columns() if mode in rewarded else {}
            samples.append(answers.table(*drift, verdicts.get(mode, {}), columns))
        return found, pa.concat_tables(samples)

    def _objective(self) -> ObjectiveConfig:
        """Return the objective that defines the rewards: evaluate.log_ratios, or else that of the policy's training."""
        settings = self.config.evaluate
        if settings.log_ratios is not None:
            return ObjectiveConfig(loss="sigmoid_norm" if settings.log_ratios == "per_token" else "sigmoid")
        settled = self.policy.trained
        trained = {name: settled[f"train.{name}"] for name in ObjectiveConfig.model_fields if f"train.{name}" in settled}
        objective = ObjectiveConfig(**trained) if "loss" in trained else self.config.train
        if objective.ld_alpha is not None:
            self.console.warn(
                f"the policy was trained with ld_alpha {objective.ld_alpha:g}; its rewards are measured without it here"
            )
        return objective

    def write(self, found: dict[str, Any], samples: pa.Table | None) -> None:
        if samples is not None:
            sink = io.BytesIO()
            pq.write_table(samples, sink, compression="zstd")
            self.storage.write(self.file("samples", "parquet"), sink.getvalue())
        self.storage.write(self.file("evaluation", "json"), json.dumps(found, indent=1, allow_nan=False).encode())

    # ---- log-probs

    @property
    def _specs(self) -> tuple[tuple[str, ReferenceSpec], ...]:
        return ("policy", self.policy.spec), ("reference", self.reference)

    def _cache(self, spec: ReferenceSpec) -> ReferenceCache:
        return ReferenceCache.open(self.config.cache_uri, spec.identity, unverified=self.config.cache.allow_unverified)

    def _score_missing(self, sampled: pa.Table | None) -> None:
        """Fill the caches for the pairs, if evaluate.score_missing is on, and for the samples that measure drift."""
        tables = [self.pairs] * self.config.evaluate.score_missing + ([] if sampled is None else [sampled])
        for name, spec in self._specs if tables else ():
            self.console.say(f"log-probs of the {name}:")
            fill_cache(tables, spec, self._cache(spec), self.config, self.console)

    def _scored_pairs(self) -> ScoredPairs:
        policy, reference = self._log_probs(self.pairs)
        tokens = (counts(self.pairs, side) for side in ("chosen", "rejected"))
        sources = np.array(self.pairs["source"].to_pylist(), object)
        labels = self.pairs[LABEL].to_numpy() if LABEL in self.pairs.column_names else None
        return ScoredPairs(*policy, *reference, *tokens, sources, prompt_numbers(self.pairs), labels)

    def _log_probs(self, pairs: pa.Table) -> list[list[np.ndarray]]:
        """Return sums over chosen and rejected completions, by policy and by reference: float64 [pairs] each."""
        found = []
        for name, spec in self._specs:
            cache = self._cache(spec)
            sums = [side.sums for side in reference_values(pairs, cache)]
            lacking = np.isnan(sums[0]) | np.isnan(sums[1])
            if lacking.any():
                raise CacheMissError(
                    f"log-probs of the {name} are missing for {int(lacking.sum()):,} of {len(lacking):,} pairs (first: "
                    f"{pairs['pair_id'][int(lacking.argmax())].as_py()}) in {cache.storage}, identity "
                    f"{spec.identity.digest}; set evaluate.score_missing=true to score them"
                )
            found.append(sums)
        return found

    def _exact_steps(self, sampled: pa.Table) -> np.ndarray:
        rows = pa.table({"prompt_ids": sampled["prompt_ids"], "answer_ids": sampled["chosen_ids"]})
        work = ExactSteps(policy=self.policy.spec, reference=self.reference)
        placed = place_reference(self.config, self.reference)
        if placed.problem is not None:
            raise placed.problem
        return self._do(work, [rows], "exact steps", placed.resources)[0]["divergence"].to_numpy()

    # ---- answers

    def _answers(self, prompts: Sequence[Prompt]) -> dict[str, Answers]:
        """Let policy and reference answer ``prompts``; return the answers by mode."""
        settings = self.config.evaluate
        for name, spec in self._specs:
            check_alone(self.config, spec, f"answers of the {name}")
        tables, places = [], []
        for mode in settings.modes:
            each = settings.samples if mode == "sampled" else 1
            places.append(np.divmod(np.arange(len(prompts) * each), each))
            drawn = {"seed": settings.seed, "temperature": settings.temperature} if mode == "sampled" else {}
            rows = [
                {"prompt_ids": prompts[place].ids, **drawn, "sample": sample if drawn else None}
                for place, sample in zip(*(each.tolist() for each in places[-1]), strict=True)
            ]
            tables.append(pa.Table.from_pylist(rows, schema=ROWS))
        how = {
            "max_tokens": settings.max_tokens,
            "batch": settings.batch,
            "engine": settings.engine,
            "python": settings.vllm_python,
            "positions": max(len(prompt.ids) for prompt in prompts) + settings.max_tokens,
            "memory_share": resources_for("score", self.config).memory_share,
        }
        sides = []
        for name, spec in self._specs:
            work = Answering(spec=spec, stop=self.tokeniser.stop_ids, **how)
            done = [one["answer_ids"].to_pylist() for one in self._do(work, tables, f"answers of the {name}")]
            sides.append([[np.array(ids, np.int32) for ids in answers] for answers in done])
        return {
            mode: Answers(mode, [prompts[place] for place in place_of], place_of, samples, policy, reference, self.tokeniser)
            for mode, (place_of, samples), policy, reference in zip(settings.modes, places, *sides, strict=True)
        }

    def _wins(
        self, prompts: Sequence[Prompt], modes: dict[str, Answers]
    ) -> tuple[list[dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
        """Return the wins for evaluation.json, and the verdicts on the contests by mode and setting of the judge."""
        settings = self.config.evaluate
        found: list[dict[str, Any]] = []
        verdicts: dict[str, dict[str, np.ndarray]] = {mode: {} for mode in modes}
        if not (settings.judge or settings.reward_model or settings.score_with):
            return found, verdicts
        texts = prompt_texts(prompts, self.config)
        contests = {mode: answers.contests(texts) for mode, answers in modes.items()}

        def count(setting: str, name: str, mode: str, told: tuple[np.ndarray, dict[str, Any]]) -> None:
            verdicts[mode][setting], more = told
            found.append(count_wins(name, mode, contests[mode], verdicts[mode][setting], **more))

        if settings.reward_model is not None:
            work = RewardModel.at(
                resolve_model(settings.reward_model), self.reference.identity.dtype, self.config.model.trust_remote_code
            )
            tables = []
            for each in contests.values():
                asked = [json.dumps(one.prompt, sort_keys=True) for one in each]
                for side in ("policy", "reference"):
                    tables.append(pa.table({"prompt": asked, "answer": [getattr(one, side) for one in each]}))
            scored = self._do(work, tables, "rewards")
            self._told_by_reward_model(settings.reward_model, scored)
            sides = iter([one["score"].to_numpy() for one in scored])
            for mode, each in contests.items():
                policy, reference = next(sides), next(sides)
                equal = np.array([one.policy == one.reference for one in each])  # rounding must not decide a tie
                count("reward_model", settings.reward_model, mode, by_scores(np.where(equal, reference, policy), reference))
        for mode, each in contests.items():
            if settings.score_with is not None:
                count("score_with", settings.score_with, mode, by_scores(*own_scores(settings.score_with, each)))
            if settings.judge is not None:
                with Judge(settings.judge) as judge, self.console.part("judging") as progress:
                    judged = judge_contests(judge, each, Storage(self.config.cache_uri), progress, self.console.warn)
                    count("judge", judge.name, mode, judged)
        return found, verdicts

    def _told_by_reward_model(self, path: str, scored: Sequence[pa.Table]) -> None:
        """Say which answers a reward model cannot score, and that it scores no batches.

        Raises:
            RaydpoError: if it can score none.
        """
        rows = pa.concat_tables(scored)
        if why := rows["alone"].drop_null().to_pylist():
            self.console.warn(f"the reward model {path} scores one answer at a time, which is slower: {why[0]}")
        if errors := rows["error"].drop_null().to_pylist():
            if len(errors) == rows.num_rows:
                raise RaydpoError(f"the reward model {path} scored no answer: {errors[0]}")
            self.console.warn(
                f"the reward model {path} could not score {len(errors):,} of {rows.num_rows:,} answers, whose contests are "
                f"not judged (first: {errors[0]})"
            )

    def _rewards(self, prompts: Sequence[Prompt], modes: dict[str, Answers]) -> dict[str, Rewarded]:
        """Score the answers of policy and reference with the reward functions; return their rewards by mode."""
        rewards, found = self.config.evaluate.rewards, {}
        records = prompt_records(prompts, self.config, {}) if rewards else []
        for mode, answers in modes.items() if rewards else ():
            self.console.say(f"rewards of {mode} answers:")
            scored = apply(rewards, answers_to_score(answers, records), self.config, self.console)
            found[mode] = Rewarded.of(answers, scored)
            for line in found[mode].account(rewards):
                self.console.warn(line)
        return found

    def _do(
        self, work: BlockTask, tables: Sequence[pa.Table], doing: str, resources: Resources | None = None
    ) -> list[pa.Table]:
        storage, resources = Storage(self.config.cache_uri), resources or resources_for("score", self.config)
        with self.console.part(doing) as progress:
            warn = self.console.warn
            return do_work(work, tables, storage, resources, block=WORK_BLOCK, progress=progress, doing=doing, warn=warn)


def _trained_on(config: Config, policy: Policy, pairs: pa.Table, console: Console) -> int | None:
    """Number of ``pairs`` that the policy was trained on; None if no run made it or its data cannot be read."""
    if policy.run is None:
        return None
    try:
        trained = config if config.evaluate.policy is None else load_config(yaml.safe_load(policy.run.read(CONFIG)))
        return trained_on(pairs, config, trained.data)
    except (RaydpoError, OSError, yaml.YAMLError) as error:
        console.warn(
            f"the training data of {policy.name} cannot be read, so it is unknown whether the pairs are in it: {error}"
        )
        return None


def _reward_of(objective: ObjectiveConfig) -> str:
    if not objective.needs_reference:
        return "log-probs of the policy alone"
    plain = objective.f_divergence_type == "reverse_kl"
    return "log-ratios" if plain else f"log-ratios under {objective.f_divergence_type}"

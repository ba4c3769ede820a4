"""``raydpo sweep``: scores what all trials need in one pass, then trains the trials, in parallel where there is room."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from raydpo.cluster.preflight import check_cluster
from raydpo.cluster.session import owns_ray, session
from raydpo.cluster.waiting import request_nodes
from raydpo.config import Config, lower_is_better
from raydpo.config.counting import counting_texts
from raydpo.data.mismatch import mismatched_run
from raydpo.errors import ConfigError, RaydpoError
from raydpo.pipeline.checks import check, check_labels, check_models, pythons_of
from raydpo.pipeline.evaluate import evaluate, pairs_to_evaluate, protocol
from raydpo.pipeline.prepare import Prepared, measured_pairs
from raydpo.pipeline.score import score_prepared
from raydpo.pipeline.tokenised import Tokenised
from raydpo.pipeline.train import Joined, TrialContext, join_sets, train_prepared
from raydpo.reference.shards import Wanted
from raydpo.reports.sweep import recommendation_of
from raydpo.reports.write import write_report_or_warn
from raydpo.rundir.directory import CONFIG, DRIVER_LOG, EVAL, EVALUATION, RUN, SUMMARY, SWEEP, RunDirectory
from raydpo.rundir.earlier import begin_again, finished_summary
from raydpo.rundir.read import SweepRecord
from raydpo.rundir.records import read_rows
from raydpo.storage.files import Storage
from raydpo.sweeps.halving import rungs, survivors
from raydpo.sweeps.ledger import Ledger
from raydpo.sweeps.packing import trials_at_once
from raydpo.sweeps.table import SweepTable, TrialDisplay
from raydpo.sweeps.trials import Trial, parameters_of, trials_of
from raydpo.terminal.console import Console
from raydpo.terminal.interrupt import interruptible
from raydpo.training.launch.board import start_mailbox
from raydpo.training.pair_files import PairFolder

__all__ = ["sweep"]

MOST_NAMED = 5
"""Number of equally good trials that are named."""


def sweep(config: Config, console: Console | None = None, *, fresh: bool = False) -> dict[str, Any]:
    """Train every trial of ``config.sweep`` against one cache.

    The same call continues a sweep: finished trials are kept, interrupted ones continue from their checkpoints, and new
    trials are trained.

    Args:
        fresh: begin again, and rename an earlier sweep of the same name to ``NAME~1``.

    Returns:
        The content of sweep.json. A trial that failed has its error there; the others are trained.

    Raises:
        ConfigError: if the configuration of a trial is wrong, or an earlier trial of its name has other settings.
        RaydpoError: if the reference pass fails. The subclass and the message say why.
        KeyboardInterrupt: if the user stopped it, after running trials have written their checkpoints.
    """
    console = console or Console()
    trials = trials_of(config)
    configs = [trial.config for trial in trials]
    check(config, "sweep", console, configs)
    storage = Storage(config.run_dir)
    if storage.exists(RUN):
        raise ConfigError(f"{storage} is the directory of a single run; give the sweep another name (name=...)")
    largest = max((trial.config for trial in trials), key=lambda one: one.train.most_workers)
    distinct = {_shared(trial.config): trial.config for trial in reversed(trials)}
    tokenised = {key: Tokenised.before_ray(one, console) for key, one in reversed(distinct.items())}
    for trial in trials:
        if (read := tokenised[_shared(trial.config)]) is not None:
            check_labels(trial.config, [read.sets.train, read.sets.eval])
    check_models(config, "sweep", console, configs)
    if fresh:
        begin_again(storage, console, SWEEP)
    with session(largest):
        check_cluster(config, ["score", "train"], console, pythons=pythons_of(configs) if config.sweep.evaluate else ())
        prepared = _prepare(trials, tokenised, console)
        for one in prepared.values():  # refuse trials whose earlier run had other settings
            finished_summary(Storage(one.config.run_dir), one.fingerprint(), one.sets.train)
        same_pairs = _on_same_pairs(config, prepared, console)
        at_once = trials_at_once(config, trials)
        storage.probe()
        storage.write(CONFIG, config.to_yaml().encode())
        ledger = Ledger(config, trials, same_pairs=same_pairs)
        to_train = any(not Storage(trial.config.run_dir).exists(SUMMARY) for trial in trials)
        with PairFolder(storage, one_machine=owns_ray()) as folder:
            with request_nodes(largest, wanted=to_train, trainings=at_once):
                shared = _score(config, prepared, ledger, folder, console)
            console.say(f"sweep: {len(trials)} trials over {', '.join(parameters_of(trials))}; {at_once} at once")
            with SweepTable(console, ledger) as table:
                _Sweep(prepared, shared, ledger, table, at_once).run()
    best, metric = ledger.best(), config.sweep.metric
    if best:
        which = "lowest" if lower_is_better(metric) else "highest"
        names = ", ".join(entry.trial.name for entry in best[:MOST_NAMED])
        more = f" and {len(best) - MOST_NAMED} more" if len(best) > MOST_NAMED else ""
        console.say(f"{which} {metric}: {names}{more} ({best[0].eval[metric]:z.4f})")
    _say_which_to_take(storage, console)
    console.say(f"sweep: {storage}/{SWEEP}")
    write_report_or_warn(config.run_dir, console)
    return ledger.to_dict()


def _shared(config: Config) -> str:
    """The settings of data and models, as JSON; trials in which they are equal share their pairs and their reference."""
    resolved = config.model_dump(mode="json", include={"model", "reference", "data"})
    for trains_only in ("lora", "freeze"):
        del resolved["model"][trains_only]
    return json.dumps(resolved)


def _prepare(trials: list[Trial], tokenised: dict[str, Tokenised | None], console: Console) -> dict[str, Prepared]:
    """Prepare all trials, by name. Trials with equal data and models share everything but their settings.

    Args:
        tokenised: pairs that were read before, by ``_shared``.

    Raises:
        ConfigError: if they do not share one reference.
    """
    groups: dict[str, Prepared] = {}
    trained: dict[tuple[str, int | None], Prepared] = {}
    prepared: dict[str, Prepared] = {}
    for trial in trials:
        key = _shared(trial.config)
        if key not in groups:
            groups[key] = Prepared.of(trial.config, console, tokenised[key])
            trained[key, mismatched_run(trial.config.train)] = groups[key]
        if (alike := (key, mismatched_run(trial.config.train))) not in trained:
            trained[alike] = groups[key].trained_by(trial.config)
        prepared[trial.name] = dataclasses.replace(trained[alike], config=trial.config)
    first, *others = prepared.items()
    ours = first[1].reference.identity
    for name, other in others:
        if other.reference.identity != ours:
            raise ConfigError(
                f"trial {name} needs another reference than trial {first[0]} "
                f"({'; '.join(ours.differences(other.reference.identity))}), but a sweep scores one. Set "
                "reference.path, reference.quantization and score.dtype so that all trials share it, or make "
                "two sweeps"
            )
    return prepared


def _on_same_pairs(config: Config, prepared: dict[str, Prepared], console: Console) -> bool:
    """Whether all trials are measured on the same held-out pairs, and on the same tokens of them. Trials that an earlier
    call trained count, too.

    Raises:
        ConfigError: if they are not, and sweep.stop_early is set.
    """
    now: dict[int, str | None] = {}
    first: dict[str, str] = {}  # digest of the pairs, and of what counts in them -> a trial that is measured on them
    counted: dict[str, str] = {}  # what counts in them, in words -> the same
    for name, one in prepared.items():
        storage = Storage(one.config.run_dir)
        digests, settings = [], one.config.model_dump(mode="json", include={"data"})
        if storage.exists(RUN):
            digests.append(json.loads(storage.read(RUN)).get("held_out"))
        if not storage.exists(SUMMARY):
            if id(one.own) not in now:
                now[id(one.own)] = measured_pairs(one.own.eval)
            digests.append(now[id(one.own)])
        elif storage.exists(CONFIG):  # its figures are of the tokens that counted then
            settings = yaml.safe_load(storage.read(CONFIG))
        for digest in filter(None, digests):
            first.setdefault(digest, name)
        counted.setdefault(counting_texts(settings["data"])[1] or "", name)
    if len(first) < 2:
        return True
    found, fix = _why_apart(list(first.values()), counted)
    if config.sweep.stop_early is not None:
        raise ConfigError(f"{found}, and sweep.stop_early would stop the wrong ones. {fix}, or set sweep.stop_early=null")
    console.warn(f"{found}: none will be recommended. {fix}")
    return False


def _why_apart(trials: list[str], counted: dict[str, str]) -> tuple[str, str]:
    """Why trials cannot be compared, and what to do.

    Args:
        trials: names of trials that are measured on different pairs, or on different tokens of them.
        counted: what counts in held-out pairs, in words, with the name of a trial.
    """
    if len(counted) > 1:
        parts = "; ".join(f"{words} ({name})" for words, name in counted.items())
        return (
            f"trials are measured on different tokens of the held-out pairs ({parts}), so their accuracies do not compare",
            "Set data.eval.train_on, for example data.eval.train_on=completion, so that all are measured on the same "
            "tokens; a trial that is done keeps its figures",
        )
    one, other, *_ = trials
    return (
        f"trials are measured on different held-out pairs (as {one} and {other} are), so their figures do not compare",
        "Hold out the same pairs in all of them: a separate file (data.eval.path) that no setting of section data changes. "
        "Or make two sweeps",
    )


def _say_which_to_take(storage: Storage, console: Console) -> None:
    """Print the recommendation of the sweep's page."""
    try:
        found = recommendation_of(SweepRecord.read(storage))
    except Exception as error:  # the trials are stored
        console.warn(f"no trial is recommended ({type(error).__name__}: {error}); 'raydpo report' tries again")
        return
    console.say(f"recommended: {found.point.name if found.point else 'none'}. {found.reason}")


def _score(
    config: Config, prepared: dict[str, Prepared], ledger: Ledger, folder: PairFolder, console: Console
) -> dict[str, Joined]:
    """Score what all trials need in one pass. Return the files of the pairs of each trial, in ``folder``, where each set of
    pairs is stored once."""
    sets = {_pairs_of(one): one for one in prepared.values()}
    compare = [one for one in sets.values() if one.config.needs_reference]
    first = next(iter([*compare, *prepared.values()]))
    # Workers read the tokens of stored sets where they are; those of trials on several data travel in the tables.
    everything = [table for one in compare for table in one.tables] if len(compare) > 1 else None
    rates = {key: _hit_rate(one) for key, one in sets.items()}  # before the pass, which stores all of them
    # The audit is written for the configuration of the sweep, in its directory, with its loss and beta. But the pairs are
    # those of the first trial, and the audit tells which of their tokens count.
    sections = ("data",) if config.needs_reference else ("data", "train")
    whole = config.model_copy(update={name: getattr(first.config, name) for name in sections})
    score_prepared(dataclasses.replace(first, config=whole), console, everything)
    joined = {key: join_sets(one, folder, console) for key, one in sets.items()}
    ledger.found_in_cache(first.reference.identity.digest, [rates[_pairs_of(one)] for one in prepared.values()])
    return {name: joined[_pairs_of(one)] for name, one in prepared.items()}


def _hit_rate(prepared: Prepared) -> float | None:
    """Share of the completions that the cache holds, 0 to 1; None without a reference."""
    if not prepared.config.needs_reference:
        return None
    wanted = Wanted(prepared.tables)
    return float(prepared.cache.covers(wanted.keys, wanted.tokens).mean())


def _pairs_of(prepared: Prepared) -> tuple[int, bool]:
    """Return a key that is equal for trials that train on the same pairs, joined alike."""
    return id(prepared.sets), prepared.config.needs_reference


class _Sweep:
    """Runs the trials: one thread for each running trial waits for its Ray Train run.

    Ray Tune is not used. It would start a process for each trial only to wait (4.2 s of CPU time and 408 MB for imports), it
    cannot add trials when it resumes, and its schedulers stop trials depending on their order of arrival.
    """

    def __init__(
        self, prepared: dict[str, Prepared], shared: dict[str, Joined], ledger: Ledger, table: SweepTable, at_once: int
    ) -> None:
        self.prepared, self.shared, self.ledger, self.table, self.at_once = prepared, shared, ledger, table, at_once
        self.config = ledger.config
        self.hit_rates = dict(zip(prepared, ledger.cache["hit_rates"], strict=True))
        self._boards: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._stopping = False
        self._loaded: dict[Any, pa.Table] = {}  # pairs of evaluate.data
        self._loading = threading.Lock()

    def run(self) -> None:
        """Train all trials to their end, or until they are stopped early.

        Raises:
            KeyboardInterrupt: if the user stopped the sweep.
        """
        self.ledger.write()
        interruptible(self._train_all, on_first=self._stop)
        if self._stopping:
            raise KeyboardInterrupt

    def _train_all(self) -> None:
        early, going = self.config.sweep.stop_early, list(self.prepared)
        for step in rungs(early) if early is not None else ():
            if len(going) < 2:
                break
            self._train(going, step)
            if self._stopping:
                return
            going = self._choose(going, step)
        self._train(going, None)

    def _choose(self, going: list[str], step: int) -> list[str]:
        """Return the trials of ``going`` that continue after ``step``.

        Trials that had failed or were complete at ``step`` are left out. A trial that completed later is compared.
        """
        early, metric = self.config.sweep.stop_early, self.config.sweep.stop_metric
        scores: dict[str, float] = {}
        for name in going:
            measured, result = self._measured(name, step), self._result(name)
            if self.ledger.entries[name].status == "failed" or measured is None or (result and result["steps"] <= step):
                continue
            if measured.get(metric) is None:  # null where another evaluation of the same file has it
                known = sorted(key for key, value in measured.items() if value is not None)
                raise ConfigError(
                    f"sweep.stop_early compares by {metric!r}, which the evaluation of {name} after step {step} does not "
                    f"measure; expected one of {', '.join(known)}"
                )
            scores[name] = measured[metric]
        better = survivors(scores, early.keep, lower_is_better=lower_is_better(metric))
        for name in scores:
            if name not in better and self.ledger.entries[name].status != "done":
                self.ledger.set(name, "stopped")
                self.table.ended(name)
        return [name for name in scores if name in better]

    def _train(self, names: list[str], until: int | None) -> None:
        """Train trials to their end, or until a step."""
        to_do = [
            name
            for name in names
            if self.ledger.entries[name].status not in ("done", "failed")
            and (until is None or self._result(name) is not None or self._measured(name, until) is None)
        ]
        with ThreadPoolExecutor(self.at_once, thread_name_prefix="raydpo-trial") as pool:
            for done in [pool.submit(self._trial, name, until) for name in to_do]:
                done.result()

    def _trial(self, name: str, until: int | None) -> None:
        if self._stopping:
            return
        config = self.prepared[name].config
        with _log(config) as log:
            try:
                if self._result(name) is None and not self._trained(name, until, log):
                    self.ledger.set(name, "waiting")
                else:
                    if self.config.sweep.evaluate and not self._evaluated(name, log):
                        evaluate(config, log)
                    self.ledger.set(name, "done")
            except Exception as error:
                log.say(traceback.format_exc())
                known = isinstance(error, RaydpoError)
                self.ledger.set(name, "failed", str(error) if known else f"unexpected {type(error).__name__}: {error}")
        self.table.ended(name)

    def _trained(self, name: str, until: int | None, log: Console) -> bool:
        """Train a trial. Returns False if it paused at ``until`` or the user stopped the sweep."""
        with self._lock:
            if self._stopping:
                return False
            board = self._boards[name] = start_mailbox()
        self.ledger.set(name, "running")
        display = TrialDisplay(log, self.table, name)
        context = TrialContext(joined=self.shared[name], at_once=self.at_once, board=board, until=until, display=display)
        try:
            return train_prepared(self.prepared[name], log, self.hit_rates[name], shared=context) is not None
        except KeyboardInterrupt:
            return False
        finally:
            with self._lock:
                del self._boards[name]

    def _stop(self) -> None:
        with self._lock:
            self._stopping = True
            for board in self._boards.values():
                board.stop.remote()

    def _evaluated(self, name: str, log: Console) -> bool:
        """Whether the trial has an evaluation by the present settings and on the present pairs."""
        prepared = self.prepared[name]
        config, storage = prepared.config, Storage(prepared.config.run_dir)
        if not storage.exists(EVALUATION):
            return False
        pairs = prepared.own.eval
        if config.evaluate.data is not None:
            with self._loading:  # once for all trials that measure on them
                key = (id(prepared.sets), config.evaluate.model_dump_json(include={"data", "subsets", "chat"}))
                if key not in self._loaded:
                    self._loaded[key], _ = pairs_to_evaluate(config, prepared.tokeniser, log)
                pairs = self._loaded[key]
        wanted = protocol(config, pairs, prepared.reference)
        return json.loads(storage.read(EVALUATION)).get("protocol") == wanted

    def _result(self, name: str) -> dict[str, Any] | None:
        """Return the summary of a trial, None if it is not complete."""
        return RunDirectory(Storage(self.prepared[name].config.run_dir)).summary()

    def _measured(self, name: str, step: int) -> dict[str, float] | None:
        """Return the held-out evaluation of a trial after ``step``, None if there is none."""
        rows = read_rows(Storage(self.prepared[name].config.run_dir), EVAL)
        return next((row for row in rows if row["step"] == step), None)


@contextlib.contextmanager
def _log(config: Config) -> Iterator[Console]:
    """Open the driver.log of a trial. For a run at a URI the output is dropped, since objects cannot be appended to."""
    storage = Storage(config.run_dir)
    if not storage.is_local:
        yield Console(io.StringIO())
        return
    path = Path(storage.path(DRIVER_LOG))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", errors="replace", buffering=1) as stream:
        yield Console(stream)

"""``raydpo rounds``: in each round the policy answers prompts, reward functions score the answers, pairs of better and worse
ones are trained on, and the policy is measured on held-out prompts."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from raydpo.cluster.preflight import check_cluster
from raydpo.cluster.session import session
from raydpo.cluster.waiting import request_nodes
from raydpo.config import Config, check_verb
from raydpo.errors import RaydpoError
from raydpo.reports.write import write_report
from raydpo.rounds.before import check_inputs, prompts_made, refuse_changes
from raydpo.rounds.goal import Goal, enough, goes_on
from raydpo.rounds.inputs import Inputs
from raydpo.rounds.ledger import Ledger
from raydpo.rounds.round import Ended, Round
from raydpo.rounds.stage import Content, stage_table
from raydpo.rounds.table import print_rounds
from raydpo.rundir.directory import CONFIG, FINAL, LEDGER, PROMPTS, REPORT, SAMPLES, TRAIN, round_folder
from raydpo.rundir.earlier import begin_again
from raydpo.rundir.rounds import PROMPT_SCHEMA
from raydpo.storage.files import Storage
from raydpo.storage.local_copy import RemoteDirectory
from raydpo.terminal.console import Console

__all__ = ["rounds"]


def rounds(
    config: Config, console: Console | None = None, *, fresh: bool = False, until: str | None = None
) -> dict[str, Any]:
    """Do all rounds of ``config.rounds``, each in a folder of its own.

    The same call continues: what is stored is read, and nothing stored is made again.

    Args:
        fresh: begin again, and rename earlier rounds of the same name to ``NAME~1``.
        until: the last stage, ``ROUND`` or ``ROUND.STAGE``, such as ``2.score``; None = the end.

    Returns:
        The content of rounds.json.

    Raises:
        ConfigError: if settings are wrong, or differ from those of stored rounds in a way that decides them.
        RaydpoError: if a stage fails, or a round has no pair to learn from. What was computed is kept.
        KeyboardInterrupt: if the user stopped it.
    """
    console = console or Console()
    check_verb(config, "rounds")
    goal = Goal.of(until, config)
    inputs = check_inputs(config, console)
    storage = Storage(config.run_dir)
    if fresh:
        begin_again(storage, console, LEDGER)
    ledger = Ledger(config)
    refuse_changes(inputs, ledger)
    if further := [number for number in ledger.records if number > inputs.rounds.count and ledger.over(number)]:
        console.warn(
            f"rounds.count is {inputs.rounds.count:,}, but round {max(further):,} is over, too: {FINAL} and the page are of "
            f"all {max(further):,} rounds; the policy of a round is in its own folder"
        )
    run = _Run(inputs, ledger, goal)
    if (told := run.nothing_to_do()) is None:
        console.begin("Ray")
        with session(config):
            check_cluster(config, ["score", "train"], console)
            with request_nodes(config):
                told = run.go()
    console.say(told)
    console.say(f"rounds: {storage}/{LEDGER}")
    if storage.exists(REPORT):
        console.say(f"report: {storage}/{REPORT}")
    return ledger.to_dict()


class _Run:
    """Does the rounds that are not over yet."""

    def __init__(self, inputs: Inputs, ledger: Ledger, goal: Goal) -> None:
        self.inputs, self.ledger, self.goal = inputs, ledger, goal
        self.config, self.console, self.storage = inputs.config, inputs.console, inputs.storage

    def nothing_to_do(self) -> str | None:
        """Say that all rounds were over before this command; None if one is not."""
        if not all(self.ledger.over(number) for number in range(self.inputs.rounds.count + 1)):
            return None
        self.ledger.set("done")
        self._page()  # the command that ended the rounds may have been killed before it
        print_rounds(self.console, self.ledger.rows())
        return f"all {self.inputs.rounds.count:,} rounds are already complete: {self.storage} (--fresh begins again)"

    def go(self) -> str:
        """Do the rounds, and say how they ended.

        Raises:
            RaydpoError: if a stage fails, or a round has nothing to learn from.
            KeyboardInterrupt: if the user stopped them.
        """
        self.storage.probe()
        self.storage.write(CONFIG, self.config.to_yaml().encode())
        again = not self.ledger.stages()
        stage_table(
            self.storage,
            PROMPTS,
            prompts_made(self.inputs),
            PROMPT_SCHEMA,
            lambda: Content(self.inputs.prompts),
            again=again,
        )
        self.ledger.set("running")
        try:
            return self._rounds()
        except KeyboardInterrupt:
            self.ledger.set("interrupted")
            raise
        except Exception as error:
            known = isinstance(error, RaydpoError)
            self.ledger.set("failed", str(error) if known else f"unexpected {type(error).__name__}: {error}")
            self._page()
            raise

    def _rounds(self) -> str:
        rounds = self.inputs.rounds
        for number in range(rounds.count + 1):
            if self.ledger.over(number):
                continue
            if number and (why := enough(number - 1, self.ledger.figures(number - 1), rounds.stop)) is not None:
                return self._stopped(why)
            sampled = self.storage.exists(f"{round_folder(number + 1)}/{SAMPLES}")
            one = Round(self.inputs, self.ledger, number, ahead=not sampled and goes_on(number, rounds, self.goal))
            for stage in one.stages:
                if not self.goal.wants(number, stage):
                    self.ledger.set("paused", f"paused before round {number}, stage {stage}, as --until asks")
                    self._page()
                    return f"{self.ledger.why}; the same command without --until goes on"
                self.console.begin(f"round {number}: {stage}")
                self.console.say(f"round {number} of {rounds.count}: {stage}")
                ended = one.stage(stage)
                self.ledger.write()
                if ended is not None:
                    return self._ended(one, ended)
                if stage != one.stages[-1]:
                    self._page()
            if number:
                self._finish(number)  # before the round is over: a command that is killed between the two does it again
            one.end()
            self._page()
            print_rounds(self.console, self.ledger.rows())
        self.ledger.set("done")
        self._page()
        return f"all {rounds.count:,} rounds are done; the policy is in {self.storage}/{FINAL}"

    def _ended(self, one: Round, ended: Ended) -> str:
        """End the rounds with one that is not trained.

        Raises:
            RaydpoError: if that is a failure.
        """
        if ended.status == "failed":
            raise RaydpoError(ended.why)
        one.end(ended)
        return self._stopped(ended.why)

    def _stopped(self, why: str) -> str:
        self.ledger.set("stopped", why)
        print_rounds(self.console, self.ledger.rows())
        self._page()
        return why

    def _page(self) -> None:
        """Write the page. Failure is a warning: the results are stored."""
        try:
            write_report(self.config.run_dir)
        except Exception as error:
            self.console.warn(f"the report failed ({type(error).__name__}: {error}); 'raydpo report' tries again")

    def _finish(self, number: int) -> None:
        """Let ``final`` be the policy of a round: a link on a disk, a copy on an object store."""
        target = f"{round_folder(number)}/{TRAIN}/{FINAL}"
        if not self.storage.is_local:
            whole = RemoteDirectory.now(Storage(f"{self.config.run_dir}/{round_folder(number)}/{TRAIN}"), FINAL)
            self.storage.upload(Path(whole.here()), FINAL)
            return
        link = Path(self.storage.path(FINAL))
        for left in link.parent.glob(f".{FINAL}-*"):  # by a command that was killed here
            left.unlink(missing_ok=True)
        temporary = link.with_name(f".{FINAL}-{uuid.uuid4().hex}")
        os.symlink(target, temporary)
        os.replace(temporary, link)

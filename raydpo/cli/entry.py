"""The command line ``raydpo VERB``. Exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydpo.cli.cache import add_cache_verbs, with_json
from raydpo.cli.configured import load_first_pairs, quietly
from raydpo.cli.rounds import add_rounds, joined
from raydpo.errors import ConfigError, TrainError
from raydpo.submit.command import add_jobs, add_submit, as_submit
from raydpo.terminal.arguments import at_least
from raydpo.terminal.console import Console, never_fail_to_print
from raydpo.terminal.guard import guarded
from raydpo.terminal.phases import collect_rarely
from raydpo.version import __version__

if TYPE_CHECKING:
    from raydpo.config import Config

__all__ = ["job", "main", "parsed"]

_SHOWN_RECORDS = 1000
"""Records that ``show`` reads of a large source at first; ten times as many if they do not give enough pairs."""
_PLANNED_RECORDS = 20_000
"""Records that ``plan`` reads of a large source."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status."""
    collect_rarely()
    never_fail_to_print()
    args = parsed(argv)

    def act(console: Console) -> int | None:
        console.verbose = getattr(args, "verbose", False)
        return args.act(args, console)

    return guarded(act, _interrupted(args))


def _interrupted(args: argparse.Namespace) -> str:
    """What is kept of a command that is interrupted, and how to continue it."""
    if args.verb == "gpu":
        return f"blocks that ended are in {args.out}. The same command starts again; --blocks runs single ones"
    if args.verb not in ("score", "train", "run", "sweep", "rounds"):
        return "the same command starts again"
    again = "Run the same command without --fresh" if getattr(args, "fresh", False) else "Run the same command again"
    return f"what was committed is kept. {again} to continue"


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Settings (``key.sub=value``) may stand before and after options."""
    parser = _parser()
    args, rest = parser.parse_known_args(joined(sys.argv[1:] if argv is None else argv))
    settings = [word for word in rest if "=" in word and not word.startswith("-")]
    if rest != (settings if hasattr(args, "overrides") else []):
        from raydpo.storage.uri import hidden

        parser.error(f"unrecognized arguments: {hidden(' '.join(rest))}")
    if settings:
        args.overrides = [*args.overrides, *settings]
    return args


def job(verb: str) -> int:
    """Run a verb as the entry point of a Ray job (``jobs/VERB.py``). With --dry-run, print the command that submits it."""
    if "--dry-run" in sys.argv[1:]:
        print(as_submit(verb, sys.argv[1:]))
        return 0
    return main([verb, *sys.argv[1:]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="raydpo", description="DPO on Ray. The frozen reference is scored once.")
    parser.add_argument("--version", action="version", version=f"raydpo {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, act: Callable[[argparse.Namespace, Console], int | None], about: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=about, description=about)
        verb.set_defaults(act=act)
        return verb

    def configured(name: str, act: Callable[[argparse.Namespace, Console], None], about: str) -> argparse.ArgumentParser:
        verb = add(name, act, about)
        verb.add_argument("config", metavar="CONFIG", help="YAML file of the run")
        verb.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="settings instead of the file's")
        return verb

    def verbose(verb: argparse.ArgumentParser) -> argparse.ArgumentParser:
        verb.add_argument("-v", "--verbose", action="store_true", help="print what the start-up does, with its seconds")
        return verb

    verbose(configured("score", _score, "score the pairs with the reference, once, and store the log-probs"))
    for name, about in (
        ("train", "train the policy with stored log-probs, or continue an interrupted run"),
        ("run", "score, then train"),
    ):
        verb = verbose(configured(name, _train, about))
        verb.add_argument("--fresh", action="store_true", help="start again; rename an earlier run of this name")
    sweep = configured("sweep", _sweep, "train with many settings and one cache, or continue an interrupted sweep")
    sweep.add_argument("--fresh", action="store_true", help="start again; rename an earlier sweep of this name")
    add_rounds(add, configured)
    show = configured("show", _show, "print pairs as the model sees them")
    show.add_argument("-n", "--count", type=at_least(1), default=3, help="number of pairs (default: %(default)s)")
    audit = configured("audit", with_json(_audit), "write a page on what the pairs teach, by lengths and cached log-probs")
    evaluate = configured("eval", with_json(_eval), "compare a policy with the reference: preferences, answers, drift, wins")
    plan = configured("plan", with_json(_plan), "estimate what a run takes: tokens, memory, GPU hours, dollars, idle time")
    plan.add_argument("--workers", type=int, metavar="N", help="number of devices of both stages (default: as configured)")
    plan.add_argument("--device", metavar="NAME", help="a GPU with a known peak rate, such as H100, A100-80GB or L4")
    for stage in ("score", "train"):
        plan.add_argument(f"--mfu-{stage}", type=float, metavar="X", help=f"share of the peak rate that {stage} reaches")
    plan.add_argument("--memory", type=float, metavar="GIB", help="memory of a device in GiB (default: as --device)")
    plan.add_argument("--price", type=float, metavar="D", help="dollars for a GPU hour")
    plan.add_argument("--runs", type=int, metavar="K", help="number of trainings with this reference, as in a sweep")
    plan.add_argument("--answer-tokens", type=float, metavar="X", help="mean length of a sampled answer, of rounds")
    plan.add_argument("--measure", action="store_true", help="measure the rate on this machine")
    plan.add_argument("--measured", metavar="FILE", help="take rates and memory from a report of 'raydpo gpu check'")
    for verb in (audit, evaluate, plan):
        verb.add_argument("--json", action="store_true", help="print one JSON object")
    report = add("report", _report, "write the page of a run, a sweep or rounds, or one that compares several")
    report.add_argument("paths", nargs="+", metavar="PATH", help="directory of a run, a sweep or rounds, local or URI")
    report.add_argument("--out", metavar="FILE", help="the page of several runs (default: comparison.html)")
    explain = add("explain", _explain, "write a page that derives the loss and shows what beta does")
    explain.add_argument("--out", metavar="FILE", default="explain.html", help="the page (default: %(default)s)")
    add_cache_verbs(verbs.add_parser("cache", help="list, show, verify, compare, compact, clean, export or import a cache"))
    add_submit(verbs.add_parser("submit", help="run a verb as a job on a Ray cluster"), _check_before_submit)
    add_jobs(verbs.add_parser("jobs", help="list, follow or stop the jobs of a Ray cluster"))
    add("doctor", _doctor, "show versions, devices, compiler and Ray cluster of this machine")
    _add_gpu(verbs.add_parser("gpu", help="check that raydpo computes rightly and fast on this machine's GPU"))
    quickstart = add("quickstart", _quickstart, "train a small model on the preference pairs that raydpo ships")
    quickstart.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    return parser


def _add_gpu(gpu: argparse.ArgumentParser) -> None:
    about = "check kernels, log-probs, memory, resuming and speed on the first GPU, in at most nine minutes"
    check = gpu.add_subparsers(dest="gpu_verb", required=True, metavar="VERB").add_parser(
        "check", help=about, description=about
    )
    check.add_argument("--out", metavar="FILE", default="gpu-check.json", help="the report (default: %(default)s)")
    check.add_argument("--blocks", metavar="N,N", help="numbers of the blocks to run (default: all)")
    check.add_argument("--quick", action="store_true", help="only the blocks that prove results and memory, in four minutes")
    check.add_argument("--device", choices=["cpu"], help="compute tiny models on the CPU instead, to try the command")
    check.set_defaults(act=_gpu_check)


def _config(args: argparse.Namespace) -> Config:
    """The configuration that the command line names, with its overrides."""
    from raydpo.config import load_config

    return load_config(args.config, args.overrides)


def _check_before_submit(config: Config, verb: str) -> None:
    """Refuse settings with which a job would end at once. Needs no torch."""
    from raydpo.config import check_verb
    from raydpo.sweeps.trials import trials_of

    check_verb(config, verb)
    if verb == "sweep":
        trials_of(config, elsewhere=True)


def _score(args: argparse.Namespace, console: Console) -> None:
    config = _config(args)
    from raydpo.pipeline.score import score

    quietly(config, console, lambda: score(config, console))


def _train(args: argparse.Namespace, console: Console) -> None:
    config = _config(args)
    from raydpo.pipeline.run import run
    from raydpo.pipeline.train import train

    verb = train if args.verb == "train" else run
    quietly(config, console, lambda: verb(config, console, fresh=args.fresh))


def _sweep(args: argparse.Namespace, console: Console) -> None:
    config = _config(args)
    from raydpo.sweeps.run import sweep

    found: dict[str, Any] = {}
    quietly(config, console, lambda: found.update(sweep(config, console, fresh=args.fresh)))
    failed = [trial for trial in found["trials"] if trial["status"] == "failed"]
    if failed:
        told = "; ".join(f"{trial['name']}: {trial['error']}" for trial in failed)
        raise TrainError(
            f"{len(failed)} of {len(found['trials'])} trials failed: {told}. Run the same command again to retry them"
        )


def _show(args: argparse.Namespace, console: Console) -> None:
    config = _config(args)
    from raydpo.data.lists import count_of
    from raydpo.data.show import render_pairs

    most_records = max(_SHOWN_RECORDS, 2 * args.count)
    with console.quiet():
        first, tokeniser = load_first_pairs(config, most_records, console)
        while not first.whole and count_of(first.sets.train) < args.count:
            most_records *= 10
            first, tokeniser = load_first_pairs(config, most_records, console)
    for line in (*first.lines(), *first.sets.report.lines()):
        console.say(line)
    coloured = console.rich.color_system is not None and not console.rich.no_color
    for renderable in render_pairs(first.sets.train, tokeniser, args.count, coloured=coloured):
        console.print(renderable)


def _audit(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    config = _config(args)
    from raydpo.pipeline.audit import audit

    with console.quiet():
        return audit(config, console).to_dict()


def _eval(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    config = _config(args)
    from raydpo.pipeline.evaluate import evaluate

    with console.quiet():
        return evaluate(config, console)


def _plan(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    config = _config(args)
    from raydpo.estimate.display import plan_run, print_plan

    names = ("measure", "measured", "device", "mfu_score", "mfu_train", "workers", "price", "runs", "memory")
    asked = {name: getattr(args, name) for name in names}
    if config.rounds is not None:
        return _plan_rounds(config, args.answer_tokens, asked, console)
    if args.answer_tokens is not None:
        raise ConfigError(f"--answer-tokens {args.answer_tokens:g} has no effect without section rounds; drop it")
    with console.quiet():
        first, _ = load_first_pairs(config, _PLANNED_RECORDS, console)
        plan = plan_run(config, first.sets, first=first, **asked)
    for line in (*first.lines(), *first.sets.report.lines()):
        console.say(line)
    print_plan(plan, console)
    return plan.to_dict()


def _plan_rounds(config: Config, answer_tokens: float | None, asked: dict[str, Any], console: Console) -> dict[str, Any]:
    import pyarrow.compute as pc

    from raydpo.config.rewards import requests_of
    from raydpo.estimate.rounds import RoundPrompts
    from raydpo.estimate.rounds_display import estimate_rounds, print_rounds
    from raydpo.pipeline.tokenised import open_tokeniser
    from raydpo.rounds.prompts import held_out_of, read_prompts, slice_of

    rounds = config.rounds
    with console.quiet():
        found = read_prompts(config, open_tokeniser(config))
        lengths = pc.list_value_length(found["prompt_ids"]).to_numpy()
        prompts = RoundPrompts(train=lengths[slice_of(found, rounds, 1)], held_out=lengths[held_out_of(found, rounds)])
        held_out, n = len(prompts.held_out), rounds.measure.n
        asking = [(len(prompts.train), rounds.sample.n), (held_out, n, n)]
        if rounds.measure.greedy:  # greedy answers have duels with greedy ones
            asking.append((held_out, 1, 1))
        requests = sum(requests_of(reward, *each) for reward in rounds.rewards for each in asking)
        plan = estimate_rounds(config, prompts, requests=requests, answer_tokens=answer_tokens, **asked)
    print_rounds(plan, console)
    return plan.to_dict()


def _report(args: argparse.Namespace, console: Console) -> None:
    from raydpo.reports import write_comparison, write_report

    if len(args.paths) == 1:
        if args.out is not None:
            raise ConfigError(
                f"--out {args.out} is for a page of several runs; the page of one run is written into its "
                "directory. Drop --out, or give more run directories"
            )
        console.say(f"report: {write_report(args.paths[0])}")
        return
    out = Path(args.out or "comparison.html")
    write_comparison(args.paths, out)
    console.say(f"comparison: {out}")


def _explain(args: argparse.Namespace, console: Console) -> None:
    from raydpo.reports.explain import write_explanation

    write_explanation(Path(args.out))
    console.say(f"explanation: {args.out}")


def _doctor(args: argparse.Namespace, console: Console) -> None:
    from raydpo.cluster.doctor import report

    report(console)


def _gpu_check(args: argparse.Namespace, console: Console) -> int:
    from raydpo.gpu.command import check

    report = check(console, out=args.out, blocks=args.blocks, quick=args.quick, device=args.device)
    return int(report.summary["fail"] > 0)


def _quickstart(args: argparse.Namespace, console: Console) -> None:
    from raydpo.quickstart.config import quickstart_config

    config = quickstart_config(args.overrides, console)
    from raydpo.pipeline.run import run
    from raydpo.quickstart.effect import measure_effect, print_effect

    def act() -> None:
        run(config, console, fresh=True)
        effect = measure_effect(config)
        if effect is not None:
            print_effect(effect, console)

    quietly(config, console, act)

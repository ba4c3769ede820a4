"""``raydpo <verb>``: exit status 0 done, 1 failed, 2 bad input, 130 stopped."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import raydpo
from raydpo.cache_cli import add_cache_verbs
from raydpo.config import Config, load_config
from raydpo.config.uri import hidden
from raydpo.console import Console
from raydpo.errors import ConfigError, RaydpoError, TrainError, exit_status
from raydpo.interrupt import sigterm_as_interrupt
from raydpo.submit.command import add_jobs, add_submit, as_submit

if TYPE_CHECKING:
    from raydpo.data.pairs import PairSets
    from raydpo.data.tokenise import Tokeniser

__all__ = ["guarded", "job", "main", "parsed"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status."""
    args = parsed(argv)
    return guarded(lambda console: args.act(args, console))


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, in which settings may stand before and after options."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    settings = [word for word in rest if "=" in word and not word.startswith("-")]
    if rest != (settings if hasattr(args, "overrides") else []):
        parser.error(f"unrecognized arguments: {hidden(' '.join(rest))}")
    if settings:
        args.overrides = [*args.overrides, *settings]
    return args


def job(verb: str) -> int:
    """What ``jobs/<verb>.py`` does: the verb as the entry point of a Ray job, its log on standard output. With --dry-run,
    the command that submits it is printed instead."""
    if "--dry-run" in sys.argv[1:]:
        print(as_submit(verb, sys.argv[1:]))
        return 0
    return main([verb, *sys.argv[1:]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="raydpo", description="DPO on Ray, with the frozen reference scored once.")
    parser.add_argument("--version", action="version", version=f"raydpo {raydpo.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, act: Callable[[argparse.Namespace, Console], None], about: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=about, description=about)
        verb.set_defaults(act=act)
        return verb

    def configured(name: str, act: Callable[[argparse.Namespace, Console], None], about: str) -> argparse.ArgumentParser:
        verb = add(name, act, about)
        verb.add_argument("config", metavar="CONFIG", help="YAML file of the run")
        verb.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that win over the file")
        return verb

    configured("score", _score, "score the reference once and store its log-probs")
    for name, about in (("train", "train the policy against stored log-probs; continues an interrupted run"),
                        ("run", "score, then train")):
        verb = configured(name, _train if name == "train" else _run, about)
        verb.add_argument("--fresh", action="store_true", help="begin again; an earlier run of this name is set aside")
    sweep = configured("sweep", _sweep, "train many settings against one cache; continues an interrupted sweep")
    sweep.add_argument("--fresh", action="store_true", help="begin again; an earlier sweep of this name is set aside")
    show = configured("show", _show, "print pairs exactly as the model sees them")
    show.add_argument("-n", "--count", type=int, default=3, help="how many pairs (default: %(default)s)")
    audit = configured("audit", _audit, "what will these pairs teach? From lengths and cached log-probs, as a page")
    audit.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate = configured("eval", _eval, "measure a policy against the reference: preferences, answers, drift, wins")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    plan = configured("plan", _plan, "what a run would take: tokens, GPU hours, dollars, and time lost to imbalance")
    plan.add_argument("--workers", type=int, metavar="N", help="devices of both stages (default: as configured)")
    plan.add_argument("--device", metavar="NAME", help="a GPU whose peak is known, such as H100, A100-80GB or L4")
    for stage in ("score", "train"):
        plan.add_argument(f"--mfu-{stage}", type=float, metavar="X", help=f"share of its peak that it achieves: {stage}")
    plan.add_argument("--memory", type=float, metavar="GIB", help="memory of a device (default: the named device's)")
    plan.add_argument("--price", type=float, metavar="D", help="dollars of a GPU hour")
    plan.add_argument("--runs", type=int, metavar="K", help="trainings against the same reference, such as a sweep of beta")
    plan.add_argument("--measure", action="store_true", help="measure the rate of this machine instead")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    report = add("report", _report, "a run, a sweep, or several of them side by side, as a page; made at the end of every "
                                    "training, too")
    report.add_argument("paths", nargs="+", metavar="PATH", help="run or sweep directory, local or URI")
    report.add_argument("--out", metavar="FILE", help="page of several runs (default: comparison.html)")
    explain = add("explain", _explain, "where the loss comes from, and what beta does, as a page")
    explain.add_argument("--out", metavar="FILE", default="explain.html", help="the page (default: %(default)s)")
    add_cache_verbs(verbs.add_parser("cache", help="list, show, verify, compare, compact, clean, export, import a cache"))
    add_submit(verbs.add_parser("submit", help="score, train, run, sweep, eval or benchmark as a job of a Ray cluster"))
    add_jobs(verbs.add_parser("jobs", help="list, follow and stop the jobs of a Ray cluster"))
    add("doctor", _doctor, "versions, devices, compilers, Ray: what would be used here")
    quickstart = add("quickstart", _quickstart, "the whole job on a small model and the preference set that raydpo ships")
    quickstart.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser


def guarded(act: Callable[[Console], int | None]) -> int:
    """Run ``act``, which may return an exit status of its own; an error that raydpo explains costs one message, any other
    also its traceback, in a file."""
    console = Console()
    try:
        with sigterm_as_interrupt():
            return act(console) or 0
    except RaydpoError as error:
        print(f"error: {hidden(str(error))}", file=sys.stderr)
        return exit_status(error)
    except ModuleNotFoundError as error:
        print(f"error: this needs the package {error.name!r}; run: pip install 'raydpo[run]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; everything committed is kept, the same command continues", file=sys.stderr)
        return 130
    except Exception as error:
        with tempfile.NamedTemporaryFile("w", prefix="raydpo-", suffix=".log", delete=False) as log:
            import traceback

            log.write(hidden(traceback.format_exc()))
        print(f"error: unexpected {type(error).__name__}: {hidden(str(error))[:500]} (traceback in {log.name})",
              file=sys.stderr)
        return 1


def _quietly(config: Config, console: Console, act: Callable[[], object]) -> None:
    """Run ``act`` with everyone else's output in the run's logs (in a temporary file if the run lies on a URI)."""
    from raydpo.storage import Storage

    storage = Storage(config.run_dir)
    directory = Path(storage.path("logs")) if storage.is_local else Path(tempfile.mkdtemp(prefix="raydpo-logs-"))
    try:
        with console.noise_to(directory / "driver.log"):
            act()
    except OSError as error:
        if error.filename and str(directory) in str(error.filename):
            raise RaydpoError(f"cannot write to {directory}: {error}") from None
        raise


def _score(args: argparse.Namespace, console: Console) -> None:
    config = load_config(args.config, args.overrides)
    _quietly(config, console, lambda: raydpo.score(config, console))


def _train(args: argparse.Namespace, console: Console) -> None:
    config = load_config(args.config, args.overrides)
    _quietly(config, console, lambda: raydpo.train(config, console, fresh=args.fresh))


def _run(args: argparse.Namespace, console: Console) -> None:
    config = load_config(args.config, args.overrides)
    _quietly(config, console, lambda: raydpo.run(config, console, fresh=args.fresh))


def _sweep(args: argparse.Namespace, console: Console) -> None:
    config = load_config(args.config, args.overrides)
    found: dict[str, Any] = {}
    _quietly(config, console, lambda: found.update(raydpo.sweep(config, console, fresh=args.fresh)))
    failed = [trial for trial in found["trials"] if trial["status"] == "failed"]
    if failed:
        raise TrainError(f"{len(failed)} of {len(found['trials'])} trials failed: "
                         + "; ".join(f"{trial['name']}: {trial['error']}" for trial in failed)
                         + ". The same command tries them again")


def _show(args: argparse.Namespace, console: Console) -> None:
    from raydpo.data.show import render_pairs

    sets, tokeniser = _load_pairs(load_config(args.config, args.overrides))
    for line in sets.report.lines():
        console.say(line)
    for renderable in render_pairs(sets.train, tokeniser, args.count):
        console.print(renderable)


def _audit(args: argparse.Namespace, console: Console) -> None:
    config = load_config(args.config, args.overrides)
    with tempfile.TemporaryDirectory() as logs, console.noise_to(Path(logs) / "audit.log"):
        done = raydpo.audit(config, Console(io.StringIO()) if args.json else console)
    if args.json:
        print(json.dumps(done.to_dict(), indent=2))


def _eval(args: argparse.Namespace, console: Console) -> None:
    config = load_config(args.config, args.overrides)
    with tempfile.TemporaryDirectory() as logs, console.noise_to(Path(logs) / "eval.log"):
        found = raydpo.evaluate(config, Console(io.StringIO()) if args.json else console)
    if args.json:
        print(json.dumps(found, indent=2))


def _plan(args: argparse.Namespace, console: Console) -> None:
    config = load_config(args.config, args.overrides)
    from raydpo.estimate.report import plan_run, print_plan

    sets, _ = _load_pairs(config)
    with tempfile.TemporaryDirectory() as logs, console.noise_to(Path(logs) / "plan.log"):  # of loading weights
        plan = plan_run(config, sets, measure=args.measure, device=args.device, mfu_score=args.mfu_score,
                        mfu_train=args.mfu_train, workers=args.workers, price=args.price, runs=args.runs,
                        memory=args.memory)
    if args.json:
        print(json.dumps(plan.to_dict(), indent=2))
        return
    for line in sets.report.lines():
        console.say(line)
    print_plan(plan, console)


def _load_pairs(config: Config) -> tuple[PairSets, Tokeniser]:
    """The pairs of a configuration as the stages see them, without Ray."""
    from raydpo.data.filter import filtered_by_tokens
    from raydpo.data.pairs import load_pairs
    from raydpo.data.tokenise import Tokeniser, load_tokenizer
    from raydpo.reference.identity import resolve_model

    tokeniser = Tokeniser(load_tokenizer(resolve_model(config.model.tokenizer or config.model.path),
                                         chat_template=config.data.chat_template,
                                         trust_remote_code=config.model.trust_remote_code))
    return filtered_by_tokens(load_pairs(config.data, tokeniser), config.data)[0], tokeniser


def _report(args: argparse.Namespace, console: Console) -> None:
    from raydpo.report import write_comparison, write_report

    if len(args.paths) == 1:
        if args.out is not None:
            raise ConfigError(f"--out {args.out} is for the page of several runs; that of one is written beside its files")
        console.say(f"report: {write_report(args.paths[0])}")
        return
    out = Path(args.out or "comparison.html")
    write_comparison(args.paths, out)
    console.say(f"comparison: {out}")


def _explain(args: argparse.Namespace, console: Console) -> None:
    from raydpo.report.explain import write_explanation

    write_explanation(Path(args.out))
    console.say(f"explanation: {args.out}")


def _doctor(args: argparse.Namespace, console: Console) -> None:
    from raydpo.doctor import report

    report(console)


def _quickstart(args: argparse.Namespace, console: Console) -> None:
    from raydpo.quickstart import quickstart_config
    from raydpo.quickstart.effect import measure_effect, print_effect

    config = quickstart_config(args.overrides, console)

    def act() -> None:
        raydpo.run(config, console, fresh=True)
        effect = measure_effect(config)
        if effect is not None:
            print_effect(effect, console)

    _quietly(config, console, act)


if __name__ == "__main__":
    sys.exit(main())

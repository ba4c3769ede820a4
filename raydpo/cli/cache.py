"""``raydpo cache VERB``: inspect, verify, clean, export and import a reference cache, and the tokenised sets in it."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydpo.errors import CacheError, ConfigError
from raydpo.terminal.arguments import at_least
from raydpo.terminal.console import Console

if TYPE_CHECKING:
    from raydpo.pipeline.prepare import Prepared
    from raydpo.reference.store import ReferenceCache
    from raydpo.reference.verify import FilesReport, ScoresReport
    from raydpo.storage.files import Storage

__all__ = ["add_cache_verbs", "with_json"]

Act = Callable[[argparse.Namespace, Console], Any]


def add_cache_verbs(cache: argparse.ArgumentParser) -> None:
    """Add the verbs of ``raydpo cache`` to its parser."""
    verbs = cache.add_subparsers(dest="cache_verb", required=True, metavar="VERB")

    reference = "digest of the reference, or its first digits; needed if the cache holds several"
    either = "digest of the reference or tokenised set, or its first digits; needed if the cache holds several references"

    def add(
        name: str, act: Act, about: str, *, uri: bool = True, identity: bool = True, which: str = reference
    ) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=about, description=about)
        verb.set_defaults(act=act if act is _verify else with_json(act))  # verify prints what it found before it fails
        if uri:
            verb.add_argument("uri", metavar="URI", help="directory or URI of the cache")
            if identity:
                verb.add_argument("identity", nargs="?", help=which)
        verb.add_argument("--json", action="store_true", help="print one JSON object")
        return verb

    add("ls", _ls, "list the references and tokenised sets in a cache", identity=False)
    add("show", _show, "show one reference or tokenised set: identity, origin, contents, lengths, log-probs", which=either)
    about = "check all files of a cache; with --config, score a sample again and compare"
    verify = add("verify", _verify, about, which=either)
    verify.add_argument(
        "--config",
        nargs="+",
        metavar=("CONFIG", "key.sub=value"),
        help="the run whose pairs were scored: a cache holds no token ids. Imported rows that pass are used "
        "by training from then on",
    )
    verify.add_argument(
        "--sample",
        type=at_least(1),
        metavar="N",
        help="number of completions to score again, also of each import (default: 256)",
    )
    verify.add_argument("--all", action="store_true", help="score all completions again")
    verify.add_argument(
        "--tolerance",
        type=at_least(1e-9, float),
        metavar="X",
        help="largest mean difference over the tokens of a completion, in nats (default: 0.001 in float32, 0.1 in bfloat16)",
    )
    diff = add(
        "diff", _diff, "compare the identities of two references, and the log-probs of their common completions", uri=False
    )
    for name in ("a", "b"):
        diff.add_argument(name, metavar=f"URI_{name.upper()}[#IDENTITY]")
    compact = add("compact", _compact, "merge many small parts into few, also while others read and write the cache")
    compact.add_argument("--target-mb", type=at_least(1, float), metavar="M", help="size of a merged part (default: 128)")
    gc = add("gc", _gc, "list files that are no longer needed: temporary, merged and damaged ones", identity=False)
    gc.add_argument("--delete", action="store_true", help="delete them")
    about = "write the pairs of a configuration with their reference log-probs to a Parquet file"
    export = add("export", _export, about, uri=False)
    export.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    export.add_argument("out", metavar="OUT.parquet")
    about = "import reference log-probs from columns of the data; unverified until 'raydpo cache verify' passes"
    imports = add("import", _import, about, uri=False)
    imports.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    about = "column of the chosen completions' sums (default: ref_chosen_logps)"
    imports.add_argument("--chosen", metavar="COLUMN", help=about)
    imports.add_argument("--rejected", metavar="COLUMN", help="column of the rejected completions' sums")
    imports.add_argument("--means", action="store_true", help="the columns hold means over tokens, not sums")
    for verb in (export, imports):
        verb.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")


def with_json(act: Act) -> Act:
    """Wrap ``act``: with --json the wrapped act prints only the result of ``act``, as one JSON object."""

    def run(args: argparse.Namespace, console: Console) -> None:
        found = act(args, Console(io.StringIO()) if args.json else console)
        if args.json:
            print(json.dumps(found, indent=2))

    return run


def _ls(args: argparse.Namespace, console: Console) -> Any:
    from raydpo.reference.inspect import identities
    from raydpo.storage.files import Storage
    from raydpo.storage.uri import redact
    from raydpo.tokens.inspect import list_sets

    storage = Storage(args.uri)
    found, sets = identities(args.uri), list_sets(storage)
    if not found and not sets:
        raise CacheError(
            f"there is no cache at {storage}, neither a reference nor a tokenised set; 'raydpo score' makes both"
        )
    texts, numbers = ("identity", "model", "dtype"), ("rows", "unverified_rows", "parts", "bytes")
    columns = (*texts, "rows", "unverified", "parts", "bytes", "newest")
    rows = [(*(one[key] for key in texts), *(f"{one[key]:,}" for key in numbers), _ago(one["age_seconds"])) for one in found]
    if found:
        console.table(redact(args.uri), columns, rows)
    else:
        console.say(f"{storage} holds no reference, only tokenised sets; 'raydpo score' makes one")
    if sets:
        numbers = ("pairs", "blocks", "bytes")
        rows = [
            (
                *(one["set"], one["path"], "yes" if one["complete"] else "no"),
                *(f"{one[key]:,}" for key in numbers),
                _ago(one["age_seconds"]),
            )
            for one in sets
        ]
        console.table("tokenised sets", ("set", "source", "complete", *numbers, "newest"), rows)
    return [{"kind": "reference"} | one for one in found] + [_as_reference(one) for one in sets]


def _as_reference(one: dict[str, Any]) -> dict[str, Any]:
    """The entry of a tokenised set with the keys that those of references have, too."""
    same = {"identity": one["set"], "model": one["path"], "dtype": None, "rows": one["pairs"], "parts": one["blocks"]}
    return {"kind": "set", **same, "bytes": one["bytes"], "unverified_rows": 0} | {
        key: one[key] for key in ("age_seconds", "complete", "path")
    }


def _set_of(storage: Storage, digest: str | None, others: Sequence[str]) -> str | None:
    """The tokenised set that ``digest`` begins, or the only one of a cache without references; None if a reference is meant.

    Args:
        others: digests of the references.

    Raises:
        CacheError: if several are meant.
    """
    from raydpo.tokens.store import TokenSet

    sets = [one for one in TokenSet.digests(storage) if one.startswith(digest or "")]
    if not sets or (digest is None and others):
        return None
    both = [*(one for one in others if one.startswith(digest or "")), *sets]
    if len(both) != 1:
        wanted = f" that begin with {digest!r}" if digest else ""
        raise CacheError(
            f"the cache at {storage} holds {len(both)} references and tokenised sets{wanted} ({', '.join(both)}); choose one"
        )
    return sets[0]


def _show(args: argparse.Namespace, console: Console) -> Any:
    from raydpo.reference.inspect import describe
    from raydpo.reference.store import ReferenceCache
    from raydpo.storage.files import Storage

    storage = Storage(args.uri)
    chosen = _set_of(storage, args.identity, [one.digest for one in ReferenceCache.identities(storage)])
    if chosen is not None:
        return _show_set(storage, chosen, console)
    found = describe(args.uri, args.identity)
    console.table("identity", ("", "value"), _rows(found["identity"]))
    made = _rows({name: value for name, value in found["made_by"].items() if name != "provenance"})
    for one in found["made_by"]["provenance"]:
        told = ", ".join(f"{name} {value}" for name, value in one.items() if name != "parts")
        made.append((f"{one['parts']} part(s)", told))
    console.table("what made it", ("", "value"), made)
    console.table("contents", ("", "value"), _rows(found["contents"]))
    console.table("tokens of a completion", ("", "value"), _rows(found["tokens_of_a_completion"]))
    console.table("mean log-prob of a token, by completion, nats", ("", "value"), _rows(found["logps_per_token"]))
    for problem in found["problems"]:
        console.warn(problem)
    return found


def _show_set(storage: Storage, digest: str, console: Console) -> Any:
    from raydpo.tokens.inspect import describe_set

    found = describe_set(storage, digest)
    for name, value in found.items():
        if isinstance(value, dict) and value:
            console.table(name.replace("_", " "), ("", "value"), _rows(value))
    for problem in found["problems"]:
        console.warn(problem)
    return found


def _verify(args: argparse.Namespace, console: Console) -> None:
    told = (("--sample", args.sample is not None), ("--all", args.all), ("--tolerance", args.tolerance is not None))
    given = [name for name, is_given in told if is_given]
    if given and not args.config:
        raise ConfigError(f"{given[0]} has no effect without --config, the run whose completions are scored again; add it")
    if args.all and args.sample is not None:
        raise ConfigError(f"--all and --sample {args.sample} contradict each other; keep one")
    prepared = None
    if args.config:
        told = Console(io.StringIO()) if args.json else console
        prepared = _prepare(args.config[0], [*args.config[1:], f"cache.uri={args.uri}"], told)
    from raydpo.reference.store import ReferenceCache
    from raydpo.storage.files import Storage
    from raydpo.tokens.inspect import verify_sets
    from raydpo.tokens.store import TokenSet

    storage = Storage(args.uri)
    digests = TokenSet.digests(storage)
    references = [one.digest for one in ReferenceCache.identities(storage)]
    if args.identity is not None:
        chosen = _set_of(storage, args.identity, references) if prepared is None else None
        digests = [] if chosen is None else [chosen]
    has_reference = not digests or prepared is not None or (args.identity is None and bool(references))
    cache, files = _verify_files(args, prepared) if has_reference else (None, None)
    sets = verify_sets(storage, digests)
    scores = promoted = None
    if prepared is not None and cache is not None:
        scores, promoted = _verify_scores(args, prepared, cache, console)
    if args.json:
        found = {"files": None if files is None else dataclasses.asdict(files), "sets": dataclasses.asdict(sets)}
        found["scores"] = None if scores is None else scores.to_dict()
        print(json.dumps(found | {"promoted": promoted}, indent=2))
    else:
        if files is not None:
            console.say(
                f"files: {files.parts:,} sound part(s), {files.rows:,} rows, {files.bytes:,} bytes, "
                f"{files.twice:,} rows stored twice, {len(files.problems):,} problem(s)"
            )
        if digests:
            console.say(
                f"tokenised sets: {sets.sets:,} complete, {sets.unfinished:,} not, {sets.blocks:,} sound block(s), "
                f"{sets.pairs:,} pairs, {sets.bytes:,} bytes, {len(sets.problems):,} problem(s)"
            )
        for problem in (*(() if files is None else files.problems), *sets.problems):
            console.warn(problem)
        if scores is not None:
            _print_scores(scores, promoted, console)
        elif files is not None:
            console.say("scores: not checked; give --config, the run whose data were scored, to score a sample again")
    if files is not None and files.problems:
        raise CacheError(
            f"{len(files.problems)} file(s) of {storage} are damaged and not used; 'raydpo score' "
            "renames them and scores again what they held"
        )
    if sets.problems:
        raise CacheError(
            f"{len(sets.problems)} file(s) of tokenised sets in {storage} are damaged and not used; the next command that "
            "needs them sets them aside and makes them again"
        )
    if scores is not None and cache is not None and not scores.passed:
        again = "; if imported rows are wrong, import the right ones" if scores.imported else ""
        raise CacheError(
            f"{scores.problem}: these log-probs are not of this model and data. Delete {storage}/{cache.directory} "
            f"and score again{again}, or raise --tolerance if they were computed on very different devices"
        )


def _verify_files(args: argparse.Namespace, prepared: Prepared | None) -> tuple[ReferenceCache, FilesReport]:
    """The reference that is meant, and what reading all of its files finds."""
    from raydpo.reference.store import ReferenceCache
    from raydpo.reference.verify import verify_files

    identity = prepared.reference.identity if prepared is not None and args.identity is None else args.identity
    cache = ReferenceCache.open(args.uri, identity, unverified=True)
    files = verify_files(cache)
    if not files.parts and not files.problems:
        others = cache.identities(cache.storage)
        told = "; ".join(f"{one.digest} ({'; '.join(cache.identity.differences(one))})" for one in others)
        fix = "; build it with 'raydpo score'"
        if others:
            fix = f", only of others: {told}. Give the model, adapter and score.dtype that it was made with"
        raise CacheError(f"{cache.storage} holds nothing of reference {cache.identity.digest}{fix}")
    return cache, files


def _verify_scores(
    args: argparse.Namespace, prepared: Prepared, cache: Any, console: Console
) -> tuple[ScoresReport, int | None]:
    """Score a sample again; if it agrees, mark imported rows as verified. Returns the report and the number of these
    rows."""
    import torch

    from raydpo.cluster.nodes import usable_cores
    from raydpo.pipeline.partition import place_here
    from raydpo.reference.exchange import completion_name
    from raydpo.reference.shards import Wanted
    from raydpo.reference.team import open_scorer
    from raydpo.reference.verify import SAMPLE, TOKENS_PER_BATCH, promote, verify_scores

    ours, theirs = prepared.reference.identity, cache.identity
    if theirs != ours:
        raise CacheError(
            f"the reference of {args.config[0]} is {ours.digest}, not {theirs.digest}: "
            f"{'; '.join(ours.differences(theirs))}. Score with the same model, adapter and score.dtype, or verify the "
            "files alone, without --config"
        )
    wanted, device = Wanted(prepared.tables), "cuda" if torch.cuda.is_available() else "cpu"
    partition = place_here(prepared.config, prepared.reference)
    threads = max(1, usable_cores() // partition.size) if device == "cpu" else None
    how = {"device": device, "partition": partition, "threads": threads}
    with console.quiet():
        scorer = open_scorer(prepared.reference, tokens_per_batch=TOKENS_PER_BATCH, **how)
    sample = None if args.all else SAMPLE if args.sample is None else args.sample
    name_of = functools.partial(completion_name, prepared.tables)
    try:
        scores = verify_scores(cache, wanted, name_of, scorer, tolerance=args.tolerance, sample=sample)
    finally:
        scorer.close()
    promoted = promote(cache, wanted, scores) if scores.passed and scores.imported else None
    return scores, promoted


def _print_scores(scores: ScoresReport, promoted: int | None, console: Console) -> None:
    console.say(
        f"scores: {scores.checked:,} of {scores.stored:,} stored completions of this data scored again "
        f"({scores.tokens:,} tokens{f', {scores.sums_only:,} as sums' if scores.sums_only else ''})"
    )
    console.table("difference, nats a token", ("", "value"), _rows(scores.quantiles))
    worst = scores.worst
    token = "" if worst["token"] is None else f", most at token {worst['token'] + 1}"
    console.say(
        f"worst: {worst['name']} (key {worst['key']}): {worst['mean']:.3g} nats a token{token}, stored "
        f"{worst['stored']:.6g}, live {worst['live']:.6g}; tolerance {worst['tolerance']:.3g}"
    )
    if scores.shift is not None:
        console.say(f"sums: {scores.shift:+.3g} nats on average, stored minus live")
    if promoted is not None:
        console.say(f"imported: {promoted:,} rows are now verified and used by training")


def _diff(args: argparse.Namespace, console: Console) -> Any:
    from raydpo.reference.inspect import difference
    from raydpo.reference.store import ReferenceCache

    parts = [name.partition("#") for name in (args.a, args.b)]
    found = difference(*(ReferenceCache.open(uri, identity or None) for uri, _, identity in parts))
    fields = [(name, *map(str, pair)) for name, pair in found["fields"].items()]
    console.table("identity", ("field", "A", "B"), fields or [("all fields", "equal", "equal")])
    console.say(
        f"completions: {found['completions'][0]:,} in A, {found['completions'][1]:,} in B, {found['common']:,} in both"
    )
    if found["common"]:
        console.table("difference on those in both, nats a token", ("", "value"), _rows(found["difference"]))
        console.say(f"worst: key {found['worst']['key']}, {found['worst']['mean']:.3g} nats a token")
    return found


def _compact(args: argparse.Namespace, console: Console) -> Any:
    from raydpo.reference.compact import TARGET_BYTES, compact
    from raydpo.reference.store import ReferenceCache

    cache = ReferenceCache.open(args.uri, args.identity)
    report = compact(cache, TARGET_BYTES if args.target_mb is None else int(args.target_mb * 2**20))
    console.say(
        f"{report.before:,} part(s) before, {report.after:,} after: {report.merged:,} merged, {report.rows:,} rows, "
        f"{report.dropped:,} left out, stored twice; 'raydpo cache gc' lists the files that are no longer needed"
    )
    for problem in cache.problems:
        console.warn(problem)
    return dataclasses.asdict(report)


def _gc(args: argparse.Namespace, console: Console) -> Any:
    from raydpo.reference.compact import delete_garbage, find_garbage
    from raydpo.reference.store import ReferenceCache
    from raydpo.storage.files import Storage
    from raydpo.tokens.inspect import find_set_garbage

    storage = Storage(args.uri)
    caches = [ReferenceCache(storage, identity) for identity in ReferenceCache.identities(storage)]
    found = [(cache, find_garbage(cache)) for cache in caches]
    of_sets = find_set_garbage(storage)
    if args.delete:
        for cache, each in found:
            delete_garbage(cache, each)
        for one in of_sets:
            storage.delete(one.path)
    garbage = [*(one for _, each in found for one in each), *of_sets]
    for one in garbage:
        console.say(f"{one.path}  {one.bytes:,} bytes  {one.reason}")
    size, done = sum(one.bytes for one in garbage), "deleted" if args.delete else "can be deleted, with --delete"
    console.say(f"{len(garbage):,} file(s), {size:,} bytes {done}")
    return {"deleted": args.delete, "files": [dataclasses.asdict(one) for one in garbage]}


def _export(args: argparse.Namespace, console: Console) -> Any:
    prepared = _prepare(args.config, args.overrides, console)
    from raydpo.data.counting import all_count
    from raydpo.data.lists import all_pairs
    from raydpo.data.select import COUNT_COLUMNS, LABEL
    from raydpo.reference.exchange import export_pairs
    from raydpo.reference.pairs import join_reference

    table = prepared.own.train
    if not all_count(table):
        table = table.drop_columns(list(COUNT_COLUMNS))
        console.warn(
            "by data.train_on or data.spans_column not every token counts, but the exported sums are over all of them, as "
            "other trainers compute them; ref_chosen_token_logps and ref_rejected_token_logps have each token"
        )
    joined = all_pairs(join_reference(table, prepared.cache, "training"))
    decode = prepared.tokeniser.tokenizer.batch_decode
    pairs = export_pairs(joined, lambda ids: decode(ids, skip_special_tokens=False), Path(args.out))
    unit = "completions" if LABEL in joined.column_names else "pairs"
    console.say(f"{pairs:,} {unit} with reference log-probs of {prepared.reference.identity.digest}: {args.out}")
    return {"pairs": pairs, "file": args.out, "identity": prepared.reference.identity.digest}


def _import(args: argparse.Namespace, console: Console) -> Any:
    from raydpo.errors import ConfigError

    if (args.chosen is None) != (args.rejected is None):
        raise ConfigError("--chosen and --rejected belong together; give both or neither")
    prepared = _prepare(args.config, [*args.overrides, "data.eval=null"], console)
    from raydpo.reference.exchange import import_sums

    prepared.cache.prepare({"model": prepared.reference.path, "adapter": prepared.reference.adapter})
    columns, pairs = None if args.chosen is None else (args.chosen, args.rejected), prepared.own.train
    report = import_sums(prepared.config.data, pairs, prepared.cache, means=args.means, columns=columns)
    unit = "pairs" if prepared.own.report.unit == "pairs" else "rows"
    read = " and ".join(dict.fromkeys(report.columns))
    console.say(
        f"{report.pairs:,} {unit} imported from {read} as {report.rows:,} unverified rows of "
        f"{prepared.reference.identity.digest}" + (f"; {report.without:,} {unit} have none" if report.without else "")
    )
    if report.contradicts:
        console.warn(
            f"{report.contradicts:,} of these rows differ by more than rounding from those imported before; the "
            "last import is used from now on. 'raydpo cache gc' lists imports that are no longer used"
        )
    console.say(
        f"training refuses them until this has verified them: raydpo cache verify {prepared.cache.storage} --config "
        f"{' '.join([args.config, *args.overrides])}"
    )
    return dataclasses.asdict(report)


def _prepare(file: str, overrides: Sequence[str], console: Console) -> Prepared:
    """Check a configuration, tokenise its pairs and open its cache, without Ray."""
    from raydpo.config import load_config

    config = load_config(file, overrides)
    from raydpo.pipeline.checks import check, check_models
    from raydpo.pipeline.prepare import Prepared

    with console.quiet():
        check(config, "score", console)
        check_models(config, "score", console)
        return Prepared.of(config, console)


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _shown(value)) for name, value in values.items()]


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}(s) ago"
    return f"{seconds:.0f} s ago"

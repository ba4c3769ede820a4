"""The pairs of a configuration as token ids: their sets are found in the cache or made, and opened."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from raydpo.cluster.session import has_ray, owns_ray, session, starts_own_ray
from raydpo.config import Config
from raydpo.data.filter import filtered_by_tokens
from raydpo.data.lists import count_of
from raydpo.data.select import PairSets
from raydpo.data.tokenise import Tokeniser, load_tokenizer
from raydpo.errors import CacheError, RaydpoError
from raydpo.model.limits import ModelLimits, check_limits, tokenizer_warnings
from raydpo.reference.identity import directory_here, resolve_model
from raydpo.storage.files import Storage
from raydpo.storage.local_copy import local_home
from raydpo.terminal.console import Console
from raydpo.tokens.actors import makers
from raydpo.tokens.build import Progress, Recipe, make_set, make_set_on_ray, worth_ray
from raydpo.tokens.open import OpenSets, SourceSet

__all__ = [
    "Tokenised",
    "find_sets",
    "limits_of",
    "make_missing",
    "make_on_ray",
    "open_pairs",
    "open_tokeniser",
    "wants_ray",
    "writable",
]


@dataclass(frozen=True)
class Tokenised:
    """The pairs of a configuration as token ids, and the tokeniser that made them."""

    tokeniser: Tokeniser
    sets: PairSets

    @classmethod
    def of(cls, config: Config, console: Console, *, streamed: bool = False) -> Tokenised:
        """Open the tokenised pairs, made where they are missing, and compare them with the limits of the models. Within a
        Ray session large sources are tokenised by its CPUs.

        Args:
            streamed: whether this command has just tokenised and scored them at once.

        Raises:
            DataError: if a source cannot be read, or more of it is malformed or dropped than allowed.
            FilesError: if a model has no row for a token id, or no position for a token.
        """
        started = time.perf_counter()
        with ThreadPoolExecutor(max_workers=1) as pool:
            loading = pool.submit(open_tokeniser, config)  # imports transformers for seconds, while stored pairs are opened
            sets, made = open_pairs(config, loading.result, console)
        tokeniser = loading.result()
        for line in sets.report.lines():
            console.say(line)
        sets, line = filtered_by_tokens(sets, config.data)
        if line:
            console.say(line)
        unit, train, held_out = sets.report.unit, count_of(sets.train), count_of(sets.eval)
        how = "tokenised while scoring, read in" if streamed else "tokenised in" if made else "tokenised before, read in"
        seconds = time.perf_counter() - started
        console.say(f"{unit}: {train:,} to train on, {held_out:,} held out, {how} {seconds:.1f} s")
        for line in tokenizer_warnings(tokeniser.tokenizer, _models_of(config), config.model.trust_remote_code):
            console.warn(line)
        for line in check_limits([sets.train, *([] if sets.eval is None else [sets.eval])], limits_of(config)):
            console.warn(line)
        return cls(tokeniser, sets)

    @classmethod
    def before_ray(cls, config: Config, console: Console) -> Tokenised | None:
        """As ``of``, where a local Ray will be started: bad pairs then end the command before that.

        None on a cluster, whose nodes are checked first, or started by an autoscaler while the pairs are read; and if a
        source has yet to be tokenised that is so large that Ray does it sooner.
        """
        return cls.of(config, console) if starts_own_ray(config) and not wants_ray(config) else None


def wants_ray(config: Config) -> bool:
    """Whether a source has no tokenised set yet, and is so large that Ray makes it sooner than one process."""
    return any(worth_ray(each.source) for each in find_sets(config).missing())


def find_sets(config: Config, load: Callable[[], Tokeniser] | None = None, storage: Storage | None = None) -> OpenSets:
    """The tokenised sets of a configuration, in its cache or in ``storage``.

    Args:
        load: gives the tokeniser, where one is at hand.
    """
    return OpenSets(
        config.data,
        storage or Storage(config.cache_uri),
        _tokenizer_directory(config),
        load or (lambda: open_tokeniser(config)),
        trust_remote_code=config.model.trust_remote_code,
    )


def open_pairs(config: Config, load: Callable[[], Tokeniser], console: Console) -> tuple[PairSets, bool]:
    """The pairs of a configuration, and whether some were tokenised now.

    Args:
        load: gives the tokeniser. It is called only if something has to be tokenised, or this machine sees it first.

    Raises:
        DataError, RaydpoError: as ``make_missing``.
    """
    found = find_sets(config, load)
    missing = list(found.missing())
    with contextlib.ExitStack() as stack:
        if not has_ray() and any(worth_ray(each.source) for each in missing):  # of a command that needs no Ray otherwise
            stack.enter_context(session(config))
        found = make_missing(config, load, console, found)
        try:
            return found.select(), bool(missing)
        except CacheError as error:
            if next(found.missing(), None) is None:
                raise
            console.warn(f"{error}. This command does so now")
        return make_missing(config, load, console, found).select(), True


def make_missing(config: Config, load: Callable[[], Tokeniser], console: Console, found: OpenSets | None = None) -> OpenSets:
    """The tokenised sets of a configuration. Those that are missing are made.

    Args:
        load: gives the tokeniser.
        found: result of ``find_sets``, which looks at each file of the sources, if that was called before.

    Raises:
        DataError: if a source cannot be read, or more of it is malformed or dropped than allowed.
        RaydpoError: if the sets cannot be written.
    """
    found = writable(found or find_sets(config, load), config, console)
    for each in found.every:
        if each.stored.complete() is None:
            for line in found.why(each):
                console.say(line)
            if has_ray() and worth_ray(each.source):
                _show_on_ray(config, each, console)
            else:
                make_set(each.stored, each.source, config.data, load(), progress=console.counter("reading", "records"))
        if each.stored.identity is not None:
            for line in each.stored.identity.warnings():
                console.say(line)
        found.check(each)
    return found


def writable(found: OpenSets, config: Config, console: Console) -> OpenSets:
    """``found``; or, if some of them are missing and this process may only read the cache, the sets in a directory of this
    machine.

    Raises:
        RaydpoError: if other machines need the sets, too.
    """
    if next(found.missing(), None) is None:
        return found
    try:
        found.storage.probe()
    except RaydpoError as error:
        if has_ray() and not owns_ray():
            raise
        here = Storage(str(local_home() / "cache"))
        console.say(f"tokenised pairs are kept in {here}, since the cache cannot be written: {error}")
        return find_sets(config, storage=here)
    return found


def recipe_of(config: Config, each: SourceSet) -> Recipe:
    """What the actors need to make a set of a configuration."""
    if each.stored.identity is None:
        raise ValueError("a set is made from its identity, not from a digest")
    directory, trusted = _tokenizer_directory(config), config.model.trust_remote_code
    return Recipe.of(each.stored.identity, config.data, directory, trust_remote_code=trusted, find=directory_here)


def make_on_ray(config: Config, each: SourceSet, console: Console, *, keep_free: int = 0) -> Iterator[Progress]:
    """Make a set with actors of the cluster; see ``tokens.build.make_set_on_ray``.

    Args:
        keep_free: CPUs to leave for what is started beside them.
    """
    with makers(keep_free=keep_free, torch=config.model.trust_remote_code) as pool:
        recipe = recipe_of(config, each)
        yield from make_set_on_ray(pool, each.stored, each.source, config.data, recipe, tell=console.say)


def _show_on_ray(config: Config, each: SourceSet, console: Console) -> None:
    console.begin("tokenising")
    with console.progress(f"tokenising {each.name}", 0, "pairs") as line:
        for progress in make_on_ray(config, each, console):
            line.total = progress.pairs + round((progress.seconds_left or 0) * progress.pairs_per_second)
            line.update(progress.pairs)


def open_tokeniser(config: Config) -> Tokeniser:
    """Load the tokenizer of a configuration, with its chat template."""
    trusted, template = config.model.trust_remote_code, config.data.chat_template
    tokenizer = load_tokenizer(_tokenizer_directory(config), chat_template=template, trust_remote_code=trusted)
    return Tokeniser(tokenizer, config.data.template_date)


def _tokenizer_directory(config: Config) -> str:
    return resolve_model(config.model.tokenizer or config.model.path)


def _models_of(config: Config) -> dict[str, str]:
    """Local directories of policy and reference, by path."""
    return {path: resolve_model(path) for path in (config.model.path, config.reference_path)}


def limits_of(config: Config, *more: str) -> dict[str, ModelLimits]:
    """Limits of reference and policy, and of models in the local directories ``more``, by path."""
    trusted = config.model.trust_remote_code
    paths = _models_of(config) | {path: path for path in more}
    return {path: ModelLimits.of(directory, trusted) for path, directory in paths.items()}

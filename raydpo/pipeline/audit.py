"""``raydpo audit``: what the training pairs will teach."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa

from raydpo.config import Config
from raydpo.config.counting import EVERYTHING, counting_texts
from raydpo.data.facts import digests_of, pair_facts, with_reference
from raydpo.data.lists import all_pairs
from raydpo.data.select import SAME
from raydpo.errors import ConfigError
from raydpo.pipeline.checks import check, check_models
from raydpo.pipeline.prepare import Prepared
from raydpo.reference.pairs import reference_values
from raydpo.rundir.directory import AUDIT_PAGE, RUN
from raydpo.rundir.earlier import changes_since
from raydpo.rundir.fingerprint import TRAINING_PAIRS
from raydpo.storage.files import Storage
from raydpo.terminal.console import Console
from raydpo.version import __version__

if TYPE_CHECKING:
    from raydpo.audits import Audit

__all__ = ["audit", "audit_prepared"]


def audit(config: Config, console: Console | None = None) -> Audit:
    """Measure what the training pairs teach, from their lengths and cached log-probs, and write it to the run directory.

    Pairs without cached log-probs are counted, not refused. Of more than ``audits.sample.MOST_AUDITED`` pairs, those of some
    prompts are audited, drawn with ``train.seed``.

    Raises:
        RaydpoError: if it fails.
    """
    console = console or Console()
    check(config, "audit", console)
    check_models(config, "audit", console)
    return audit_prepared(Prepared.of(config, console), console)


def audit_prepared(prepared: Prepared, console: Console) -> Audit:
    """Audit prepared pairs: write the page to the run directory and print the findings.

    Raises:
        ConfigError: if the run directory belongs to a run with other pairs.
    """
    from raydpo.audits import audit_pairs, draw, summary_lines, write_audit

    storage = Storage(prepared.config.run_dir)
    _refuse_other_pairs(storage, prepared)
    pairs = all_pairs(prepared.own.train)  # mismatched completions teach nothing
    everything = pair_facts(pairs)
    sample = draw(digests_of(pairs, "prompt"), prepared.config.train.seed)
    facts = everything if sample.whole else everything.take(pa.array(sample.rows))
    facts = with_reference(facts, *(found.sums for found in reference_values(pairs, prepared.cache, sample.rows)))
    identical = {source.name: source.dropped.counts[SAME] for source in prepared.sets.report.sources}
    scores = {source.name: source.scores.to_dict() for source in prepared.sets.report.sources if source.scores.compared}
    counted, _ = counting_texts(prepared.config.model_dump(mode="json", include={"data"})["data"])
    decode = prepared.tokeniser.tokenizer.batch_decode
    done = audit_pairs(
        facts,
        pairs,
        lambda ids: decode(ids, skip_special_tokens=False),
        sample,
        everything=None if sample.whole else everything,
        meta={
            "name": prepared.config.run_name,
            "model": prepared.config.reference_path,
            "raydpo": __version__,
            "identity": prepared.reference.identity.digest,
            "cache": str(prepared.cache.storage),
            "counted": None if counted == EVERYTHING else counted,
        },
        identical={name: count for name, count in identical.items() if count},
        scores=scores,
        objective=prepared.config.train,
    )
    if prepared.continued is not None:
        # The advice is about data that somebody wrote. The answers of a round are sampled: nothing of it can be followed.
        done = replace(done, advice=[])
    write_audit(done, storage)
    for line in summary_lines(done):
        console.say(line)
    console.say(f"audit: {storage}/{AUDIT_PAGE}")
    return done


def _refuse_other_pairs(storage: Storage, prepared: Prepared) -> None:
    """Refuse to replace the audit of a run by that of other pairs, or of another reference."""
    if not storage.exists(RUN):
        return
    compared = (TRAINING_PAIRS, "reference identity")
    changes = changes_since(storage, prepared.fingerprint(), prepared.sets.train, compared)
    if changes:
        raise ConfigError(
            f"{storage} is a run of other pairs or another reference ({'; '.join(changes)}), and its audit is "
            "kept. Give this one another name (name=...)"
        )

"""Tokenised pairs with their reference log-probs, read by row number without copies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch

from raydpo.data.counting import RunColumns, all_count, counts, weighted_sums
from raydpo.data.facts import prompt_numbers
from raydpo.data.lists import begins, rows_of, starts_of
from raydpo.data.pairs import PAIR_MARGIN, PAIR_WEIGHT
from raydpo.data.ragged import Ragged, tokens_in_use
from raydpo.data.rows import TokenSource
from raydpo.data.select import COUNT_COLUMNS, LABEL, LIST_COLUMNS, TokenTables
from raydpo.data.shapes import Shapes
from raydpo.data.spool import MOST_SMALL
from raydpo.errors import RaydpoError
from raydpo.model.layout import PromptGroup
from raydpo.reference.pairs import REFERENCE_COLUMNS, SIDES

__all__ = ["TrainingPairs", "pair_columns", "send"]

_SOURCES = b"raydpo.sources"
"""Key in the metadata of ``pair_columns``: JSON list of (name, weight) of each source."""
_PARTS = ("prompt", *SIDES)
_COUNTED = ("chosen_counted", "rejected_counted")
_NUMBERS = ("set", "place", PAIR_WEIGHT, PAIR_MARGIN, LABEL, *LIST_COLUMNS)


class TrainingPairs:
    """Pairs in memory or in mapped files. What it holds itself does not grow with their number.

    Args:
        columns: result of ``pair_columns``.
        tokens: where the token ids are; in order of ``columns`` if that has no column ``place``.
        logps: the reference's log-probs that ``columns`` refers to, nats, float32; None without reference.

    Attributes:
        has_reference: whether the reference's values are known; otherwise they are 0.
        ids: name of each pair, ``source:row``.
        source_names: names of the sources, in order of first appearance.
        sources: number of the source of each pair, int [pairs].
        weights: weight of each source, float [sources].
        prompt_tokens, chosen_tokens, rejected_tokens: lengths in use, int [pairs].
        masked: whether some token does not count with weight 1.
        chosen_counted, rejected_counted: sums of the weights of the tokens in use, [pairs].
        ref_chosen, ref_rejected: sums of the reference's log-probs, each with its token's weight, nats, float64 [pairs].
        pair_weights, pair_margins: float [pairs], from ``data.weight_column`` and ``data.margin_column``; None if not set.
        labels: int8 [pairs], as ``losses.PairLogps.labels``; None if all are pairs.
        prompts: number of the prompt of each pair among the distinct ones, int [pairs]; None if it was not wanted.
        starts: of ranked lists, see ``data.lists.starts_of``; None if all rows are pairs.
        chosen_ranks, rejected_ranks: place of each completion in its list, int32 [pairs]; None without lists.
    """

    def __init__(self, columns: pa.RecordBatch, tokens: TokenSource, logps: np.ndarray | None) -> None:
        self._tokens, self._logps = tokens, logps
        self.ids = columns["pair_id"]
        sources = json.loads(columns.schema.metadata[_SOURCES])
        self.source_names, self.weights = [name for name, _ in sources], np.array([weight for _, weight in sources])

        def numbers(name: str) -> np.ndarray:
            return columns[name].to_numpy()

        def numbers_if_there(name: str) -> np.ndarray | None:
            return numbers(name) if name in columns.schema.names else None

        self.sources = numbers("source")
        self.prompt_tokens, self.chosen_tokens, self.rejected_tokens = (numbers(f"{part}_tokens") for part in _PARTS)
        self.masked = _COUNTED[0] in columns.schema.names
        self.chosen_counted, self.rejected_counted = self.chosen_tokens, self.rejected_tokens
        if self.masked:
            self.chosen_counted, self.rejected_counted = map(numbers, _COUNTED)
            self._runs = [RunColumns(columns, side) for side in SIDES]
        self._sets, self._places = numbers_if_there("set"), numbers_if_there("place")
        self.pair_weights, self.pair_margins = numbers_if_there(PAIR_WEIGHT), numbers_if_there(PAIR_MARGIN)
        self.labels, self.prompts = numbers_if_there(LABEL), numbers_if_there("prompt")
        lists, self.chosen_ranks, self.rejected_ranks = map(numbers_if_there, LIST_COLUMNS)
        self._begins = None if lists is None else begins(lists)
        self.starts = None if self._begins is None else starts_of(self._begins)
        self.has_reference = logps is not None
        if self.has_reference:
            *self._logp_places, self._known, self.ref_chosen, self.ref_rejected = map(numbers, REFERENCE_COLUMNS)
        else:
            self.ref_chosen = self.ref_rejected = np.broadcast_to(0.0, len(self.ids))

    @classmethod
    def of(cls, table: pa.Table) -> TrainingPairs:
        """Rows of ``join_reference``. Columns of sums may be absent; they follow from the log-probs of the tokens. All
        columns of the reference may be absent, for an objective without a reference."""
        table = table.drop_columns([name for name in ("set", "place") if name in table.column_names])
        table, logps = _placed(table)
        return cls(pair_columns(table, prompts=True), TokenTables([[table]]), logps)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def count(self) -> int:
        """Number of pairs, or of ranked lists."""
        return len(self) if self.starts is None else len(self.starts) - 1

    @property
    def unit(self) -> str:
        """What ``count`` counts."""
        return "lists" if self.starts is not None else "pairs" if self.labels is None else "rows"

    def shapes_of(self, items: np.ndarray) -> Shapes:
        """Lengths and shared tokens of the pairs, or of the ranked lists, with these numbers, for the batch plan."""
        rows = items if self.starts is None else rows_of(self.starts, items)
        completions = np.stack([self.chosen_tokens[rows], self.rejected_tokens[rows]], axis=1)
        if self.starts is None:
            return Shapes.of([prompt for prompt, _, _ in self._ids(rows)], completions.tolist())
        ends = np.cumsum(self.starts[items + 1] - self.starts[items]).tolist()
        lists = [completions[start:stop].ravel().tolist() for start, stop in pairwise([0, *ends])]
        return Shapes.of([prompt for prompt, _, _ in self._ids(self.starts[items])], lists)

    def items_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Numbers of the ranked lists whose rows are ``rows``, all of each, one list after another: int64 [lists]. Without
        lists, ``rows`` themselves."""
        rows = np.asarray(rows, np.int64)
        if self.starts is None:
            return rows
        return np.searchsorted(self.starts, rows[self.begin(rows)], side="right") - 1

    def with_lists(self, rows: Sequence[int]) -> list[int]:
        """``rows``, and with each the other rows of its ranked list, one list after another."""
        if self.starts is None:
            return list(rows)
        return rows_of(self.starts, np.unique(np.searchsorted(self.starts, rows, side="right") - 1)).tolist()

    def begin(self, rows: np.ndarray) -> np.ndarray:
        """Which of ``rows`` begin a ranked list, bool [rows]; all do without lists."""
        return np.ones(len(rows), bool) if self._begins is None else self._begins[rows]

    def groups(self, rows: Sequence[int]) -> list[PromptGroup]:
        """The pairs in ``rows``, each as a group (chosen, rejected)."""
        rows = np.asarray(rows, np.int64)
        used = zip(self._ids(rows), self.chosen_tokens[rows].tolist(), self.rejected_tokens[rows].tolist(), strict=True)
        return [PromptGroup(prompt, (chosen[:most], rejected[:more])) for (prompt, chosen, rejected), most, more in used]

    def _ids(self, rows: np.ndarray) -> Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Token ids of prompt, chosen and rejected before truncation."""
        if self._places is None:
            sets, places = np.zeros(len(rows), np.int16), rows
        else:
            sets, places = self._sets[rows], self._places[rows]
        found = self._tokens.rows(sets, places)
        for row, ids in zip(rows.tolist(), found, strict=True):
            prompt, *sides = map(len, ids)
            used = self.chosen_tokens[row], self.rejected_tokens[row]
            if prompt != self.prompt_tokens[row] or sides[0] < used[0] or sides[1] < used[1]:
                raise RaydpoError(
                    f"pair {self.ids[row]} was read as {prompt:,}, {sides[0]:,} and {sides[1]:,} tokens, expected "
                    f"{self.prompt_tokens[row]:,} and at least {used[0]:,} and {used[1]:,}; run the command again"
                )
        return found

    def source_of(self, rows: Sequence[int] | np.ndarray, device: torch.device) -> torch.Tensor:
        """Source numbers of ``rows``, int64 [rows]."""
        return send(self.sources[np.asarray(rows)].astype(np.int64), device)

    def mean_chosen_tokens(self, rows: np.ndarray) -> float:
        """Mean over ``rows`` of the counted tokens of their chosen completion. An undesirable completion alone has none."""
        tokens = self.chosen_counted[rows]
        return float((tokens if self.labels is None else tokens * (self.labels[rows] >= 0)).mean())

    def reference(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Reference log-probs of the tokens of a pair's chosen and rejected completion; NaN if only their sum is known."""
        chosen, rejected = (int(places[row]) for places in self._logp_places)
        values = self._logps
        return values[chosen : chosen + self.chosen_tokens[row]], values[rejected : rejected + self.rejected_tokens[row]]

    def weights_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Weight of each completion token of ``rows``, chosen and rejected of each pair in turn, float32 [their tokens]."""
        rows = np.asarray(rows)
        if not self.masked:
            return np.ones(int((self.chosen_tokens[rows] + self.rejected_tokens[rows]).sum()), np.float32)
        both = [side.at(rows) for side in self._runs]
        order = np.argsort(np.concatenate([2 * runs.owners + place for place, runs in enumerate(both)]), kind="stable")
        weights, lengths = (
            np.concatenate(each) for each in zip(*((runs.weights, runs.lengths) for runs in both), strict=True)
        )
        return np.repeat(weights[order], lengths[order])

    def reference_tails(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Sums of the reference log-probs of tokens beyond the length of the shorter completion, float64 [rows]. As
        elsewhere, lengths and sums are of the tokens that count. 0 for a completion alone."""
        values = map(self._weighted if self.masked else self.reference, rows)
        tails = np.array([[side[min(map(len, sides)) :].sum(dtype=np.float64) for side in sides] for sides in values])
        if self.labels is not None:
            tails[self.labels[np.asarray(rows)] != 0] = 0
        return tails[:, 0], tails[:, 1]

    def _weighted(self, row: int) -> tuple[np.ndarray, ...]:
        """Reference log-probs times weights of the tokens that count, of chosen and rejected."""
        weights = np.split(self.weights_of([row]), [self.chosen_tokens[row]])
        both = zip(self.reference(row), weights, strict=True)
        return tuple(logps[each > 0].astype(np.float64) * each[each > 0] for logps, each in both)

    def sums_only(self) -> np.ndarray:
        """Rows of which only the sums of the reference log-probs are known."""
        return np.flatnonzero(self._known == 0)

    def has_tokens(self, row: int) -> bool:
        """Whether the reference log-probs of this pair's tokens are known, not only their sums."""
        return bool(self._known[row])


def pair_columns(table: pa.Table, *, prompts: bool) -> pa.RecordBatch:
    """What training needs to know of each pair beside its tokens and log-probs, as one record batch without nulls.

    Columns: pair_id; source (number); set and place, pair_weight and pair_margin, and those that ``place_reference`` adds,
    where ``table`` has them; prompt_tokens, chosen_tokens, rejected_tokens; prompt (number of the prompt among the distinct
    ones), if ``prompts``; ``select.COUNT_COLUMNS`` and the sums of weights, if some token does not count with weight 1.

    Args:
        table: rows of ``data.pairs.PAIR_SCHEMA``.
    """
    names, weights, numbers = _sources(table)
    ids = table["pair_id"]
    columns = {"pair_id": ids.cast(pa.large_string()) if ids.nbytes > MOST_SMALL else ids, "source": numbers}
    columns |= {f"{part}_tokens": tokens_in_use(table, part) for part in _PARTS}
    if prompts:
        columns["prompt"] = prompt_numbers(table)
    if not all_count(table):
        columns |= {name: table[name] for name in COUNT_COLUMNS}
        columns |= {name: counts(table, side) for name, side in zip(_COUNTED, SIDES, strict=True)}
    columns |= {name: table[name] for name in (*_NUMBERS, *REFERENCE_COLUMNS) if name in table.column_names}
    arrays = [_one_array(column) for column in columns.values()]
    metadata = {_SOURCES: json.dumps(list(zip(names, weights, strict=True))).encode()}
    schema = pa.schema([(name, array.type) for name, array in zip(columns, arrays, strict=True)], metadata)
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _sources(table: pa.Table) -> tuple[list[str], list[float], np.ndarray]:
    """Names and weights of the sources in order of first appearance, and the number of each pair's source."""
    column = table["source"]
    column = (column if pa.types.is_dictionary(column.type) else column.dictionary_encode()).unify_dictionaries()
    codes = np.concatenate([np.empty(0, np.int32), *(chunk.indices.to_numpy() for chunk in column.chunks)])
    distinct, first, numbers = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    names = [column.chunk(0).dictionary[code].as_py() for code in distinct[order].tolist()]
    weights = table["weight"].take(pa.array(first[order])).to_pylist()
    return names, weights, np.argsort(order).astype(np.int32)[numbers]


def _placed(table: pa.Table) -> tuple[pa.Table, np.ndarray | None]:
    """As ``reference.pairs.place_reference``, from columns of lists. None without such columns."""
    names = [f"ref_{side}_logps" for side in SIDES]
    if names[0] not in table.column_names:
        return table, None
    sides = [Ragged.of(table[name]) for name in names]
    (chosen, starts), (rejected, more) = (side.gather(np.arange(len(side))) for side in sides)
    known = (_known(chosen, starts) & _known(rejected, more)).astype(np.uint8)
    columns = dict(zip(REFERENCE_COLUMNS, (starts[:-1], more[:-1] + len(chosen), known), strict=False))
    both = zip(REFERENCE_COLUMNS[-2:], SIDES, ((chosen, starts), (rejected, more)), strict=True)
    columns |= {name: weighted_sums(*values, table, side) for name, side, values in both if name not in table.column_names}
    for name, column in columns.items():
        table = table if name in table.column_names else table.append_column(name, pa.array(column))
    return table, np.concatenate([chosen, rejected])


def _known(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Whether the values of each completion are known, and not only their sum: bool [completions]. Of no tokens they are."""
    known, filled = np.ones(len(offsets) - 1, bool), np.flatnonzero(np.diff(offsets))
    known[filled] = ~np.isnan(values[offsets[:-1][filled]])
    return known


def _one_array(column: pa.ChunkedArray | np.ndarray) -> pa.Array:
    """The column in one piece, which readers of the file can use without a copy."""
    if isinstance(column, np.ndarray):
        return pa.array(column)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def send(values: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Copy ``values`` to ``device``. A GPU copies from page-locked memory, and nobody waits: a copy from other memory would
    wait until all that the GPU was asked to compute is done, and then the GPU for what it is asked next."""
    tensor, device = torch.from_numpy(values), torch.device(device)
    return tensor.to(device) if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

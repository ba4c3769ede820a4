"""Values of Arrow columns as Python values, equal to those of the same record in JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

__all__ = ["rows"]

Decode = Callable[[Any], Any]
_NULLS_MEANT = frozenset(("tools", "parameters", "arguments", "chat_template_kwargs"))
"""Fields inside which a null may say something else than an absent field."""


def rows(batch: pa.RecordBatch | pa.Table) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Yield each row as a dictionary, and the fields inside which a null was left out that may be meant.

    Columns of the extension type arrow.json are decoded, at any depth, maps become dictionaries, and decimals plain numbers.
    Nulls:

    - A column that is null in a row is left out of that row.
    - Arrow gives each struct the fields of all others of its column, as nulls, and a template would print them. So a null
      field of a struct is left out, also where the field is null in every row and has another type than Arrow's null.
    - A field of Arrow's type null is kept: it can only be null, so someone wrote nulls, and no other value, into it.
    - Nulls in lists, in maps and in JSON are kept.

    Where one tool has ``"default": null`` and another ``"default": 1``, the file does not tell that null from an absent
    field. Both are left out, and the second value names ``tools``, ``parameters``, ``arguments`` or
    ``chat_template_kwargs``, whichever is outermost. Elsewhere such nulls say nothing.
    """
    left_out: set[str] = set()
    decoders = {field.name: decode for field in batch.schema if (decode := _decoder(field, left_out)) is not None}
    for row in batch.to_pylist():
        for name, decode in decoders.items():
            if row[name] is not None:
                row[name] = decode(row[name])
        yield {name: value for name, value in row.items() if value is not None}, tuple(sorted(left_out))
        left_out.clear()


def _decoder(field: pa.Field, left_out: set[str], inside: str | None = None) -> Decode | None:
    """A function for values that are not null, or None where they are right already.

    Args:
        left_out: takes up ``inside`` where the function leaves out a null.
        inside: the outermost field around it whose nulls may be meant.
    """
    kind = field.type
    inside = inside or (field.name if field.name in _NULLS_MEANT else None)
    named = (field.metadata or {}).get(b"ARROW:extension:name", b"").decode(errors="replace")
    if isinstance(kind, pa.BaseExtensionType):
        named, kind = kind.extension_name, kind.storage_type
    if named == "arrow.json":
        return _from_json
    if pa.types.is_decimal(kind):
        return int if kind.scale <= 0 else float
    if pa.types.is_struct(kind):
        return _struct_decoder(kind, left_out, inside)
    if pa.types.is_map(kind):
        return _map_decoder(kind, left_out, inside)
    if pa.types.is_dictionary(kind):
        return _decoder(pa.field("item", kind.value_type), left_out, inside)
    if any(
        test(kind)
        for test in (
            pa.types.is_list,
            pa.types.is_large_list,
            pa.types.is_fixed_size_list,
            pa.types.is_list_view,
            pa.types.is_large_list_view,
        )
    ):
        decode = _decoder(kind.value_field, left_out, inside)
        if decode is not None:
            return lambda values: [None if value is None else decode(value) for value in values]
    return None


def _from_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, (str, bytes)) else value


def _struct_decoder(kind: pa.StructType, left_out: set[str], inside: str | None) -> Decode:
    fields = [kind.field(index) for index in range(kind.num_fields)]
    decoders = {field.name: decode for field in fields if (decode := _decoder(field, left_out, inside)) is not None}
    always_null = frozenset(field.name for field in fields if pa.types.is_null(field.type))

    def decode(value: dict[str, Any]) -> dict[str, Any]:
        found = {
            name: decoders[name](entry) if name in decoders and entry is not None else entry
            for name, entry in value.items()
            if entry is not None or name in always_null
        }
        if inside is not None and len(found) < len(value):
            left_out.add(inside)
        return found

    return decode


def _map_decoder(kind: pa.MapType, left_out: set[str], inside: str | None) -> Decode:
    decode = _decoder(kind.item_field, left_out, inside)

    def decode_map(value: Any) -> dict[str, Any]:
        pairs = value.items() if isinstance(value, dict) else value
        return {
            key if isinstance(key, str) else str(key): entry if entry is None or decode is None else decode(entry)
            for key, entry in pairs
        }

    return decode_map

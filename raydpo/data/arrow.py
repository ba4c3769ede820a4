"""Values of Arrow columns as Python values, equal to those of the same record in JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

__all__ = ["rows"]

Decode = Callable[[Any], Any]


def rows(batch: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any]]:
    """Yield the rows as dictionaries.

    Columns of the extension type arrow.json are decoded, at any depth, and maps become dictionaries. Arrow gives each
    message the fields of all others, as nulls, and a template would print them. So a field of a struct that is null is left
    out, unless it is null in every row: then it is in the file only because someone wrote a null. Nulls in lists, in maps
    and in JSON are kept.
    """
    decoders = {field.name: decode for field in batch.schema if (decode := _decoder(field)) is not None}
    for row in batch.to_pylist():
        for name, decode in decoders.items():
            if row[name] is not None:
                row[name] = decode(row[name])
        yield {name: value for name, value in row.items() if value is not None}


def _decoder(field: pa.Field) -> Decode | None:
    """A function for values that are not null, or None where they are right already."""
    kind = field.type
    named = (field.metadata or {}).get(b"ARROW:extension:name", b"").decode(errors="replace")
    if isinstance(kind, pa.BaseExtensionType):
        named, kind = kind.extension_name, kind.storage_type
    if named == "arrow.json":
        return _from_json
    if pa.types.is_struct(kind):
        return _struct_decoder(kind)
    if pa.types.is_map(kind):
        return _map_decoder(kind)
    if pa.types.is_dictionary(kind):
        return _decoder(pa.field("item", kind.value_type))
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
        decode = _decoder(kind.value_field)
        if decode is not None:
            return lambda values: [None if value is None else decode(value) for value in values]
    return None


def _from_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, (str, bytes)) else value


def _struct_decoder(kind: pa.StructType) -> Decode:
    fields = [kind.field(index) for index in range(kind.num_fields)]
    decoders = {field.name: decode for field in fields if (decode := _decoder(field)) is not None}
    always_null = frozenset(field.name for field in fields if pa.types.is_null(field.type))

    def decode(value: dict[str, Any]) -> dict[str, Any]:
        return {
            name: decoders[name](entry) if name in decoders and entry is not None else entry
            for name, entry in value.items()
            if entry is not None or name in always_null
        }

    return decode


def _map_decoder(kind: pa.MapType) -> Decode:
    decode = _decoder(kind.item_field)

    def decode_map(value: Any) -> dict[str, Any]:
        pairs = value.items() if isinstance(value, dict) else value
        return {
            key if isinstance(key, str) else str(key): entry if entry is None or decode is None else decode(entry)
            for key, entry in pairs
        }

    return decode_map

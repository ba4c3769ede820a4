"""The identity of a tokenised set: everything that decides its rows, and nothing else.

It names the directory of the set, so tokens of other data, another tokenizer or another chat template are never read by
mistake. ``data.max_length``, truncation, filter, fraction, held-out share, seed, and the source's name and weight are not
part of it: rows hold all tokens, and these settings select among them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from raydpo.config import DataConfig, SourceConfig
from raydpo.data.counting import needs_marks
from raydpo.data.locate import DataFile, data_files, hub_dataset, is_on_hub
from raydpo.data.pairs import number_columns
from raydpo.data.preference import Preference
from raydpo.data.rows import PAIR_MARGIN, PAIR_WEIGHT, most_characters_of
from raydpo.data.tokenise import FILES, Tokeniser, template_text
from raydpo.errors import DataError, reason
from raydpo.storage.content import BY_TIME, content_version, file_digest
from raydpo.storage.memory import remembered, stamp, versions
from raydpo.storage.uri import redact

__all__ = ["SetIdentity", "SourceFile", "files_of", "tokenizer_facts"]

RECIPE = 2
"""Version of raydpo's own reading and tokenising, raised whenever a change alters the rows or the account of a set."""
_IF_SET = ("marks", "spans", "ranked")
_PACKAGES = ("transformers", "tokenizers", "jinja2")
_UNKNOWN = "unknown "
"""Begins ``SourceFile.content`` where a store tells nothing from which a change would be noticed."""
_PROBES = (
    Preference("Once\n\n upon  a time, 1234567", " était une fois <|x|> </s>", "\t数 ½ naïve 🙂 it's"),
    Preference(
        [{"role": "user", "content": "Hi  1+1?"}],
        [{"role": "assistant", "content": "2\n"}],
        [{"role": "assistant", "content": " 3"}],
    ),
    Preference(
        [{"role": "system", "content": "S."}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
         {"role": "user", "content": "\nc "}],
        [{"role": "assistant", "content": "<think>\nt\n</think>\n\nd"}],
        [{"role": "assistant", "content": "e"}],
    ),
)  # fmt: skip


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        name: as messages name it.
        size: bytes; 0 for a data set on the hub.
        content: a digest of its content, or what its store tells in its place.
        note: how it was chosen (``locate.DataFile``), which the set's account repeats.
    """

    name: str
    size: int
    content: str
    note: str | None = None

    def is_still(self, now: SourceFile) -> bool:
        """Whether ``now`` is this file with the same content, as far as its store tells."""
        told = not self.content.startswith(_UNKNOWN)
        return (self.name, self.size) == (now.name, now.size) and (self.content == now.content or not told)


def files_of(source: SourceConfig) -> tuple[SourceFile, ...]:
    """The files of a source as they are now, in order. A local file is read once, and not again until it changes.

    Raises:
        DataError: if there are none, or they cannot be read.
    """
    if is_on_hub(source):
        return (_hub_file(source),)
    return tuple(_file(file) for file in data_files(source))


def _hub_file(source: SourceConfig) -> SourceFile:
    dataset = hub_dataset(source)
    # Names of the downloaded files, each with its commit. A data set that was built otherwise has a fingerprint alone.
    downloads = json.dumps(getattr(dataset.info, "download_checksums", None) or {}, sort_keys=True, default=str)
    content = hashlib.sha256(downloads.encode()).hexdigest() if downloads != "{}" else f"fingerprint {dataset._fingerprint}"
    subset = "" if source.subset is None else f"/{source.subset}"
    return SourceFile(f"{source.path}{subset}[{source.split}]", 0, content)


def _file(file: DataFile) -> SourceFile:
    try:
        if isinstance(file.filesystem, pafs.LocalFileSystem):
            path = Path(file.path)
            before = stamp(path)
            content = file_digest(path)
            if stamp(path) != before:
                raise DataError(f"{file.label} changed while it was read; run the command again when it is written")
            return SourceFile(file.label, path.stat().st_size, f"sha256 {content}", file.note)
        info = file.filesystem.get_file_info(file.path)
        content = content_version(file.filesystem, file.path)
        # Where nothing proves that it is the same file next time, the set is not found again.
        return SourceFile(file.label, info.size or 0, content or f"{_UNKNOWN}{uuid.uuid4().hex}", file.note)
    except DataError:
        raise
    except Exception as error:  # every file system has its own errors
        raise DataError(f"cannot read {file.label}: {reason(error)}") from None


@dataclass(frozen=True, kw_only=True)
class SetIdentity:
    """The identity, field by field."""

    files: tuple[SourceFile, ...]
    """The files of the source, in order."""
    columns: dict[str, str]
    """Our column names, and the file's that they are mapped to."""
    limit: int | None
    """Number of records to read."""
    numbers: dict[str, str]
    """Our columns ``PAIR_WEIGHT`` and ``PAIR_MARGIN``, and the record columns that they come from."""
    special_tokens: str
    """``data.special_tokens``."""
    most_characters: int
    """``rows.most_characters_of(data.max_length)``: pairs with longer text are not tokenised."""
    tokenizer: dict[str, Any]
    """See ``tokenizer_facts``."""
    marks: bool = False
    """Whether rows have ``marks.MARK_COLUMNS``, which tell the parts of completions that ``data.train_on`` names."""
    spans: str | None = None
    """``data.spans_column``."""
    ranked: bool = False
    """Whether ranked completions become lists, by ``data.ranked``."""
    recipe: int = RECIPE
    path: str = field(default="", compare=False)
    """The source's path, for people. It is not part of the identity: a copy of the files gives the same set."""

    @classmethod
    def of(
        cls,
        source: SourceConfig,
        data: DataConfig,
        directory: str | Path,
        load: Callable[[], Tokeniser],
        *,
        trust_remote_code: bool = False,
    ) -> SetIdentity:
        """The identity of ``source`` as it is now.

        Args:
            directory: local directory of the tokenizer.
            load: gives the tokeniser of ``directory`` and ``data``. Called only if this machine does not remember what it
                does.
            trust_remote_code: whether loading the tokenizer runs code, which may lie elsewhere and is not compared. The
                tokeniser is then always loaded.

        Raises:
            DataError: if the source cannot be read.
            FilesError: if there is no tokenizer.
        """
        return cls(
            files=files_of(source),
            columns=dict(source.columns),
            limit=source.limit,
            numbers=number_columns(data),
            special_tokens=data.special_tokens,
            most_characters=most_characters_of(data.max_length),
            tokenizer=tokenizer_facts(directory, data, load, trust_remote_code=trust_remote_code),
            marks=needs_marks(data),
            spans=data.spans_column,
            ranked=data.ranked == "lists",
            path=redact(source.path),
        )

    @property
    def digest(self) -> str:
        """32 hexadecimal digits over all fields: the name of the set's directory."""
        return hashlib.blake2b(_canonical(self.to_dict()).encode(), digest_size=16).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON, without ``path``, and without those of marks and lists in a set that has none."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name != "path"}
        return {name: value for name, value in fields.items() if value or name not in _IF_SET}

    @classmethod
    def from_dict(cls, fields: dict[str, Any], path: str = "") -> SetIdentity:
        """The identity with these fields, as ``to_dict`` gives them."""
        return cls(**fields | {"files": tuple(SourceFile(**file) for file in fields["files"]), "path": path})

    def differences(self, other: SetIdentity) -> list[str]:
        """``field: mine here, theirs there`` for each field that differs."""
        mine, theirs = dict(_flat(self)), dict(_flat(other))
        names = [*mine, *(name for name in theirs if name not in mine)]
        return [
            f"{name}: {mine.get(name, 'none')} here, {theirs.get(name, 'none')} there"
            for name in names
            if mine.get(name) != theirs.get(name)
        ]

    def warnings(self) -> list[str]:
        """A line for files of which a change may go unnoticed, and one for those that count as changed each time."""
        told = (
            (BY_TIME, "a change is noticed by size and time alone, so give changed data another name"),
            (
                _UNKNOWN,
                "it tells no time either, so the pairs are tokenised again by each command; copy it to another store",
            ),
        )
        lines = []
        for kind, remedy in told:
            files = [file.name for file in self.files if file.content.startswith(kind)]
            if files:
                more = f" and {len(files) - 1:,} more" if len(files) > 1 else ""
                lines.append(f"warning: the store of {self.path} tells no ETag or digest of {files[0]}{more}; {remedy}")
        return lines


def _canonical(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))


_SETTINGS = {
    "limit": "limit of the source",
    "most_characters": "most characters of a pair, by data.max_length",
    "special_tokens": "data.special_tokens",
    "marks": "marks of the parts of completions, by data.train_on",
    "spans": "data.spans_column",
    "ranked": "ranked lists, by data.ranked",
    PAIR_WEIGHT: "data.weight_column",
    PAIR_MARGIN: "data.margin_column",
}
"""What users call fields."""


def _flat(identity: SetIdentity) -> Iterator[tuple[str, str]]:
    """What a reader is told of each field, by name. Texts that differ are told differently."""
    yield "files", ", ".join(file.name for file in identity.files)
    for file in identity.files:
        yield f"file {file.name}", f"{file.size:,} bytes, {_short(file.content)}"
        if file.note is not None:
            yield f"choice of {file.name}", file.note
    for name, value in identity.to_dict().items():
        if isinstance(value, dict):
            for key, entry in value.items():
                if isinstance(entry, dict):
                    yield from ((f"{name} {key} {inner}", _short(told)) for inner, told in entry.items())
                else:
                    yield _SETTINGS.get(key, f"{name} {key}"), _short(entry)
        elif name != "files":
            yield _SETTINGS.get(name, name), _short(value)


def _short(value: Any) -> str:
    text = "yes" if value is True else str(value)
    return text if len(text) <= 40 else f"{text[:24]}..."


def tokenizer_facts(
    directory: str | Path, data: DataConfig, load: Callable[[], Tokeniser], *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """What decides the tokens of a record: files and class of the tokenizer, chat template, date that the template is told,
    versions of the packages, and what came out of a few fixed records. The last also shows code that none of these names.

    Remembered as long as nothing of these has changed, unless remote code is trusted. Otherwise the tokeniser is loaded.
    """

    def find() -> dict[str, Any]:
        return {
            "files": {str(file.relative_to(directory)): file_digest(file) for file in files},
            "versions": dict(entry.split(" ", 1) for entry in versions(*_PACKAGES)),
        } | _as_loaded(load())

    files = [file for name in FILES if (file := Path(directory, name)).is_file()]
    files += [file for pattern in ("*.py", "additional_chat_templates/*") for file in sorted(Path(directory).glob(pattern))]
    config = Path(directory, "config.json")  # may name the tokenizer's class
    if trust_remote_code:
        return find()
    stamps = [stamp(file) for file in (*files, config) if file.is_file()]
    given = None if data.chat_template is None else template_text(data.chat_template)
    return remembered("tokenizers", [RECIPE, stamps, given, str(data.template_date), versions(*_PACKAGES)], find)


def _as_loaded(tokeniser: Tokeniser) -> dict[str, Any]:
    template = tokeniser.tokenizer.chat_template
    return {
        "class": type(tokeniser.tokenizer).__name__,
        "template": None if not template else hashlib.sha256(_canonical(template).encode()).hexdigest(),
        "template_date": str(tokeniser.template.day) if tokeniser.template.writes_date else None,
        "probe": _probe(tokeniser),
    }


def _probe(tokeniser: Tokeniser) -> str:
    """Digest of the ids of a few fixed records."""
    found = []
    fresh = Tokeniser(tokeniser.tokenizer, tokeniser.template.day)  # the given one counts what it does
    for preference in _PROBES:
        try:
            (encoded,) = fresh.encode([preference])
            told = [ids.tolist() for ids in encoded] if isinstance(encoded, tuple) else str(encoded)
        except Exception as error:  # such as a tokenizer without a chat template
            told = type(error).__name__
        found.append(told)
    return hashlib.sha256(_canonical(found).encode()).hexdigest()

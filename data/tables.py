"""Where samples come from: CSV and JSON Lines manifests, folders, and data sets of Hugging Face ``datasets``.

A table gives its rows in one order, numbered from 0, each with what `data.rows.to_sample` needs to read it.
"""

import csv
import difflib
import hashlib
import importlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from data.decode import METADATA, MODALITIES
from data.errors import UserError
from data.rows import Bad, File, Row, RowError, free_name

HUB = "hf:"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_NAMES = {"image": ("image",), "text": ("text", "caption"), "audio": ("audio",), "label": ("label",)}
_PATHS = ("_path", "_file")
_KEYS = ("key", "id", "__key__")
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_TEXT_PATH = re.compile(r"\S+\.txt", re.IGNORECASE)  # to train on names of files would go unseen
_MAX_FIELD = 16_000_000  # characters of a CSV field; csv's own limit is 131,072
# Extensions by which files of a folder are taken for an image or sound, too: their content decides, and a GIF is
# refused as one, not passed by.
_ALSO = {
    "image": ("avif", "bmp", "gif", "heic", "heif", "jfif", "jpe", "jxl", "svg", "tif", "tiff"),
    "audio": ("aac", "aif", "aiff", "m4a", "mp3", "oga", "opus", "wma"),
}
_MODALITY = MODALITIES | {extension: modality for modality, others in _ALSO.items() for extension in others}


class TableError(UserError):
    """A source that can't be read, or lacks what was asked for; names the source."""


class Columns(NamedTuple):
    """Which column holds what; None where none does.

    Attributes:
        text_files: the column ``text`` holds paths to files, not the text itself.
    """

    image: str | None = None
    text: str | None = None
    audio: str | None = None
    label: str | None = None
    text_files: bool = False

    @property
    def modalities(self) -> dict[str, str]:
        """Modality -> column, of those there are."""
        columns = {"image": self.image, "text": self.text, "audio": self.audio}
        return {modality: column for modality, column in columns.items() if column is not None}


@dataclass(frozen=True)
class Slice:
    """Every ``count``-th row, from row ``index`` on: slices share no row, and together have all."""

    index: int = 0
    count: int = 1

    def numbers(self, start: int, end: int = 1 << 62) -> range:
        """The numbers of its rows in [start, end)."""
        return range(start + (self.index - start) % self.count, end, self.count)


class Table(ABC):
    """Rows in a fixed order.

    Attributes:
        folder: where relative paths in it start; None for data of the hub.
        columns: which column holds what.
        fingerprint: what must be equal for the rows to be the same again, by name.
        notes: what the user should know of it, such as columns that are left out.
    """

    folder: Path | None
    columns: Columns
    fingerprint: dict[str, Any]
    notes: list[str]

    @abstractmethod
    def count(self) -> int | None:
        """Number of rows; None where only reading all would tell."""

    @abstractmethod
    def rows(self, part: Slice, start: int) -> Iterator[Row | Bad]:
        """The rows of a slice from number ``start`` on."""


def open_table(source: str, wanted: Columns) -> Table:
    """The table that ``--from`` names.

    Args:
        source: a CSV (``.csv .tsv``) or JSON Lines (``.jsonl .ndjson``) manifest, a folder, a data set saved by
            ``save_to_disk``, or ``hf:NAME[@REVISION][:CONFIG][:SPLIT]``, a data set of the hub or a local folder that
            ``load_dataset`` takes.
        wanted: columns that the user named; others are found by their names: ``image``, ``text`` or ``caption``,
            ``audio``, ``label``, each also with ``_path`` or ``_file`` at its end, in lower case.

    Raises:
        TableError: nothing there, nothing that can be read, or no such column.
    """
    if source.startswith(HUB):
        return _from_hub(source, wanted)
    path = Path(source)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = ", ".join(sorted(str(inner.parent) for inner in path.glob("*/state.json")))
            raise TableError(f"{source}: several splits, saved by datasets; give one of {splits}")
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return _from_disk(path, wanted)
        return Folder(path, wanted)
    if not path.exists():
        hint = f"; data sets of the hub are written {HUB}{source}" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
        raise TableError(f"{source}: no such file or folder{hint}")
    if path.suffix.lower() in _DELIMITERS:
        return CsvManifest(path, wanted)
    if path.suffix.lower() in _JSON_LINES:
        return JsonManifest(path, wanted)
    known = " ".join((*_DELIMITERS, *_JSON_LINES))
    raise TableError(f"{source}: neither a folder nor a manifest; manifests end in {known}")


def choose(source: str, columns: Collection[str], wanted: Columns) -> Columns:
    """The columns to read: those that are ``wanted``, others by their names.

    Raises:
        TableError: a wanted column is missing, a column stands for two things, several names fit, or none at all; or
            one would fit but for its case or white space around it.
    """
    chosen: dict[str, str | None] = {}
    # A column that the user named stands for what he said, however it is spelled.
    unnamed = [column for column in columns if column not in (wanted.image, wanted.text, wanted.audio, wanted.label)]
    for kind, names in _NAMES.items():
        column = getattr(wanted, kind)
        if column is not None and column not in columns:
            close = difflib.get_close_matches(column, columns, 1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise TableError(f"{source}: no column {column!r} (--{kind}){hint} It has: {', '.join(columns)}")
        known = [name + end for name in names for end in ("", *_PATHS)]
        found = [name for name in known if name in columns]
        if column is None and len(found) > 1:
            raise TableError(f"{source}: columns {' and '.join(found)} could be the {kind}: choose with --{kind}")
        alike = next((name for name in unnamed if name.strip().lower() in known), None)
        if column is None and not found and alike is not None:
            raise TableError(
                f"{source}: column {alike!r} is not taken for {alike.strip().lower()!r}, as case and white space count "
                f'in names of columns: add --{kind} "{alike}", or rename it'
            )
        chosen[kind] = column or next(iter(found), None)
    for column, uses in Counter(column for column in chosen.values() if column is not None).items():
        if uses > 1:
            raise TableError(f"{source}: column {column!r} stands for {uses} of image, text, audio and label")
    text_files = wanted.text_files or (chosen["text"] or "").endswith(_PATHS)
    made = Columns(**chosen, text_files=text_files)
    if not made.modalities:
        raise TableError(
            f"{source}: none of the columns image, text, caption and audio; name yours with --image, --text or "
            f"--audio. It has: {', '.join(columns)}"
        )
    return made


def _to_row(number: int, where: str, cells: Mapping[str, Any], columns: Columns) -> Row | Bad:
    """A row from its cells: what files it names, what it is called, and all else."""
    files: dict[str, File] = {}
    try:
        for modality, column in columns.modalities.items():
            file = _to_file(modality, column, cells.get(column), columns.text_files)
            if file is not None:
                files[modality] = file
        taken = {*columns.modalities.values(), columns.label}
        facts: dict[str, Any] = {}
        if columns.label is not None and cells.get(columns.label) not in (None, ""):
            facts["label"] = cells[columns.label]
        for column, value in cells.items():
            if column not in taken:
                facts[free_name(column, facts)] = value
    except RowError as error:
        return Bad(number, where, error.kind, str(error))
    return Row(number, where, _name(cells, files), files, facts)


def _to_file(modality: str, column: str, cell: Any, text_files: bool) -> File | None:
    """What a cell stands for: text itself, a path, bytes, or the ``{"path", "bytes"}`` of `datasets`."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return None
    if isinstance(cell, dict) and cell.keys() <= {"path", "bytes"} and modality != "text":
        name, content = cell.get("path"), cell.get("bytes")
        if not name and content is None:
            return None
        if isinstance(name, str | None) and isinstance(content, bytes | None):
            return File(name, content)
    if isinstance(cell, bytes):
        return File(None, cell)
    if isinstance(cell, str) and modality == "text" and not text_files:
        if _TEXT_PATH.fullmatch(cell.strip()):
            raise RowError(
                "text looks like a path",
                f"column {column}: {cell.strip()!r} looks like a path; --text-files reads files",
            )
        try:
            return File(None, cell.encode())
        except UnicodeEncodeError as error:
            raise RowError("text is no text", f"column {column}: {error}") from error
    if isinstance(cell, str):
        return File(cell.strip())
    needed = "text" if modality == "text" and not text_files else "a path"
    raise RowError(f"{modality} of another type", f"column {column}: {needed} is needed, not a {type(cell).__name__}")


def _name(cells: Mapping[str, Any], files: Mapping[str, File]) -> str | None:
    """What the row says of its own name, or else its file's name without the folder and the extension."""
    for column in _KEYS:
        if cells.get(column) not in (None, ""):
            return str(cells[column])
    paths = (files[modality].name for modality in ("image", "audio", "text") if modality in files)
    return next((PurePosixPath(path).stem for path in paths if path), None)


class _Manifest(Table):
    """A text file with a row per record."""

    def __init__(self, path: Path, wanted: Columns) -> None:
        self.path, self.folder, self.notes = path, path.parent, []
        self.fingerprint = {"sha256": _hash_utf8(path)}
        self._count: int | None = None
        self.columns = choose(str(path), self._column_names(), wanted)

    @abstractmethod
    def _column_names(self) -> list[str]: ...

    @abstractmethod
    def _cells(self, wanted: range | None = None) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Per row its line and its cells, or what is wrong with it; of rows not in ``wanted`` an empty text."""

    def count(self) -> int:
        if self._count is None:
            self._count = sum(1 for _ in self._cells(range(0)))
        return self._count

    def rows(self, part: Slice, start: int) -> Iterator[Row | Bad]:
        wanted = part.numbers(start)
        for number, (line, cells) in enumerate(self._cells(wanted)):
            if number not in wanted:
                continue
            where = f"{self.path}:{line}"
            if isinstance(cells, str):
                yield Bad(number, where, "malformed line", cells)
            else:
                yield _to_row(number, where, cells, self.columns)


class CsvManifest(_Manifest):
    """Comma- or tab-separated values in UTF-8, with names in the first line.

    Labels become numbers if all of them are whole numbers; all else stays text.
    """

    header: Sequence[str] = ()

    def _column_names(self) -> list[str]:
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            try:
                header: list[str] = next(self._reader(file), [])
            except csv.Error as error:
                raise TableError(f"{self.path}:1: {error}; names of the columns are needed there") from error
        if not header:
            raise TableError(f"{self.path}: empty; the names of the columns are needed in its first line")
        twice = [name for name, uses in Counter(header).items() if uses > 1]
        if twice:
            raise TableError(f"{self.path}: column {twice[0]!r} comes twice")
        self.header = header
        return header

    def _reader(self, file: Iterable[str]) -> Any:
        csv.field_size_limit(_MAX_FIELD)
        return csv.reader(file, delimiter=_DELIMITERS[self.path.suffix.lower()], strict=True)

    def _records(self) -> Iterator[tuple[int, list[str] | str]]:
        """Each record after the first with the line it ends in, or what is wrong with it; empty lines are none.

        Raises:
            TableError: quotation marks that leave it open where the records after them begin.
        """
        lines: list[str] = []  # of the record
        faulty: int | None = None
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            reader = self._reader(_kept(file, lines))
            next(reader)
            while True:
                lines.clear()
                try:
                    record: list[str] | str | None = next(reader, None)
                except csv.Error as error:
                    # A record of one line whose marks come in pairs is at fault by itself. Of any other, who knows
                    # whether the next line is a record or goes on with a text?
                    if len(lines) > 1:
                        raise TableError(
                            f"{self.path}:{reader.line_num}: {error}; is a quotation mark left open?"
                        ) from error
                    faulty = faulty or reader.line_num
                    record = f"{error}; a quotation mark inside of a quoted text is written twice"
                if record is None:
                    return
                if faulty is not None and sum(line.count('"') for line in lines) % 2:
                    raise TableError(
                        f"{self.path}:{reader.line_num}: a quotation mark too few or too many since the malformed line "
                        f"{faulty}: it can't be told where records begin"
                    )
                if record:
                    yield reader.line_num, record

    def _cells(self, wanted: range | None = None) -> Iterator[tuple[int, dict[str, Any] | str]]:
        for number, (line, record) in enumerate(self._records()):
            if wanted is not None and number not in wanted:
                yield line, ""
            elif isinstance(record, str):
                yield line, record
            elif len(record) != len(self.header):
                yield line, f"{len(record)} fields, the first line names {len(self.header)}"
            else:
                yield line, self._typed(dict(zip(self.header, record, strict=True)))

    def _typed(self, cells: dict[str, Any]) -> dict[str, Any]:
        label = self.columns.label
        if label is not None and cells[label] and self._labels_are_numbers:
            cells[label] = int(cells[label])
        return cells

    @cached_property
    def _labels_are_numbers(self) -> bool:
        at = self.header.index(str(self.columns.label))
        records = (record for _, record in self._records() if not isinstance(record, str))
        labels = (record[at] for record in records if len(record) == len(self.header))
        return all(_WHOLE_NUMBER.fullmatch(label) for label in labels if label)


def _kept(file: Iterable[str], lines: list[str]) -> Iterator[str]:
    """The lines of ``file``, each of which is added to ``lines`` as it is read."""
    for line in file:
        lines.append(line)
        yield line


class JsonManifest(_Manifest):
    """JSON Lines: an object per line, in UTF-8. Its columns are the fields of all lines together."""

    def _column_names(self) -> list[str]:
        names: dict[str, None] = {}
        for _, cells in self._cells():
            if not isinstance(cells, str):
                names.update(dict.fromkeys(cells))
        if not names:
            raise TableError(f"{self.path}: holds no JSON object, of which one per line is needed")
        return list(names)

    def _cells(self, wanted: range | None = None) -> Iterator[tuple[int, dict[str, Any] | str]]:
        with self.path.open(encoding="utf-8-sig", newline="\n") as file:
            texts = ((line, text) for line, text in enumerate(file, 1) if text.strip())
            for number, (line, text) in enumerate(texts):
                if wanted is not None and number not in wanted:
                    yield line, ""
                    continue
                try:
                    cells = json.loads(text.strip())
                except json.JSONDecodeError as error:
                    yield line, f"not JSON at character {error.colno}: {error.msg}"
                    continue
                except (ValueError, RecursionError) as error:
                    yield line, f"not JSON: {error}"
                    continue
                yield line, cells if isinstance(cells, dict) else f"a {type(cells).__name__}, an object is needed"


def _hash_utf8(path: Path) -> str:
    """The sha256 of a text file, which is checked to be UTF-8."""
    digest, lines = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            for line in file:
                lines += 1
                line.decode()
                digest.update(line)
    except UnicodeDecodeError as error:
        raise TableError(f"{path}:{lines}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise TableError(f"{path}: {error.strerror}") from error
    return digest.hexdigest()


class Folder(Table):
    """All files below a folder; those of equal path up to the extension are a sample.

    Symbolic links are followed. Hidden files are passed by.
    """

    def __init__(self, path: Path, wanted: Columns) -> None:
        if any(wanted):
            raise TableError(f"{path}: a folder has no columns; its files go by their extensions")
        self.folder, self.columns, self.notes = path, Columns(text_files=True), []
        files = _list(path)
        self.fingerprint = _fingerprint(files)
        self.samples: dict[str, dict[str, list[str]]] = {}
        ignored: Counter[str] = Counter()
        for name, _, _ in files:
            pure = PurePosixPath(name)
            kind = METADATA if pure.suffix.lower() == f".{METADATA}" else _MODALITY.get(pure.suffix[1:].lower())
            if kind is None:
                ignored[pure.suffix or pure.name] += 1
                continue
            kinds = self.samples.setdefault(str(pure.with_suffix("")), {})
            kinds.setdefault(kind, []).append(name)
        if ignored:
            counted = ", ".join(f"{uses} {suffix}" for suffix, uses in ignored.most_common(10))
            self.notes.append(f"files that are no image, text, sound or .json are passed by: {counted}")
        if not self.samples:
            raise TableError(f"{path}: no files to read; looked for {' '.join((*MODALITIES, METADATA))}")

    def count(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def rows(self, part: Slice, start: int) -> Iterator[Row | Bad]:
        """By path."""
        wanted = part.numbers(start)
        for number, (stem, kinds) in enumerate(self.samples.items()):
            if number not in wanted:
                continue
            where = f"{self.folder}/{stem}"
            twice = [names for names in kinds.values() if len(names) > 1]
            if twice:
                yield Bad(number, where, "several files of a kind", " and ".join(twice[0]))
            else:
                yield Row(number, where, stem, {kind: File(names[0]) for kind, names in kinds.items()}, {})


def _list(folder: Path) -> list[tuple[str, int, int]]:
    """Relative path, size and time of change of every file below ``folder`` that isn't hidden, sorted by path.

    Raises:
        TableError: symbolic links that go round in a circle, or a folder that can't be read.
    """
    files: list[tuple[str, int, int]] = []

    def visit(here: Path, above: tuple[Path, ...]) -> None:
        real = here.resolve()
        if real in above:
            raise TableError(f"{here}: a symbolic link to a folder that it lies in")
        with os.scandir(here) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                path = here / entry.name
                if entry.is_dir():
                    visit(path, (*above, real))
                    continue
                try:
                    found = entry.stat()
                except OSError:  # a link to nowhere: reading it will say so
                    files.append((path.relative_to(folder).as_posix(), 0, 0))
                    continue
                files.append((path.relative_to(folder).as_posix(), found.st_size, found.st_mtime_ns))

    try:
        visit(folder, ())
    except OSError as error:
        raise TableError(f"{error.filename}: {error.strerror}") from error
    return sorted(files)


def _fingerprint(files: Sequence[tuple[str, int, int]]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps(file).encode() + b"\n")
    return {"files": len(files), "bytes": sum(size for _, size, _ in files), "sha256": digest.hexdigest()}


class DataSet(Table):
    """A data set of `datasets`, whose pictures and sounds are read as the bytes they are."""

    def __init__(self, name: str, data: Any, folder: Path | None, fingerprint: dict[str, Any], wanted: Columns) -> None:
        self.name, self.folder, self.fingerprint, self.notes = name, folder, fingerprint, []
        data = data.with_format(None)
        features = data.features or {}
        self.columns = choose(name, list(features) or list(next(iter(data), {})), wanted)
        if self.columns.text_files:
            raise TableError(f"{name}: column {self.columns.text!r} holds paths; data sets must hold the text itself")
        left_out = []
        for column, feature in features.items():
            if column in self.columns.modalities.values():
                continue
            if _holds_bytes(feature):
                left_out.append(column)
                self.notes.append(f"column {column!r} holds {type(feature).__name__} and is left out")
            if column == self.columns.label and hasattr(feature, "names"):
                self.notes.append(f"labels are numbers; their names, for eval.classes: [{', '.join(feature.names)}]")
        if left_out:  # not by remove_columns, which decodes what is in a stream
            data = data.select_columns([column for column in features if column not in left_out])
        for modality, column in self.columns.modalities.items():
            if column in features:
                data = _undecoded(data, name, modality, column)
        self.data = data

    def count(self) -> int | None:
        """Number of rows, where `datasets` has all of them at hand."""
        return len(self.data) if hasattr(self.data, "__len__") else None

    def rows(self, part: Slice, start: int) -> Iterator[Row | Bad]:
        """In the order of the data set; of a stream all are read, and those of other slices passed by."""
        total = self.count()
        wanted = part.numbers(start) if total is None else part.numbers(start, total)
        if total is None:
            numbered: Iterable[tuple[int, Any]] = enumerate(self.data.skip(start) if start else self.data, start)
        else:
            numbered = zip(wanted, self.data.select(wanted) if wanted else (), strict=True)
        number = start
        try:
            for number, cells in numbered:
                if number in wanted:
                    yield _to_row(number, f"{self.name} row {number}", cells, self.columns)
        except (OSError, ImportError) as error:  # the network; or torchcodec, without which some sounds can't be read
            raise TableError(f"{self.name}: after row {number}: {error}") from error


def _undecoded(data: Any, name: str, modality: str, column: str) -> Any:
    """``data`` with a column that gives bytes and paths, not pixels and samples."""
    datasets = _library()
    feature = data.features[column]
    kind = {"image": datasets.Image, "audio": datasets.Audio}.get(modality)
    if kind is not None and isinstance(feature, kind):
        return data.cast_column(column, kind(decode=False))
    allowed = ("string", "large_string") + (() if modality == "text" else ("binary", "large_binary"))
    if isinstance(feature, datasets.Value) and feature.dtype in allowed:
        return data
    needed = "text" if modality == "text" else f"{kind.__name__ if kind else ''}, bytes or paths"
    raise TableError(f"{name}: column {column!r} holds {feature}: for {modality}, {needed} are needed")


def _holds_bytes(feature: Any) -> bool:
    """Whether values of a feature, or parts of them, are bytes or are decoded from bytes."""
    if isinstance(feature, dict):
        return any(map(_holds_bytes, feature.values()))
    if hasattr(feature, "feature"):  # lists
        return _holds_bytes(feature.feature)
    return hasattr(feature, "decode") or "binary" in str(getattr(feature, "dtype", ""))


def _library() -> Any:
    """`datasets`, which takes a second to import."""
    return importlib.import_module("datasets")


def _from_disk(path: Path, wanted: Columns) -> Table:
    try:
        data = _library().load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: {error}") from error
    return DataSet(str(path), data, path, _fingerprint(_list(path)), wanted)


def _from_hub(source: str, wanted: Columns) -> Table:
    """Open ``hf:NAME[@REVISION][:CONFIG][:SPLIT]`` as a stream."""
    name, *rest = source.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise TableError(f"{source}: {HUB}NAME[@REVISION][:CONFIG][:SPLIT] is needed")
    split = rest[-1] if rest else None
    config = rest[0] if len(rest) == 2 else None
    local = Path(name) if Path(name).is_dir() else None
    if local is not None and (local / "state.json").is_file():
        raise TableError(f"{source}: saved by datasets: give the folder itself, --from {name}")
    name, _, revision = (name, "", "") if local else name.partition("@")
    try:
        builder = _library().load_dataset_builder(name, config or None, revision=revision or None)
        streams = builder.as_streaming_dataset()
    except (OSError, ValueError) as error:  # nothing there, no network, no such configuration
        raise TableError(f"{source}: {error}") from error
    if split is None and len(streams) == 1:
        split = next(iter(streams))
    if split not in streams:
        wrong = "several splits" if split is None else f"no split {split!r}"
        raise TableError(f"{source}: {wrong}; add one of {', '.join(f':{name}' for name in streams)}")
    fingerprint = {"split": split, "config": builder.config.name}
    fingerprint |= _fingerprint(_list(local)) if local else {"revision": builder.hash}
    return DataSet(source, streams[split], local, fingerprint, wanted)

"""One row of a table -> one sample of a shard: read, checked against its content, stripped, decoded once.

Worker processes import this file, which is why it imports nothing large.
"""

import errno
import json
import math
import os
import re
import signal
import stat
import threading
import unicodedata
from collections.abc import Callable, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple, cast

import fsspec

from data.decode import DECODERS, MAX_MEMBER_BYTES, METADATA, MODALITIES, DecodeError
from data.errors import UserError
from data.strip import StripError, sniff, strip

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB = re.compile(r"((zip|tar)://[^:]*::)?hf://datasets/")
_UNREADABLE = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
_KEY_LENGTH = 64


class File(NamedTuple):
    """A file that a row names or holds.

    Attributes:
        name: path as the row gives it, if it does.
        content: its bytes, where the row holds them.
    """

    name: str | None
    content: bytes | None = None


class Row(NamedTuple):
    """One row, not yet read.

    Attributes:
        number: its place in the whole table, from 0; the same in every slice.
        where: its place for people, such as ``train.csv:17``.
        name: what it is called, if anything.
        files: modality or ``json`` -> file. What the row lacks is absent.
        facts: all else that the row says; becomes the ``.json``.
    """

    number: int
    where: str
    name: str | None
    files: dict[str, File]
    facts: dict[str, Any]


class Sample(NamedTuple):
    """What becomes of a good row: ``members`` as `data.shards.NewShard.add` takes them."""

    number: int
    members: dict[str, bytes | str]


class Bad(NamedTuple):
    """What becomes of any other row.

    Attributes:
        kind: a few words that equal faults share, to be counted by.
        reason: what is wrong with this one.
    """

    number: int
    where: str
    kind: str
    reason: str


class Reading(NamedTuple):
    """How rows are read.

    Attributes:
        folder: relative paths start here; None for data of the hub, which must not name files of this machine.
        keep_metadata: leave EXIF, tags and the like in the files.
    """

    folder: Path | None
    keep_metadata: bool = False


class RowError(Exception):
    """Something is wrong with a row; ``kind`` as in `Bad`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def start_worker() -> None:
    """Make this process leave Ctrl-C to its parent, and end with the parent even when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def to_samples(rows: Sequence[Row | Bad], reading: Reading) -> list[Sample | Bad]:
    """`to_sample` of each.

    Raises:
        UserError: the disk or the network failed; names the row.
    """
    made = []
    for row in rows:
        try:
            made.append(to_sample(row, reading))
        except OSError as error:
            raise UserError(f"{row.where}: {error}") from error
        except Exception as error:
            error.add_note(f"while reading {row.where}")
            raise
    return made


def to_sample(row: Row | Bad, reading: Reading) -> Sample | Bad:
    """Read what ``row`` names, and check that all of it can be trained on.

    The sample has a member per modality, named by its content, and ``json`` with the row's facts and ``source``: its
    name before `portable_key`.

    Raises:
        OSError: the disk or the network failed.
    """
    if isinstance(row, Bad):
        return row
    try:
        facts = {**_sidecar(row, reading), **row.facts}
        members: dict[str, bytes | str] = {}
        for modality, file in row.files.items():
            if modality != METADATA:
                extension, content = _member(modality, file, reading)
                members[extension] = content
        if not members:
            raise RowError("nothing in it", f"has none of {', '.join(DECODERS)}")
        facts[free_name("source", facts)] = row.name
        members[METADATA] = _dump(facts)
    except RowError as error:
        return Bad(row.number, row.where, error.kind, str(error))
    return Sample(row.number, {"__key__": portable_key(row.name, row.number), **members})


def portable_key(name: str | None, number: int) -> str:
    """A key that is unique, whatever the other rows are, and a file name everywhere: ``cats_0001-000000017``.

    ASCII letters, digits, ``_`` and ``-``; accents are dropped, anything else becomes ``_``. The row's number at the
    end tells apart names that are equal, or become so here or on a file system that ignores case.
    """
    decomposed = unicodedata.normalize("NFKD", name or "")
    plain = "".join(character for character in decomposed if not unicodedata.combining(character))
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", plain).strip("_-")[:_KEY_LENGTH].rstrip("_-")
    return f"{readable}-{number:09d}" if readable else f"{number:09d}"


def free_name(name: str, taken: dict[str, Any]) -> str:
    """``name``, behind as many underscores as keep it apart from ``taken``."""
    while name in taken:
        name = f"_{name}"
    return name


def _dump(facts: dict[str, Any]) -> bytes:
    try:
        return json.dumps(_plain(facts), separators=(",", ":"), allow_nan=False).encode()
    except RecursionError as error:
        raise RowError("facts that JSON can't hold", "its fields are nested too deeply") from error


def _plain(value: Any) -> Any:
    """``value`` as JSON can say it: dates and decimals as text, numbers that are not finite as null.

    Raises:
        RowError: bytes, or another type without a JSON form.
    """
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta | Decimal):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise RowError("facts that JSON can't hold", f"{type(value).__name__} can't be written to the .json")


def _sidecar(row: Row, reading: Reading) -> dict[str, Any]:
    """The fields of the row's own JSON file."""
    if METADATA not in row.files:
        return {}
    file = row.files[METADATA]
    try:
        facts = json.loads(_read(METADATA, file, reading))
    except (ValueError, RecursionError) as error:
        raise RowError("json can't be read", f"json {file.name}: {error}") from error
    if not isinstance(facts, dict):
        raise RowError("json can't be read", f"json {file.name}: a {type(facts).__name__}, an object is needed")
    return facts


def _member(modality: str, file: File, reading: Reading) -> tuple[str, bytes]:
    """Extension and bytes of the member that ``file`` becomes."""
    content = _read(modality, file, reading)
    called = f"{modality} {file.name}" if file.name else modality
    extension = "txt" if modality == "text" else _extension(modality, called, content)
    decode = cast("Callable[[bytes], object]", DECODERS[modality])
    try:
        if not reading.keep_metadata:
            content = strip(content, extension)
        decode(content)
    except StripError as error:
        raise RowError(f"{modality} is damaged", f"{called}: {error}") from error
    except DecodeError as error:
        raise RowError(f"{modality} can't be used ({type(error).__name__})", f"{called}: {error}") from error
    return extension, content


def _extension(modality: str, called: str, content: bytes) -> str:
    """The usual extension of what ``content`` is, whatever the file is called: a format has one spelling in shards."""
    found = sniff(content)
    if found is None or MODALITIES.get(found) != modality:
        allowed = ", ".join(extension for extension, of in MODALITIES.items() if of == modality)
        what = "of no known format" if found is None else f"a file of the format {found}"
        raise RowError(f"{modality} of a format that is not allowed", f"{called}: {what}; allowed are {allowed}")
    return found


def _read(modality: str, file: File, reading: Reading) -> bytes:
    """The bytes of a file.

    Raises:
        RowError: missing, not to be read, too large, or at a place where nothing is read.
        OSError: the disk or the network failed.
    """
    called = f"{modality} {file.name}" if file.name else modality
    if file.content is not None:
        content = file.content
    elif file.name is None:
        raise RowError("file is missing", f"{called}: neither bytes nor a path")
    elif reading.folder is None and _HUB.match(file.name):
        with fsspec.open(file.name, "rb") as remote:
            content = remote.read(MAX_MEMBER_BYTES + 1)
    elif _URL.match(file.name):
        raise RowError("file at an address", f"{called}: only files are read; download it first")
    elif reading.folder is None:
        raise RowError("file of this machine", f"{called}: data of the hub must not name files of this machine")
    else:
        content = _read_local(called, file.name, reading.folder)
    if not content:
        raise RowError("file is empty", f"{called}: 0 bytes")
    if len(content) > MAX_MEMBER_BYTES:
        raise RowError("file is too large", f"{called}: at most {MAX_MEMBER_BYTES} bytes are allowed")
    return content


def _read_local(called: str, name: str, folder: Path) -> bytes:
    try:
        path = folder / name
        # Before opening, since a named pipe would keep us waiting.
        if not stat.S_ISREG(path.stat().st_mode):
            raise RowError("not a file", f"{called}: not a file")
        with path.open("rb") as opened:
            return opened.read(MAX_MEMBER_BYTES + 1)
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        kind = "file is missing" if error.errno == errno.ENOENT else "file can't be read"
        raise RowError(kind, f"{called}: {error.strerror} ({path})") from error
    except ValueError as error:
        raise RowError("file can't be read", f"{called}: {error}") from error  # a zero byte in its name

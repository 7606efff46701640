"""One index per shard, ``<shard>.tar.index.json`` beside it: where each sample's bytes lie in the tar."""

import errno
import glob
import hashlib
import json
import os
import re
import tarfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from braceexpand import braceexpand

from data.errors import UserError

SUFFIX = ".index.json"
_SCHEMA = 1
_BLOCK = 512
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


class ShardError(UserError):
    """A shard or its index cannot be used; the message names the path and, where known, the byte or key."""


class Sample(NamedTuple):
    """One sample of a shard.

    Attributes:
        key: the members' common path up to the first dot of the file name.
        members: extension (lower case, no leading dot) -> (offset, size) of its bytes in the tar.
    """

    key: str
    members: dict[str, tuple[int, int]]


class ShardIndex(NamedTuple):
    """All samples of one shard, in the tar's order.

    Attributes:
        path: the tar.
        size: bytes of the tar.
        sha256: hex digest of the tar.
        samples: at least one.
    """

    path: Path
    size: int
    sha256: str
    samples: list[Sample]


def index_path(path: Path) -> Path:
    """Where the index of the shard ``path`` lies."""
    return path.with_name(path.name + SUFFIX)


def build_index(path: Path) -> ShardIndex:
    """Index a tar from its headers, and hash it.

    Members are grouped by WebDataset's rule: consecutive ones with the same path up to the first dot of the
    file name are a sample, the rest of the name in lower case is the extension. Folders, hidden files, names
    without an extension and WebDataset's ``__meta__`` names belong to no sample.

    Raises:
        ShardError: the file is missing, compressed, truncated or damaged, holds no sample, holds a link, device
            or sparse file, or has a sample whose members are repeated or do not lie together.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            samples = _scan(path, file, size)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise ShardError(f"{path}: no such shard") from error
    except IsADirectoryError as error:
        raise ShardError(f"{path}: a folder, not a shard") from error
    return ShardIndex(path, size, sha256, samples)


def _scan(path: Path, file: BinaryIO, size: int) -> list[Sample]:
    """Read the headers of a tar of ``size`` bytes."""
    start = file.read(6)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise ShardError(f"{path}: compressed with {name}, so samples have no offset: unpack it to a plain tar")
    file.seek(0)
    samples: list[Sample] = []
    seen: set[str] = set()
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # tarfile keeps every header it read: memory that grows with the shard.
                tar.members = []  # type: ignore[attr-defined]
                end = tar.offset
                if not 0 <= member.size <= size - member.offset_data:
                    raise ShardError(
                        f"{path}: truncated or damaged at byte {size}: "
                        f"{member.name!r} reaches to byte {member.offset_data + member.size}"
                    )
                _add(path, member, samples, seen)
    except tarfile.TarError as error:
        raise ShardError(f"{path}: truncated or damaged at byte {end}: {error}") from error
    _check_end(path, file, end)
    if not samples:
        raise ShardError(f"{path}: holds no samples")
    return samples


def _add(path: Path, member: tarfile.TarInfo, samples: list[Sample], seen: set[str]) -> None:
    """Append ``member`` to the last of ``samples``, or to a new one."""
    where = f"{path}: {member.name!r} at byte {member.offset}"
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        raise ShardError(f"{where} is a link, device or sparse file: only regular files have bytes to read")
    name = _NAME.fullmatch(member.name)
    if name is None or _META.match(member.name):
        return
    key, extension = name[1], name[2].lower()
    if not samples or samples[-1].key != key:
        if key in seen:
            raise ShardError(f"{where}: sample {key!r} came before: its members must lie together, and only once")
        seen.add(key)
        samples.append(Sample(key, {}))
    if extension in samples[-1].members:
        raise ShardError(f"{where}: sample {key!r} has two members {extension!r}")
    samples[-1].members[extension] = (member.offset_data, member.size)


def _check_end(path: Path, file: BinaryIO, end: int) -> None:
    """Refuse a tar that does not end at ``end`` with two blocks of zeros and nothing but zeros after them.

    tarfile takes a damaged header, a cut between two members and a zeroed stretch for the end of the archive,
    without a word. So would every later reader, and the rest of the shard would be lost.
    """
    file.seek(end)
    position = end
    while chunk := file.read(1 << 20):
        content = chunk.lstrip(b"\0")
        if content:
            raise ShardError(
                f"{path}: truncated or damaged at byte {position + len(chunk) - len(content)}: no tar header"
            )
        position += len(chunk)
    if position < end + 2 * _BLOCK:
        raise ShardError(f"{path}: truncated or damaged at byte {position}: no end-of-archive blocks")


def write_index(index: ShardIndex) -> None:
    """Write ``index`` beside its shard, replacing an older one in a single step.

    Raises:
        OSError: the folder cannot be written to.
    """
    document = {"schema": _SCHEMA, "size": index.size, "sha256": index.sha256, "samples": index.samples}
    write_whole(index_path(index.path), json.dumps(document, separators=(",", ":")).encode() + b"\n")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that readers find the old one or the new one, never half of one.

    Raises:
        OSError: the folder cannot be written to.
    """
    # Several processes may write the same file at first sight, hence a name of one's own.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def load_index(path: Path) -> ShardIndex:
    """The index of the shard ``path``: read, or at first sight built and written beside it.

    In a folder that cannot be written to, the new index is only returned.

    Raises:
        ShardError: the shard is missing, cannot be indexed (see `build_index`) or has another size than when it
            was indexed, or is newer than its index and has other content; or its index file is malformed or of
            another schema.
    """
    beside = index_path(path)
    try:
        text = beside.read_bytes()
    except FileNotFoundError:
        index = build_index(path)
        try:
            write_index(index)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
        return index
    index = _parse(path, beside, text)
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ShardError(f"{path}: no such shard, though its index is there") from error
    if size != index.size:
        raise ShardError(
            f"{path}: changed since it was indexed: {index.size} bytes then, {size} now; "
            f"if that is meant, delete {beside} to re-index"
        )
    # Tars are padded to whole records, so a shard that was written anew often has its old size.
    if path.stat().st_mtime_ns > beside.stat().st_mtime_ns:
        verify(index)
    return index


def _parse(path: Path, beside: Path, text: bytes) -> ShardIndex:
    """The index that the file ``beside`` holds as ``text``."""
    try:
        document = json.loads(text)
        if document["schema"] != _SCHEMA:
            raise ShardError(
                f"{beside}: schema {document['schema']!r}, this version reads {_SCHEMA}; delete it to re-index"
            )
        size, sha256 = int(document["size"]), str(document["sha256"])
        samples = [
            Sample(key, {extension: (int(offset), int(length)) for extension, (offset, length) in members.items()})
            for key, members in document["samples"]
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{beside}: malformed index ({error!r}); delete it to re-index") from error
    for sample in samples:
        for offset, length in sample.members.values():
            if offset < 0 or length < 0 or offset + length > size:
                raise ShardError(
                    f"{beside}: malformed index (sample {sample.key!r} reaches outside of the shard); "
                    "delete it to re-index"
                )
    return ShardIndex(path, size, sha256, samples)


def verify(index: ShardIndex) -> None:
    """Hash the shard again.

    Raises:
        ShardError: the shard is missing, or its bytes are not those that were indexed.
    """
    try:
        with index.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise ShardError(f"{index.path}: no such shard") from error
    if sha256 != index.sha256:
        raise ShardError(f"{index.path}: sha256 is {sha256}, but {index.sha256} was indexed")


def find_shards(patterns: Sequence[str]) -> list[Path]:
    """The shards that paths, globs (``train-*.tar``) or brace ranges (``train-{00000..00003}.tar``) name.

    Returns:
        Paths, sorted within a pattern, in the order of the patterns.

    Raises:
        ShardError: a path or glob (each one that braces expand to) matches no file, two of them match the same
            file, or a pattern is a URL or a pipe.
        TypeError: ``patterns`` is a single string.
    """
    if isinstance(patterns, str):
        raise TypeError(f"patterns must be a list of strings, not the string {patterns!r}")
    matched_by: dict[Path, str] = {}
    shards: list[Path] = []
    for pattern in patterns:
        for shard in _match(pattern):
            real = shard.resolve()
            if real in matched_by:
                raise ShardError(f"{shard}: named twice, by {matched_by[real]!r} and by {pattern!r}")
            matched_by[real] = pattern
            shards.append(shard)
    return shards


def _match(pattern: str) -> list[Path]:
    """The shards that one pattern names, sorted."""
    if _URL.match(pattern):
        raise ShardError(f"{pattern}: only local paths are supported; download the shards first")
    if Path(pattern).is_file():  # a name with brackets or braces in it is still a name
        return [Path(pattern)]
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise ShardError(f"{pattern}: {error}") from error
    return sorted(shard for name in names for shard in _glob(name))


def _glob(name: str) -> list[Path]:
    """The files that a path or a glob names."""
    if Path(name).is_file():
        return [Path(name)]
    # Not Path.glob, whose "*" also matches hidden names: half-written files and folders have those.
    hits = [Path(hit) for hit in glob.glob(name, recursive=True)]  # noqa: PTH207
    shards = [hit for hit in hits if hit.is_file() and not hit.name.endswith(SUFFIX)]
    if not shards:
        raise ShardError(f"{name}: no such shard; looked in {Path(name).parent.absolute()}")
    return shards

"""One index per shard, ``<shard>.tar.index.jsonl`` beside it: where each sample's bytes lie in the tar.

The first line says what the shard is, and is all that a run reads of it when it starts; then a line per sample:

    {"schema": 2, "size": 10240, "sha256": "...", "samples": 2, "members": {"jpg": 2, "txt": 1}}
    ["cats/0001", {"jpg": [512, 1730], "txt": [3072, 9]}]
    ["cats/0002", {"jpg": [4096, 1811]}]
"""

import errno
import glob
import hashlib
import json
import os
import re
import tarfile
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from braceexpand import braceexpand

from data.cache import Cache
from data.errors import UserError
from data.fetch import (
    INDEX_SUFFIX,
    FetchError,
    check_url,
    expand,
    index_beside,
    is_url,
    masked,
    open_binary,
    read_file,
    read_first_line,
    state_of,
)

MAX_INDEX_BYTES = 1 << 30  # ten million samples
_SCHEMA = 2
_BLOCK = 512
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_DECODER = json.JSONDecoder()
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


class Shard(NamedTuple):
    """What the first line of a shard's index says.

    Attributes:
        location: path or URL of the tar.
        size: bytes of the tar.
        sha256: hex digest of the tar.
        samples: how many there are; at least one.
        members: extension -> how many samples have it.
        stamp: of the file that `load_shard` saw (see `data.fetch.Told`), by which its readers know it again; "" if
            unknown. Shards that differ in nothing else are equal.
    """

    location: str
    size: int
    sha256: str
    samples: int
    members: dict[str, int]
    stamp: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shard) and self[:-1] == other[:-1]

    def __ne__(self, other: object) -> bool:  # a tuple has its own
        return not self == other

    def __hash__(self) -> int:
        return hash((self.location, self.sha256))


class ShardIndex(NamedTuple):
    """All samples of one shard, in the tar's order.

    Attributes:
        location: path or URL of the tar.
        size: bytes of the tar.
        sha256: hex digest of the tar.
        samples: at least one.
    """

    location: str
    size: int
    sha256: str
    samples: list[Sample]

    @property
    def shard(self) -> Shard:
        """The summary that stands in the first line."""
        members = Counter(extension for sample in self.samples for extension in sample.members)
        return Shard(self.location, self.size, self.sha256, len(self.samples), dict(sorted(members.items())))


def index_path(path: Path | str) -> Path:
    """Where the index of the local shard ``path`` lies."""
    return Path(f"{path}{INDEX_SUFFIX}")


def build_index(location: Path | str) -> ShardIndex:
    """The index of a tar: `scan` without its count. Raises what that raises."""
    return scan(location)[0]


def scan(location: Path | str) -> tuple[ShardIndex, int]:
    """Index a tar from its headers, and hash it.

    Members are grouped by WebDataset's rule: consecutive ones with the same path up to the first dot of the
    file name are a sample, the rest of the name in lower case is the extension. Folders, hidden files, names
    without an extension and WebDataset's ``__meta__`` names belong to no sample.

    Args:
        location: path or URL; of a URL all bytes are read once.

    Returns:
        The index, and how many files belong to no sample.

    Raises:
        ShardError: the file is missing, compressed, truncated or damaged, holds no sample, holds a link, device
            or sparse file, or has a sample whose members are repeated or do not lie together.
        FetchError: a URL that can't be read.
    """
    location = str(location)
    if not is_url(location) and Path(location).is_dir():
        raise ShardError(f"{masked(location)}: a folder, not a shard")
    try:
        with open_binary(location) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            samples, outside = _scan(masked(location), file, size)
            file.seek(0)
            sha256 = _sha256(file)
    except FileNotFoundError as error:
        raise ShardError(f"{masked(location)}: no such shard") from error
    return ShardIndex(location, size, sha256, samples), outside


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _scan(path: str, file: BinaryIO, size: int) -> tuple[list[Sample], int]:
    """Read the headers of a tar of ``size`` bytes; also counts the files that belong to no sample."""
    start = file.read(6)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise ShardError(f"{path}: compressed with {name}, so samples have no offset: unpack it to a plain tar")
    file.seek(0)
    samples: list[Sample] = []
    seen: set[str] = set()
    end = outside = 0
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
                outside += not _add(path, member, samples, seen)
    except ShardError:
        raise
    except (tarfile.TarError, ValueError) as error:  # the latter from malformed extended headers
        raise ShardError(f"{path}: truncated or damaged at byte {end}: {error}") from error
    _check_end(path, file, end)
    if not samples:
        raise ShardError(f"{path}: holds no samples")
    return samples, outside


def _add(path: str, member: tarfile.TarInfo, samples: list[Sample], seen: set[str]) -> bool:
    """Append ``member`` to the last of ``samples``, or to a new one; False for a file that belongs to none."""
    where = f"{path}: {member.name!r} at byte {member.offset}"
    if member.isdir():
        return True
    if not member.isreg() or member.issparse():
        raise ShardError(f"{where} is a link, device or sparse file: only regular files have bytes to read")
    parts = split_name(member.name)
    if parts is None:
        return False
    key, extension = parts
    if not samples or samples[-1].key != key:
        if key in seen:
            raise ShardError(f"{where}: sample {key!r} came before: its members must lie together, and only once")
        seen.add(key)
        samples.append(Sample(key, {}))
    if extension in samples[-1].members:
        raise ShardError(f"{where}: sample {key!r} has two members {extension!r}")
    samples[-1].members[extension] = (member.offset_data, member.size)
    return True


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension in a member's name, by the rule that `scan` states; None if it belongs to no sample."""
    match = _NAME.fullmatch(name)
    return None if match is None or _META.match(name) else (match[1], match[2].lower())


def _check_end(path: str, file: BinaryIO, end: int) -> None:
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


def write_index(index: ShardIndex, beside: Path | None = None) -> None:
    """Write ``index`` beside its shard, or to the file ``beside``, replacing an older one in a single step.

    Raises:
        OSError: the folder cannot be written to.
    """
    write_whole(index_path(index.location) if beside is None else beside, _dump(index))


def _dump(index: ShardIndex) -> bytes:
    shard = index.shard._asdict()
    head = {"schema": _SCHEMA, **{key: shard[key] for key in ("size", "sha256", "samples", "members")}}
    lines = [json.dumps(line, separators=(",", ":")) for line in (head, *index.samples)]
    return "\n".join([*lines, ""]).encode()


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


def load_shard(location: Path | str, cache: Cache | None = None) -> Shard:
    """What the index of a shard says of it as a whole; at first sight the index is built, and written beside it.

    In a folder that can't be written to, it is kept in memory. Indexes of URLs are kept in ``cache``.

    Raises:
        ShardError: the shard is missing, cannot be indexed (see `scan`), has another size than when it was
            indexed, or is newer than its index and has other content; its index file is malformed or of another
            schema; or a URL has no index and there is no cache to keep one in.
        FetchError: a URL that can't be read, or a cache that can't be written to.
    """
    location = str(location)
    # Before all else: whatever takes the shard's place from here on has another stamp.
    size, stamp = _state(location)
    if location in _unwritable and _unwritable[location][1] == stamp:
        return _unwritable[location][0].shard._replace(stamp=stamp)
    where = _index_location(location, cache)
    try:
        if is_url(where):
            first = read_first_line(where, MAX_INDEX_BYTES)
        else:
            with Path(where).open("rb") as file:
                first = file.readline(MAX_INDEX_BYTES)
    except FileNotFoundError:
        return _first_sight(location, cache, stamp).shard._replace(stamp=stamp)
    except OSError as error:
        raise ShardError(f"{where}: {error.strerror}") from error
    shard = _parse_head(location, where, first)._replace(stamp=stamp)
    _check_unchanged(shard, where, size)
    return shard


def load_shards(locations: Sequence[str], cache: Cache | None = None) -> list[Shard]:
    """`load_shard` for many, several at a time, since remote ones take a round trip each."""
    with ThreadPoolExecutor(16 if any(map(is_url, locations)) else 1) as pool:
        return list(pool.map(lambda location: load_shard(location, cache), locations))


def load_index(location: Path | str, cache: Cache | None = None) -> ShardIndex:
    """The whole index of a shard: `load_shard`, with its samples. Raises what that raises."""
    shard = load_shard(location, cache)
    return ShardIndex(shard.location, shard.size, shard.sha256, load_samples(shard, cache))


def load_samples(shard: Shard, cache: Cache | None = None) -> list[Sample]:
    """The samples of a shard that `load_shard` gave.

    Raises:
        ShardError: its index was changed since, or is malformed.
        FetchError: a URL that can't be read.
    """
    return [parse_sample(shard, line) for line in load_lines(shard, cache)]


def load_lines(shard: Shard, cache: Cache | None = None) -> list[bytes]:
    """The lines of a shard's index, one per sample, for `parse_sample`: the compact form in which many are kept.

    Raises:
        ShardError: its index was changed since, or is malformed.
        FetchError: a URL that can't be read.
    """
    where = _index_location(shard.location, cache)
    try:
        content = read_file(where, MAX_INDEX_BYTES)
    except FileNotFoundError:
        if shard.location in _unwritable:
            index, _ = _unwritable[shard.location]
        else:
            index = _first_sight(shard.location, cache, shard.stamp)
        content = _dump(index)
    head, *lines = content.rstrip(b"\n").split(b"\n")
    if _parse_head(shard.location, where, head) != shard:
        raise ShardError(f"{masked(where)}: changed while it was in use")
    _check_count(shard, where, lines)
    return lines


def _check_count(shard: Shard, where: str, lines: list[bytes]) -> None:
    if len(lines) != shard.samples:
        raise ShardError(
            f"{masked(where)}: malformed index ({len(lines)} of {shard.samples} samples); delete it to re-index"
        )


def parse_sample(shard: Shard, line: bytes) -> Sample:
    """One line of the shard's index.

    Raises:
        ShardError: malformed, or the sample reaches outside of the shard.
    """
    try:
        # This runs once per sample that is read, and `json.loads` takes twice as long.
        key, members = _DECODER.decode(line.decode())
        spans, total = {}, shard.size
        for extension, (offset, size) in members.items():
            if type(offset) is not int or type(size) is not int or offset < 0 or size < 0 or offset + size > total:
                raise ValueError(f"sample {key!r} reaches outside of the shard")
            spans[extension] = offset, size
        return Sample(str(key), spans)
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ShardError(
            f"{masked(shard.location)}: malformed index ({error!r}); delete its {INDEX_SUFFIX} file to re-index"
        ) from error


def _count(value: object) -> int:
    """A whole number that JSON gave."""
    if type(value) is not int or value < 0:  # a bool is an int, too
        raise ValueError(f"{value!r} is no number of bytes or samples")
    return value


def _index_location(location: str, cache: Cache | None) -> str:
    """Where the index of a shard lies: beside it; of a URL, a copy of that in the cache if there is one."""
    where = index_beside(location)
    if not is_url(location) or cache is None:
        return where
    kept = cache.index_of(location)
    if kept.is_file():
        return str(kept)
    try:
        content = read_file(where, MAX_INDEX_BYTES)
    except FileNotFoundError:  # it has none: one is made for the cache at first sight
        return str(kept)
    head, *lines = content.rstrip(b"\n").split(b"\n")
    shard = _parse_head(location, where, head)
    _check_count(shard, where, lines)
    for line in lines:  # a copy of a malformed one would outlive its repair
        parse_sample(shard, line)
    try:
        write_whole(kept, content)
    except OSError as error:
        raise _no_cache(kept.parent, error) from error
    return str(kept)


def _no_cache(folder: Path, error: OSError) -> FetchError:
    return FetchError(f"{folder}: can't be used as a cache: {error.strerror}")


# Indexes of shards in folders that can't be written to, and the shards' stamps: scanning such a shard once is enough.
_unwritable: dict[str, tuple[ShardIndex, str]] = {}


def _first_sight(location: str, cache: Cache | None, stamp: str) -> ShardIndex:
    """Make the index of a shard of this stamp, and keep it."""
    if is_url(location) and cache is None:
        raise ShardError(
            f"{masked(location)}: there is no {INDEX_SUFFIX} file beside it: put one there (python -m data index makes "
            "it beside a local copy), or set data.cache to a folder, where it is made and kept"
        )
    changed = _changed(location) if not is_url(location) and Path(location).exists() else None
    index = build_index(location)
    kept = None if cache is None or not is_url(location) else cache.index_of(location)
    try:
        write_index(index, kept)
        if changed is not None:
            os.utime(index_path(location), ns=(changed, changed))
    except OSError as error:
        if error.errno in _READ_ONLY:
            _unwritable[location] = index, stamp
        elif kept is not None:
            raise _no_cache(kept.parent, error) from error
        else:
            raise
    return index


def _parse_head(location: str, where: str, line: bytes) -> Shard:
    """The first line of the index at ``where``."""
    try:
        head = json.loads(line)
        if head["schema"] != _SCHEMA:
            raise ShardError(
                f"{masked(where)}: schema {head['schema']!r}, this version reads {_SCHEMA}; delete it to re-index"
            )
        members = {extension: _count(count) for extension, count in head["members"].items()}
        if _count(head["samples"]) == 0:
            raise ValueError("no samples")
        return Shard(location, _count(head["size"]), str(head["sha256"]), head["samples"], members)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{masked(where)}: malformed index ({error!r}); delete it to re-index") from error


def _state(location: str) -> tuple[int, str]:
    try:
        return state_of(location)
    except FileNotFoundError as error:
        raise ShardError(f"{masked(location)}: no such shard") from error


def _check_unchanged(shard: Shard, where: str, size: int) -> None:
    """Refuse a tar, now of ``size`` bytes, that is not the one that was indexed."""
    if size != shard.size:
        raise ShardError(
            f"{masked(shard.location)}: changed since it was indexed: {shard.size} bytes then, {size} now; "
            f"if that is meant, delete {masked(where)} to re-index"
        )
    # Tars are padded to whole records, so a shard that was written anew often has its old size.
    # What is copied with its old time of modification still has a new time of change.
    if not is_url(shard.location):
        changed = _changed(shard.location)
        if changed > Path(where).stat().st_mtime_ns:
            verify(shard)
            with suppress(OSError):  # once is enough, where the index may be touched
                os.utime(where, ns=(changed, changed))


def _changed(location: str) -> int:
    """When a local shard was last changed: the time that nobody can set. An index that is dated so, and not by the
    clock, is older than a shard that takes its shard's place while that is being read.
    """
    return Path(location).stat().st_ctime_ns


def verify(index: Shard | ShardIndex) -> None:
    """Hash the shard again.

    Raises:
        ShardError: the shard is missing, or its bytes are not those that were indexed.
    """
    try:
        with open_binary(index.location) as file:
            sha256 = _sha256(file)
    except FileNotFoundError as error:
        raise ShardError(f"{masked(index.location)}: no such shard") from error
    if sha256 != index.sha256:
        raise ShardError(
            f"{masked(index.location)}: sha256 is {sha256}, but {index.sha256} was indexed; "
            f"if that is meant, delete its {INDEX_SUFFIX} file to re-index"
        )


def find_shards(patterns: Sequence[str]) -> list[str]:
    """The shards that paths, globs (``train-*.tar``), brace ranges (``train-{00000..00003}.tar``) or URLs name.

    Returns:
        Paths and URLs, sorted within a pattern, in the order of the patterns.

    Raises:
        ShardError: a path or glob (each one that braces expand to) matches no file, or two of them match the same
            file.
        FetchError: a URL that names nothing, or of a kind that is not allowed (``pipe:``, for one).
        TypeError: ``patterns`` is a single string.
    """
    if isinstance(patterns, str):
        raise TypeError(f"patterns must be a list of strings, not the string {patterns!r}")
    matched_by: dict[str, str] = {}
    shards: list[str] = []
    for pattern in patterns:
        for shard in _match(pattern):
            real = shard if is_url(shard) else str(Path(shard).resolve())
            if real in matched_by:
                raise ShardError(f"{masked(shard)}: named twice, by {matched_by[real]!r} and by {masked(pattern)!r}")
            matched_by[real] = masked(pattern)
            shards.append(shard)
    return shards


def _match(pattern: str) -> list[str]:
    """The shards that one pattern names, sorted."""
    if is_url(pattern) or pattern.startswith("pipe:"):
        check_url(pattern)
    elif Path(pattern).is_file():  # a name with brackets or braces in it is still a name
        return [pattern]
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise ShardError(f"{masked(pattern)}: its braces don't match") from error
    return sorted(shard for name in names for shard in (expand(name) if is_url(name) else _glob(name)))


def _glob(name: str) -> list[str]:
    """The files that a path or a glob names."""
    if Path(name).is_file():
        return [name]
    # Not Path.glob, whose "*" also matches hidden names: half-written files and folders have those.
    hits = glob.glob(name, recursive=True)  # noqa: PTH207
    shards = [hit for hit in hits if Path(hit).is_file() and not hit.endswith(INDEX_SUFFIX)]
    if name and Path(name).is_dir():  # the empty path is the working folder
        raise ShardError(f"{name}: a folder; name the shards in it, such as '{name.rstrip('/')}/*.tar'")
    if not shards:
        raise ShardError(f"{name}: no such shard; looked in {Path(name).parent.absolute()}")
    return shards

"""Write samples as WebDataset shards: the same samples give the same bytes."""

import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.index import ShardIndex, build_index, write_index

_EXTENSION = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_BLOCK, _RECORD = 512, 10240  # a tar is made of blocks, and its length is a multiple of a record's
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?i?)B", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_TAR: dict[str, Any] = {  # everything in a header that would differ from machine to machine
    "encoder": False,
    "format": "PAX_FORMAT",  # for names of any length
    "mtime": 0,
    "user": "",
    "group": "",
    "mode": 0o644,
}


def parse_size(text: str) -> int:
    """Bytes from ``256MB`` (a million each) or ``256MiB`` (1024 times 1024 each); ``B k M G T`` alike.

    Raises:
        UserError: another form, or less than a byte.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[match[2].lower()]) if match and match[2].lower() in _UNITS else 0
    if size < 1:
        raise UserError(f"size {text!r}: a number and a unit are needed, such as 500KB, 256MB, 1GB or 256MiB")
    return size


def packed_size(sample: Mapping[str, bytes | str]) -> int:
    """Bytes that ``sample`` takes in a shard, if its members' names are in ASCII and below 100 characters."""
    return sum(_BLOCK + -(-len(value) // _BLOCK) * _BLOCK for name, value in sample.items() if name != "__key__")


def shard_size(packed: int) -> int:
    """Bytes of a whole shard whose samples take ``packed`` bytes."""
    return -(-(packed + 2 * _BLOCK) // _RECORD) * _RECORD


class NewShard:
    """A shard in the making: written aside, it appears under its name when it is whole and on the disk.

    Attributes:
        path: the name it will have.
        samples: how many it holds.
        packed: bytes that they take.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.samples, self.packed = path, 0, 0
        self._aside = path.with_name(f".{path.name}.tmp")
        self._file = self._aside.open("wb")
        from webdataset import TarWriter  # here, since it imports torch, for which other commands need not wait

        self._tar = TarWriter(self._file, **_TAR)

    def fits(self, sample: Mapping[str, bytes | str], limit: int) -> bool:
        """Whether the shard would be of at most ``limit`` bytes with ``sample``; an empty one takes any."""
        return self.samples == 0 or shard_size(self.packed + packed_size(sample)) <= limit

    def add(self, sample: Mapping[str, bytes | str]) -> None:
        """Append a sample; see `write_shards`, except that keys are not compared.

        Raises:
            ValueError, TypeError: as `write_shards`.
        """
        _check(sample)
        self._tar.write(sample)
        self.samples += 1
        self.packed += packed_size(sample)

    def finish(self) -> ShardIndex:
        """Give the shard its name, and write its index."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._aside.replace(self.path)
        sync_folder(self.path.parent)
        index = build_index(self.path)
        write_index(index)
        return index

    def discard(self) -> None:
        """Remove what was written of it."""
        with suppress(OSError):  # of a full disk, say, which is why it goes
            self._tar.close()
        self._file.close()
        self._aside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make sure that renamed files keep their names when the power fails."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_shards(samples: Iterable[Mapping[str, bytes | str]], pattern_prefix: Path, *, max_samples: int) -> list[Path]:
    """Write ``PREFIX-00000.tar``, ``PREFIX-00001.tar``, ... and an index beside each.

    The shards are written aside and appear under their names when all of them are whole, so a failure (of
    ``samples``, too) leaves nothing behind.

    Args:
        samples: each has the string ``__key__`` and, by extension (``"png"``), its members' bytes. Keys may have
            folders (``"cats/0001"``) and must be unique; dots are refused, as WebDataset cuts names there.
        pattern_prefix: folder and start of the shards' names; the folder is made if need be.
        max_samples: samples per shard; the last one has the rest.

    Returns:
        The shards' paths, in order.

    Raises:
        ValueError: no samples, ``max_samples`` below 1, or a key or extension that readers would not give back
            as it is.
        TypeError: a key that is no string or a member that is not bytes.
        FileExistsError: the folder already has shards of this prefix.
    """
    if max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, not {max_samples}")
    folder, prefix = pattern_prefix.parent.absolute(), pattern_prefix.name
    folder.mkdir(parents=True, exist_ok=True)
    # Fewer shards than last time would leave the last ones of that time in place, to be read with the new ones.
    for path in sorted(folder.iterdir()):
        if re.fullmatch(re.escape(prefix) + r"-\d+\.tar", path.name):
            raise FileExistsError(f"{path}: already there; remove the shards of this prefix or choose another")

    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{prefix}-") as scratch:
        pattern = scratch.replace("%", "%%") + "/%05d.tar"
        from webdataset import ShardWriter  # as above

        with ShardWriter(pattern, maxcount=max_samples, maxsize=math.inf, verbose=0, **_TAR) as writer:
            for sample in _unique(samples):
                writer.write(sample)
            if writer.total == 0:
                raise ValueError(f"{pattern_prefix}: no samples to write")
        parts = sorted(Path(scratch).iterdir())
        shards = [part.rename(pattern_prefix.with_name(f"{prefix}-{part.name}")) for part in parts]
    for shard in shards:
        write_index(build_index(shard))
    return shards


def _unique(samples: Iterable[Mapping[str, bytes | str]]) -> Iterator[Mapping[str, bytes | str]]:
    """Pass on ``samples``, refusing those that a reader would skip, merge or rename."""
    seen: set[str | bytes] = set()
    for sample in samples:
        _check(sample)
        key = sample["__key__"]
        if key in seen:
            raise ValueError(f"key {key!r}: comes twice")
        seen.add(key)
        yield sample


def _check(sample: Mapping[str, bytes | str]) -> None:
    """Refuse a sample that a reader would skip or rename."""
    key = sample.get("__key__")
    if not isinstance(key, str):
        raise TypeError(f"__key__ must be a string, not {key!r}")
    if not key or "." in key or key.startswith(("/", "__")) or key.endswith("/") or not key.isprintable():
        raise ValueError(
            f"key {key!r}: must be printable, without dots, and neither start with '/' or '__' nor end with '/'"
        )
    members = {extension: value for extension, value in sample.items() if extension != "__key__"}
    if not members:
        raise ValueError(f"key {key!r}: has no members")
    for extension, value in members.items():
        if not _EXTENSION.fullmatch(extension):
            raise ValueError(f"key {key!r}: extension {extension!r} must be lower case, such as 'png' or 'seg.png'")
        if not isinstance(value, bytes):
            raise TypeError(f"key {key!r}: {extension!r} must be bytes, not {type(value).__name__}")

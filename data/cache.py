"""Reading samples: of local shards in place, of remote ones in ranges or through a cache of whole shards.

The cache is a folder of a local disk that any number of processes share; a shard lies in it under its content's hash.
"""

import hashlib
import os
import re
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from time import monotonic, sleep
from typing import Any, BinaryIO, Protocol

from filelock import FileLock, Timeout

from data.fetch import (
    INDEX_SUFFIX,
    RETRIES,
    FetchError,
    MissingError,
    download,
    is_url,
    local_error,
    masked,
    open_binary,
    read_range,
    split_query,
    stamp_of,
    told,
)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TOUCH_SECONDS = 30.0


class Stored(Protocol):
    """A shard whose content is known: ``data.index.Shard`` is one."""

    @property
    def location(self) -> str:
        """A local path or a URL."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def sha256(self) -> str:
        """Hex digest of the whole file."""

    @property
    def stamp(self) -> str:
        """Of the file when its content was last known to be this (see `data.fetch.Told`); "" if unknown."""


def _check_size(shard: Stored, size: int | None) -> None:
    if size is not None and size != shard.size:
        raise FetchError(f"{masked(shard.location)}: changed since it was indexed: {shard.size} bytes then, {size} now")


def _check_sha256(shard: Stored, sha256: str) -> None:
    if sha256 != shard.sha256:
        raise FetchError(
            f"{masked(shard.location)}: changed since it was indexed: sha256 {shard.sha256} then, {sha256} now"
        )


# --- The cache


class Cache:
    """Whole shards in a folder of a local disk, each under the hash of its content.

    Any number of processes may use a folder at once. A shard is downloaded by one of them while the others wait, and
    appears in one step. ``<sha256>.tar`` are the shards, ``<sha256>.part`` the downloads under way, ``locks/`` empty
    files; nothing else in the folder is ever deleted.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Use ``folder``, made if need be, for at most ``max_bytes`` bytes of shards.

        Raises:
            FetchError: the folder can't be made.
        """
        self.folder = folder
        self.max_bytes = max_bytes
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FetchError(f"{folder}: can't be the folder of a cache: {error.strerror}") from error

    def get(self, shard: Stored) -> Path:
        """The local copy of ``shard``, downloaded at first sight, which counts as used now.

        It may be gone as soon as another process needs the room; open it at once, and ask again if that fails.

        Raises:
            FetchError: the shard can't be read, has other bytes than when it was indexed, or is larger than the cache.
        """
        # The hash comes from an index file, and becomes the name of a file.
        if not _SHA256.fullmatch(shard.sha256):
            raise FetchError(f"{masked(shard.location)}: its index gives {shard.sha256!r} as sha256: no hash")
        if shard.size > self.max_bytes:
            raise FetchError(
                f"{masked(shard.location)}: has {shard.size} bytes, and the whole cache {self.folder} "
                f"may have {self.max_bytes}"
            )
        path = self.folder / f"{shard.sha256}.tar"
        try:
            if not self._hit(path, shard.size):
                with self._lock(shard.sha256):
                    if not self._hit(path, shard.size):  # the process we waited for has fetched it
                        self._fetch(shard, path)
        except OSError as error:
            if isinstance(error, MissingError):
                raise
            raise FetchError(f"{self.folder}: can't be used as a cache: {error}") from error
        return path

    def index_of(self, location: str) -> Path:
        """Where the index of the remote shard ``location`` may be stored; such files are never deleted.

        A query behind the name of a tar is a signature or the like, and another one next time. Behind anything else
        it may be what tells two shards apart.
        """
        path, query = split_query(location)
        name = path if path.endswith(".tar") else path + query
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()}{INDEX_SUFFIX}"

    def _lock(self, name: str) -> FileLock:
        # Lock files stay: deleting one while another process waits for it would give both the lock.
        # The substitute where a disk has no locks would outlive a killed process, and all others would wait for ever.
        return FileLock(self.folder / "locks" / f"{name}.lock", fallback_to_soft=False)

    def _hit(self, path: Path, size: int) -> bool:
        """Whether ``path`` is there, whole; if so, it is marked as used now.

        Only the size is checked. The hash was when the file was downloaded, and it was renamed into place only then;
        to hash it again would cost each process seconds per shard, to find a damaged disk.
        """
        try:
            if path.stat().st_size != size:
                return False
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _fetch(self, shard: Stored, path: Path) -> None:
        """Download ``shard`` to ``path``, holding its lock."""
        _check_size(shard, told(shard.location).size)
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)  # of a process that was killed
        try:
            self._reserve(part, shard.size)
            with part.open("r+b") as file:
                sha256 = download(shard.location, shard.size, file, self.folder)
                # After a power cut, a renamed file would have its size, which is all that is checked, and no bytes.
                file.flush()
                os.fsync(file.fileno())
            _check_sha256(shard, sha256)
            with self._lock("room"):  # or it could be counted under neither name
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int) -> None:
        """Make the file ``part`` of ``size`` bytes, once the least recently used shards have made room for it."""
        while True:
            with self._lock("room"):
                if self._make_room(size):
                    with part.open("wb") as file:
                        file.truncate(size)
                    return
            # Others' downloads fill the cache. They wait for nothing, and then can be evicted.
            sleep(0.1)

    def _make_room(self, size: int) -> bool:
        """Evict what must go for ``size`` more bytes; False, and nothing evicted, where that would not be enough."""
        shards: list[tuple[float, Path, int]] = []
        room = self.max_bytes - size
        for file in self.folder.iterdir():
            if not _SHA256.fullmatch(file.stem) or file.suffix not in (".tar", ".part"):
                continue
            try:
                state = file.stat()
                if file.suffix == ".tar":
                    shards.append((state.st_mtime, file, state.st_size))
                elif self._is_leftover(file):
                    file.unlink()
                else:
                    room -= state.st_size
            except FileNotFoundError:  # a download that has just failed
                continue
        if room < 0:
            return False
        used = sum(size for _, _, size in shards)
        for _, file, size in sorted(shards):
            if used <= room:
                break
            file.unlink(missing_ok=True)
            used -= size
        return True

    def _is_leftover(self, part: Path) -> bool:
        """Whether the process that downloaded ``part`` is dead: then nobody holds the lock."""
        try:
            with self._lock(part.stem).acquire(blocking=False):
                return part.exists()
        except Timeout:
            return False


# --- Reading samples


class _OpenFile:
    """A descriptor that is closed when nobody refers to it any more, so not under a thread that is reading."""

    def __init__(self, path: str | Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        self.touched = monotonic()
        weakref.finalize(self, os.close, self.descriptor)


class Reader:
    """Reads pieces of shards; for threads, and for processes: files are not carried over when it is pickled.

    Whether a shard is still the one that was indexed is asked when it is opened, of a URL without a cache before the
    first read: by its size, and by its stamp if it has one. A file that is written over while it is open is not
    noticed unless it gets shorter, nor is a URL whose store tells nothing but the size.
    """

    def __init__(self, cache: Cache | None = None, max_open: int = 256) -> None:
        """Read URLs through ``cache``, without one in ranges; hold at most ``max_open`` files open.

        Fewer than ``max_open``, if the process may not have twice as many.
        """
        self.cache = cache
        self.max_open = max_open
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = max(1, max_open if allowed == resource.RLIM_INFINITY else min(max_open, allowed // 2))
        self._files: OrderedDict[tuple[str, str], _OpenFile] = OrderedDict()
        self._checked: set[tuple[str, str]] = set()
        self._hashed: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.cache, self.max_open)

    def close(self) -> None:
        """Close all files; the next read opens them again."""
        with self._lock:
            self._files.clear()

    def read(self, shard: Stored, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes of ``shard``, from byte ``offset``. Raises what `read_spans` raises."""
        return self.read_spans(shard, [(offset, size)])[0]

    def read_spans(self, shard: Stored, spans: Iterable[tuple[int, int]]) -> list[bytes]:
        """The bytes of several (offset, size) of ``shard``.

        Raises:
            FetchError: the shard is missing, can't be read, is another one than was indexed, or has no such bytes.
        """
        remote = self.cache is None and is_url(shard.location)
        file = None if remote else self._file(shard)
        contents, total = [], shard.size
        # Once per member that is read: nothing is called here that need not be.
        for offset, size in spans:
            if offset < 0 or size < 0 or offset + size > total:
                raise FetchError(
                    f"{masked(shard.location)}: bytes {offset} to {offset + size} are not within its {total}"
                )
            if file is None:
                contents.append(self._read_remote(shard, offset, size))
                continue
            try:
                content = os.pread(file.descriptor, size, offset)
                while len(content) < size:  # a read may bring less than there is
                    rest = os.pread(file.descriptor, size - len(content), offset + len(content))
                    if not rest:
                        raise FetchError(
                            f"{masked(shard.location)}: changed since it was indexed: it ends at byte "
                            f"{offset + len(content)}"
                        )
                    content += rest
            except OSError as error:
                raise local_error(shard.location, error) from error
            contents.append(content)
        return contents

    def _read_remote(self, shard: Stored, offset: int, size: int) -> bytes:
        # Of a shard that was replaced, a range has the right length and the wrong bytes.
        key = (shard.location, shard.sha256)
        if key not in self._checked:
            now = told(shard.location)
            _check_size(shard, now.size)
            if self._is_new(shard, now.stamp):
                with open_binary(shard.location) as file:
                    self._check_content(shard, now.stamp, file)
            self._checked.add(key)
        return read_range(shard.location, offset, size, shard.size) if size else b""

    def _file(self, shard: Stored) -> _OpenFile:
        key = (shard.location, shard.sha256)
        with self._lock:
            if (file := self._files.get(key)) is not None:
                self._files.move_to_end(key)
                self._touch(key, file)
                return file
        file = self._open(shard)  # may take a download
        with self._lock:
            self._drop_evicted()
            self._files[key] = file
            while len(self._files) > self._limit:
                self._files.popitem(last=False)
        return file

    def _open(self, shard: Stored) -> _OpenFile:
        if self.cache is None or not is_url(shard.location):
            try:
                file = _OpenFile(shard.location)
            except OSError as error:
                raise local_error(shard.location, error) from error
            state = os.fstat(file.descriptor)
            _check_size(shard, state.st_size)
            if self._is_new(shard, stamp_of(state)):
                with open(os.dup(file.descriptor), "rb") as same:  # noqa: PTH123 (a path may be another file by now)
                    self._check_content(shard, stamp_of(state), same)
            return file
        for _ in range(RETRIES):
            path = self.cache.get(shard)
            try:
                return _OpenFile(path)
            except FileNotFoundError:  # evicted since
                continue
            except OSError as error:
                raise local_error(path, error) from error
        raise FetchError(
            f"{self.cache.folder}: {masked(shard.location)} was evicted {RETRIES} times before it could be opened: "
            f"{self.cache.max_bytes} bytes are too few for the processes that share the cache"
        )

    def _is_new(self, shard: Stored, stamp: str) -> bool:
        """Whether the file has neither the shard's stamp nor one with which it was found to be the same."""
        known = (shard.stamp, self._hashed.get((shard.location, shard.sha256)))
        return bool(shard.stamp and stamp) and stamp not in known

    def _check_content(self, shard: Stored, stamp: str, file: BinaryIO) -> None:
        """Refuse a shard that was replaced. One that was only touched, or copied anew, is the same."""
        _check_sha256(shard, hashlib.file_digest(file, "sha256").hexdigest())  # type: ignore[arg-type]
        self._hashed[shard.location, shard.sha256] = stamp

    def _touch(self, key: tuple[str, str], file: _OpenFile) -> None:
        """Tell the cache now and then that an open file is in use."""
        if is_url(key[0]) and monotonic() - file.touched > _TOUCH_SECONDS:
            os.utime(file.descriptor)
            file.touched = monotonic()

    def _drop_evicted(self) -> None:
        """Close the evicted files that are no longer read: until then they fill the disk beyond the cache's limit."""
        for key, file in list(self._files.items()):
            idle = monotonic() - file.touched > 2 * _TOUCH_SECONDS
            if is_url(key[0]) and idle and os.fstat(file.descriptor).st_nlink == 0:
                del self._files[key]

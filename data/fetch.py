"""Files at local paths and at fsspec URLs: which URLs are allowed, what is tried again, reads of wholes and of ranges.

URLs take their credentials and endpoints from where their package looks for them (``~/.aws``, ``HF_TOKEN``,
``~/.netrc`` and proxies for HTTP) and from fsspec's own configuration (``FSSPEC_S3_ENDPOINT_URL=...``).
"""

import hashlib
import logging
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from io import BufferedRandom, BufferedReader
from pathlib import Path
from time import sleep
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import urlsplit

import fsspec

from data.errors import UserError

RETRIES = 5
"""How often a URL is tried before its error is final."""
BACKOFF = 0.5
"""Seconds, give or take half, before the second try; doubled before each further one."""
TIMEOUT = 60.0
"""Seconds of silence after which a server counts as dead: connecting, or between two pieces of an answer.

It is passed on to http(s), gs/gcs and az/abfs. s3 keeps what s3fs sets (5 s to connect, 15 s to read), hf what
huggingface_hub sets (10 s, or ``HF_HUB_DOWNLOAD_TIMEOUT``).
"""
INDEX_SUFFIX = ".index.jsonl"
"""What the name of a shard's index has behind that of the shard."""

# The schemes that are allowed, and the package that serves each.
_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "az": "adlfs",
    "abfs": "adlfs",
    "memory": "fsspec",
}
_HTTP = ("http", "https")
# What stores say of a file that another one in its place would not share, the best first.
_STAMPS = (
    *("ETag", "etag", "generation", "blob_id", "Content-MD5", "Digest"),
    *("Last-Modified", "LastModified", "last_modified", "mtime", "created"),
)
# What the packages raise besides OSError. Looked up only among the modules that are loaded.
_ERRORS = {
    "aiohttp": "ClientError",
    "azure.core.exceptions": "AzureError",
    "botocore.exceptions": "BotoCoreError",
    "gcsfs.retry": "HttpError",
    "google.auth.exceptions": "GoogleAuthError",
    "httpx2": "HTTPError",
}
_TRANSIENT_4XX = (408, 425, 429)
# Two letters at least: C:// is a drive.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]+://|pipe:")
_CHUNK = 8 << 20
_START = 64 << 10  # bytes in which a first line is looked for

_log = logging.getLogger(__name__)
# Not the global generator, which a run seeds, and not one that forked workers inherit: they would wait in step.
_random = random.SystemRandom()
_T = TypeVar("_T")


class FetchError(UserError):
    """A file or URL can't be read; the message names it and what happened."""


class MissingError(FetchError, FileNotFoundError):
    """There is no such file."""


# --- URLs


def is_url(location: str) -> bool:
    """Whether ``location`` is no local path: ``scheme://...``, also when chained or a ``pipe:``, which are refused."""
    return ":" in location and _URL.match(location) is not None  # asked for every read, mostly of paths


def masked(location: str) -> str:
    """``location`` as it may be printed: without user, password and the query of HTTP, which may hold a signature."""
    scheme, separator, rest = location.partition("://")
    if not separator or not is_url(location):
        return location
    rest, query = split_query(location)
    host, slash, path = rest.partition("://")[2].partition("/")
    if "@" in host and (":" in host.rpartition("@")[0] or scheme in _HTTP):
        host = "***@" + host.rpartition("@")[2]
    return f"{scheme}://{host}{slash}{path}{'?***' if query else ''}"


def split_query(location: str) -> tuple[str, str]:
    """``location`` without its query, and the query with its ``?``; elsewhere than in HTTP it has none."""
    if not location.startswith(tuple(f"{scheme}://" for scheme in _HTTP)):
        return location, ""
    path, mark, query = location.partition("?")
    return path, mark + query


def index_beside(location: str) -> str:
    """Where the index of the shard ``location`` lies: a query is no part of the file's name."""
    path, query = split_query(location)
    return f"{path}{INDEX_SUFFIX}{query}"


def check_url(url: str) -> None:
    """Refuse what is no plain URL of a known scheme.

    Raises:
        FetchError: the scheme isn't allowed or its package isn't installed; ``pipe:``; fsspec's chaining (``::``); or
            the URL holds a password.
    """
    shown = masked(url)
    allowed = ", ".join(f"{scheme}://" for scheme in _PACKAGES)
    if url.startswith("pipe:"):
        raise FetchError(f"{shown}: commands are never run; allowed are local paths and {allowed}")
    if "::" in url:
        raise FetchError(f"{shown}: fsspec's chaining ('::') is not supported; allowed are local paths and {allowed}")
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise FetchError(f"{shown}: not a URL; allowed are {allowed}")
    if scheme not in _PACKAGES:
        raise FetchError(f"{shown}: scheme {scheme!r} is not supported; allowed are {allowed}")
    try:
        parts = urlsplit(url)
        if scheme in _HTTP and (not parts.hostname or parts.port == 0):
            raise ValueError("it names no host")
    except ValueError as error:
        raise FetchError(f"{shown}: not a URL: {error}") from error
    if shown.partition("://")[2].startswith("***@"):
        raise FetchError(
            f"{shown}: holds a user or password, which logs and checkpoints would show; "
            "put it where its package looks for it (~/.netrc for HTTP, the environment for others)"
        )
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        reason = error.__cause__ or error
        raise FetchError(f"{shown}: needs a package: pip install {_PACKAGES[scheme]} ({reason})") from error


def _options(scheme: str) -> dict[str, Any]:
    """What the filesystem of ``scheme`` is made with."""
    if scheme in ("az", "abfs"):
        return {"connection_timeout": TIMEOUT, "read_timeout": TIMEOUT}
    if scheme in (*_HTTP, "gs", "gcs"):
        from aiohttp import ClientTimeout  # comes with the package of these schemes

        # aiohttp's own limit is 5 minutes for a whole answer, and a large shard takes longer.
        timeout = ClientTimeout(total=None, connect=TIMEOUT, sock_read=TIMEOUT)
        if scheme not in _HTTP:
            return {"requests_timeout": timeout}
        # Ranges of a compressed answer would be other bytes. Clusters reach the outside through proxies.
        return {"headers": {"Accept-Encoding": "identity"}, "client_kwargs": {"timeout": timeout, "trust_env": True}}
    return {}


def _filesystem(url: str) -> tuple[Any, str]:
    """The filesystem of ``url`` and the path that it knows it by.

    Never kept: fsspec has its own store of them, which is right after a fork too.
    """
    check_url(url)
    try:
        fs, path = fsspec.core.url_to_fs(url, **_options(url.partition("://")[0]))
    except ValueError as error:  # for example no account was given
        raise FetchError(f"{masked(url)}: {error}") from error
    return fs, path


def _is_http(fs: Any) -> bool:
    return "http" in fs.protocol


# --- Trying again


def _remote_errors() -> tuple[type[Exception], ...]:
    loaded = (getattr(sys.modules.get(module), name, None) for module, name in _ERRORS.items())
    return (OSError, *(error for error in loaded if error is not None))


def _status(error: Exception) -> int | None:
    """The HTTP status that ``error`` carries; each package has its own place for it."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            if isinstance(status := getattr(holder, name, None), int):
                return status
    return None


def _retried(url: str, action: Callable[[Any, str], _T]) -> _T:
    """``action(filesystem, path)``, tried again after what may pass.

    Raises:
        MissingError: there is no such file.
        FetchError: it failed ``RETRIES`` times, or in a way that trying again does not mend.
    """
    shown = masked(url)
    missing = f"{shown}: no such file" + ", or a private repository (set HF_TOKEN)" * url.startswith("hf:")
    attempt = 0
    while True:
        attempt += 1
        try:
            return action(*_filesystem(url))
        except FileNotFoundError as error:
            raise MissingError(missing) from error
        except _remote_errors() as error:
            status = _status(error)
            # A response's own text repeats the URL, query and all.
            problem = f"HTTP status {status}" if status else f"{type(error).__name__}: {error}".removesuffix(": ")
            if status == 404:
                raise MissingError(missing) from error
            refused = status is not None and 400 <= status < 500 and status not in _TRANSIENT_4XX
            if refused or isinstance(error, (PermissionError, IsADirectoryError)):
                raise FetchError(f"{shown}: {problem}") from error
            if attempt == RETRIES:
                raise FetchError(f"{shown}: failed {RETRIES} times, the last time with {problem}") from error
            _log.warning("%s: attempt %d of %d: %s", shown, attempt, RETRIES, problem)
        sleep(BACKOFF * 2 ** (attempt - 1) * _random.uniform(0.5, 1.5))


# --- Remote reads


class Told(NamedTuple):
    """What a store tells of a file without sending it.

    Attributes:
        size: bytes; None if it doesn't tell.
        stamp: of this file's content or time; "" if it doesn't tell.
    """

    size: int | None
    stamp: str


def _told(fs: Any, path: str) -> Told:
    try:
        info = fs.info(path)
    except FileNotFoundError:
        # fsspec's HTTP says so whatever went wrong, also of a server that is only busy; `exists` raises that.
        if _is_http(fs) and fs.exists(path, strict=True):
            raise OSError("the server refused to tell the size") from None
        raise
    if info["type"] == "directory":
        raise IsADirectoryError("a folder, not a file")
    return Told(info["size"], next((f"{name} {info[name]}" for name in _STAMPS if info.get(name)), ""))


def _stream(fs: Any, path: str, headers: Mapping[str, str] | None = None) -> BinaryIO:
    """The file from its first byte to its last, to be read once in pieces of at most ``_CHUNK`` bytes.

    ``headers`` are those of HTTP, to add.
    """
    file: BinaryIO
    if _is_http(fs):
        more = {"headers": {**fs.kwargs["headers"], **headers}} if headers else {}
        # One request, which servers without ranges understand too; naming any size spares one that asks for it.
        file = fs.open(path, "rb", block_size=0, size=1, **more)
    elif "hf" in fs.protocol:
        file = fs.open(path, "rb", block_size=0)
    else:
        file = fs.open(path, "rb", block_size=_CHUNK, cache_type="none")
    return file


def download(url: str, size: int, out: BinaryIO, folder: Path | str) -> str:
    """Write the ``size`` bytes of ``url`` to ``out``, a file in ``folder``.

    Returns:
        sha256, as a hex digest.

    Raises:
        FetchError: it is missing, can't be read, has more bytes, or there is no place for them.
    """

    def action(fs: Any, path: str) -> str:
        digest, received = hashlib.sha256(), 0
        out.seek(0)
        with _stream(fs, path) as remote:
            while chunk := remote.read(_CHUNK):
                received += len(chunk)
                if received > size:
                    raise FetchError(f"{masked(url)}: sends more than the {size} bytes that it should have")
                digest.update(chunk)
                try:
                    out.write(chunk)
                except OSError as error:  # a full disk is no reason to try again
                    raise FetchError(f"{folder}: no place for {masked(url)}, {size} bytes: {error.strerror}") from error
        if received < size:
            raise OSError(f"ended after {received} of {size} bytes")
        return digest.hexdigest()

    return _retried(url, action)


def read_range(url: str, start: int, size: int, total: int) -> bytes:
    """``size`` bytes of ``url`` from byte ``start``; all of it are ``total`` bytes.

    Raises:
        FetchError: it is missing, can't be read, or its server can't send a part of a file.
    """

    def action(fs: Any, path: str) -> bytes:
        data: bytes
        if _is_http(fs):
            # `cat_file` would take, and hold in memory, the whole file from a server that ignores ranges.
            with fs.open(path, "rb", block_size=1, size=total, cache_type="none") as remote:
                remote.seek(start)
                try:
                    data = remote.read(size)
                except ValueError as error:
                    raise FetchError(
                        f"{masked(url)}: the server can't send a part of a file; use a cache, which takes whole shards"
                    ) from error
        else:
            data = fs.cat_file(path, start=start, end=start + size)
        if len(data) != size:
            raise OSError(f"{len(data)} bytes came instead of {size}")
        return data

    return _retried(url, action)


# --- Files, wherever they are


def local_error(location: str | Path, error: OSError) -> FetchError:
    """What a local file that can't be read is reported with."""
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{location}: no such file")
    return FetchError(f"{location}: {error.strerror}")


def _as_in(pattern: str, name: str) -> str:
    """The URL of ``bucket/key``, written as in ``pattern``.

    Not fsspec's `unstrip_protocol`: it turns gcs:// into gs://, and forgets the account of Azure's container@account.
    """
    bucket, _, key = name.partition("/")
    parts = urlsplit(pattern)
    return f"{parts.scheme}://{parts.netloc if '@' in parts.netloc else bucket}/{key}"


def expand(pattern: str) -> list[str]:
    """The URLs that one URL names, sorted: itself, or those that match its ``*``, ``?`` (not of HTTP) and ``[...]``.

    Index files are left out. A plain URL costs one request, so does a pattern per folder.

    Raises:
        FetchError: no file is there or matches, or see `check_url`.
    """
    check_url(pattern)
    scheme = pattern.partition("://")[0]
    path = urlsplit(pattern).path if scheme in _HTTP else pattern  # what follows the ? of HTTP is no name
    if not re.search(r"[*?\[]", path):
        told(pattern)
        return [pattern]
    hint = "; HTTP servers list files only where they show an index page: name them with braces" * (scheme in _HTTP)

    def action(fs: Any, path: str) -> list[str]:
        files = [name for name, info in fs.glob(path, detail=True).items() if info["type"] == "file"]
        return sorted(name if _is_http(fs) else _as_in(pattern, name.lstrip("/")) for name in files)

    try:
        urls = [url for url in _retried(pattern, action) if not url.endswith(INDEX_SUFFIX)]
    except FetchError as error:
        raise FetchError(f"{error}{hint}") from error
    if not urls:
        raise FetchError(f"{masked(pattern)}: matches no file{hint}")
    return urls


def told(url: str) -> Told:
    """Size and stamp of a URL, in one request.

    Raises:
        FetchError: it is missing (then also a ``FileNotFoundError``), or can't be reached.
    """
    return _retried(url, _told)


def stamp_of(state: os.stat_result) -> str:
    """What differs for another local file in the same place; also for the same one that was touched."""
    # No inode: file systems over a network may number a file anew each time.
    return f"{state.st_mtime_ns} {state.st_ctime_ns}"


def state_of(location: str) -> tuple[int, str]:
    """Bytes of a file, and its stamp (see `Told`).

    Raises:
        FetchError: it is missing (then also a ``FileNotFoundError``), can't be reached, or its server doesn't tell
            its size.
    """
    if not is_url(location):
        try:
            state = Path(location).stat()
        except OSError as error:
            raise local_error(location, error) from error
        return state.st_size, stamp_of(state)
    size, stamp = told(location)
    if size is None:
        raise FetchError(f"{masked(location)}: the server doesn't tell its size")
    return size, stamp


def size_of(location: str) -> int:
    """Bytes of a file. Raises what `state_of` raises."""
    return state_of(location)[0]


def open_binary(location: str) -> BufferedReader | BufferedRandom:
    """A file to read from and seek in.

    A remote one is downloaded first, to a nameless file in ``$TMPDIR``: whoever hashes a shard needs all its bytes,
    and this way they cross the network once.

    Raises:
        FetchError: as `size_of`; or there is no place for it.
    """
    if not is_url(location):
        try:
            return Path(location).open("rb")
        except OSError as error:
            raise local_error(location, error) from error
    size = size_of(location)
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())
        download(location, size, file, tempfile.gettempdir())
        file.seek(0)
        stack.pop_all()
    return file


def _read(file: BinaryIO, limit: int) -> bytes:
    """The first ``limit`` bytes, or all there are."""
    data = bytearray()
    # Streams give what has arrived, which may be less than asked for.
    while chunk := file.read(limit - len(data)):
        data += chunk
    return bytes(data)


def read_first_line(url: str, limit: int) -> bytes:
    """The bytes of a URL up to its first line break; where they are few, the rest does not cross the network.

    Raises:
        FileNotFoundError: it is missing; of HTTP, only with status 404.
        FetchError: it has a long first line and more than ``limit`` bytes, or can't be read.
    """

    def action(fs: Any, path: str) -> bytes:
        # A server that knows no ranges sends all, and is cut short.
        span = {"Range": f"bytes=0-{_START - 1}"}
        with _stream(fs, path, span) as remote:
            return _read(remote, _START)

    start, found, _ = _retried(url, action).partition(b"\n")
    return start if found else read_file(url, limit).partition(b"\n")[0]


def read_file(location: str, limit: int) -> bytes:
    """All bytes of a small file.

    Raises:
        FileNotFoundError: it is missing; of HTTP, only with status 404.
        FetchError: it has more than ``limit`` bytes, or can't be read.
    """

    def action(fs: Any, path: str) -> bytes:
        with _stream(fs, path) as remote:
            return _read(remote, limit + 1)

    if is_url(location):
        data = _retried(location, action)
    else:
        try:
            with Path(location).open("rb") as file:
                data = _read(file, limit + 1)
        except OSError as error:
            raise local_error(location, error) from error
    if len(data) > limit:
        raise FetchError(f"{masked(location)}: larger than {limit} bytes")
    return data

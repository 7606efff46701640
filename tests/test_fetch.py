import hashlib
import logging
import os
import re
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from fsspec.spec import AbstractBufferedFile

from data import fetch
from data.errors import UserError
from data.fetch import (
    FetchError,
    MissingError,
    check_url,
    download,
    expand,
    index_beside,
    is_url,
    masked,
    open_binary,
    read_file,
    read_first_line,
    read_range,
    size_of,
    told,
)
from tests.server import A, Server, empty_memory, run_server, skip_waits

server = pytest.fixture(run_server)
waits = pytest.fixture(autouse=True)(skip_waits)
memory = pytest.fixture(empty_memory)


# --- URLs


def test_is_url() -> None:
    assert all(map(is_url, ["s3://b/k.tar", "memory://x", "ftp://x", "pipe:cat x", "pipe://x", "filecache::s3://b/k"]))
    assert not any(map(is_url, ["train.tar", "/data/a:b.tar", "C://data/x.tar", "C:\\x.tar", "a::b.tar", "x/s3://y"]))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://host/x.tar", "'ftp' is not supported; allowed are s3://.*https://"),
        ("file:///etc/passwd", "'file' is not supported"),
        ("pipe:curl http://host/x.tar", "commands are never run"),
        ("pipe://curl", "commands are never run"),
        ("simplecache::s3://bucket/x.tar", "chaining"),
        ("s3://bucket/x.zip::memory://y", "chaining"),
        ("train.tar", "allowed are"),
        ("http:///x.tar", "names no host"),
        ("http://host:99999/x.tar", "not a URL"),
        ("http://[host/x.tar", "not a URL"),
    ],
)
def test_check_url_refuses(url: str, says: str) -> None:
    with pytest.raises(FetchError, match=says) as error:
        check_url(url)
    assert isinstance(error.value, UserError)
    assert url in str(error.value)
    if is_url(url):
        for read in (
            expand,
            open_binary,
            size_of,
            lambda url: read_file(url, 1),
            lambda url: read_first_line(url, 1),
            told,
            lambda url: read_range(url, 0, 1, 9),
            lambda url: download(url, 9, BytesIO(), "folder"),
        ):
            with pytest.raises(FetchError, match=says):
                read(url)


@pytest.mark.parametrize("url", ["https://me:secret@host/x.tar", "http://secret@host/x", "s3://key:secret@bucket/x"])
def test_credentials_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(FetchError, match=r"://\*\*\*@") as error:
        check_url(url)
    assert "secret" not in str(error.value)


def test_a_revision_or_container_is_no_credential() -> None:
    check_url("hf://datasets/name/set@main/x.tar")
    assert (
        masked("abfs://container@account.dfs.core.windows.net/x") == "abfs://container@account.dfs.core.windows.net/x"
    )
    assert masked("https://host/x.tar?X-Signature=secret") == "https://host/x.tar?***"
    assert masked("s3://bucket/x-?.tar") == "s3://bucket/x-?.tar"


@pytest.mark.parametrize(
    ("shard", "index"),
    [
        ("x/a.tar", "x/a.tar.index.jsonl"),
        ("x/a?b.tar", "x/a?b.tar.index.jsonl"),
        ("s3://bucket/a?b.tar", "s3://bucket/a?b.tar.index.jsonl"),
        ("https://host/a.tar", "https://host/a.tar.index.jsonl"),
        ("http://host/a.tar?sig=x/y?z", "http://host/a.tar.index.jsonl?sig=x/y?z"),
    ],
)
def test_where_the_index_of_a_shard_lies(shard: str, index: str) -> None:
    assert index_beside(shard) == index


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str) -> type:
        raise ImportError("Install s3fs to access S3") from ModuleNotFoundError("No module named 's3fs'")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(FetchError, match=r"s3://bucket/x.tar: needs a package: pip install s3fs .*No module named"):
        check_url("s3://bucket/x.tar")


# --- expand


def test_expand_lists_and_sorts(memory: fsspec.AbstractFileSystem) -> None:
    for name in ("b-1.tar", "b-0.tar", "b-0.tar.index.jsonl", "c.tar", "b-9/x.tar"):
        memory.pipe_file(f"/set/{name}", A)
    assert expand("memory://set/b-*") == ["memory://set/b-0.tar", "memory://set/b-1.tar"]
    assert expand("memory://set/b-?.tar") == ["memory://set/b-0.tar", "memory://set/b-1.tar"]
    assert expand("memory://set/[bd]-[1-9].tar") == ["memory://set/b-1.tar"]
    assert expand("memory://set/c.tar") == ["memory://set/c.tar"]
    with pytest.raises(FetchError, match=r"memory://set/z\*.tar: matches no file"):
        expand("memory://set/z*.tar")
    with pytest.raises(FetchError, match=r"matches no file"):
        expand("memory://set/*.index.jsonl")
    with pytest.raises(FetchError, match=r"memory://set/z.tar: no such file"):
        expand("memory://set/z.tar")
    with pytest.raises(FetchError, match=r"memory://set: .*a folder"):
        expand("memory://set")


class Azure(MemoryFileSystem):  # type: ignore[misc]
    """Names files like adlfs: container/path, whatever the account."""

    protocol = ("abfs", "az")
    store: ClassVar[dict[str, object]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + re.sub(r"^az://|^abfs://|(?<=shards)@[^/]*", "", path).strip("/")

    def glob(self, path: str, **options: object) -> dict[str, object]:
        return dict(reversed(super().glob(path, **options).items()))


def test_expand_keeps_scheme_and_account(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in ("abfs", "az"):
        monkeypatch.setitem(_registry, scheme, Azure)
    for name in "ab":
        Azure().pipe_file(f"/shards/x/{name}.tar", A)
    for host in ("az://shards", "abfs://shards@account.dfs.core.windows.net"):
        assert expand(f"{host}/x/*") == [f"{host}/x/a.tar", f"{host}/x/b.tar"]


def test_a_filesystem_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(scheme: str, **options: object) -> None:
        raise ValueError("Must provide an account_name")

    monkeypatch.setattr(fsspec.core, "filesystem", refuse)
    with pytest.raises(FetchError, match=r"memory://a.tar: Must provide an account_name"):
        size_of("memory://a.tar")


def test_expand_over_http(server: Server) -> None:
    server.files = {"/set/a-0.tar": A, "/set/a-1.tar": A, "/set/": b'<a href="a-1.tar">x</a><a href="a-0.tar">y</a>'}
    assert expand(f"{server.url}/set/a-*.tar") == [f"{server.url}/set/a-0.tar", f"{server.url}/set/a-1.tar"]
    assert expand(f"{server.url}/set/a-0.tar?sig=[x]*") == [f"{server.url}/set/a-0.tar?sig=[x]*"]
    with pytest.raises(FetchError, match=r"z-\*.tar: matches no file; HTTP servers list"):
        expand(f"{server.url}/set/z-*.tar")
    with pytest.raises(FetchError, match=r"HTTP servers list"):
        expand(f"{server.url}/other/*.tar")
    server.failures = [403] * 4
    with pytest.raises(FetchError, match=r"HTTP servers list"):
        expand(f"{server.url}/set/a-*.tar")
    server.failures = []
    with pytest.raises(MissingError, match=r"set/z.tar: no such file"):
        expand(f"{server.url}/set/z.tar")


# --- whole files


def test_local_files(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(A)
    with open_binary(str(path)) as file:
        file.seek(300)
        assert file.read(5) == A[300:305]
    assert size_of(str(path)) == len(A)
    assert read_file(str(path), len(A)) == A
    with pytest.raises(FetchError, match=rf"a.tar: larger than {len(A) - 1} bytes"):
        read_file(str(path), len(A) - 1)
    calls: list[Callable[[str], object]] = [open_binary, size_of, lambda location: read_file(location, 9)]
    for call in calls:
        with pytest.raises(FileNotFoundError, match=r"absent: no such file"):
            call(str(tmp_path / "absent"))
    with pytest.raises(FetchError, match=r"Is a directory"):
        read_file(str(tmp_path), 9)


def test_remote_files(server: Server, memory: fsspec.AbstractFileSystem) -> None:
    server.files["/a.tar"] = A
    memory.pipe_file("/a.tar", A)
    for url in (f"{server.url}/a.tar", "memory://a.tar"):
        with open_binary(url) as file:
            assert file.read(3) == A[:3]
            file.seek(-5, os.SEEK_END)
            assert file.read() == A[-5:]
        assert size_of(url) == len(A)
        assert read_file(url, len(A)) == A
        with pytest.raises(FetchError, match=rf"larger than {len(A) - 1} bytes"):
            read_file(url, len(A) - 1)
        calls: list[Callable[[str], object]] = [open_binary, size_of, lambda location: read_file(location, 9)]
        for call in calls:
            with pytest.raises(FileNotFoundError, match=r"/a.tar.absent: no such file"):
                call(f"{url}.absent")


def test_the_whole_of_a_remote_file_crosses_the_network_once(server: Server) -> None:
    server.files["/a.tar"] = A
    server.ranges = False
    with open_binary(f"{server.url}/a.tar") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == hashlib.sha256(A).hexdigest()
        file.seek(0)
        assert file.read() == A
    assert server.gets("/a.tar") == [None]


def test_of_a_first_line_little_more_is_read(server: Server, memory: fsspec.AbstractFileSystem) -> None:
    long = b"x" * 70_000
    files = {
        "/short": b"{}\n" + A * 100,
        "/long": long + b"\n" + A,
        "/only": b"{}",
        "/none": b"",
        "/edge": b"x" * 65_536,
    }
    server.files = files
    for name, content in files.items():
        memory.pipe_file(name, content)
    for ranges in (True, False):
        server.ranges = ranges
        for name, content in files.items():
            for url in (f"{server.url}{name}", f"memory:/{name}"):
                assert read_first_line(url, 10**6) == content.partition(b"\n")[0]
    assert server.gets("/short") == ["bytes=0-65535"] * 2
    assert server.gets("/long") == ["bytes=0-65535", None] * 2
    assert server.encodings == {"identity"}, "ranges of a compressed file are other bytes"
    for url in (f"{server.url}/long", "memory://long"):
        with pytest.raises(FetchError, match=r"/long: larger than 80000 bytes"):
            read_first_line(url, 80_000)
        with pytest.raises(FileNotFoundError, match=r"/long.absent: no such file"):
            read_first_line(f"{url}.absent", 9)


class RangedFile(AbstractBufferedFile):  # type: ignore[misc]
    """A file like those of S3 and its kind: each read is a request for a range."""

    asked: ClassVar[list[tuple[int, int]]] = []

    def _fetch_range(self, start: int, end: int) -> Any:
        self.asked.append((start, end))
        return self.fs.store[self.path].getvalue()[start:end]


def test_no_more_of_a_store_is_asked_for_than_the_start(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe_file("/a", b"{}\n" + A * 100)
    monkeypatch.setattr(memory, "_open", partial(RangedFile, memory))
    assert read_first_line("memory://a", 10**9) == b"{}"
    assert RangedFile.asked == [(0, 65_536)]


def test_what_is_told_of_a_url(server: Server, memory: fsspec.AbstractFileSystem) -> None:
    server.files["/a"] = A
    memory.pipe_file("/a", A)
    assert told(f"{server.url}/a") == (len(A), "")
    assert len(server.log) == 1
    server.etags = True
    first = told(f"{server.url}/a"), told("memory://a")
    assert first == (told(f"{server.url}/a"), told("memory://a"))
    server.files["/a"] = A[::-1]
    memory.pipe_file("/a", A[::-1])
    for url, before in zip((f"{server.url}/a", "memory://a"), first, strict=True):
        assert before.size == told(url).size == len(A)
        assert before.stamp != told(url).stamp
        assert before.stamp


def test_only_404_is_missing(server: Server) -> None:
    server.files["/a"] = A
    for status in (401, 403, 410):
        server.failures = [status] * 3
        with pytest.raises(FetchError, match=rf"/a: HTTP status {status}") as error:
            read_file(f"{server.url}/a", 9)
        assert not isinstance(error.value, FileNotFoundError)
        server.failures = []
    assert len(server.log) == 3, "a refusal is final"


def test_a_file_without_a_size_is_refused_where_it_is_needed(server: Server) -> None:
    server.files["/a"] = A
    server.lengths = False
    assert read_file(f"{server.url}/a", len(A)) == A
    with pytest.raises(FetchError, match=r"doesn't tell its size"):
        open_binary(f"{server.url}/a")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to /dev/full")
def test_a_full_disk_is_named_and_final(server: Server, waits: list[float]) -> None:
    server.files["/a.tar"] = A
    with (
        Path("/dev/full").open("r+b", buffering=0) as full,
        pytest.raises(FetchError, match=r"folder: no place for .*No space"),
    ):
        download(f"{server.url}/a.tar", len(A), full, "folder")
    assert waits == []


# --- trying again


def test_a_busy_server_is_asked_again(server: Server, waits: list[float], caplog: pytest.LogCaptureFixture) -> None:
    server.files["/a"] = A
    server.failures = [503, 503]
    with caplog.at_level(logging.WARNING):
        assert read_file(f"{server.url}/a?sig=secret", len(A)) == A
    assert 0.25 <= waits[0] <= 0.75
    assert 0.5 <= waits[1] <= 1.5
    assert "/a?***: attempt 2 of 5: HTTP status 503" in caplog.text
    assert "secret" not in caplog.text


def test_a_busy_server_is_not_taken_for_a_missing_file(server: Server) -> None:
    server.files["/a"] = A
    server.failures = [503, 503, 503, 429]  # fsspec asks with HEAD and GET, then we ask why
    assert size_of(f"{server.url}/a") == len(A)
    server.failures = [503, 503]
    assert size_of(f"{server.url}/a") == len(A)
    server.failures = [500] * 100
    with pytest.raises(FetchError, match=r"/a: failed 5 times, the last time with HTTP status 500") as error:
        size_of(f"{server.url}/a")
    assert not isinstance(error.value, FileNotFoundError)


def test_giving_up_names_url_attempts_and_error(
    server: Server, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch._random, "uniform", lambda low, high: (low + high) / 2)
    server.failures = [502] * 5
    with pytest.raises(FetchError, match=r"127.0.0.1:\d+/a: failed 5 times, the last time with HTTP status 502"):
        read_file(f"{server.url}/a", 9)
    assert len(server.log) == 5
    assert waits == [0.5, 1, 2, 4]
    with pytest.raises(
        FetchError, match=r"http://127.0.0.1:1/a: failed 5 times, .*ClientConnectorError: Cannot connect"
    ):
        read_file("http://127.0.0.1:1/a", 9)


def test_missing_files_are_not_asked_for_again(server: Server, waits: list[float]) -> None:
    with pytest.raises(FileNotFoundError):
        read_file(f"{server.url}/a", 9)
    assert (len(server.log), waits) == (1, [])


def test_a_server_that_wants_a_break_gets_it(server: Server, waits: list[float]) -> None:
    server.files["/a"] = A
    server.failures = [429, 408]
    assert read_file(f"{server.url}/a", len(A)) == A
    assert len(waits) == 2


def test_cut_connections(server: Server) -> None:
    server.files["/a"] = A
    for cuts in (1, 4):
        server.cuts = cuts
        assert read_file(f"{server.url}/a", len(A)) == A
        server.cuts = cuts
        assert read_range(f"{server.url}/a", 10, 20_000, len(A)) == A[10:20_010]
        server.cuts = cuts
        with open_binary(f"{server.url}/a") as file:
            assert file.read() == A
    server.cuts = 5
    with pytest.raises(FetchError, match=r"failed 5 times"):
        open_binary(f"{server.url}/a")
    server.lengths = False  # then nothing but the bytes that are missing tells a cut from the end
    server.cuts = 2
    out = BytesIO()
    assert download(f"{server.url}/a", len(A), out, "folder") == hashlib.sha256(A).hexdigest()
    assert out.getvalue() == A


def test_short_ranges_are_never_returned(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    memory.pipe_file("/a.tar", A)
    real = type(memory).cat_file
    lost = [10, 10, 0]
    monkeypatch.setattr(
        type(memory), "cat_file", lambda self, path, start, end: real(self, path, start, end - lost.pop(0))
    )
    assert read_range("memory://a.tar", 100, 50, len(A)) == A[100:150]
    assert len(waits) == 2
    lost = [10] * 5
    with pytest.raises(FetchError, match=r"failed 5 times, the last time with OSError: 40 bytes came instead of 50"):
        read_range("memory://a.tar", 100, 50, len(A))


def test_a_dead_server_does_not_hang(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT", 0.1)
    monkeypatch.setattr(fetch, "RETRIES", 2)
    server.files["/a"] = A
    server.pause = 60.0
    start = time.monotonic()
    with pytest.raises(FetchError, match=r"failed 2 times.*[Tt]imeout"):
        read_file(f"{server.url}/a", len(A))
    assert time.monotonic() - start < 30


def test_a_slow_server_is_no_dead_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT", 2.0)  # less than the answer takes, more than each of its pauses
    server.files["/a"] = A
    server.pause = 0.75
    with open_binary(f"{server.url}/a") as file:
        assert file.read() == A
    assert server.gets("/a") == [None]

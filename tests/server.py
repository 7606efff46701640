"""A web server on the loopback that can be as bad as those on the internet, and what it serves.

The last functions are fixtures that test files give a name of their own: ``server = pytest.fixture(run_server)``.
"""

import contextlib
import hashlib
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import fsspec
import pytest

import data.fetch

A = bytes(range(256)) * 400  # 102,400 bytes
B = A[::-1]


class Shard(NamedTuple):
    location: str
    size: int
    sha256: str
    stamp: str = ""


def shard(location: str | Path, content: bytes = A) -> Shard:
    return Shard(str(location), len(content), hashlib.sha256(content).hexdigest())


@dataclass
class Server:
    """What the handler serves, and how badly."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    failures: list[int] = field(default_factory=list)  # statuses of the next answers
    cuts: int = 0  # so many answers end in the middle
    ranges: bool = True
    lengths: bool = True
    etags: bool = False
    pause: float = 0.0  # seconds between the quarters of a body
    log: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range
    encodings: set[str | None] = field(default_factory=set)  # that were accepted

    def gets(self, path: str) -> list[str | None]:
        return [span for method, name, span in self.log if method == "GET" and name == path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the other side hung up
            super().handle()

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        state = self.state
        state.log.append((self.command, self.path, self.headers["Range"]))
        state.encodings.add(self.headers["Accept-Encoding"])
        if state.failures:
            return self.error(state.failures.pop(0))
        path = self.path.partition("?")[0]
        if path not in state.files:
            return self.error(404)
        content, span = state.files[path], re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if span and state.ranges:
            start, end = int(span[1]), int(span[2]) + 1
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            content = content[start:end]
        else:
            self.send_response(200)
        if state.lengths:
            self.send_header("Content-Length", str(len(content)))
        else:
            self.close_connection = True
        if state.etags:
            self.send_header("ETag", f'"{hashlib.sha256(state.files[path]).hexdigest()}"')
        self.send_header("Content-Type", "text/html" if path.endswith("/") else "application/octet-stream")
        self.end_headers()
        if body:
            self.send(content)
        return None

    def send(self, content: bytes) -> None:
        state, quarter = self.state, -(-len(content) // 4)
        for i in range(4):
            if i == 2 and state.cuts:
                state.cuts -= 1
                self.close_connection = True
                return
            self.wfile.write(content[i * quarter : (i + 1) * quarter])
            time.sleep(state.pause if i < 3 else 0)

    def error(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    """A server for as long as the context lasts."""

    class Bound(Handler):
        """A handler of this server only."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Bound) as http:
        Bound.state = Server(f"http://127.0.0.1:{http.server_port}")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield Bound.state
        finally:
            http.shutdown()
            thread.join()


def run_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that no proxy stands before."""
    for name in ("NO_PROXY", "no_proxy"):  # where both are set, the second counts
        monkeypatch.setenv(name, "127.0.0.1")
    with serve() as running:
        yield running


def skip_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were slept between attempts, in no time."""
    seconds: list[float] = []
    monkeypatch.setattr(data.fetch, "sleep", seconds.append)
    return seconds


def empty_memory() -> Iterator[fsspec.AbstractFileSystem]:
    """What lies behind ``memory://``."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()

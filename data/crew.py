"""Processes that decode members of shards, to find those that can't be. A crash or a hang costs one member."""

import multiprocessing
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

from data.cache import Cache, Reader
from data.decode import DECODERS, METADATA, MODALITIES, DecodeError, check_size, decode_metadata
from data.errors import UserError
from data.fetch import FetchError
from data.index import Shard, ShardIndex

PATIENCE = 120.0
"""Seconds for one member; then its process is ended."""
_CHUNK = 64


class CrewError(UserError):
    """The processes can't be started."""


def available_cpus() -> int:
    """CPUs that this process may run on; where a job has a part of a machine, not all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Job(NamedTuple):
    """One member to decode."""

    shard: Shard
    key: str
    extension: str
    offset: int
    size: int


def jobs_of(index: ShardIndex) -> Iterator[Job]:
    """All members that training could read."""
    shard = index.shard._replace(members={})  # it goes through a pipe many times
    for key, members in index.samples:
        for extension, (offset, size) in members.items():
            if extension in MODALITIES or extension == METADATA:
                yield Job(shard, key, extension, offset, size)


Decode = Callable[[Reader, Job], str | None]


def decode_member(reader: Reader, job: Job) -> str | None:
    """Read and decode one member; returns what is wrong with it, or None."""
    try:
        check_size(job.size)  # before it is read into memory
        data = reader.read(job.shard, job.offset, job.size)
        if job.extension == METADATA:
            decode_metadata(data)
        else:
            DECODERS[MODALITIES[job.extension]](data)
    except (DecodeError, FetchError) as error:
        return f"{type(error).__name__}: {error}"
    return None


class Crew:
    """Processes that decode. One that crashes or gets stuck costs the member it was at, and is replaced."""

    def __init__(self, count: int, cache: Cache | None, decode: Decode = decode_member) -> None:
        self.count = count
        self.cache = cache
        self.decode = decode
        self.workers: list[_Worker] = []

    def __enter__(self) -> "Crew":
        self.workers = [_Worker(self.decode, self.cache) for _ in range(self.count)]
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.stop()

    def map(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, str | None]]:
        """Each job, in any order, with what is wrong with it or None."""
        queue = iter(jobs)
        for worker in self.workers:
            worker.give(islice(queue, _CHUNK))
        while busy := [worker for worker in self.workers if worker.jobs]:
            wait([worker.pipe for worker in busy], timeout=1)
            for worker in busy:
                yield from worker.results()
                if not worker.jobs:
                    worker.give(islice(queue, _CHUNK))


class _Worker:
    """A process, and the jobs that it has not answered yet."""

    def __init__(self, decode: Decode, cache: Cache | None) -> None:
        self.decode = decode
        self.cache = cache
        self.jobs: deque[Job] = deque()
        self._start()

    def _start(self) -> None:
        # Not fork: this process has threads.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.decode, self.cache), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.since = time.monotonic()

    def give(self, jobs: Iterable[Job]) -> None:
        """Take these jobs on; there must be none left."""
        self.jobs.extend(jobs)
        self._send()

    def _send(self) -> None:
        self.since = time.monotonic()
        if self.jobs:
            with suppress(ConnectionError):  # it died already: `results` will see that
                self.pipe.send(list(self.jobs))

    def results(self) -> Iterator[tuple[Job, str | None]]:
        """The answers that have arrived; a crash and too long a silence are answers, too."""
        try:
            while self.jobs and self.pipe.poll():
                error = self.pipe.recv()
                self.since = time.monotonic()
                if self.ready:
                    yield self.jobs.popleft(), error
                self.ready = True
        except (EOFError, OSError):
            if not self.ready:
                raise CrewError(f"a process that decodes ended at its start (exit code {self.stop()})") from None
            yield self._replace(f"the decoder crashed (exit code {self.stop()})")
        if self.jobs and time.monotonic() - self.since > PATIENCE:
            self.stop()
            yield self._replace(f"not decoded after {PATIENCE:.0f} s")

    def _replace(self, error: str) -> tuple[Job, str]:
        """Put a new process in the place of the stopped one; returns the job it was at, and ``error``."""
        failed = self.jobs.popleft()
        self._start()
        self._send()
        return failed, error

    def stop(self) -> int | None:
        """End the process, by force if need be; returns its exit code."""
        self.pipe.close()  # it takes this for the end of its work
        self.process.join(timeout=1)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode


def _serve(pipe: Connection, decode: Decode, cache: Cache | None) -> None:
    """A worker's life: lists of jobs come, an answer goes for each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the first process ends the others
    warnings.simplefilter("ignore")
    reader = Reader(cache)
    with suppress(EOFError, ConnectionError):  # the first process closed its end
        pipe.send(None)  # ready: whatever ends this process from now on is a member's fault
        while True:
            for job in pipe.recv():
                pipe.send(decode(reader, job))

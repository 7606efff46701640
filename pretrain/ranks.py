"""What ranks tell each other on the CPU in every step, so that no device is waited for; and who no longer answers."""

import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what clusters send before they take a machine away
HOST_BYTES = 64
PATIENCE = timedelta(days=7)
ANSWER = timedelta(seconds=10)  # ranks notice a failure at moments that lie this far apart, at most


class LostRankError(UserError):
    """Other ranks no longer answer; names them and their machines."""


class Ranks:
    """Adds up numbers over ranks; with one rank they are the sums already."""

    def __init__(self, world: int, timeout: timedelta | None = None) -> None:
        """All ranks make it together.

        Args:
            world: number of ranks.
            timeout: how long to wait for the others; None: as long as torch does.
        """
        self.world, self.timeout = world, timeout
        self.hosts = [socket.gethostname()]
        if world > 1:
            # Groups of their own: the default one may know devices only, and one that has failed is of no more use.
            self._group: Any = dist.new_group(backend="gloo", timeout=timeout)
            self._roll_call: Any = dist.new_group(backend="gloo", timeout=timeout)
            name = self.hosts[0].encode()[:HOST_BYTES].ljust(HOST_BYTES, b"\0")
            every = torch.empty(world * HOST_BYTES, dtype=torch.uint8)
            dist.all_gather_single(every, torch.tensor(list(name), dtype=torch.uint8), group=self._group)
            self.hosts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in every.view(world, -1)]

    def sum(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """All ranks call it with the same names in the same order."""
        if self.world == 1:
            return dict(numbers)
        sums = torch.tensor(list(numbers.values()))
        dist.all_reduce(sums, group=self._group)
        return dict(zip(numbers, sums.tolist(), strict=True))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, a failure to reach another rank says which rank that is.

        Raises:
            LostRankError: instead of the backend's error, which knows addresses at best.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            lost = self.silent()
            named = ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in lost)
            waited = "" if self.timeout is None else f" (train.timeout={self.timeout.total_seconds():g} s)"
            what = (
                f"lost {named}: it ended, was killed, or its machine can't be reached{waited}"
                if lost
                else f"some rank took longer than the others wait{waited}, though all answer"
            )
            raise LostRankError(
                f"{what}. This rank ({dist.get_rank()} on {self.hosts[dist.get_rank()]}) ends, too; the run goes on "
                f"from the newest checkpoint when it is started again. torch says: {str(error).splitlines()[0]}"
            ) from error

    def silent(self) -> list[int]:
        """The ranks that do not answer; for when something has failed, on all that are left."""
        others = [rank for rank in range(self.world) if rank != dist.get_rank()]
        calls: dict[int, list[Any]] = {}
        heard = {rank: torch.zeros(1) for rank in others}
        for rank in others:
            calls[rank] = [_started(dist.isend, torch.ones(1), rank, self._roll_call)]
            calls[rank] += [_started(dist.irecv, heard[rank], rank, self._roll_call)]
        return [rank for rank in others if sum(map(_answered, calls[rank])) < 2]


def _started(call: Any, tensor: Tensor, rank: int, group: Any) -> Any:
    try:
        return call(tensor, rank, group=group)
    except RuntimeError:  # the connection is known to be gone
        return None


def _answered(call: Any) -> bool:
    if call is None:
        return False
    try:
        call.wait(ANSWER)
    except RuntimeError:
        return False
    return True


@contextmanager
def first_alone(main: bool, world: int) -> Iterator[None]:
    """The first rank does it alone, then the others: it makes what they find. They wait as long as that takes.

    Not with the run's timeout, since indexing shards may take hours. If the first one fails, the launcher ends them.
    """
    group = dist.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None
    if group is not None and not main:
        dist.barrier(group=group)
    yield
    if group is not None and main:
        dist.barrier(group=group)


class Stop:
    """Within ``with``, SIGTERM and SIGUSR1 end nothing: they are remembered, for the loop to end after its step.

    They may reach ranks at different moments, or only one of them: what a rank got it tells the others.
    """

    def __init__(self) -> None:
        self._got = {number.name: 0 for number in SIGNALS}
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._got[signal.Signals(number).name] = 1

    @property
    def got(self) -> dict[str, int]:
        """The signals' names -> 1 if this rank got one, for `Ranks.sum`."""
        return dict(self._got)

"""What ranks tell each other on the CPU in every step, so that no device is waited for."""

import signal
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what clusters send before they take a machine away


class Ranks:
    """Adds up numbers over ranks; with one rank they are the sums already."""

    def __init__(self, world: int) -> None:
        # A group of its own: the default one may know devices only.
        self._group: Any = dist.new_group(backend="gloo") if world > 1 else None

    def sum(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """All ranks call it with the same names in the same order."""
        if self._group is None:
            return dict(numbers)
        sums = torch.tensor(list(numbers.values()))
        dist.all_reduce(sums, group=self._group)
        return dict(zip(numbers, sums.tolist(), strict=True))


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

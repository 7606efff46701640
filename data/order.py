"""Which sample stands at global position g of a run: a pure function of the seed, the shards' sizes and g."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Place(NamedTuple):
    """Where the sample of one global position lies."""

    epoch: int
    shard: int
    sample: int


def permutation(n: int, *key: int) -> npt.NDArray[np.int64]:
    """A random order of ``range(n)`` fixed by up to four non-negative integers below 2**32.

    Sorting raw 64-bit draws instead of ``Generator.permutation``: numpy promises that a bit generator's raw
    stream never changes, and promises no such thing of its shuffles. A resumed run must not depend on it.
    """
    # Every integer has 32 bits of its own in the 128-bit key: no two (seed, epoch, window) share a stream.
    words = (*key, 0, 0, 0, 0)[:4]
    philox = np.random.Philox(key=sum(word << (32 * i) for i, word in enumerate(words)))
    return np.argsort(philox.random_raw(n), kind="stable")


class Order:
    """Shuffled order over shards, infinitely many epochs long.

    In each epoch the shards are permuted and cut into windows of ``window`` shards; samples are shuffled within
    a window. So a reader has few files open at once, and any position is found without walking there.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, window: int = 8) -> None:
        """Order ``sum(shard_sizes)`` samples per epoch.

        Raises:
            ValueError: no samples, or a seed outside 0 .. 2**32 - 1.
        """
        if sum(shard_sizes) == 0:
            raise ValueError(f"{len(shard_sizes)} shards hold no samples: nothing to order")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed}: allowed are 0 .. 2**32 - 1")
        if window < 1:
            raise ValueError(f"window={window}: allowed is 1 or more")
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.epoch_size = int(self.sizes.sum())
        self.seed = seed
        self.window = window
        # The walk is nearly always forward, so the last few tables serve all look-ups.
        self._epoch = lru_cache(maxsize=2)(self._epoch_tables)
        self._window = lru_cache(maxsize=2)(self._window_order)

    def __reduce__(self) -> tuple[type["Order"], tuple[list[int], int, int]]:
        # The caches can't be pickled, which a worker process that is not forked needs.
        return Order, (self.sizes.tolist(), self.seed, self.window)

    def at(self, position: int) -> Place:
        """The epoch, shard and sample within the shard at a global position (0, 1, 2, ...)."""
        epoch, within_epoch = divmod(position, self.epoch_size)
        _, window_starts = self._epoch(epoch)
        window = int(np.searchsorted(window_starts, within_epoch, side="right")) - 1
        shards, samples = self._window(epoch, window)
        i = within_epoch - int(window_starts[window])
        return Place(epoch, int(shards[i]), int(samples[i]))

    def _epoch_tables(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        shards = permutation(len(self.sizes), self.seed, epoch, 0)
        totals = np.add.reduceat(self.sizes[shards], np.arange(0, len(shards), self.window))
        return shards, np.concatenate([[0], np.cumsum(totals)[:-1]])

    def _window_order(self, epoch: int, window: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        shards, _ = self._epoch(epoch)
        members = shards[window * self.window : (window + 1) * self.window]
        shard_of = np.repeat(members, self.sizes[members])
        sample_of = np.concatenate([np.arange(self.sizes[shard]) for shard in members])
        shuffled = permutation(len(shard_of), self.seed, epoch, window + 1)
        return shard_of[shuffled], sample_of[shuffled]

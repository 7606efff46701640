"""Which sample stands where in a run: a pure function of the seed, the sizes of the shards and the position.

A step's global batch is made of ``lanes`` equal parts. Lane ``l`` of every step is read by the same rank, and a lane
meets its own stretch of each epoch, so ranks read disjoint samples, and mostly disjoint shards. What a lane draws is
fixed by the source and by how many samples of it the lane has drawn before. Nothing here depends on how many ranks and
workers read.
"""

import hashlib
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data.errors import UserError

Ints = npt.NDArray[np.int64]

# Up to here a source is shuffled as a whole: the table of an epoch takes 8 MB.
WHOLE = 1 << 20
# Shares of sources are exact in this many turns; finer ones are rounded to it.
PERIOD = 10_000
# 2**32 / the golden ratio: multiples of it are spread evenly, whatever their number, and in step with no share.
_GOLDEN = 2_654_435_769


class Place(NamedTuple):
    """Where a sample lies.

    Attributes:
        source: number of the source.
        epoch: of that source, from 0.
        shard: number of the shard within the source.
        sample: number of the sample within the shard.
    """

    source: int
    epoch: int
    shard: int
    sample: int


class Slot(NamedTuple):
    """One place of a batch, before it is known which sample stands there.

    Attributes:
        source: number of the source.
        lane: from 0.
        draw: how many samples the lane has drawn from this source before.
    """

    source: int
    lane: int
    draw: int


class Turn(NamedTuple):
    """What a mixing schedule says of one turn: the source, and how many turns it had before."""

    source: int
    before: int


def permutation(n: int, *key: object) -> Ints:
    """A random order of ``range(n)`` fixed by ``key``.

    Sorting raw 64-bit draws instead of ``Generator.permutation``: numpy promises that a bit generator's raw
    stream never changes, and promises no such thing of its shuffles. A resumed run must not depend on it.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    philox = np.random.Philox(key=int.from_bytes(digest, "little"))
    return np.argsort(philox.random_raw(n), kind="stable")


class SourceOrder:
    """The order in which the lanes draw the samples of one source, endlessly.

    Position p of the source is drawn by lane ``p % lanes``; N positions are an epoch, so every epoch holds each
    sample exactly once, whether or not N is a multiple of the lanes. An epoch is the shards in random order, cut into
    one stretch per lane; a lane shuffles its stretch in windows of a few shards. A source of few shards is shuffled
    as a whole before it is cut.
    """

    def __init__(self, sizes: Sequence[int], lanes: int, window: int, *key: object) -> None:
        """Order ``sum(sizes)`` samples.

        Args:
            sizes: samples of each shard.
            lanes: how many draw from it.
            window: shards that all lanes together have open at a time.
            key: what else fixes the order: seed, pass, name.

        Raises:
            ValueError: no samples.
        """
        if sum(sizes) == 0:
            raise ValueError(f"{len(sizes)} shards hold no samples: nothing to order")
        self.ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
        self.begins = np.concatenate([[0], self.ends[:-1]])
        self.size = int(self.ends[-1])
        self.lanes = lanes
        self.window = max(1, window // lanes)
        self.whole = len(sizes) <= window and self.size <= WHOLE
        self.key = key
        self._arguments = (list(sizes), lanes, window, *key)
        # The walk is nearly always forward, so the last tables of each lane serve all look-ups.
        self._epoch = lru_cache(maxsize=2)(self._epoch_tables)
        self._cuts = lru_cache(maxsize=2 * lanes)(self._window_cuts)
        self._drawn = lru_cache(maxsize=2 * lanes)(self._window_order)

    def __reduce__(self) -> tuple[type["SourceOrder"], tuple[Any, ...]]:
        # The caches can't be pickled, which a worker process that is not forked needs.
        return SourceOrder, self._arguments

    def epoch(self, lane: int, index: int) -> int:
        """The epoch in which a lane draws its ``index``-th sample."""
        return (index * self.lanes + lane) // self.size

    def draw(self, lane: int, index: int, count: int) -> Ints:
        """(count,) numbers of the samples ``index``, ``index + 1``, ... of a lane, counted over all shards."""
        parts = []
        while count > 0:
            epoch = self.epoch(lane, index)
            first = -((lane - epoch * self.size) // self.lanes)  # the lane's first index in this epoch
            within = index - first
            cuts = self._cuts(epoch, lane)
            window = int(np.searchsorted(cuts, within, side="right")) - 1
            part = self._drawn(epoch, lane, window)[within - int(cuts[window]) :][:count]
            parts.append(part)
            index, count = index + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def locate(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Numbers counted over all shards -> shards, and samples within them."""
        shards = np.searchsorted(self.ends, numbers, side="right")
        return shards, numbers - self.begins[shards]

    def _epoch_tables(self, epoch: int) -> tuple[Ints, Ints, Ints]:
        """The order of the shards (or of all samples), their ends in that order, the lanes' starts and last end."""
        first = -((np.arange(self.lanes) - epoch * self.size) // self.lanes)
        following = -((np.arange(self.lanes) - (epoch + 1) * self.size) // self.lanes)
        starts = np.concatenate([[0], np.cumsum(following - first)])
        if self.whole:
            return permutation(self.size, *self.key, epoch), self.ends, starts
        shards = permutation(len(self.ends), *self.key, epoch)
        return shards, np.cumsum(np.diff(self.ends, prepend=0)[shards]), starts

    def _window_cuts(self, epoch: int, lane: int) -> Ints:
        """Where the windows of a lane's stretch begin, from 0, and where the last one ends."""
        _, ends, starts = self._epoch(epoch)
        start, end = starts[lane], starts[lane + 1]
        if self.whole:
            return np.array([0, end - start])
        inside = ends[np.searchsorted(ends, start, side="right") : np.searchsorted(ends, end, side="left")]
        return np.concatenate([[0], inside[self.window - 1 :: self.window] - start, [end - start]])

    def _window_order(self, epoch: int, lane: int, window: int) -> Ints:
        """The numbers of a window's samples, shuffled."""
        order, ends, starts = self._epoch(epoch)
        cuts = self._cuts(epoch, lane) + starts[lane]
        positions = np.arange(cuts[window], cuts[window + 1])
        if self.whole:
            return order[positions]
        at = np.searchsorted(ends, positions, side="right")
        numbers = self.ends[order[at]] - (ends[at] - positions)
        return numbers[permutation(len(numbers), *self.key, epoch, lane, window)]


class Schedule:
    """Which source has which turn of a lane: exactly its share in every period, spread evenly over it.

    Each lane begins elsewhere in the period, so the rows that all lanes have at a time hold the shares, too.
    A source that has had all its turns leaves; the others share what follows.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None], lane: int = 0) -> None:
        """Share turns among sources.

        Args:
            weights: of each source, above 0.
            limits: how many turns each may have; None for endlessly many.
            lane: whose turns.
        """
        phase = Fraction(lane * _GOLDEN % 2**32, 2**32)
        self._parts: list[_Part] = []
        self.total: int | None = None
        begin, before = 0, [0] * len(weights)
        left = dict(enumerate(limits))
        while left:
            part = _Part(
                begin,
                list(before),
                list(left),
                [weights[source] for source in left],
                phase,
            )
            self._parts.append(part)
            ends = {source: part.end(source, limit) for source, limit in left.items() if limit is not None}
            if not ends:
                return
            begin = min(ends.values())
            for source in list(left):
                before[source] += part.turns(source, begin - part.begin)
                if before[source] == limits[source]:
                    del left[source]
        self.total = begin

    def at(self, turn: int) -> Turn:
        """The source of a turn; after the last one, those that were left last go on, to fill a batch that was begun."""
        part = next(part for part in reversed(self._parts) if part.begin <= turn)
        return part.at(turn)


class _Part:
    """The schedule while the same sources take part."""

    def __init__(
        self, begin: int, before: list[int], sources: list[int], weights: list[float], phase: Fraction
    ) -> None:
        self.begin, self.before = begin, before
        shares = _whole_shares(weights)
        self.period = sum(shares)
        self.shift = int(phase * self.period)
        self.order, places = _spread(tuple(shares))
        self.sources = sources
        self.shares = dict(zip(sources, shares, strict=True))
        self.places = dict(zip(sources, places, strict=True))
        self.passed = {source: int(np.searchsorted(at, self.shift)) for source, at in self.places.items()}

    def at(self, turn: int) -> Turn:
        within = (turn - self.begin + self.shift) % self.period
        source = self.sources[self.order[within]]
        return Turn(source, self.before[source] + self.turns(source, turn - self.begin))

    def turns(self, source: int, count: int) -> int:
        """How many of the first ``count`` turns are the source's."""
        periods, within = divmod(count + self.shift, self.period)
        return periods * self.shares[source] + int(np.searchsorted(self.places[source], within)) - self.passed[source]

    def end(self, source: int, limit: int) -> int:
        """The turn before which the source has had ``limit`` turns."""
        periods, rank = divmod(limit - self.before[source] + self.passed[source] - 1, self.shares[source])
        return self.begin - self.shift + periods * self.period + int(self.places[source][rank]) + 1


@lru_cache(maxsize=64)
def _spread(shares: tuple[int, ...]) -> tuple[Ints, list[Ints]]:
    """Whose each turn of a period is, and the turns of each source.

    Turn i of a source's n may come from i / n of the period on and is due at (i + 1) / n. Of the turns that may come,
    the one that is due first does, which meets every due time: no source is ever a whole turn off its share.
    """
    period = sum(shares)
    jobs = sorted(
        (i * period // n, -(-(i + 1) * period // n), source) for source, n in enumerate(shares) for i in range(n)
    )
    order, waiting, job = [], list[tuple[int, int]](), iter([*jobs, (period, 0, 0)])
    released = next(job)
    for turn in range(period):
        while released[0] <= turn:
            heapq.heappush(waiting, released[1:])
            released = next(job)
        order.append(heapq.heappop(waiting)[1])
    whose = np.array(order)
    return whose, [np.flatnonzero(whose == source) for source in range(len(shares))]


def _whole_shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers of turns, in lowest terms; of PERIOD turns where they are finer than that."""
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    period = math.lcm(*((weight / total).denominator for weight in exact))
    if period > PERIOD:
        shares = [max(1, round(weight / total * PERIOD)) for weight in exact]
    else:
        shares = [int(weight / total * period) for weight in exact]
    divisor = math.gcd(*shares)
    return [share // divisor for share in shares]


class Supply(NamedTuple):
    """What the order needs to know of a source.

    Attributes:
        name: of the source, which fixes its shuffles.
        sizes: samples of each shard.
        weight: its share of the rows, relative to the others' weights.
        max_epochs: after so many it leaves the mixture; None for endlessly many.
    """

    name: str
    sizes: Sequence[int]
    weight: float
    max_epochs: int | None = None


class Order:
    """The samples of every step of a run."""

    def __init__(
        self,
        supplies: Sequence[Supply],
        seed: int,
        batch_size: int,
        *,
        lanes: int | None = None,
        window: int = 64,
        homogeneous: bool = False,
        run_pass: int = 0,
    ) -> None:
        """Order the samples of several sources.

        Args:
            supplies: the sources.
            seed: fixes all shuffles.
            batch_size: rows of a step, over all ranks.
            lanes: equal parts of a batch; by default `default_lanes`.
            window: shards of a source that are open at a time.
            homogeneous: all rows of a step come from one source; otherwise each lane mixes them.
            run_pass: number of times that the data were exchanged during the run; shuffles anew.

        Raises:
            UserError: lanes that don't divide the batch.
            ValueError: no samples.
        """
        self.batch_size = batch_size
        self.lanes = default_lanes(batch_size) if lanes is None else lanes
        if batch_size % self.lanes:
            raise UserError(f"data.lanes={self.lanes} does not divide train.batch_size={batch_size}")
        self.per_lane = batch_size // self.lanes
        self.sources = [
            SourceOrder(supply.sizes, self.lanes, window, seed, run_pass, supply.name) for supply in supplies
        ]
        # A turn is what a source gets at a time: one sample per lane, or a whole batch.
        self.turn_size = self.per_lane if homogeneous else 1
        limits = [
            None
            if supply.max_epochs is None
            # A last turn that an epoch does not fill is completed from the next one, as is a last batch.
            else -(-supply.max_epochs * source.size // (self.lanes * self.turn_size))
            for supply, source in zip(supplies, self.sources, strict=True)
        ]
        weights = [supply.weight for supply in supplies]
        if homogeneous:
            self.schedules = [Schedule(weights, limits)] * self.lanes
        else:
            self.schedules = [Schedule(weights, limits, lane) for lane in range(self.lanes)]
        turns, total = self.per_lane // self.turn_size, self.schedules[0].total
        self.steps = None if total is None else -(-total // turns)

    def slots(self, step: int, lanes: range) -> list[Slot]:
        """The rows of a step that the given lanes fill, lane after lane.

        Raises:
            IndexError: all sources have had their ``max_epochs``.
        """
        if self.steps is not None and step >= self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        turns = self.per_lane // self.turn_size
        return [
            Slot(turn.source, lane, turn.before * self.turn_size + i)
            for lane in lanes
            for turn in map(self.schedules[lane].at, range(step * turns, (step + 1) * turns))
            for i in range(self.turn_size)
        ]

    def place(self, slot: Slot) -> Place:
        """Where the sample of a slot lies."""
        source = self.sources[slot.source]
        shards, samples = source.locate(source.draw(slot.lane, slot.draw, 1))
        return Place(slot.source, source.epoch(slot.lane, slot.draw), int(shards[0]), int(samples[0]))


def default_lanes(batch_size: int) -> int:
    """As many lanes as allow every usual number of ranks (products of 2 and 3, up to 64) that divides the batch."""
    return math.gcd(batch_size, 192)

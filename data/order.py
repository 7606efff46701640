"""Which sample stands where in a run: a pure function of the seed, the sizes of the shards and the position.

A step's global batch is made of ``lanes`` equal parts. Lane ``l`` of every step is read by the same rank, and a lane
meets its own stretch of each epoch, so ranks read disjoint samples, and mostly disjoint shards. What a lane draws is
fixed by the source and by how many samples of it the lane has drawn before. Nothing here depends on how many ranks and
workers read.
"""

import hashlib
import heapq
import math
from bisect import bisect_right
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
        self._last: dict[int, tuple[int, list[int]]] = {}
        self.shard_ends: list[int] = self.ends.tolist()  # Python's numbers are faster one by one

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
            epoch, window, within = self._find(lane, index)
            part = self._drawn(epoch, lane, window)[within:][:count]
            parts.append(part)
            index, count = index + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def number(self, lane: int, index: int) -> int:
        """``draw`` of one sample, from the last window if it is in there: training asks for one after the other."""
        begin, numbers = self._last.get(lane, (0, []))
        if not begin <= index < begin + len(numbers):
            epoch, window, within = self._find(lane, index)
            numbers = self._drawn(epoch, lane, window).tolist()
            begin = index - within
            self._last[lane] = begin, numbers
        number: int = numbers[index - begin]
        return number

    def locate(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Numbers counted over all shards -> shards, and samples within them."""
        shards = np.searchsorted(self.ends, numbers, side="right")
        return shards, numbers - self.begins[shards]

    def _find(self, lane: int, index: int) -> tuple[int, int, int]:
        """Epoch, window and place within the window of a lane's ``index``-th sample."""
        epoch = self.epoch(lane, index)
        first = -((lane - epoch * self.size) // self.lanes)  # the lane's first index in this epoch
        cuts = self._cuts(epoch, lane)
        window = int(np.searchsorted(cuts, index - first, side="right")) - 1
        return epoch, window, index - first - int(cuts[window])

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
    """Which source has which turn of each lane: exactly its share in every period, spread evenly over it.

    All lanes go round the same period, each ahead of the one before it by the turns that this one has in a step. So
    the turns of all lanes in a step are a stretch of the period without gaps, which holds each source's share to within
    two turns. A source that has had all its turns leaves, all lanes at about the same time; the others share what
    follows.
    """

    def __init__(
        self, weights: Sequence[float], limits: Sequence[int | None], lanes: int = 1, turns_per_step: int = 1
    ) -> None:
        """Share turns among sources.

        Args:
            weights: of each source, above 0.
            limits: how many turns each may have in a lane; None for endlessly many.
            lanes: how many there are.
            turns_per_step: of a lane.
        """
        self.lanes = lanes
        self.total: int | None = None
        self._parts: list[_Part] = []
        begins, before = [0] * lanes, [[0] * len(weights) for _ in range(lanes)]
        left = dict(enumerate(limits))
        while left:
            part = _Part({source: weights[source] for source in left}, begins, before, turns_per_step)
            self._parts.append(part)
            limited = {source: limit for source, limit in left.items() if limit is not None}
            if not limited:
                return
            end = min(part.end(lane, source, limit) for lane in range(lanes) for source, limit in limited.items())
            before = [part.had(lane, end) for lane in range(lanes)]
            leaving = [source for source, limit in limited.items() if any(had[source] == limit for had in before)]
            # Lanes come to a source's last turn at different times. Those that are behind have theirs now.
            part.close(end, [[s for s in leaving for _ in range(had[s], limited[s])] for had in before])
            begins = part.ends
            left = {source: limit for source, limit in left.items() if source not in leaving}
        self.total = begins[0]  # a lane has as many turns as any other

    def at(self, lane: int, turn: int) -> Turn:
        """The source of a turn; after the last one, those that were left last go on, to fill a batch that was begun."""
        return next(part for part in reversed(self._parts) if part.begins[lane] <= turn).at(lane, turn)


class _Part:
    """The schedule while the same sources take part."""

    def __init__(
        self, weights: dict[int, float], begins: list[int], before: list[list[int]], turns_per_step: int
    ) -> None:
        self.begins, self.before = begins, before
        shares = _whole_shares(list(weights.values()))
        self.period = sum(shares)
        # Lanes may begin at different turns. Counted from the run's first turn, they are as far apart as ever.
        self.shifts = [(begin + lane * turns_per_step) % self.period for lane, begin in enumerate(begins)]
        self.order, places = _spread(tuple(shares))
        self.sources = list(weights)
        self.shares = dict(zip(weights, shares, strict=True))
        self.places = dict(zip(weights, places, strict=True))
        # Where the sources that leave begin to have what they have left, and what that is.
        self.closes: list[int] = []
        self.rest: list[list[int]] = [[] for _ in begins]

    def close(self, end: int, rest: list[list[int]]) -> None:
        """Let each lane end with the turns ``rest``."""
        self.closes = [max(begin, end) for begin in self.begins]
        self.rest = rest

    @property
    def ends(self) -> list[int]:
        """Where the next part begins, in each lane."""
        return [close + len(rest) for close, rest in zip(self.closes, self.rest, strict=True)]

    def at(self, lane: int, turn: int) -> Turn:
        """The source of a turn."""
        rest: list[int] = []
        if self.closes and (after := turn - self.closes[lane]) >= 0:
            turn, rest = self.closes[lane], self.rest[lane][:after]
            if after < len(self.rest[lane]):
                source = self.rest[lane][after]
                return Turn(source, self._had(lane, source, turn) + rest.count(source))
            turn += after - len(rest)
        within = (turn - self.begins[lane] + self.shifts[lane]) % self.period
        source = self.sources[self.order[within]]
        return Turn(source, self._had(lane, source, turn) + rest.count(source))

    def had(self, lane: int, turn: int) -> list[int]:
        """How many turns each source of the schedule has had before ``turn``."""
        had = list(self.before[lane])
        for source in self.sources:
            had[source] = self._had(lane, source, turn)
        return had

    def end(self, lane: int, source: int, limit: int) -> int:
        """The turn before which the source has had ``limit`` turns."""
        missing = limit - self.before[lane][source] + self._passed(source, self.shifts[lane])
        periods, rank = divmod(missing - 1, self.shares[source])
        return self.begins[lane] - self.shifts[lane] + periods * self.period + int(self.places[source][rank]) + 1

    def _had(self, lane: int, source: int, turn: int) -> int:
        shift = self.shifts[lane]
        count = self._passed(source, max(0, turn - self.begins[lane]) + shift) - self._passed(source, shift)
        return self.before[lane][source] + count

    def _passed(self, source: int, place: int) -> int:
        """How many of the first ``place`` turns of the periods are the source's."""
        periods, within = divmod(place, self.period)
        return periods * self.shares[source] + int(np.searchsorted(self.places[source], within))


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
        turns = self.per_lane // self.turn_size
        weights = [supply.weight for supply in supplies]
        self.schedule = Schedule(weights, limits, 1 if homogeneous else self.lanes, turns)
        total = self.schedule.total
        self.steps = None if total is None else -(-total // turns)

    def slots(self, step: int, lanes: range) -> list[Slot]:
        """The rows of a step that the given lanes fill, lane after lane.

        Raises:
            IndexError: all sources have had their ``max_epochs``.
        """
        if self.steps is not None and step >= self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        count = self.per_lane // self.turn_size
        slots = []
        for lane in lanes:
            # In a homogeneous step all lanes have the same source: the schedule has one lane for all.
            turns = [self.schedule.at(lane % self.schedule.lanes, step * count + turn) for turn in range(count)]
            slots += [
                Slot(turn.source, lane, turn.before * self.turn_size + i)
                for turn in turns
                for i in range(self.turn_size)
            ]
        return slots

    def place(self, slot: Slot) -> Place:
        """Where the sample of a slot lies."""
        source = self.sources[slot.source]
        number = source.number(slot.lane, slot.draw)
        shard = bisect_right(source.shard_ends, number)
        sample = number - (source.shard_ends[shard - 1] if shard else 0)
        return Place(slot.source, source.epoch(slot.lane, slot.draw), shard, sample)


def default_lanes(batch_size: int) -> int:
    """As many lanes as allow every usual number of ranks (products of 2 and 3, up to 64) that divides the batch."""
    return math.gcd(batch_size, 192)

import pickle
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

import data.order
from data.errors import UserError
from data.order import PERIOD, Order, Place, Schedule, Slot, SourceOrder, Supply, default_lanes, permutation

SIZES = [3, 0, 5, 1, 4, 2, 6, 0, 3, 2]  # 26 samples, two shards without any

PERMUTATION = [3, 7, 2, 0, 5, 6, 4, 1]
WINDOWED = [
    [4, 2, 0, 1, 3, 16, 17, 14, 15, 4, 15, 14, 16, 3, 17, 2, 0, 1],
    [6, 10, 5, 13, 12, 7, 9, 8, 11, 7, 6, 5, 8, 13, 9, 11, 10, 12],
]
WHOLE = [[0, 1, 12, 8, 10, 4, 13, 3, 2, 6], [5, 17, 7, 11, 15, 14, 16, 6, 9, 8]]
MIXED = [
    *((0, 0, 0, 0), (0, 0, 0, 2), (0, 0, 0, 1), (1, 0, 1, 1)),
    *((0, 0, 2, 2), (0, 0, 2, 3), (0, 0, 2, 0), (1, 0, 1, 0)),
    *((0, 0, 1, 1), (0, 0, 1, 0), (0, 1, 1, 1), (1, 0, 0, 0)),
    *((0, 0, 2, 1), (0, 1, 0, 2), (0, 1, 2, 2), (1, 1, 1, 0)),
]


def walk(order: SourceOrder, lane: int, count: int) -> list[int]:
    """The first ``count`` samples of a lane, one by one."""
    return [int(order.draw(lane, index, 1)[0]) for index in range(count)]


def epoch(order: SourceOrder, number: int) -> list[list[int]]:
    """The samples that each lane draws in an epoch, found position by position."""
    lanes: list[list[int]] = [[] for _ in range(order.lanes)]
    for position in range(number * order.size, (number + 1) * order.size):
        index, lane = divmod(position, order.lanes)
        assert order.epoch(lane, index) == number
        lanes[lane].append(int(order.draw(lane, index, 1)[0]))
    return lanes


def flat(lanes: list[list[int]]) -> list[int]:
    return [sample for lane in lanes for sample in lane]


# --- One source


@pytest.mark.parametrize("window", [1, 2, 5, 10, 50])  # from 10 on the whole source is shuffled at once
@pytest.mark.parametrize("lanes", [1, 2, 3, 8, 26, 64])
def test_each_epoch_has_every_sample_exactly_once_for_all_lanes_together(lanes: int, window: int) -> None:
    for sizes in (SIZES, [1], [7], [5] * 12, [1, 40], [0, 0, 13, 0]):
        order = SourceOrder(sizes, lanes, window, 0)
        for number in range(4):
            assert sorted(flat(epoch(order, number))) == list(range(sum(sizes)))


@pytest.mark.parametrize(("lanes", "window"), [(1, 3), (3, 3), (4, 8), (3, 20), (40, 3)])
def test_lanes_draw_equally_many_and_epochs_follow_each_other(lanes: int, window: int) -> None:
    order = SourceOrder(SIZES, lanes, window, 0)
    for lane in range(lanes):
        epochs = [order.epoch(lane, index) for index in range(60)]
        assert epochs == [(index * lanes + lane) // 26 for index in range(60)]
    for number in range(3):
        assert {len(lane) for lane in epoch(order, number)} <= {26 // lanes, -(-26 // lanes)}


@pytest.mark.parametrize("lanes", [1, 3, 40])
@pytest.mark.parametrize("window", [1, 4, 20])
def test_a_sample_is_found_without_walking_there(lanes: int, window: int) -> None:
    order = SourceOrder(SIZES, lanes, window, 5)
    walked = {lane: walk(order, lane, 70) for lane in range(lanes)}
    jumping = SourceOrder(SIZES, lanes, window, 5)
    places = [(lane, index) for lane in range(lanes) for index in range(70)]
    for lane, index in random.Random(0).choices(places, k=200):
        assert int(jumping.draw(lane, index, 1)[0]) == walked[lane][index]
    assert int(SourceOrder(SIZES, lanes, window, 5).draw(lanes - 1, 69, 1)[0]) == walked[lanes - 1][69]


@pytest.mark.parametrize("lanes", [1, 3, 40])
@pytest.mark.parametrize("window", [1, 4, 20])
@pytest.mark.parametrize("count", [1, 2, 7, 69])
def test_many_samples_at_once_are_those_one_by_one(lanes: int, window: int, count: int) -> None:
    order = SourceOrder(SIZES, lanes, window, 5)
    for lane in range(min(lanes, 4)):
        walked = walk(order, lane, 150)
        for first in (0, 3, 26, 81):
            assert order.draw(lane, first, count).tolist() == walked[first : first + count]


@pytest.mark.parametrize("window", [3, 10])
def test_epochs_and_keys_differ_and_are_shuffled(window: int) -> None:
    keys = [(0,), (1,), (0, 0), (0, "a"), (0, "b")]
    sequences = [tuple(flat(epoch(SourceOrder(SIZES, 2, window, *key), number))) for key in keys for number in range(3)]
    assert len({*sequences, tuple(range(26))}) == 16


@pytest.mark.parametrize(("sizes", "window"), [([2, 2], 2), ([2, 2], 1), ([1, 1, 1, 1], 2)])
def test_the_first_sample_of_a_lane_is_any_sample_equally_often(sizes: list[int], window: int) -> None:
    for lanes in (1, 2):
        counts = Counter(walk(SourceOrder(sizes, lanes, window, seed), lanes - 1, 1)[0] for seed in range(800))
        assert sorted(counts) == [0, 1, 2, 3]
        assert max(abs(count - 200) for count in counts.values()) < 60


def test_few_shards_are_shuffled_as_a_whole_and_many_are_cut_first(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [50] * 8

    def shards_per_lane(window: int) -> list[int]:
        order = SourceOrder(sizes, 4, window, 0)
        return [len({sample // 50 for sample in lane}) for lane in epoch(order, 0)]

    assert shards_per_lane(window=8) == [8, 8, 8, 8]
    assert shards_per_lane(window=7) == [2, 2, 2, 2]
    monkeypatch.setattr(data.order, "WHOLE", 399)  # few shards, but of too many samples for one table
    assert shards_per_lane(window=8) == [2, 2, 2, 2]


def test_a_whole_shuffle_mixes_all_positions() -> None:
    sequence = flat(epoch(SourceOrder([500, 500], 1, 64, 0), 0))
    assert abs(float(np.corrcoef(np.arange(1000), sequence)[0, 1])) < 0.1
    shards = [sample // 500 for sample in sequence]
    assert 400 < sum(a != b for a, b in pairwise(shards)) < 600


@pytest.mark.parametrize("lanes", [2, 7, 16])
def test_a_lane_reads_its_own_stretch_of_the_shards(lanes: int) -> None:
    # Nodes then have disjoint shards in their page caches, and each downloads only its own.
    shards = 100
    order = SourceOrder([10] * shards, lanes, 4, 0)
    stretches = []
    for number in range(3):
        touched = [{sample // 10 for sample in lane} for lane in epoch(order, number)]
        assert max(map(len, touched)) <= -(-shards // lanes) + 1
        for a in range(lanes):
            for b in range(a):
                # Only neighbours meet, in the shard that the cut goes through.
                assert len(touched[a] & touched[b]) <= (a - b == 1)
        stretches.append(touched[0])
    assert stretches[0] != stretches[1] != stretches[2]


@pytest.mark.parametrize(
    ("lanes", "window", "each"), [(1, 3, 3), (2, 6, 3), (2, 7, 3), (4, 4, 1), (4, 3, 1), (3, 9, 3)]
)
def test_a_lane_has_only_its_part_of_the_window_open(lanes: int, window: int, each: int) -> None:
    rng = random.Random(1)
    sizes = [rng.choice([0, 1, 5, 9, 30]) for _ in range(40)]
    order = SourceOrder(sizes, lanes, window, 0)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    widest = 0
    for lane in epoch(order, 1):
        shards = [int(shard_of[sample]) for sample in lane]
        first = {shard: i for i, shard in reversed(list(enumerate(shards)))}
        last = {shard: i for i, shard in enumerate(shards)}
        begun = [sum(first[s] <= i <= last[s] for s in first) for i in range(len(shards))]
        assert max(begun) <= each
        widest = max(widest, *begun)
    assert widest == each


def test_the_shards_of_a_window_are_mixed() -> None:
    order = SourceOrder([20] * 12, 2, 6, 1)
    for lane in epoch(order, 0):
        shards = [sample // 20 for sample in lane]
        for start in (0, 60):
            window = shards[start : start + 60]
            assert len(set(window)) == 3
            assert sum(a != b for a, b in pairwise(window)) > 25  # 40 are expected
        assert len(set(shards)) == 6


def test_numbers_are_located_in_shards_that_have_samples() -> None:
    order = SourceOrder(SIZES, 1, 3, 0)
    shards, samples = order.locate(np.arange(26))
    expected = [(shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)]
    assert list(zip(shards.tolist(), samples.tolist(), strict=True)) == expected


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_nothing_to_order_is_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{len(sizes)} shards hold no samples"):
        SourceOrder(sizes, 1, 1)


def test_every_word_of_the_key_counts() -> None:
    keys = [(), (1,), (0, 1), (0, 0, 1), (0, 0, 0, 1), (1, 1), (2**32 - 1,), (0, 2**32 - 1), ("1",), (11,)]
    assert len({tuple(permutation(50, *key).tolist()) for key in keys}) == len(keys)
    assert sorted(permutation(50, 3).tolist()) == list(range(50))


# --- The schedule


def turns(schedule: Schedule, start: int, stop: int, lane: int = 0) -> list[int]:
    return [schedule.at(lane, turn).source for turn in range(start, stop)]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((1.0,), (1,)),
        ((3, 1), (3, 1)),
        ((6, 2), (3, 1)),
        ((0.5, 0.3, 0.2), (5, 3, 2)),
        ((1 / 3, 2 / 3), (1, 2)),
        ((0.1, 0.1, 0.1, 0.7), (1, 1, 1, 7)),
        ((0.1, 0.1, 0.3), (1, 1, 3)),
        ((1, 1, 1, 1, 1), (1, 1, 1, 1, 1)),
        ((0.999, 0.001), (999, 1)),
        ((1e-9, 3e-9), (1, 3)),
        ((3291, 26), (3291, 26)),
    ],
)
def test_each_period_has_exactly_the_shares(weights: Sequence[float], shares: Sequence[int]) -> None:
    schedule = Schedule(weights, [None] * len(weights))
    period = sum(shares)
    for start in (0, period, 7 * period, 10**6 * period):
        counts = Counter(turns(schedule, start, start + period))
        assert [counts[source] for source in range(len(weights))] == list(shares)
    for turn in range(period):
        source, before = schedule.at(0, turn)
        assert schedule.at(0, turn + 10**6 * period) == (source, before + 10**6 * shares[source])
    assert schedule.total is None

    # A step of all lanes is a stretch of it.
    lanes = Schedule(weights, [None] * len(weights), 7, 4)
    for step in (0, 1, 1000):
        rows = [source for lane in range(7) for source in turns(lanes, 4 * step, 4 * step + 4, lane)]
        assert rows == turns(schedule, 4 * step, 4 * step + 28)


@pytest.mark.parametrize(
    "weights",
    [
        *((3, 1), (0.5, 0.3, 0.2), (1 / 3, 2 / 3), (99, 1), (50, 49, 1), (17, 13, 11), (1,) * 20, (9, 1, 1, 1)),
        *((20, 5, 5, 5, 5), (100,) + (1,) * 100, (60, 1, 2, 3, 5, 7, 11, 13)),
    ],
)
def test_no_prefix_strays_far_from_the_shares(weights: Sequence[float]) -> None:
    shares = np.array(weights) / sum(weights)
    sequence = turns(Schedule(weights, [None] * len(weights)), 0, 2 * round(sum(weights) / min(weights)))
    counts = np.zeros(len(weights))
    for turn, source in enumerate(sequence, 1):
        counts[source] += 1
        assert (np.abs(counts - turn * shares) < 1).all(), (turn, counts)


LIMITED = [
    ((3, 1), (None, None)),
    ((3, 1), (30, None)),
    ((3, 1), (30, 30)),
    ((3, 1), (30, 10)),  # both end at once
    ((1, 1, 1), (5, 11, 17)),
    ((0.5, 0.3, 0.2), (1, None, 40)),
    ((0.5, 0.3, 0.2), (7, 7, 7)),
    ((1.0,), (1,)),
    ((2, 3, 5, 7), (100, 1, None, 33)),
]


LANES = [0, 1, 3, 63]  # of 64, each of which begins elsewhere in the period


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("weights", "limits"), LIMITED)
def test_a_turn_knows_how_many_its_source_had_before(
    weights: Sequence[float], limits: Sequence[int | None], lane: int
) -> None:
    schedule = Schedule(weights, limits, 64, 3)
    before: Counter[int] = Counter()
    for turn in range(300 if schedule.total is None else schedule.total + 50):
        source, so_far = schedule.at(lane, turn)
        assert so_far == before[source]
        before[source] += 1

    # Far away nothing is lost either: before turn t, all sources together have had t.
    had: dict[int, int] = {}
    for turn in range(10**9, 10**9 + 300):
        source, so_far = schedule.at(lane, turn)
        assert had.setdefault(source, so_far) == so_far
        had[source] += 1
    assert sum(had.values()) + sum(limit or 0 for i, limit in enumerate(limits) if i not in had) == 10**9 + 300


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("weights", "limits"), LIMITED)
def test_limits_are_kept_exactly_and_the_others_share_what_follows(
    weights: Sequence[float], limits: Sequence[int | None], lane: int
) -> None:
    schedule = Schedule(weights, limits, 64, 3)
    if None in limits:
        assert schedule.total is None
    else:
        assert schedule.total == sum(limit for limit in limits if limit is not None)
    sequence = turns(schedule, 0, schedule.total or 3000, lane)
    counts = Counter(sequence)
    for source, limit in enumerate(limits):
        assert counts[source] == limit or limit is None

    # While the same sources take part, their turns are in proportion.
    last = {source: turn for turn, source in enumerate(sequence)}
    ends = sorted({last[source] + 1 for source, limit in enumerate(limits) if limit is not None} | {len(sequence)})
    for start, stop in pairwise([0, *ends]):
        left = [source for source in counts if last[source] >= start]
        part = Counter(sequence[start:stop])
        share = (stop - start) / sum(weights[source] for source in left)
        assert set(part) <= set(left)
        for source in left:
            assert abs(part[source] - share * weights[source]) < 2  # less than one at either end

    # Those that were left last go on for as long as a batch that was begun needs turns, still in proportion.
    filling = Counter(turns(schedule, len(sequence), len(sequence) + 60, lane))
    assert set(filling) == set(left)
    for source in left:
        assert abs(filling[source] - 60 * weights[source] / sum(weights[each] for each in left)) < 2


@pytest.mark.parametrize("weights", [(1_000_003, 499_979, 99_991), (10**7, 7), (1.0, 1 / 7, 1e-9), (2**0.5, 1)])
def test_weights_finer_than_the_period_are_rounded_but_none_is_lost(weights: Sequence[float]) -> None:
    counts = Counter(turns(Schedule(weights, [None] * len(weights)), 0, 2 * PERIOD))
    for source, weight in enumerate(weights):
        assert counts[source] > 0
        assert counts[source] / (2 * PERIOD) == pytest.approx(weight / sum(weights), abs=2 / PERIOD)


def test_many_sources_leave_one_after_another() -> None:
    limits = list(range(1, 13))
    schedule = Schedule([limit + 0.123456789 for limit in limits], limits[::-1])
    assert schedule.total == sum(limits)
    assert Counter(turns(schedule, 0, schedule.total)) == dict(enumerate(limits[::-1]))


# --- Whole batches


def supplies(*weights: float, max_epochs: Sequence[int | None] | None = None) -> list[Supply]:
    """Sources named a, b, ... of 26 samples, 30, 34 ..."""
    epochs = max_epochs or [None] * len(weights)
    return [Supply("abcdef"[i], [*SIZES, 4 * i], weight, epochs[i]) for i, weight in enumerate(weights)]


def places(order: Order, steps: int) -> list[Place]:
    return [order.place(slot) for step in range(steps) for slot in order.slots(step, range(order.lanes))]


@pytest.mark.parametrize("homogeneous", [False, True])
def test_the_slots_of_the_ranks_are_those_of_one_process(homogeneous: bool) -> None:
    order = Order(supplies(3, 1), 0, 48, lanes=12, homogeneous=homogeneous)
    for step in range(6):
        whole = order.slots(step, range(12))
        assert len(whole) == 48
        assert [slot.lane for slot in whole] == [row // 4 for row in range(48)]
        for world in (1, 2, 3, 4, 6, 12):
            ranks = [order.slots(step, range(rank * 12 // world, (rank + 1) * 12 // world)) for rank in range(world)]
            assert {len(rank) for rank in ranks} == {48 // world}
            assert [slot for rank in ranks for slot in rank] == whole


def test_the_order_does_not_depend_on_what_was_asked_before() -> None:
    walked = places(Order(supplies(3, 1), 5, 24, lanes=4, window=3), 20)
    order = Order(supplies(3, 1), 5, 24, lanes=4, window=3)
    for step in random.Random(0).sample(range(20), 20):
        assert [order.place(slot) for slot in order.slots(step, range(4))] == walked[24 * step : 24 * (step + 1)]


@pytest.mark.parametrize("homogeneous", [False, True])
def test_a_lane_draws_a_source_without_gaps(homogeneous: bool) -> None:
    # What was drawn before is what the next slot counts on: a gap would lose samples, an overlap repeat them.
    order = Order(supplies(0.5, 0.3, 0.2), 0, 24, lanes=4, homogeneous=homogeneous)
    drawn: Counter[tuple[int, int]] = Counter()
    for step in range(40):
        for slot in order.slots(step, range(4)):
            assert slot.draw == drawn[slot.source, slot.lane]
            drawn[slot.source, slot.lane] += 1


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_every_sample_comes_once_per_epoch_of_its_source(lanes: int, homogeneous: bool) -> None:
    order = Order(supplies(3, 1), 0, 16, lanes=lanes, window=4, homogeneous=homogeneous)
    seen = Counter(places(order, 60))
    assert set(seen.values()) == {1}
    for source, size in ((0, 26), (1, 30)):
        by_epoch = Counter(place.epoch for place in seen if place.source == source)
        assert [by_epoch[number] for number in range(3)] == [size] * 3
        assert max(by_epoch.values()) == size


def test_mixed_batches_have_the_share_of_each_source_in_each_lane() -> None:
    order = Order(supplies(0.5, 0.3, 0.2), 0, 80, lanes=4)
    for step in range(5):
        for lane in range(4):
            counts = Counter(slot.source for slot in order.slots(step, range(lane, lane + 1)))
            assert counts == {0: 10, 1: 6, 2: 4}


@pytest.mark.parametrize("batch", [64, 128, 192, 256, 1000])
@pytest.mark.parametrize("weights", [(9, 1), (0.5, 0.3, 0.2), (1, 1, 1, 1, 1)])
def test_every_mixed_batch_has_its_share_of_all_sources(batch: int, weights: tuple[float, ...]) -> None:
    order = Order(supplies(*weights), 0, batch)
    for step in range(60):
        counts = Counter(slot.source for slot in order.slots(step, range(order.lanes)))
        for source, weight in enumerate(weights):
            assert abs(counts[source] - batch * weight / sum(weights)) < 1  # row


@pytest.mark.parametrize("trial", range(30))
def test_no_mixed_batch_strays_two_rows_from_the_shares(trial: int) -> None:
    random = np.random.default_rng(trial)
    weights = random.integers(1, 10 ** random.integers(1, 4), random.integers(2, 7)).tolist()
    batch = int(random.choice([8, 60, 96, 384, 1000]))
    order = Order(supplies(*weights), 0, batch)
    for step in range(60):
        counts = Counter(slot.source for slot in order.slots(step, range(order.lanes)))
        for source, weight in enumerate(weights):
            assert abs(counts[source] - batch * weight / sum(weights)) < 2


@pytest.mark.parametrize("trial", range(30))
def test_when_a_source_has_left_batches_hold_the_shares_of_the_others(trial: int) -> None:
    random = np.random.default_rng(trial)
    weights = random.integers(1, 30, 4).tolist()
    batch = int(random.choice([8, 60, 64, 192, 384]))
    made = [Supply("abcd"[i], [64 * batch], float(weight)) for i, weight in enumerate(weights)]
    made[0] = made[0]._replace(sizes=[int(random.integers(1, 20)) * batch // 3], max_epochs=1)
    made[1] = made[1]._replace(sizes=[int(random.integers(20, 30)) * batch // 3], max_epochs=1)
    order = Order(made, 0, batch)
    steps = [Counter(slot.source for slot in order.slots(step, range(order.lanes))) for step in range(200)]
    last = max(step for step, counts in enumerate(steps) if counts[0] or counts[1])
    assert last < 190
    for counts in steps[last + 1 :]:
        for source in (2, 3):
            assert abs(counts[source] - batch * weights[source] / sum(weights[2:])) < 2


def test_many_limited_sources_take_little_time_and_memory() -> None:
    # They end at nearly the same turn, in another order in each lane.
    made = [Supply(f"s{i}", [1000 + i] * 20, 20.0 * (1000 + i), 3) for i in range(12)]
    began = time.process_time()
    order = Order(made, 0, 384)
    assert time.process_time() - began < 2  # 0.05 s; a table for each lane took 4
    assert len(pickle.dumps(order)) < 5_000_000
    assert order.steps is not None
    assert order.steps * 384 - 60 * sum(1000 + i for i in range(12)) < 12 * 192 + 384  # part of a turn each, of a step


def test_shares_that_a_batch_cant_have_come_out_even_over_several() -> None:
    order = Order(supplies(0.5, 0.3, 0.2), 0, 16, lanes=4)  # 4 turns a step, and a period of 10
    for lane in range(4):
        counts = Counter(slot.source for step in range(5) for slot in order.slots(step, range(lane, lane + 1)))
        assert counts == {0: 10, 1: 6, 2: 4}


def test_homogeneous_batches_have_one_source_and_its_share_of_the_steps() -> None:
    order = Order(supplies(0.5, 0.3, 0.2), 0, 16, lanes=4, homogeneous=True)
    sources = [{slot.source for slot in order.slots(step, range(4))} for step in range(30)]
    assert {len(source) for source in sources} == {1}
    assert Counter(source.pop() for source in sources) == {0: 15, 1: 9, 2: 6}


def test_what_a_source_gives_does_not_depend_on_the_others() -> None:
    alone = places(Order(supplies(1), 0, 16, lanes=4), 6)
    mixed = [place for place in places(Order(supplies(1, 1), 0, 16, lanes=4), 12) if place.source == 0]
    assert sorted(mixed) == sorted(alone)


def test_seed_pass_and_name_shuffle_anew() -> None:
    def first(seed: int = 0, name: str = "a", run_pass: int = 0, window: int = 4) -> tuple[Place, ...]:
        return tuple(places(Order([Supply(name, SIZES, 1.0)], seed, 8, lanes=2, window=window, run_pass=run_pass), 3))

    others = [first(seed=1), first(name="b"), first(run_pass=1), first(seed=1, run_pass=1), first(window=6)]
    assert len({first(), *others}) == 6
    assert first() == first(window=5)  # 4 and 5 are 2 shards for each of two lanes


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("lanes", [1, 2, 8])
@pytest.mark.parametrize("epochs", [(1,), (2,), (2, 1), (1, 3, 2)])
def test_max_epochs_gives_every_sample_so_often(epochs: tuple[int, ...], lanes: int, homogeneous: bool) -> None:
    batch = 16
    weights = (3.0, 1.0, 2.0)[: len(epochs)]
    order = Order(supplies(*weights, max_epochs=epochs), 0, batch, lanes=lanes, window=4, homogeneous=homogeneous)
    assert order.steps is not None
    seen = places(order, order.steps)
    assert len(seen) == order.steps * batch
    turn = batch if homogeneous else lanes  # rows that a source has at a time
    due = [limit * (26 + 4 * source) for source, limit in enumerate(epochs)]
    taken = [-(-rows // turn) * turn for rows in due]  # a last turn is completed from the next epoch
    filled = len(seen) - sum(taken)  # and so is the last batch
    assert 0 <= filled <= batch - turn
    for source, limit in enumerate(epochs):
        counts = Counter((place.shard, place.sample) for place in seen if place.source == source)
        assert len(counts) == 26 + 4 * source
        assert set(counts.values()) <= {limit, limit + 1}
        assert taken[source] - due[source] <= counts.total() - due[source] <= taken[source] - due[source] + filled
        by_epoch = Counter(place.epoch for place in seen if place.source == source)
        assert [by_epoch[number] for number in range(limit)] == [26 + 4 * source] * limit
        assert by_epoch[limit] == counts.total() - due[source] < batch
    for step in (order.steps, order.steps + 1, 10**9):
        with pytest.raises(IndexError, match=f"^step {step} of {order.steps}$"):
            order.slots(step, range(lanes))


def test_the_last_batch_is_filled_by_those_that_were_left_last() -> None:
    order = Order(supplies(1, 1, max_epochs=[2, 1]), 0, 16, lanes=4)
    assert order.steps == 6  # 52 and 30 rows are 13 and 8 turns of the four lanes, of which a step has 4
    assert Counter(place.source for place in places_of(order, 4)) == {0: 16}
    assert [(place.source, place.epoch >= 2) for place in places_of(order, 5)] == 4 * [(0, False), *3 * [(0, True)]]


def test_the_steps_are_those_that_the_samples_begin() -> None:
    def steps(*epochs: int | None, homogeneous: bool = False, more: int = 0) -> int | None:
        made = [Supply("ab"[i], [10, 6, more], 1.0, limit) for i, limit in enumerate(epochs)]
        return Order(made, 0, 8, lanes=4, homogeneous=homogeneous).steps

    assert steps(1) == 2
    assert steps(3) == 6
    assert steps(1, 2) == 6
    assert steps(1, 2, homogeneous=True) == 6
    assert steps(1, more=1) == 3
    assert steps(1, more=1, homogeneous=True) == 3
    assert steps(1, more=8) == 3
    assert steps(1, 1, more=1) == 5  # 2 times 5 turns of 4 rows
    assert steps(1, 1, more=1, homogeneous=True) == 6
    assert steps(1, None) is None
    assert steps(None) is None


def test_when_a_source_leaves_the_others_go_on() -> None:
    order = Order(supplies(1, 1, max_epochs=[1, None]), 0, 4, lanes=2)
    sources = [Counter(place.source for place in places_of(order, step)) for step in range(40)]
    assert sources[:12] == [Counter({0: 2, 1: 2})] * 12
    assert sources[13:] == [Counter({1: 4})] * 27  # 26 samples are 13 turns of the two lanes
    assert sum(counts[0] for counts in sources) == 26


def places_of(order: Order, step: int) -> list[Place]:
    return [order.place(slot) for slot in order.slots(step, range(order.lanes))]


@pytest.mark.parametrize(("batch", "lanes"), [(128, 64), (96, 96), (100, 4), (7, 1), (4096, 64), (1536, 192)])
def test_default_lanes_suit_every_usual_number_of_ranks(batch: int, lanes: int) -> None:
    assert default_lanes(batch) == Order(supplies(1), 0, batch).lanes == lanes
    for world in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        assert batch % world or lanes % world == 0


def test_lanes_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.lanes=5 does not divide train\.batch_size=16"):
        Order(supplies(1), 0, 16, lanes=5)


def test_it_travels_to_another_process() -> None:
    # Where worker processes are not forked (macOS, Windows, Python 3.14), the order is pickled.
    order = Order(supplies(3, 1), 5, 24, lanes=4, window=3)
    fresh = len(pickle.dumps(order))
    walked = places(order, 10)
    pickled = pickle.dumps(order)
    assert len(pickled) == fresh  # without the tables of what was read
    assert places(pickle.loads(pickled), 10) == walked  # noqa: S301


def test_the_order_never_changes() -> None:
    # Checkpoints rely on it: if this fails, runs that are resumed see other samples than before.
    assert permutation(8, 7, 1, 2).tolist() == PERMUTATION
    windowed = SourceOrder([3, 2, 4, 5, 4], 2, 4, 7, 0, "train")
    assert [windowed.draw(lane, 0, 18).tolist() for lane in range(2)] == WINDOWED
    whole = SourceOrder([3, 2, 4, 5, 4], 2, 5, 7, 0, "train")
    assert [whole.draw(lane, 0, 10).tolist() for lane in range(2)] == WHOLE
    order = Order([Supply("a", [3, 2, 4], 3.0), Supply("b", [1, 2], 1.0)], 7, 8, lanes=2, window=2)
    assert places(order, 2) == [Place(*place) for place in MIXED]
    assert order.slots(1, range(1, 2))[0] == Slot(0, 1, 3)


LARGE = """
import time
import numpy as np
from data.order import SourceOrder

def peak():
    with open("/proc/self/status") as status:  # unlike ru_maxrss, not that of the parent
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

missing = np.ones(10_000_000, dtype=bool)
before, began = peak(), time.process_time()
order = SourceOrder([1000] * 10_000, 64, 64, 0, 0, "web")
for index in range(0, 156_250, 64):
    for lane in range(64):
        missing[order.draw(lane, index, min(64, 156_250 - index))] = False
print(missing.sum(), peak() - before, time.process_time() - began)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_million_samples_are_ordered_in_little_memory() -> None:
    # A table of all samples would take 80 MB; 5 MB and 1 s are usual.
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True, timeout=60)
    missing, kilobytes, seconds = done.stdout.split()
    assert int(missing) == 0
    assert int(kilobytes) < 64_000
    assert float(seconds) < 10

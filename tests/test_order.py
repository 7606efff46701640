import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from data.order import Order, Place, permutation

SIZES = [3, 0, 5, 1, 4, 2, 6, 0, 3, 2]  # 26 samples, two shards without any
EPOCH = [(shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)]


PERMUTATION = [6, 4, 7, 5, 1, 0, 3, 2]
GOLDEN = [
    *((0, 2, 1), (0, 1, 1), (0, 2, 0), (0, 2, 3), (0, 2, 2), (0, 1, 0), (0, 0, 0), (0, 0, 1), (0, 0, 2)),
    *((1, 0, 2), (1, 1, 1), (1, 1, 0), (1, 0, 0), (1, 0, 1), (1, 2, 1), (1, 2, 0), (1, 2, 3), (1, 2, 2)),
]


def walk(order: Order, start: int, stop: int) -> list[Place]:
    return [order.at(position) for position in range(start, stop)]


@pytest.mark.parametrize("window", [1, 2, 3, 8, 10, 50])
@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_each_epoch_has_every_sample_exactly_once(window: int, seed: int) -> None:
    order = Order(SIZES, seed, window)
    assert order.epoch_size == 26
    for epoch in range(4):
        places = walk(order, 26 * epoch, 26 * (epoch + 1))
        assert {place.epoch for place in places} == {epoch}
        assert sorted((place.shard, place.sample) for place in places) == EPOCH


def test_epochs_and_seeds_differ_and_are_shuffled() -> None:
    sequences = [
        tuple((place.shard, place.sample) for place in walk(Order(SIZES, seed, 3), 26 * epoch, 26 * (epoch + 1)))
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len({*sequences, tuple(EPOCH)}) == 10


def test_a_position_is_found_without_walking_there() -> None:
    walked = walk(Order(SIZES, 5, 3), 0, 150)
    jumping = Order(SIZES, 5, 3)
    for position in np.random.default_rng(0).permutation(150).tolist():
        assert jumping.at(position) == walked[position]
    assert Order(SIZES, 5, 3).at(149) == walked[149]


def test_a_window_has_its_number_of_shards_and_they_are_mixed() -> None:
    sizes = [20] * 7
    order = Order(sizes, 1, window=3)
    windows = [{place.shard for place in walk(order, start, stop)} for start, stop in ((0, 60), (60, 120), (120, 140))]
    assert [len(shards) for shards in windows] == [3, 3, 1]
    assert set.union(*windows) == set(range(7))
    neighbours = [place.shard for place in walk(order, 0, 60)]
    assert sum(a != b for a, b in pairwise(neighbours)) > 25  # 40 are expected
    assert windows[0] != {place.shard for place in walk(order, 140, 200)}  # the next epoch has other windows


def test_the_first_sample_is_any_sample_equally_often() -> None:
    counts = Counter((place.shard, place.sample) for place in (Order([2, 2], seed, 1).at(0) for seed in range(800)))
    assert set(counts) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert max(abs(count - 200) for count in counts.values()) < 60


def test_the_order_never_changes() -> None:
    # Checkpoints rely on it: if this fails, runs that are resumed see other samples than before.
    assert permutation(8, 7, 1, 2).tolist() == PERMUTATION
    assert walk(Order([3, 2, 4], seed=7, window=2), 0, 18) == [Place(*place) for place in GOLDEN]


def test_every_word_of_the_key_counts() -> None:
    keys = [(), (1,), (0, 1), (0, 0, 1), (0, 0, 0, 1), (1, 1), (2**32 - 1,), (0, 2**32 - 1)]
    assert len({tuple(permutation(50, *key).tolist()) for key in keys}) == len(keys)
    assert sorted(permutation(50, 3).tolist()) == list(range(50))


def test_sizes_of_shards_matter_but_not_what_is_asked_before() -> None:
    order = Order([4, 4], 0, 2)
    before = order.at(3)
    walk(order, 0, 400)
    assert order.at(3) == before


def test_it_travels_to_another_process() -> None:
    # Where worker processes are not forked (macOS, Windows, Python 3.14), the order is pickled.
    order = Order(SIZES, 5, 3)
    order.at(40)
    copy = pickle.loads(pickle.dumps(order))  # noqa: S301
    assert walk(copy, 0, 60) == walk(order, 0, 60)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_nothing_to_order_is_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{len(sizes)} shards hold no samples"):
        Order(sizes, 0)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_share_a_stream_with_others_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed}: allowed are 0 .. "):
        Order([1], seed)


@pytest.mark.parametrize("window", [0, -1])
def test_windows_without_a_shard_are_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"window={window}"):
        Order([1], 0, window)


def test_negative_positions_are_refused() -> None:
    with pytest.raises(ValueError):
        Order([3], 0).at(-1)

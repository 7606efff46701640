"""Memory that is lent again: never while anything can still see it."""

import gc
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch

from data.memory import KEPT, SMALLEST, _left, lend


def address(array: Any) -> int:
    return int(array.ctypes.data)


@pytest.mark.parametrize(
    "derive",
    [
        lambda lent: lent[5:],
        lambda lent: lent.reshape(3, -1)[1],
        lambda lent: lent.view(np.int16)[::7],
        lambda lent: lent.reshape(3, -1).T[4],
        torch.from_numpy,
        lambda lent: torch.from_numpy(lent)[5:].view(torch.int8),
        lambda lent: torch.from_numpy(lent[8:]).view(torch.float64)[1:].numpy(),
        lambda lent: memoryview(lent)[3:],
        lambda lent: torch.from_numpy(lent).untyped_storage(),
    ],
)
def test_memory_is_lent_again_only_when_nothing_refers_to_it(derive: Any) -> None:
    size = 3 << 20
    lent = lend(size)
    begin, derived = address(lent), derive(lent)
    del lent
    others = [lend(size) for _ in range(2 * KEPT)]
    assert begin not in map(address, others)
    del derived
    gc.collect()
    assert address(lend(size - 1000)) == begin


def test_only_so_many_pieces_are_kept() -> None:
    size = 5 << 20
    pieces = [lend(size) for _ in range(3 * KEPT)]
    begins = set(map(address, pieces))
    del pieces
    gc.collect()
    kept = {address(owner) for owner in _left[(size - 1).bit_length()]}
    assert len(kept) == KEPT
    assert kept <= begins
    held = [lend(size) for _ in range(3 * KEPT)]
    assert kept <= set(map(address, held))
    assert lend(SMALLEST - 1).base is None  # such pieces are not lent


def test_threads_never_get_the_same_piece() -> None:
    failures: list[str] = []

    def work(mark: int) -> None:
        choose = random.Random(mark)
        for _ in range(300):
            pieces = [lend(choose.choice([SMALLEST, 70_000, 100_000])) for _ in range(choose.randint(1, 5))]
            for piece in pieces:
                piece[:] = mark
            if any((piece != mark).any() for piece in pieces):
                failures.append(f"{mark}: overwritten")

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_piece_is_writable_and_of_the_size_asked_for() -> None:
    for size in (0, 1, SMALLEST - 1, SMALLEST, SMALLEST + 1, 1 << 20):
        piece = lend(size)
        assert piece.shape == (size,)
        piece[:] = 7

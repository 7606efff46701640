"""Memory that is used again: fresh pages cost more than what is written on them."""

import weakref
from collections import defaultdict, deque

import numpy as np
import numpy.typing as npt

SMALLEST = 1 << 16
"""Bytes below which malloc keeps memory at hand itself."""
KEPT = 4
"""Pieces of about one size that are kept; more are freed."""

# Pieces that nobody uses, by the power of two that they have room for.
_left: defaultdict[int, deque[npt.NDArray[np.uint8]]] = defaultdict(lambda: deque(maxlen=KEPT))


def lend(size: int) -> npt.NDArray[np.uint8]:
    """(size,) uninitialised bytes, which are lent again once no array or tensor refers to them any more.

    For threads too: to take and to leave a piece are single steps, so that none is ever lent twice.
    """
    if size < SMALLEST:
        return np.empty(size, np.uint8)
    power = (size - 1).bit_length()
    left = _left[power]
    try:
        owner = left.pop()
    except IndexError:
        owner = np.empty(1 << power, np.uint8)  # pages that are never touched take no memory
    # Not a slice of the owner: slices of that would refer to the owner, and this one could be gone before them.
    lent = np.frombuffer(memoryview(owner)[:size], np.uint8)  # type: ignore[arg-type]  # numpy's stubs of 3.11
    weakref.finalize(lent, left.append, owner).atexit = False
    return lent

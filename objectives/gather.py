"""Rows that several ranks hold: gathered, summed back to their owner, counted. Ranks may hold unequal numbers, or none.

Every rank calls every function, in the same order. All of it happens in the forward pass and none of it is
differentiated: a collective inside backward could fall between those of data parallelism, in another order on a rank
that lacks a modality, and hang.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_counts(counts: Sequence[int], device: torch.device) -> list[list[int]]:
    """One collective for any number of counts.

    Returns:
        for each of the counts: its value on every rank.
    """
    if world_size() == 1:
        return [[count] for count in counts]
    mine = torch.tensor(counts, device=device)
    every = mine.new_empty(world_size() * len(mine))
    dist.all_gather_single(every, mine)
    by_count: list[list[int]] = every.view(world_size(), -1).T.tolist()
    return by_count


def gather_rows(x: Tensor, counts: Sequence[int]) -> Tensor:
    """(n, ...) of each rank -> (N, ...) of all, in order of rank; ``counts`` holds every rank's n."""
    if len(counts) == 1:
        return x
    largest = max(counts)
    every = x.new_empty(len(counts) * largest, *x.shape[1:])
    dist.all_gather_single(every, _padded(x, largest))
    if min(counts) == largest:
        return every
    return torch.cat(
        [part[:count] for part, count in zip(every.view(len(counts), largest, *x.shape[1:]), counts, strict=True)]
    )


def sum_to_owner(x: Tensor, counts: Sequence[int]) -> Tensor:
    """(N, ...), each rank's contribution to all rows -> (n, ...), the sum over ranks of this rank's rows."""
    if len(counts) == 1:
        return x
    largest = max(counts)
    if min(counts) < largest:
        x = torch.cat([_padded(part, largest) for part in torch.split_with_sizes(x, list(counts))])
    mine = x.new_empty(largest, *x.shape[1:])
    dist.reduce_scatter_single(mine, x)
    return mine[: counts[dist.get_rank()]]


def _padded(x: Tensor, rows: int) -> Tensor:
    """Zeros below, so that all ranks send as much; NCCL and gloo want that."""
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows - len(x))).contiguous()

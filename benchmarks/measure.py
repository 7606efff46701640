"""What benchmarks share: sides timed in turn, medians with their spread, groups of processes, tables in Markdown."""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Spread(NamedTuple):
    """Of repeated measurements: the median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """At least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def show(self, digits: int = 0, factor: float = 1) -> str:
        """``5.2 (5.1 to 5.4)``, each times ``factor``."""
        median, low, high = (f"{factor * value:,.{digits}f}" for value in self)
        return f"{median} ({low} to {high})"


def in_turn(sides: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> list[dict[str, float]]:
    """What each side says of itself, one after the other in each round, so that a load meets all of them.

    Args:
        sides: name -> measurement, such as `elapsed` of an action.
        rounds: that count.
        warm_up: rounds before them.
    """
    return [{name: side() for name, side in sides.items()} for _ in range(warm_up + rounds)][warm_up:]


def elapsed(action: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds of an action, and of what it gave the device to do."""
    begun = time.perf_counter()
    action()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def spread(rounds: Sequence[Mapping[str, float]], name: str) -> Spread:
    """Of one side."""
    return Spread.of([row[name] for row in rounds])


def ratio(rounds: Sequence[Mapping[str, float]], one: str, other: str) -> float | None:
    """Median over rounds of ``one`` / ``other``, to three digits; None where a side is absent."""
    if one not in rounds[0] or other not in rounds[0]:
        return None
    return float(f"{statistics.median(row[one] / row[other] for row in rounds):.3g}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns aligned for the terminal, with an empty line after it."""
    widths = [max(3, *(len(row[i]) for row in (header, *rows))) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows), ""])


def in_group(world: int, threads: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a module's function in as many fresh processes, which are a group of torch.distributed over gloo.

    Args:
        world: how many; a single one is no group.
        threads: of torch in each.
        function: called with ``arguments``, all of which can be pickled.

    Returns:
        what it returned, by rank.
    """
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world, spawn) as pool:
        # Each process takes one call, since a call waits for the others before it does anything.
        store = f"file://{folder}/store"
        members = [pool.submit(_member, rank, world, threads, store, function, arguments) for rank in range(world)]
        return [member.result() for member in members]


def _member(
    rank: int, world: int, threads: int, store: str, function: Callable[..., Any], arguments: Sequence[Any]
) -> Any:
    torch.set_num_threads(threads)
    if world == 1:
        return function(*arguments)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(minutes=10))
    try:
        return function(*arguments)
    finally:
        if dist.is_initialized():  # a function may leave the group, to go on beside the others
            dist.destroy_process_group()

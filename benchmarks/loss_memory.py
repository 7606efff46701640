"""Memory and time of the contrastive loss: ours beside open_clip's ClipLoss on the same embeddings, timed in turn.

    python benchmarks/loss_memory.py                # 10 minutes on 2 CPU cores, 8 GB
    python benchmarks/loss_memory.py --sizes 1024 2048 --worlds 1 --rounds 2      # a quick look

float32, embeddings of width 512 that both normalise. "Saved" is what waits for the backward pass, each storage once;
"peak" is how far the process grew over a forward and a backward pass, in a process of its own; "seconds" is both
passes. Several ranks share the rows and the threads over gloo, and all is said of the first of them; theirs then has
``local_loss`` and ``gather_with_grad``, which give the same gradients as ours and take the least memory. Theirs is left
out above `--theirs-up-to` rows or where memory is short. The last line is one JSON object with the ratios, ours /
theirs, at the largest size that both have, for each number of ranks.
"""

import argparse
import json
import math
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

if __name__ in ("__main__", "__mp_main__"):  # launched by path: the project's root, not this folder, has the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import elapsed, in_group, in_turn, ratio, spread, table
from benchmarks.peers import MissingPeerError, open_clip
from objectives.contrastive import TILE, info_nce
from objectives.gather import world_size

WIDTH = 512
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def open_clip_loss() -> LossFunction:
    """open_clip's ClipLoss, after the normalising that its models do; of several ranks with its cheaper settings."""
    rank = dist.get_rank() if world_size() > 1 else 0
    loss: Any = open_clip("loss").ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size())

    def clip_loss(x: Tensor, y: Tensor, log_scale: Tensor) -> Tensor:
        value: Tensor = loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1), log_scale.exp())
        return value

    return clip_loss


def make_loss(name: str, n: int, tile: int) -> LossFunction:
    """Ours or theirs, of n rows of each rank."""
    if name == "theirs":
        return open_clip_loss()
    counts = [n] * world_size() if world_size() > 1 else None
    return lambda x, y, log_scale: info_nce(x, y, log_scale, counts=counts, tile=tile)


def make_inputs(n: int) -> list[Tensor]:
    """Embeddings that are somewhat alike, and the scale of CLIP's start."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, WIDTH, generator=generator)
    y = x + 3 * torch.randn(n, WIDTH, generator=generator)
    return [each.requires_grad_() for each in (x, y, torch.tensor(math.log(1 / 0.07)))]


class Held:
    """A tensor that waits for backward, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def memory(name: str, n: int, tile: int) -> tuple[int, int]:
    """Bytes saved for backward, and bytes by which this process grew at most. Called in a process of its own."""
    torch.autograd.backward(make_loss(name, 64, tile)(*make_inputs(64)))  # what libraries allocate once
    loss, inputs = make_loss(name, n, tile), make_inputs(n)
    saved: WeakSet[Held] = WeakSet()

    def hold(tensor: Tensor) -> Held:
        held = Held(tensor)
        saved.add(held)
        return held

    before = peak()
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda held: held.tensor):
        value = loss(*inputs)
    waiting = {held.tensor.untyped_storage().data_ptr(): held.tensor.untyped_storage().nbytes() for held in saved}
    torch.autograd.backward(value)
    return sum(waiting.values()), peak() - before


def peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def times(names: list[str], n: int, tile: int, rounds: int) -> list[dict[str, float]]:
    """Seconds of forward and backward of n rows of each rank, in turn."""
    inputs = make_inputs(n)

    def taken(loss: LossFunction) -> float:
        if world_size() > 1:
            dist.barrier()
        return elapsed(lambda: torch.autograd.backward(loss(*inputs)))

    losses = {name: make_loss(name, n, tile) for name in names}
    return in_turn({name: partial(taken, loss) for name, loss in losses.items()}, rounds)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure contrastive losses.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768], help="rows")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="ranks that share the rows")
    parser.add_argument("--gathered-from", type=int, default=4096, help="rows below which there is only one rank")
    parser.add_argument("--theirs-up-to", type=int, default=16384, help="rows above which only ours is measured")
    parser.add_argument("--tile", type=int, default=TILE, help="rows of similarities in memory at a time, ours")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    given = parser.parse_args(argv)
    reason = None
    try:
        open_clip_loss()
    except MissingPeerError as error:
        reason = str(error)
    cores = torch.get_num_threads()
    print(f"{cores} threads in all, width {WIDTH}, tiles of {given.tile} rows; all of the first rank:\n")
    lines, figures = list[list[str]](), dict[str, Any]()
    for world in given.worlds:
        for n in given.sizes:
            if world > 1 and n < given.gathered_from:
                continue
            # One rank: two matrices of logits, two of probabilities, their gradients and a temporary.
            room = psutil.virtual_memory().available > 8 * n * n * 4
            both = reason is None and n <= given.theirs_up_to and room
            names = ["ours", "theirs"] if both else ["ours"]
            threads, share = max(1, cores // world), n // world
            # A process of its own for each figure of memory: the largest size so far never falls.
            sizes = {name: in_group(world, threads, memory, name, share, given.tile)[0] for name in names}
            rounds = in_group(world, threads, times, names, share, given.tile, given.rounds)[0]
            for name in names:
                saved, grown = sizes[name]
                seconds = spread(rounds, name).show(3)
                lines.append([f"{n:,}", str(world), name, f"{saved / 1e6:.1f}", f"{grown / 1e6:,.0f}", seconds])
                print(*lines[-1], sep="\t", file=sys.stderr)
            if both:
                suffix = "" if world == 1 else f"_{world}_ranks"
                figures |= {
                    f"n{suffix}": n,
                    f"saved_bytes_ratio{suffix}": round(sizes["ours"][0] / sizes["theirs"][0], 4),
                    f"time_ratio{suffix}": ratio(rounds, "ours", "theirs"),
                }
    print(table(["rows in all", "ranks", "side", "saved MB", "peak MB", "seconds (quartiles)"], lines))
    if reason is not None:
        print(f"theirs is absent: {reason}\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

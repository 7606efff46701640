"""Memory and time of the contrastive loss: ours beside open_clip's ClipLoss on the same embeddings, timed in turn.

    pip install --no-deps open_clip_torch           # its loss.py is loaded alone: nothing else of it is needed
    python benchmarks/loss_memory.py                # minutes on 2 CPU cores, 8 GB; the figures of benchmarks/README.md
    python benchmarks/loss_memory.py --sizes 1024 2048 --rounds 2      # a quick look

One rank, float32, embeddings of width 512 that both normalise. "Saved" is what waits for the backward pass, each
storage once; "peak" is how far the process grew over a forward and a backward pass, in a process of its own; "time" is
both passes, the median of rounds. Theirs is left out above `--theirs-up-to` rows or where memory is short. The last
line is one JSON object with the ratios, ours / theirs, at the largest size that both have.
"""

import argparse
import json
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

if __name__ in ("__main__", "__mp_main__"):  # launched by path: the project's root, not this folder, has the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import MissingPeerError, open_clip
from objectives.contrastive import TILE, info_nce

WIDTH = 512
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def open_clip_loss() -> LossFunction:
    """open_clip's ClipLoss, after the normalising that its models do."""
    loss: Any = open_clip("loss").ClipLoss()

    def clip_loss(x: Tensor, y: Tensor, log_scale: Tensor) -> Tensor:
        value: Tensor = loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1), log_scale.exp())
        return value

    return clip_loss


def make_loss(name: str, tile: int) -> LossFunction:
    """Ours or theirs."""
    if name == "theirs":
        return open_clip_loss()
    return lambda x, y, log_scale: info_nce(x, y, log_scale, tile=tile)


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
    loss = make_loss(name, tile)
    torch.autograd.backward(loss(*make_inputs(64)))  # what libraries allocate once
    inputs = make_inputs(n)
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


def seconds(names: list[str], n: int, tile: int, rounds: int) -> dict[str, float]:
    """Median seconds of forward and backward, in turn; the first round warms up and is not counted."""
    losses = {name: make_loss(name, tile) for name in names}
    inputs = make_inputs(n)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name, loss in losses.items():
            begun = time.perf_counter()
            torch.autograd.backward(loss(*inputs))
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768], help="rows")
    parser.add_argument("--theirs-up-to", type=int, default=16384, help="rows above which only ours is measured")
    parser.add_argument("--tile", type=int, default=TILE, help="rows of similarities in memory at a time, ours")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    arguments = parser.parse_args()
    open_clip_loss()  # says at once if it isn't there
    tile = arguments.tile
    # A process of its own for each figure of memory: the largest size so far never falls.
    pool = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, width {WIDTH}, tile {tile}; MB and seconds")
    print(f"{'rows':>6} {'':6} {'saved':>8} {'peak':>8} {'time':>8}")
    last: dict[str, float] = {}
    for n in arguments.sizes:
        names = ["ours"]
        # Two matrices of logits, two of probabilities, their gradients and a temporary.
        if n <= arguments.theirs_up_to and psutil.virtual_memory().available > 8 * n * n * 4:
            names.append("theirs")
        sizes = {name: pool.apply(memory, (name, n, tile)) for name in names}
        times = pool.apply(seconds, (names, n, tile, arguments.rounds))
        for name in names:
            saved, grown = sizes[name]
            print(f"{n:6} {name:6} {saved / 1e6:8.1f} {grown / 1e6:8.0f} {times[name]:8.3f}", flush=True)
        if "theirs" in names:
            last = {
                "n": n,
                "saved_bytes_ratio": round(sizes["ours"][0] / sizes["theirs"][0], 4),
                "time_ratio": round(times["ours"] / times["theirs"], 3),
            }
    pool.close()
    if not last:
        sys.exit("no size that both were measured at: lower --sizes, or free some memory")
    print(json.dumps(last))


if __name__ == "__main__":
    try:
        main()
    except MissingPeerError as error:
        sys.exit(f"error: {error}")

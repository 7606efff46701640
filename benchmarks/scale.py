"""Samples per second on several processes, and what is to be expected of 8 to 512 GPUs: a model, checked where we can.

    OMP_NUM_THREADS=1 python benchmarks/scale.py                # 10 minutes on 2 CPU cores
    OMP_NUM_THREADS=1 python benchmarks/scale.py --rounds 1 --steps 3 --size micro      # a quick look
    python benchmarks/scale.py --step-ms vit_b16=380            # with a step measured on one GPU

Measured: all objectives, a fixed number of pairs per process, each process with a thread of its own, over gloo:
one process; two that do not talk, which shows what sharing the machine costs; and two that train one model.

The model. A step on W processes takes

    T(W) = step + exposed all-reduce + exchange of embeddings + similarities

- step: forward, backward and update of one process's pairs. Here: of two that do not talk. GPUs share nothing; there it
  is what `--step-ms` says, or what step.py measured on a GPU, or else operations counted / (peak x USE), which is an
  assumption and is marked as such.
- all-reduce: 2 (W - 1) / W of the gradients' bytes through the slowest link, within a machine of 8 by NVLink and
  between machines an eighth per GPU, plus LATENCY for every doubling of W. It runs beside the backward pass, two thirds
  of the step, but for the last of DDP's 25 MB buckets.
- exchange of embeddings: every process receives all others' rows of one modality of a pair, and as many gradients go
  back, see objectives/contrastive.py. Nothing runs beside it.
- similarities: of the process's rows with those of all, made twice and multiplied twice more for gradients; they grow
  with W. On GPUs by operations and by how often a tile is read and written.

Links reach REACH of what is published for them (DGX H100: docs.nvidia.com/dgx/dgxh100-user-guide; H100 SXM:
nvidia.com/en-us/data-center/h100): NVLink 900 GB/s per GPU for both directions together; ConnectX-7 400 Gb/s per GPU;
for comparison one 100 Gb/s adapter per machine of 8. H100: 989 TFLOP/s dense in bf16, 3.35 TB/s of memory.

The check: the model's T(2) from the two that do not talk, the gradients' all-reduce and the exchange of embeddings as
measured on this machine's gloo, against two processes that train. "Breaks" is the first size at which less than 90 % of
the speed per GPU is left, with the term that takes the most of it. What the model leaves out: reading (cores that each
GPU needs are in the table, from loader.py's figure where there is one), stragglers, and whether a larger batch is
worth it: sigmoid and softmax losses gain little beyond 32k pairs (Zhai et al. 2023, SigLIP, section 4). The last line
is one JSON object: the speed-up, the model's error and where it breaks.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

if __name__ in ("__main__", "__mp_main__"):  # launched by path: the project's root, not this folder, has the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import Spread, elapsed, in_group, table
from benchmarks.step import SIZES, Side, count, ours, pairs, train_step
from objectives.contrastive import TILE, info_nce
from objectives.gather import gather_rows, sum_to_owner
from objectives.pretraining import ObjectivesConfig
from pretrain.allocator import keep_freed_memory

RESULTS = Path(__file__).resolve().parent / "results"
WORLDS = (8, 16, 32, 64, 128, 256, 512)
PER_MACHINE = 8
BUCKET = 25 * 2**20  # bytes, DDP's default
BACKWARD = 2 / 3  # of a step
PEAK, MEMORY = 989e12, 3.35e12  # FLOP/s and bytes/s of an H100 SXM
USE = 0.35  # of the peak, where no step was measured
REACH = 0.8  # of a link's published speed
LATENCY = 10e-6  # seconds of a collective for each doubling of the processes
LEAST = 0.9  # of the speed per GPU
TOUCHED = 12  # how often a value of a tile of similarities is read or written, in float32


class Link(NamedTuple):
    """Bytes per second and GPU, in one direction."""

    inside: float
    between: float


NVLINK = 450e9
LINKS = {
    "NVLink, 400 Gb/s per GPU": Link(NVLINK, 50e9),
    "NVLink, 100 Gb/s per machine": Link(NVLINK, 12.5e9 / PER_MACHINE),
}


class Load(NamedTuple):
    """What a process does in a step.

    Attributes:
        step: seconds of its own work, without similarities to other processes' rows.
        gradients: bytes.
        rows: pairs of its own.
        width: of embeddings.
        measured: the step's time is no assumption.
    """

    step: float
    gradients: int
    rows: int
    width: int
    measured: bool


class Parts(NamedTuple):
    """Seconds of a step on W processes."""

    step: float
    all_reduce: float
    embeddings: float
    similarities: float

    @property
    def total(self) -> float:
        """Of the whole step."""
        return sum(self)

    @property
    def worst(self) -> str:
        """The largest of what several processes cost."""
        costs = self._asdict()
        del costs["step"]
        return max(costs, key=lambda name: costs[name])


def exposed(whole: float, last: float, backward: float) -> float:
    """Seconds of an all-reduce that nothing runs beside.

    Args:
        whole: seconds of all buckets.
        last: seconds of the bucket that is complete only when the backward pass ends.
        backward: seconds of the backward pass.
    """
    return max(last, whole - backward)


def reduce_seconds(size: float, world: int, link: Link) -> float:
    """Of an all-reduce of ``size`` bytes: around the ring of each machine, an eighth of it around all machines."""
    inside, machines = min(world, PER_MACHINE), -(-world // PER_MACHINE)
    seconds = 2 * (inside - 1) / inside * size / (link.inside * REACH)
    seconds += 2 * (machines - 1) / machines * size / inside / (link.between * REACH)
    return seconds + LATENCY * math.log2(world)


def gather_seconds(size: float, world: int, link: Link) -> float:
    """Of bringing ``size`` bytes of every process to all: once per machine from outside, then to its GPUs."""
    machines = -(-world // PER_MACHINE)
    seconds = (world - 1) * size / (link.inside * REACH)
    seconds += (machines - 1) * size / (link.between * REACH)
    return seconds + LATENCY * math.log2(world)


def similarity_seconds(rows: int, others: int, width: int) -> float:
    """Of ``rows`` with ``others`` rows on an H100: two passes over tiles, two products for gradients."""
    return 8 * rows * others * width / (PEAK * USE) + TOUCHED * 4 * rows * others / MEMORY


def predict(load: Load, world: int, link: Link) -> Parts:
    """Seconds of a step on ``world`` GPUs."""
    last = reduce_seconds(min(BUCKET, load.gradients), world, link)
    own = 4 * load.rows * load.width  # bytes of a modality's embeddings in float32
    return Parts(
        load.step,
        exposed(reduce_seconds(load.gradients, world, link), last, BACKWARD * load.step),
        2 * gather_seconds(own, world, link),  # there and back
        similarity_seconds(load.rows, (world - 1) * load.rows, load.width),
    )


def speed_left(load: Load, world: int, link: Link) -> float:
    """Share of the speed per GPU that is left on so many."""
    return load.step / predict(load, world, link).total


def breaks(load: Load, link: Link) -> tuple[int, str] | None:
    """The first of WORLDS at which too little speed is left, and why; None: none of them."""
    for world in WORLDS:
        if speed_left(load, world, link) < LEAST:
            return world, predict(load, world, link).worst
    return None


class Trained(NamedTuple):
    """What the first process measured.

    Attributes:
        seconds: of each step.
        gradients: bytes.
        reduce: seconds to all-reduce the gradients alone; 0 for a process that is not in a group.
        last: of the last bucket.
        exchange: seconds to gather embeddings and send gradients back.
    """

    seconds: list[float]
    gradients: int
    reduce: float = 0
    last: float = 0
    exchange: float = 0


def train(size_name: str, rows: int, steps: int, together: bool) -> Trained:
    """Steps of this process, after three that warm up; called in processes of `in_group`.

    Args:
        size_name: of ``step.SIZES``.
        rows: pairs of this process.
        steps: how many.
        together: with the other processes of the group, or beside them.
    """
    if dist.is_initialized() and not together:
        dist.barrier()
        dist.destroy_process_group()
    torch.manual_seed(0)
    keep_freed_memory()  # as a run does
    size, device = SIZES[size_name], torch.device("cpu")
    batch = pairs(rows, size)
    side = ours(batch, size, ObjectivesConfig())
    if dist.is_initialized():
        shared, seeds = DistributedDataParallel(side.model), iter(range(10**9))
        side = Side(shared, lambda: shared(batch, seed=next(seeds)).total, side.compile)
    step = train_step(side, device)
    seconds = [elapsed(step) for _ in range(steps + 3)][3:]
    gradients = sum(4 * each.numel() for each in side.model.parameters() if each.requires_grad)
    if not dist.is_initialized():
        return Trained(seconds, gradients)
    counts = [rows] * dist.get_world_size()
    embeddings = torch.randn(rows, size.embed)

    def exchange() -> None:
        sum_to_owner(gather_rows(embeddings, counts), counts)

    return Trained(
        seconds,
        gradients,
        typical(lambda: dist.all_reduce(torch.zeros(gradients // 4)), steps),
        typical(lambda: dist.all_reduce(torch.zeros(min(gradients, BUCKET) // 4)), steps),
        typical(exchange, steps),
    )


def typical(action: Any, times: int) -> float:
    """Median seconds, each time begun together."""
    taken = []
    for _ in range(times + 1):
        dist.barrier()
        taken.append(elapsed(action))
    return Spread.of(taken[1:]).median


def own_similarities(rows: int, width: int, times: int) -> float:
    """Median seconds of the loss of ``rows`` among themselves, forward and backward, on this machine."""
    taken = []
    for _ in range(times + 1):
        x, y = (torch.randn(rows, width, requires_grad=True) for _ in range(2))
        begun = time.perf_counter()
        torch.autograd.backward(info_nce(x, y, torch.tensor(2.0, requires_grad=True), tile=TILE))
        taken.append(time.perf_counter() - begun)
    return Spread.of(taken[1:]).median


def load_of(name: str, rows: int, given: dict[str, float]) -> Load:
    """Of a GPU that trains all objectives: its step as given, as step.py measured it on a GPU, or as counted."""
    size = SIZES[name]
    few = 8
    side = ours(pairs(few, size), size, ObjectivesConfig())
    gradients = sum(4 * each.numel() for each in side.model.parameters() if each.requires_grad)
    measured = given.get(name) or on_gpu(name, rows)
    if measured is not None:
        return Load(measured / 1000, gradients, rows, size.embed, True)
    _, operations = count(side, torch.device("cpu"))
    return Load(operations / few * rows / (PEAK * USE), gradients, rows, size.embed, False)


def on_gpu(name: str, rows: int) -> float | None:
    """Milliseconds of all objectives that step.py measured, if it did on a GPU."""
    path = RESULTS / "step.json"
    found = json.loads(path.read_text()) if path.exists() else {"machine": {"gpus": []}}
    if not found["machine"]["gpus"]:
        return None
    size = SIZES[name]
    ms = found["figures"]["ms"].get(f"{name} {rows} {size.side}x{size.tokens}", {}).get("ours, all objectives")
    return None if ms is None else float(ms)


def reading_ms() -> float | None:
    """CPU milliseconds to read a sample, from loader.py's results."""
    path = RESULTS / "loader.json"
    return float(json.loads(path.read_text())["figures"]["cpu_ms"]) if path.exists() else None


def measured(size: str, rows: int, steps: int, rounds: int) -> dict[str, float | None]:
    """Print what one and two processes do, and the check of the model; returns its figures."""
    alone, beside, both = [], [], []
    for _ in range(rounds):
        alone.append(in_group(1, 1, train, size, rows, steps, False)[0])
        beside.append(in_group(2, 1, train, size, rows, steps, False)[0])
        both.append(in_group(2, 1, train, size, rows, steps, True)[0])
    times = [Spread.of([second for run in runs for second in run.seconds]) for runs in (alone, beside, both)]
    link = [Spread.of([getattr(run, part) for run in both]).median for part in ("reduce", "last", "exchange")]
    step, more = times[1].median, own_similarities(rows, SIZES[size].embed, steps)
    parts = Parts(step, exposed(link[0], link[1], BACKWARD * step), link[2], more)
    names = ("one process", "two that do not talk", "two that train one model")
    pairs_per_second = [count * rows / time.median for count, time in zip((1, 2, 2), times, strict=True)]
    lines = [
        [name, time.show(1, 1000), f"{speed:,.0f}", f"{speed / pairs_per_second[0]:.2f}x"]
        for name, time, speed in zip(names, times, pairs_per_second, strict=True)
    ]
    lines.append(["the model, of the latter", f"{1000 * parts.total:.1f}", f"{2 * rows / parts.total:,.0f}", ""])
    print(f"{size}, {rows} pairs per process, {both[0].gradients / 1e6:.1f} MB of gradients, over gloo:\n")
    print(table(["", "ms per step (quartiles)", "samples/s", "of one"], lines))
    said = ", ".join(f"{name} {1000 * value:.1f}" for name, value in parts._asdict().items())
    print(f"The model in ms: {said}; the gradients' all-reduce alone takes {1000 * link[0]:.1f}.\n", flush=True)
    return {
        "speedup_at_2": round(pairs_per_second[2] / pairs_per_second[0], 3),
        "speedup_at_2_without_sharing_cost": round(step / times[2].median * 2, 3),
        "model_error_at_2": round(parts.total / times[2].median - 1, 3),
    }


def main(argv: list[str] | None = None) -> None:
    """Print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description="Measure two processes, and say what more would do.")
    parser.add_argument("--size", choices=SIZES, default="small", help="what is measured here")
    parser.add_argument("--rows", type=int, default=32, help="pairs per process, measured here")
    parser.add_argument("--steps", type=int, default=20, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is measured, in turn")
    parser.add_argument("--gpu-rows", type=int, default=256, help="pairs per GPU of the model")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["vit_s16", "vit_b16"], help="of the model")
    parser.add_argument(
        "--step-ms",
        nargs="*",
        default=[],
        metavar="MODEL=MS",
        help="measured on one GPU with --gpu-rows, all objectives",
    )
    given = parser.parse_args(argv)
    steps = {name: float(ms) for name, _, ms in (text.partition("=") for text in given.step_ms)}
    if unknown := sorted(set(steps) - set(given.models)):
        parser.error(f"--step-ms {unknown[0]}: allowed are {', '.join(given.models)}")
    figures: dict[str, Any] = dict(measured(given.size, given.rows, given.steps, given.rounds))
    reading = reading_ms()
    for name in given.models:
        load = load_of(name, given.gpu_rows, steps)
        speed = load.rows / load.step
        how = "measured" if load.measured else f"ASSUMED from {USE:.0%} of the peak, not measured"
        cores = "" if reading is None else f"; reading takes {speed * reading / 1000:.1f} CPU cores per GPU"
        print(f"{name}, {load.rows} pairs per H100, a step of {1000 * load.step:.0f} ms ({how}){cores}:\n")
        lines = []
        for world in WORLDS:
            lines.append([str(world), f"{world * load.rows:,}"])
            for link in LINKS.values():
                lines[-1] += [f"{world * speed * (left := speed_left(load, world, link)):,.0f}", f"{left:.0%}"]
        header = ["GPUs", "batch", *(text for link in LINKS for text in (f"samples/s, {link}", "per GPU"))]
        print(table(header, lines))
        for network, link in LINKS.items():
            found = breaks(load, link)
            figures[f"{name}, {network}"] = {"breaks_at": found and found[0], "by": found and found[1]}
            what = f"breaks at {found[0]} GPUs, by {found[1]}" if found else f"holds to {WORLDS[-1]} GPUs"
            print(f"{network}: {what}.  ")
        print(flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

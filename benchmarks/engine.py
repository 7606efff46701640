"""What the program costs besides the step itself: the loop, going on from far within the data, and checkpoints.

    python benchmarks/engine.py                     # minutes on 2 CPU cores; the figures of benchmarks/README.md
    python benchmarks/engine.py --rounds 3 --saves 2 --resumes 1 --only loop resume         # a quick look

Image 64 px in patches of 8 and text, width 192, depth 6, batch 64; shards are made by the script. The disk is that of
the folder for temporary files (TMPDIR).

- loop: `pretrain.engine.train` in a real folder, a line every 20 steps, beside a bare loop of torch alone (forward,
  backward, clipping, optimiser, gradients to zero) on the same batches, which are kept in memory; in turn, step by
  step. Both begin with the same weights and end with the same. The device's half of the views belongs to both.
- resume: seconds from the call of `pretrain`, in a fresh process, to the end of its first step, with a checkpoint that
  stands at sample 10 million of 3 million in 3,000 shards. These are one shard under many names, so that they take no
  room: the files lie in memory, but all indexes are read and kept as if they differed.
- stall: what a save costs the loop, which is slower steps while the thread copies and writes, as a share of what it
  costs to save and wait. Steps that follow a save and steps that don't, in turn; a model of 39 million weights. One
  core is left to the thread, as training on a GPU does; where training takes every core (train.threads=2 on two), it
  takes its time from the steps.

The last line is one JSON object with the ratios, and seconds.
"""

import argparse
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # launched by path: the project's root, not this folder, is where packages are
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image

from data.batch import Batch
from data.crew import available_cpus
from data.index import index_path
from data.shards import write_shards
from data.stream import STATE, Stream, open_train
from data.text import load_tokenizer, train_tokenizer
from data.transforms import OnDevice
from objectives.pretraining import Pretraining
from pretrain.checkpoint import Checkpoints, find_last
from pretrain.config import Config, load_config, to_yaml
from pretrain.engine import pretrain, save, step_seed, train
from pretrain.model.encoder import Encoder
from pretrain.optimizer import make_optimizer
from pretrain.start import Run, set_up, start_accelerator, vocabulary_of

# The rate of learning stays, as that of the bare loop does.
RECIPE = """
data:
  train: [{folder}/train-*.tar]
  views: {{image: {{size: 64}}, text: {{max_tokens: 32}}, audio: null}}
tokenizer: {{name: {folder}/tokenizer}}
model: {{width: 192, depth: 6, heads: 3, embed_dim: 128, image_patch: 8}}
objectives: {{final_whole: 0}}
train: {{batch_size: 64, learning_rate: 1.0e-4, warmup: 0, schedule: constant, cooldown: 0, pictures: false}}
"""
LARGE = ["model.width=512", "model.depth=12", "model.heads=8", "train.batch_size=8"]
WORDS = ("a", "photo", "of", "one", "red", "large", "old", "new", "cat", "dog", "tree", "house", "in", "the", "rain")
PER_SHARD = 1000
LOG_EVERY = 20
KEPT = 4  # batches that are given again and again
WARM_UP = 5  # steps before the first save
ROOM = 3  # how many times as long as alone a save may take beside training


class Kept(Stream):
    """Gives the same few batches again and again, and measures what the loop does with them.

    Attributes:
        kept: the batches.
        seconds: number of a step -> how long it took, with the steps before it in its turn.
        between: called with the number of steps done after each turn, in time that is not counted.
    """

    def __init__(self, run: Run, turn: int = 1) -> None:
        """In the place of the run's own stream.

        Args:
            run: just set up.
            turn: steps that are timed together.
        """
        config = run.config
        super().__init__(
            run.stream.sources, config.data, run.tokenizer, seed=config.seed, batch_size=config.train.batch_size
        )
        self.turn, self.device = turn, run.accelerator.device
        self.kept = [self.batch(step) for step in range(KEPT)]
        self.seconds: dict[int, float] = {}
        self.between: Callable[[int], None] = lambda done: None

    def batches(self, timeout: timedelta | None = None) -> Iterator[Batch]:
        """Endlessly; there is nothing to wait for."""
        while True:
            begun = self.clock()
            for _ in range(self.turn):
                self.step += 1
                yield self.kept[self.step % KEPT]
            self.seconds[self.step] = self.clock() - begun
            self.between(self.step)

    def clock(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Overhead(NamedTuple):
    """Milliseconds per step of the loop and of the bare one; by how much the first is longer; whether both learned the
    same."""

    loop: float
    bare: float
    share: float
    same: bool


class Stall(NamedTuple):
    """Seconds: a save that is waited for, the part of it that copies, and what a save costs the loop, which makes the
    passes of its next step meanwhile; the last to the first; the numbers of weights and of steps between saves."""

    waited: float
    copying: float
    lost: float
    share: float
    weights: int
    period: int


def samples(count: int) -> Iterator[dict[str, bytes | str]]:
    """Small JPEGs with captions of ten words."""
    random = np.random.default_rng(0)
    for number in range(count):
        jpeg = io.BytesIO()
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=90)
        yield {"__key__": f"{number:06d}", "jpg": jpeg.getvalue(), "txt": " ".join(random.choice(WORDS, 10)).encode()}


def make_data(folder: Path, shards: int) -> Path:
    """Shards, one under many names, and a tokenizer; returns the recipe that names them."""
    (first,) = write_shards(samples(PER_SHARD), folder / "train", max_samples=PER_SHARD)
    for number in range(1, shards):
        shard = folder / f"train-{number:05}.tar"
        shard.hardlink_to(first)
        index_path(shard).hardlink_to(index_path(first))
    changed = first.stat().st_ctime_ns  # another name counts as a change of the shard
    os.utime(index_path(first), ns=(changed, changed))
    train_tokenizer([" ".join(WORDS)] * 100, 400).save_pretrained(folder / "tokenizer")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    return recipe


def bare_step(run: Run) -> Callable[[Batch, int], Pretraining]:
    """A step of a copy of the run's model by torch alone, given a batch and the step's number; returns the copy."""
    config, device = run.config, run.accelerator.device
    encoder = Encoder(config.model, config.data.views, vocabulary_of(run.tokenizer))
    model = Pretraining(encoder, config.objectives).to(device)
    model.load_state_dict(run.bare.state_dict())
    optimizer = make_optimizer(model, config.train)
    on_device = OnDevice(config.data.views).to(device)
    mixed = run.accelerator.mixed_precision == "bf16"

    def step(batch: Batch, number: int) -> Pretraining:
        inputs = on_device(batch.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = model(inputs, seed=step_seed(config.seed, number)).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return model

    return step


def loop_overhead(config: Config, rounds: int) -> Overhead:
    """The loop beside a bare one; a round is as many steps as a line of progress is about."""
    config.train.log_every = LOG_EVERY
    # The first round warms up; the last step saves, and is not counted.
    config.train.steps = config.train.save_every = (rounds + 1) * LOG_EVERY + 1
    run = set_up(config, None, start_accelerator(config))
    step = bare_step(run)
    # A GPU works while the next steps are being prepared; one by one they would all be waited for.
    run.stream = stream = Kept(run, LOG_EVERY if run.accelerator.device.type == "cuda" else 1)
    bare: dict[int, float] = {}
    same: list[bool] = []

    def between(done: int) -> None:
        begun = stream.clock()
        for number in range(done - stream.turn, done):
            model = step(stream.kept[(number + 1) % KEPT], number)
        bare[done] = stream.clock() - begun
        if done == config.train.steps - 1:
            same.extend(torch.equal(a, b) for a, b in zip(model.parameters(), run.bare.parameters(), strict=True))

    stream.between = between
    train(run)
    ours, theirs = (by_round(seconds) for seconds in (stream.seconds, bare))
    return Overhead(
        1000 * statistics.median(ours) / LOG_EVERY,
        1000 * statistics.median(theirs) / LOG_EVERY,
        statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) - 1,
        all(same),
    )


def by_round(seconds: dict[int, float]) -> list[float]:
    """Sums over the rounds after the first, of which each ends with a line."""
    rounds: dict[int, float] = {}
    for step, taken in seconds.items():
        number = (step - 1) // LOG_EVERY
        rounds[number] = rounds.get(number, 0.0) + taken
    return [rounds[number] for number in sorted(rounds)[1:]]


def first_step_seconds(config: Config) -> float:
    """From the call of `pretrain`, which has one step left, to the end of that step, when its line is written."""
    with redirect_stdout(sys.stderr):
        begun = time.time()
        pretrain(config)
    return (Path(config.out) / "metrics.jsonl").stat().st_mtime - begun


def in_fresh_process(config: Config) -> float:
    """`first_step_seconds` where nothing is warm but the imports."""
    recipe = Path(f"{config.out}.yaml")
    recipe.write_text(to_yaml(config))
    # No process of `multiprocessing`: one that is spawned would spawn its readers, too, where the program forks them.
    command = [sys.executable, str(Path(__file__).resolve()), "--first-step", str(recipe)]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 (our own program)
    return float(ran.stdout)


def advance(config: Config, checkpoint: Path, position: int) -> None:
    """Let a checkpoint's data stand where ``position`` samples have been read."""
    tokenizer = load_tokenizer(checkpoint / "encoder" / "tokenizer")
    stream = Stream(
        open_train(config.data), config.data, tokenizer, seed=config.seed, batch_size=config.train.batch_size
    )
    stream.load(checkpoint)
    stream.load_state_dict({**stream.state_dict(), "step": position // config.train.batch_size})
    stream.save(checkpoint)


def resume_seconds(config: Config, position: int, repeats: int) -> tuple[float, float]:
    """Seconds to the end of the first step: of a new run, and of one that goes on at ``position``; the latter a median.

    Raises:
        RuntimeError: it went on from somewhere else.
    """
    config.train.steps = config.train.log_every = 1
    new = in_fresh_process(config)
    begun = Path(config.out)
    checkpoint = find_last(begun / "checkpoints")
    if checkpoint is None:
        raise RuntimeError(f"{begun}: no checkpoint")
    advance(config, checkpoint, position)
    config.train.steps = 2
    taken = []
    for number in range(repeats):
        config.out = f"{begun}-{number}"
        shutil.copytree(begun, config.out, symlinks=True)
        taken.append(in_fresh_process(config))
        last = find_last(Path(config.out) / "checkpoints")
        after = None if last is None else json.loads((last / STATE).read_text())["step"]
        if after != position // config.train.batch_size + 1:
            raise RuntimeError(f"{config.out}: the data stand at step {after}")
    return new, statistics.median(taken)


def checkpoint_stall(config: Config, saves: int) -> Stall:
    """What a save costs the loop beside one that is waited for."""
    config.train.steps = WARM_UP
    run = set_up(config, None, start_accelerator(config))
    run.stream = stream = Kept(run)
    train(run)  # which makes the optimiser's state, and says how long a step takes
    aside = Checkpoints(run.out / "aside", keep=1)
    waited, copying = list[float](), list[float]()

    def save_and_wait() -> None:
        begun = stream.clock()
        save(run, aside, wait=True)
        aside.copied()
        copied = stream.clock()
        aside.wait()
        copying.append(copied - begun)
        waited.append(stream.clock() - begun)

    save_and_wait()
    period = max(2, math.ceil(ROOM * waited[0] / statistics.median(list(stream.seconds.values())[1:])))
    every = 2 * period
    config.train.save_every = every
    config.train.steps = (WARM_UP // every + saves + 1) * every + period
    waited.clear()
    copying.clear()

    def between(done: int) -> None:
        if done % every == period - 1:  # before the steps that have no save beside them
            save_and_wait()

    stream.between = between
    train(run)
    return Stall(
        w := statistics.median(waited),
        statistics.median(copying),
        lost := statistics.median(losses(stream.seconds, period)),
        lost / w,
        sum(parameter.numel() for parameter in run.bare.parameters()),
        period,
    )


def losses(seconds: dict[int, float], period: int) -> list[float]:
    """By how much longer ``period`` steps take that begin with the one that saves than as many steps before them.

    Args:
        seconds: of each step. Every ``2 * period``-th one saves.
        period: steps within which a save is written.
    """
    found = []
    for step in seconds:
        before, after = range(step - period, step), range(step, step + period)
        if step % (2 * period) == 0 and all(other in seconds for other in (*before, *after)):
            found.append(sum(seconds[other] for other in after) - sum(seconds[other] for other in before))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description="Time what the program does besides its steps.")
    parser.add_argument(
        "--only", nargs="+", choices=("loop", "resume", "stall"), help="which of them; all if not given"
    )
    parser.add_argument(
        "--rounds", type=int, default=10, help=f"times {LOG_EVERY} steps of the loop, and of the bare one"
    )
    parser.add_argument("--resumes", type=int, default=3, help="times that a run is resumed")
    parser.add_argument("--saves", type=int, default=5, help="checkpoints of the loop, and as many that are waited for")
    parser.add_argument("--shards", type=int, default=3000, help=f"of {PER_SHARD} samples each")
    parser.add_argument("--position", type=int, default=10_000_000, help="samples read before the run is resumed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all runs")
    parser.add_argument("--first-step", type=Path, help=argparse.SUPPRESS)  # what `in_fresh_process` has done
    given = parser.parse_intermixed_args(arguments)
    if given.first_step is not None:
        print(first_step_seconds(load_config(given.first_step)))
        return
    chosen = given.only or ("loop", "resume", "stall")
    print(f"{'cuda' if torch.cuda.is_available() else 'cpu'}, torch {torch.__version__}\n", flush=True)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        recipe = make_data(folder, given.shards)

        def config_of(name: str, *settings: str) -> Config:
            return load_config(recipe, [f"out={folder / name}", *settings, *given.overrides])

        if "loop" in chosen:
            with redirect_stdout(sys.stderr):  # where the loop prints
                overhead = loop_overhead(config_of("loop"), given.rounds)
            figures["loop_overhead"] = overhead.share
            row("step of the bare loop", f"{overhead.bare:.1f} ms")
            row("step of ours", f"{overhead.loop:.1f} ms")
            row("more than the bare loop", f"{overhead.share:.1%}")
            row("same weights after all steps", "yes" if overhead.same else "NO: the loops are not comparable")
        if "resume" in chosen:
            new, resumed = resume_seconds(config_of("resume"), given.position, given.resumes)
            figures["resume_first_step_s"] = resumed
            row("first step of a new run", f"{new:.2f} s, {given.shards * PER_SHARD} samples in {given.shards} shards")
            row("first step of a resumed run", f"{resumed:.2f} s, at sample {given.position}")
        if "stall" in chosen:
            with redirect_stdout(sys.stderr):
                config = config_of("stall", *LARGE, f"train.threads={max(1, available_cpus() - 1)}")
                stall = checkpoint_stall(config, given.saves)
            figures["checkpoint_stall"] = stall.share
            row("save and wait", f"{stall.waited:.3f} s, {stall.weights / 1e6:.1f} M weights")
            row("  of which copying", f"{stall.copying:.3f} s, {stall.copying / stall.waited:.1%}")
            row("a save costs the loop", f"{stall.lost:.3f} s, {stall.share:.1%}; {stall.period} steps compared")
            row("threads that train", f"{config.train.threads}, of {available_cpus()} cores")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def row(name: str, text: str) -> None:
    """A line of the table."""
    print(f"{name:32} {text}", flush=True)


if __name__ == "__main__":
    main()

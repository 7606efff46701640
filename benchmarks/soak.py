"""A long run that is killed again and again: are all samples seen once, does memory stay, is anything left behind?

    python benchmarks/soak.py --steps 10000 --kills 20      # half an hour on 2 CPU cores
    python benchmarks/soak.py --steps 60 --kills 2          # a quick look

A small model on the embedded digits, of whose training samples one in 60 can't be decoded. The run saves, and looks at
the encoder, and is killed (SIGKILL) at random moments, some of them while it starts: the training process, or one of
those that read for it, upon which the training process has to end by itself. Each time it is started again by the same
command.

- Samples: each session writes down what it is given in each step, by a hook on `Stream.batches`; of steps that were
  done again, the last time counts. Every row has to be the one that `data.order` names, replaced where that one can't
  be decoded; and by ids alone, every sample is seen once in each epoch, or named once as skipped.
- Memory: resident bytes of each process, every few seconds. Of sessions that are long enough for a look and a save to
  come in the first fifth of their time, from the first step on, that is left out; of what follows the last quarter
  has to be within 5 % of the first, by medians: what a look or a save takes for a moment is no growth.
- Leftovers: new names in /dev/shm, processes that still run, half-written files in the run's folder.

Whatever goes wrong is named, and the exit code is then 1. The last line is one JSON object.
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

if __name__ == "__main__":  # launched by path: the project's root, not this folder, is where packages are
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil  # type: ignore[import-untyped]

from data import digits
from data.batch import Batch
from data.index import load_shards
from data.order import Order
from data.shards import write_shards
from data.source import Source
from data.stream import Stream, make_order, open_train
from pretrain.checkpoint import find_last
from pretrain.config import Config, load_config
from pretrain.engine import pretrain

RECIPE = """
out: {folder}/run
data:
  root: {folder}
  train: [damaged-*.tar]
  val: [digits/val-*.tar]
  test: [digits/test-*.tar]
  workers: 2
  views:
    image: {{size: 32, crop_scale: 0.7, load: 32}}
    text: {{max_tokens: 16}}
    audio: {{frames: 96, mels: 64, speed: 0.12, shift: 0.15, noise: 0.1, gain: 6}}
tokenizer: {{train: 300}}
model: {{width: 64, depth: 2, heads: 2, embed_dim: 32, image_patch: 8}}
objectives:
  masked_region: {{decoder_width: 32, decoder_depth: 1}}
  keep: {{image: 0.75, audio: 0.5}}
train: {{batch_size: 32, learning_rate: 1.0e-3, log_every: 20, save_every: 50, pictures: false}}
eval: {{label: label, monitor: {{every: 50, samples: 200, max_share: 1}}}}
"""
# Every so many samples one is damaged, in one of these members at a time.
DAMAGED, MEMBERS = 60, ("png", "flac", "txt")
FLAT = 0.05
PATIENCE = 300.0  # seconds without a step after which a run hangs
PAUSE = 1.0  # seconds at the most between the step at which a kill is due and the kill
# Every so many kills one comes while the run starts, within so many seconds.
STARTING, STARTS = 5, 10.0
SHARED = Path("/dev/shm")  # noqa: S108 (looked at, not written to)
_NAMED = re.compile(r"(?:torch_|sem\.loky-)(\d+)[_-]")  # names that hold the number of a process


class SoakError(Exception):
    """The run ended, or hung, though nobody killed it."""


@dataclass
class Session:
    """From one start of the run to its end.

    Attributes:
        number: from 0.
        killed: what was killed, if anything.
        steps: number of each step -> what it was given, ``{"keys": [...], "skipped": [...]}``.
        began: when the first step was given, in seconds.
        memory: process -> (when, resident bytes) of each look.
        training: number of the training process.
    """

    number: int
    killed: str | None = None
    steps: dict[int, dict[str, list[str]]] = field(default_factory=dict)
    began: float | None = None
    memory: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    training: int = 0

    def seconds(self) -> float:
        """How long it trained."""
        times = [when for looks in self.memory.values() for when, _ in looks]
        return max(times, default=0.0) - self.began if self.began is not None and times else 0.0

    def late(self) -> dict[int, list[int]]:
        """Each process's memory after the first fifth of the time."""
        start = (self.began or 0.0) + 0.2 * self.seconds()
        late = {number: [size for when, size in looks if when >= start] for number, looks in self.memory.items()}
        return {number: sizes for number, sizes in late.items() if len(sizes) > 1}


@dataclass
class Found:
    """What the samples' check says.

    Attributes:
        wrong: rows that are not those of the order, in any session.
        missing: samples that an epoch lacks.
        repeated: samples that an epoch has more than once.
        skipped: rows that got another sample than theirs.
        epochs: whole ones.
        lost: steps that no session did.
    """

    wrong: int
    missing: int
    repeated: int
    skipped: int
    epochs: int
    lost: int


def drift(sizes: Sequence[int]) -> float:
    """How far the median of the last quarter is from that of the first, as a share of that, below 0 if it is less."""
    quarter = -(-len(sizes) // 4)
    return statistics.median(sizes[-quarter:]) / statistics.median(sizes[:quarter]) - 1


def spread(sizes: Sequence[int]) -> float:
    """How far the largest is from the smallest, as a share of that."""
    return max(sizes) / min(sizes) - 1


def damage(shards: Sequence[Path], folder: Path) -> set[str]:
    """Write ``damaged-*.tar``, in which some samples can't be decoded; returns their keys."""
    source = Source(load_shards([str(path) for path in shards]))
    keys: set[str] = set()

    def samples() -> Iterator[dict[str, bytes | str]]:
        for number, (shard, sample) in enumerate(source.places()):
            key, members = source.sample(shard, sample).key, dict[str, bytes | str](source.contents(shard, sample))
            if number % DAMAGED == DAMAGED // 2:
                members[MEMBERS[len(keys) % len(MEMBERS)]] = b"\xff damaged"
                keys.add(key)
            yield {"__key__": key, **members}

    write_shards(samples(), folder / "damaged", max_samples=1000)
    return keys


def train_and_record(recipe: Path, record: Path, overrides: Sequence[str]) -> None:
    """What a session's process does: train, and write a line to ``record`` for each step before it is made."""
    read = Stream.batches
    with record.open("w", buffering=1) as file:

        def batches(self: Stream, *arguments: Any, **named: Any) -> Iterator[Batch]:
            for batch in read(self, *arguments, **named):
                skipped = [skip.key for skip in batch.skipped]
                file.write(json.dumps({"step": self.step, "keys": batch.keys, "skipped": skipped}) + "\n")
                yield batch

        Stream.batches = batches  # type: ignore[method-assign]
        pretrain(load_config(recipe, overrides))


def plan(steps: int, kills: int, chance: random.Random) -> list[int]:
    """After which step each session is to be killed; 0: while it starts."""
    starting = kills // STARTING
    # Not in the last steps: the run would be done before the kill comes.
    found = sorted(chance.randrange(1, max(2, int(0.8 * steps))) for _ in range(kills - starting))
    for _ in range(starting):
        found.insert(chance.randint(0, len(found)), 0)
    return found


class Runner:
    """Starts sessions, watches them and kills them."""

    def __init__(self, folder: Path, recipe: Path, overrides: Sequence[str], every: float, chance: random.Random):
        """Nothing runs yet.

        Args:
            folder: for records and what sessions print.
            recipe: of the run.
            overrides: settings that differ from it.
            every: seconds between two looks at memory.
            chance: when, and what to kill.
        """
        self.folder, self.recipe, self.overrides = folder, recipe, overrides
        self.every, self.chance = every, chance
        self.sessions: list[Session] = []
        self.processes: set[int] = set()

    def run(self, kill_at: int | None) -> Session:
        """A session, killed soon after the step ``kill_at``, 0: while it starts, if it comes to that.

        Raises:
            SoakError: it ended by itself before it was done, or hung; with what it printed last.
        """
        session = Session(len(self.sessions))
        self.sessions.append(session)
        record, log = (self.folder / f"{kind}-{session.number:03}" for kind in ("record", "log"))
        record.touch()
        command = [sys.executable, str(Path(__file__).resolve()), "--record", str(record), "--recipe", str(self.recipe)]
        with log.open("w") as printed, record.open() as lines:
            process = subprocess.Popen(  # noqa: S603 (our own program)
                [*command, *self.overrides], stdout=printed, stderr=subprocess.STDOUT
            )
            session.training = process.pid
            try:
                self._watch(session, process, lines, kill_at)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            take(session, lines)
        if process.returncode != 0 and session.killed is None:
            raise SoakError(f"session {session.number} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        return session

    def _watch(self, session: Session, process: subprocess.Popen[bytes], lines: IO[str], kill_at: int | None) -> None:
        """Until the process has ended."""
        moved = looked = time.monotonic()
        kill_after: float | None = None
        while process.poll() is None:
            time.sleep(0.05)
            now = time.monotonic()
            if take(session, lines):
                moved = now
                session.began = now if session.began is None else session.began
            if now - moved > PATIENCE:
                raise SoakError(f"session {session.number} hangs after step {max(session.steps, default=0)}")
            if now - looked >= self.every:
                looked = now
                for number, size in resident(process.pid).items():
                    session.memory.setdefault(number, []).append((now, size))
                    self.processes.add(number)
            due = kill_at is not None and max(session.steps, default=0) >= kill_at
            if due and kill_after is None:
                kill_after = now + self.chance.uniform(0, PAUSE if kill_at else STARTS)
            if kill_after is not None and session.killed is None and now >= kill_after:
                session.killed = self._kill(process.pid)

    def _kill(self, training: int) -> str | None:
        """Kill the training process, or, as often as not, one that reads for it; None: it had ended."""
        readers = [number for number in resident(training) if number != training]
        victim = self.chance.choice([training, self.chance.choice(readers)]) if readers else training
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return None
        return "training" if victim == training else "a reader"


def take(session: Session, lines: IO[str]) -> bool:
    """Read what a record has gained, but for a line that is not whole; returns whether there was anything."""
    gained = False
    while True:
        position = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(position)
            return gained
        given = json.loads(line)
        session.steps[given.pop("step")] = given
        gained = True


def resident(training: int) -> dict[int, int]:
    """Resident bytes of a process and of those that it started, by number; those that have ended are left out."""
    found: dict[int, int] = {}
    try:
        process = psutil.Process(training)
        for each in (process, *process.children(recursive=True)):
            if size := each.memory_info().rss:  # one that is about to end has none any more
                found[each.pid] = size
    except psutil.NoSuchProcess:
        pass
    return found


def check(
    sessions: Sequence[Session], order: Order, keys: Sequence[Sequence[str]], damaged: set[str], steps: int
) -> Found:
    """Compare what the sessions were given with what they should have been.

    Args:
        sessions: in the order in which they ran.
        order: of the run.
        keys: of all samples, by shard.
        damaged: those of them that can't be decoded.
        steps: of the run.
    """
    found = Found(0, 0, 0, 0, steps * order.batch_size // order.sources[0].size, 0)
    done: dict[int, dict[str, list[str]]] = {}
    for session in sessions:
        done |= session.steps
    seen: dict[int, Counter[str]] = {}  # epoch -> samples
    for step in range(1, steps + 1):
        wanted, skipped, epochs = rows_of(order, keys, damaged, step)
        for session in sessions:
            if (given := session.steps.get(step)) is not None:
                found.wrong += sum(a != b for a, b in zip(wanted, given["keys"], strict=True))
                found.wrong += abs(len(skipped) - len(given["skipped"])) + (skipped != given["skipped"])
        if step not in done:
            found.lost += 1
            continue
        named = iter(done[step]["skipped"])
        found.skipped += len(done[step]["skipped"])
        for key, (epoch, bad) in zip(done[step]["keys"], epochs, strict=True):
            seen.setdefault(epoch, Counter())[next(named, "none") if bad else key] += 1
    every = {key for shard in keys for key in shard}
    for epoch in range(found.epochs):
        found.missing += len(every - seen.get(epoch, Counter()).keys())
    found.repeated = sum(count > 1 for counter in seen.values() for count in counter.values())
    return found


def rows_of(
    order: Order, keys: Sequence[Sequence[str]], damaged: set[str], step: int
) -> tuple[list[str], list[str], list[tuple[int, bool]]]:
    """What a step, counted from 1, has to be given: the keys of its rows, those that are skipped in them, and each
    row's epoch and whether its own sample is damaged.
    """
    wanted, skipped, epochs = list[str](), list[str](), list[tuple[int, bool]]()
    for slot in order.slots(step - 1, range(order.lanes)):
        place, draw = order.place(slot), slot.draw
        key = keys[place.shard][place.sample]
        epochs.append((place.epoch, key in damaged))
        if key in damaged:
            skipped.append(key)
        while key in damaged:
            draw += order.per_lane
            place = order.place(slot._replace(draw=draw))
            key = keys[place.shard][place.sample]
        wanted.append(key)
    return wanted, skipped, epochs


def read_log(config: Config) -> tuple[int, int]:
    """How many lines of metrics.jsonl a step of the run lacks, or has too many; and at which step the run stands."""
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    told = Counter(line["step"] for line in lines if "loss" in line)
    settings = config.train
    due = {s for s in range(1, settings.steps + 1) if s % settings.log_every == 0 or s % settings.save_every == 0}
    due.add(settings.steps)
    last = find_last(Path(config.out) / "checkpoints")
    step = 0 if last is None else int(json.loads((last / "state.json").read_text())["step"])
    return sum(abs(told[s] - (s in due)) for s in due | told.keys()), step


def shared_names(ours: set[int] | None = None) -> set[str]:
    """What lies in /dev/shm, but for what names a process that is not one of ``ours``."""
    if not SHARED.is_dir():
        return set()
    names = {path.name for path in SHARED.iterdir()}
    if ours is None:
        return names
    return {name for name in names if (of := _NAMED.match(name)) is None or int(of[1]) in ours}


def still_running(processes: set[int], patience: float) -> set[int]:
    """Those that have not ended after so many seconds: a reader notices within some that it works for nobody."""
    end = time.monotonic() + patience
    alive = processes
    while (alive := {number for number in alive if _runs_soak(number)}) and time.monotonic() < end:
        time.sleep(0.2)
    return alive


def _runs_soak(number: int) -> bool:
    """Whether that process is one of ours: numbers are used again."""
    try:
        process = psutil.Process(number)
        return process.status() != psutil.STATUS_ZOMBIE and str(Path(__file__).resolve()) in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def soak(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all sessions, print the table; returns the figures."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    overrides = [f"train.steps={arguments.steps}", *arguments.overrides]
    damaged = damage(digits.build(folder / "digits")["train"], folder)
    config = load_config(recipe, overrides)
    (source,) = open_train(config.data)
    keys = [[source.sample(i, j).key for j in range(shard.samples)] for i, shard in enumerate(source.shards)]
    order = make_order([source], config.data, config.seed, config.train.batch_size)

    before = shared_names()
    chance = random.Random(arguments.seed)
    runner = Runner(folder, recipe, overrides, arguments.every, chance)
    for kill_at in plan(arguments.steps, arguments.kills, chance):
        show(runner.run(kill_at), arguments.long)
    show(runner.run(None), arguments.long)

    alive = still_running(runner.processes, 30)
    left = shared_names(runner.processes) - before
    partial = [path.name for path in Path(config.out).rglob("*") if path.name.endswith((".partial", ".tmp"))]
    found = check(runner.sessions, order, keys, damaged, arguments.steps)
    lines, step = read_log(config)
    late = [sizes for each in runner.sessions if len(each.steps) >= arguments.long for sizes in each.late().values()]
    drifted = max((drift(sizes) for sizes in late), key=abs, default=None)
    kills = Counter(session.killed for session in runner.sessions if session.killed is not None)
    done = sum(len(session.steps) for session in runner.sessions)
    return {
        "steps": step,
        "kills": kills.total(),
        "kills_of_readers": kills["a reader"],
        "steps_done_again": done - (arguments.steps - found.lost),
        "samples": sum(map(len, keys)),
        "damaged": len(damaged),
        "epochs": found.epochs,
        "rows_skipped": found.skipped,
        "steps_lost": found.lost,
        "rows_wrong": found.wrong,
        "samples_missing": found.missing,
        "samples_repeated": found.repeated,
        "lines_wrong": lines,
        "memory_processes": len(late),
        "memory_drift": None if drifted is None else round(drifted, 4),
        "memory_spread": round(max(map(spread, late)), 4) if late else None,
        "shared_memory_left": sorted(left),
        "processes_left": len(alive),
        "files_left": sorted(partial),
    }


def show(session: Session, long: int) -> None:
    """A line of the table."""
    if session.number == 0:
        print(
            f"{'session':>7} {'steps':>13} {'seconds':>8} {'killed':>9}   MB, training and readers: first, last, drift"
        )
    late = session.late() if len(session.steps) >= long else {}
    memory = [
        f"{looks[0][1] / 1e6:.0f} {looks[-1][1] / 1e6:.0f} {f'{drift(late[number]):+.1%}' if number in late else '-'}"
        for number, looks in sorted(session.memory.items(), key=lambda item: item[0] != session.training)
    ]
    steps = f"{min(session.steps)}-{max(session.steps)}" if session.steps else "none"
    killed = session.killed or "-"
    print(f"{session.number:7} {steps:>13} {session.seconds():8.0f} {killed:>9}   {'; '.join(memory)}", flush=True)


def wrong(figures: Mapping[str, Any], steps: int, kills: int) -> list[str]:
    """What is not as it should be."""
    never = ("steps_lost", "rows_wrong", "samples_missing", "samples_repeated", "lines_wrong")
    empty = ("shared_memory_left", "processes_left", "files_left")
    found = [f"{name}: {figures[name]}" for name in (*never, *empty) if figures[name]]
    if figures["steps"] != steps:
        found.append(f"steps: {figures['steps']} of {steps}")
    if figures["kills"] != kills:
        found.append(f"kills: {figures['kills']} of {kills}; the run was done before the others")
    if figures["memory_drift"] is not None and abs(figures["memory_drift"]) > FLAT:
        found.append(f"memory_drift: {figures['memory_drift']}, more than {FLAT}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the JSON line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train for long, kill often, count everything.")
    parser.add_argument("--steps", type=int, default=10_000, help="of the run")
    parser.add_argument("--kills", type=int, default=20, help="of the training process or of one that reads for it")
    parser.add_argument("--seed", type=int, default=0, help="of when and what to kill")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks at memory")
    parser.add_argument("--long", type=int, default=300, help="steps of a session whose memory is judged")
    parser.add_argument("--folder", type=Path, help="an empty one, which stays; without, one that goes")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # a session's process has these two
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run")
    given = parser.parse_intermixed_args(arguments)
    if given.record is not None:
        train_and_record(given.recipe, given.record, given.overrides)
        return 0
    with tempfile.TemporaryDirectory() as made:
        folder = given.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        figures = soak(given, folder.resolve())
    bad = wrong(figures, given.steps, given.kills)
    print("\n".join(f"WRONG {line}" for line in bad) or "all as it should be")
    print(json.dumps(figures))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""``doctor=true``: looks at all that a run depends on, says what is wrong and what to do about it, and trains nothing.

Shards get the index that a run would give them at first sight, too. Nothing else is left behind.
"""

import copy
import importlib.util
import io
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]
import torch
from accelerate import Accelerator
from torch import Tensor

from data import digits
from data.batch import Batch
from data.batches import read_ahead
from data.crew import available_cpus
from data.decode import MODALITIES
from data.errors import UserError
from data.fetch import is_url
from data.index import Shard, find_shards, load_samples, load_shard
from data.skips import Skips
from data.source import Source
from data.stream import DataConfig, Stream, open_cache, open_train
from data.transforms import OnDevice
from pretrain.config import Config, TrainConfig
from pretrain.engine import follow, go_backward, step_seed
from pretrain.model.layers import LONGEST_PLAIN
from pretrain.progress import duration
from pretrain.start import Run, fast_in_bf16, precision_of, set_up

OK, WARN, FAIL = "OK", "WARN", "FAIL"
SHOWN = 10  # unreadable shards of a split that are named
COUNTED = 200_000  # samples of a source whose members are counted
ROWS, SECONDS = 400, 4.0  # what a worker reads at most to tell its rate
STEPS = 3  # that are timed
TEXT = 512  # bytes that a rank may tell the others


class Line(NamedTuple):
    """One finding; ``FAIL`` is what a run could not start with."""

    level: str
    text: str


Report = dict[str, list[Line]]


class DoctorError(UserError):
    """The run could not start; the whole report, or on other ranks than the first what is wrong there."""


def examine(config: Config, accelerator: Accelerator) -> str:
    """Look at everything; all ranks call it.

    Args:
        config: of the run. Its folder is neither read nor written.
        accelerator: ``start_accelerator(config)``.

    Returns:
        the report, of the first rank's view.

    Raises:
        DoctorError: the run could not start; holds the report.
    """
    data, main = config.data, accelerator.is_main_process
    report: Report = {"processes": processes(accelerator), "precision": precision(config.train, accelerator)}
    report["packages"] = packages()
    with workplace(Path(config.out), accelerator) as folder:
        report["disk"] = shared_disk(folder, accelerator)
        stop_at_failures(report, accelerator)
        if data.embedded == "digits" and not Path(data.root).exists():
            data = replace(data, root=str(folder / "digits"))
        with accelerator.main_process_first():  # it writes the indices
            if main and data.root == str(folder / "digits"):
                digits.build(Path(data.root))
            report["shards"] = shards(data, config.eval.label is not None, config.eval.monitor.every is not None)
        stop_at_failures(report, accelerator)
        try:
            sources = open_train(data)
            if main:
                pairs = "contrastive" in config.objectives.used
                report["samples"] = samples(sources, list(data.views.used), pairs)
            with silent(accelerator):
                aside = replace(config, data=data, out=str(folder / "run"), resume="auto")
                run = set_up(aside, sources, accelerator)
            report["disk"] += room(config, checkpoint_bytes(run))
            batches = [run.stream.batch(step) for step in range(2)]
            report["attention"] = attention(accelerator.device.type, accelerator.mixed_precision, batches)
            report |= at_work(run, batches)
        except torch.OutOfMemoryError as error:
            text = "a step does not fit: train.accumulate, train.recompute=true or a smaller train.batch_size help"
            report["memory"] = [Line(FAIL, f"{text} ({str(error).splitlines()[0]})")]
            raise DoctorError(render(report, main)) from error
        except UserError as error:
            report["start"] = [Line(FAIL, str(error))]
            raise DoctorError(render(report, main)) from error
        stop_at_failures(report, accelerator)  # others may still use the folder until here
    return render(report, main)


def render(report: Report, whole: bool = True) -> str:
    """The report; without ``whole`` only its failures."""
    counts = Counter(line.level for lines in report.values() for line in lines)
    if not whole:
        return "\n".join(line.text for lines in report.values() for line in lines if line.level == FAIL)
    text = ""
    for title, lines in report.items():
        text += f"{title}\n"
        for line in lines:
            text += f"  {line.level:4}  " + line.text.replace("\n", "\n        ") + "\n"
    end = "the run can start" if not counts[FAIL] else "the run can't start: mend what says FAIL"
    return f"{text}\n{counts[WARN]} warnings, {counts[FAIL]} failures: {end}"


def stop_at_failures(report: Report, accelerator: Accelerator) -> None:
    """Raise DoctorError on all ranks if any of them has a failure: what follows needs all of them."""
    failed = [line.text for lines in report.values() for line in lines if line.level == FAIL]
    told = tell(failed[0] if failed else "", accelerator)
    others = [Line(FAIL, f"process {rank}: {text}") for rank, text in enumerate(told) if text and rank]
    if others:
        report["other processes"] = others
    if any(told):
        raise DoctorError(render(report, accelerator.is_main_process))


# --- The machine


def tell(text: str, accelerator: Accelerator) -> list[str]:
    """The texts of all ranks, in their order, cut at `TEXT` bytes."""
    content = text.encode()[:TEXT]
    told = torch.tensor([*content, *bytes(TEXT - len(content))], dtype=torch.uint8, device=accelerator.device)
    gathered: Tensor = accelerator.gather(told[None])
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in gathered.cpu().tolist()]


def processes(accelerator: Accelerator) -> list[Line]:
    """Whether ranks reach each other, where they are, and whether GPUs are idle or used twice."""
    device = accelerator.device
    number = int(accelerator.reduce(torch.ones(1, device=device), "sum").item())
    name, gpus = device.type, 0
    if device.type == "cuda":
        name, gpus = f"{device} {torch.cuda.get_device_name(device)}", torch.cuda.device_count()
    return where(tell(f"{platform.node()}\n{name}\n{gpus}", accelerator), number)


def where(told: Sequence[str], number: int) -> list[Line]:
    """What each rank's host, device and host's number of GPUs, in lines, say; ``number`` joined in a sum over all."""
    lines = [
        Line(OK if number == len(told) else FAIL, f"{number} of {len(told)} processes take part in a sum over all")
    ]
    for host, ranks in groupby(sorted(text.split("\n") for text in told), key=lambda rank: rank[0]):
        devices, gpus = zip(*((device, int(gpus)) for _, device, gpus in ranks), strict=True)
        counts = Counter(devices)
        lines.append(Line(OK, f"{host}: " + ", ".join(f"{n} x {name}" for name, n in counts.items())))
        if gpus[0] and len(counts) < len(devices):
            lines.append(Line(FAIL, f"{host}: processes share a GPU; there are {gpus[0]}: --num_processes has to fit"))
        elif gpus[0] > len(devices):
            lines.append(Line(WARN, f"{host}: only {len(devices)} of {gpus[0]} GPUs are used: raise --num_processes"))
    return lines


def precision(train: TrainConfig, accelerator: Accelerator) -> list[Line]:
    """Which precision was chosen, and why."""
    fast = fast_in_bf16(accelerator.device)
    chosen = precision_of(accelerator)
    units = f"this {accelerator.device.type} has {'matrix' if fast else 'no matrix'} units for bf16"
    text = f"{chosen}, from train.precision={train.precision}: {units}"
    if chosen == "bf16" and not fast:
        return [Line(WARN, f"{text}, in which it is slower than in fp32: set train.precision=auto")]
    if chosen == "fp32" and fast:
        return [Line(WARN, f"{text}, in which steps are faster and smaller: set train.precision=auto")]
    return [Line(OK, text)]


def packages() -> list[Line]:
    """Optional ones, and what is done without them."""
    without = {
        "simplejpeg": (WARN, "JPEG is decoded more slowly: pip install simplejpeg"),
        "matplotlib": (OK, "train.pictures draws none"),
        "tensorboard": (OK, "metrics are in metrics.jsonl alone, unless trackers.names says more"),
    }
    there = {name: importlib.util.find_spec(name) is not None for name in without}
    lines = [Line(OK, f"{name} is installed") for name in without if there[name]]
    return lines + [Line(level, f"{name} is not: {so}") for name, (level, so) in without.items() if not there[name]]


def attention(device: str, mixed: str, batches: Sequence[Batch]) -> list[Line]:
    """Which kernel `pretrain.model.layers.attention` takes for these batches, and why."""
    if device == "cpu" and mixed == "bf16":
        why = "the CPU's fused kernel is several times slower in bf16's backward pass"
        return [Line(OK, f"plain product up to {LONGEST_PLAIN:,} tokens: {why}; above it scaled_dot_product_attention")]
    if device == "cpu":
        return [Line(OK, "scaled_dot_product_attention, the CPU's fused kernel")]
    kernels = {"flash": "flash", "memory-efficient": "mem_efficient", "cuDNN": "cudnn", "math": "math"}
    on = [name for name, own in kernels.items() if getattr(torch.backends.cuda, f"{own}_sdp_enabled")()]
    level = OK if "flash" in on else WARN
    lines = [Line(level, f"scaled_dot_product_attention; enabled are {', '.join(on)}")]
    if mixed == "no":
        lines.append(Line(WARN, "flash needs bf16 or fp16, this is fp32: set train.precision=auto"))
    if padded := sorted({name for batch in batches for name, field in batch.fields.items() if field.valid is not None}):
        lines.append(Line(OK, f"{', '.join(padded)} is padded: with its mask, passes with it can't take flash"))
    return lines


# --- The disk


@contextmanager
def workplace(out: Path, accelerator: Accelerator) -> Iterator[Path]:
    """A folder beside ``out``, the same for all ranks, which is gone afterwards.

    Raises:
        DoctorError: it can't be made.
    """
    parent, name, reason = existing(out.absolute().parent), "", ""
    if accelerator.is_main_process:
        try:
            name = Path(tempfile.mkdtemp(prefix=".doctor-", dir=parent)).name
        except OSError as error:
            reason = f": {error.strerror}"
    name = tell(name, accelerator)[0]
    if not name:
        raise DoctorError(f"out={out}: {parent} can't be written to{reason}")
    try:
        yield parent / name
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(parent / name, ignore_errors=True)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def shared_disk(folder: Path, accelerator: Accelerator) -> list[Line]:
    """Whether all ranks see what the first one writes beside the run's folder."""
    world, sees = accelerator.num_processes, tell("yes" if folder.is_dir() else "no", accelerator).count("yes")
    if sees < world:
        text = f"{folder.parent}: {sees} of {world} processes see what the first one writes there"
        return [Line(FAIL, f"{text}; choose an `out` on a disk that all machines share")]
    return [Line(OK, f"{folder.parent} can be written to" + (", and all processes see it" if world > 1 else ""))]


def checkpoint_bytes(run: Run) -> int:
    """About how large a checkpoint is: weights, two moments of those that are trained, an average if there is one."""
    trained = [p for p in run.bare.parameters() if p.requires_grad]
    average = () if run.average is None else run.average.state_dict().values()
    sizes: list[int] = [
        t.numel() * t.element_size() for t in (*trained, *trained, *average, *run.bare.state_dict().values())
    ]
    return sum(sizes)


def room(config: Config, size: int) -> list[Line]:
    """Free space where ``out`` lies, against all checkpoints of ``size`` bytes that the run keeps."""
    train, free = config.train, shutil.disk_usage(existing(Path(config.out).absolute())).free
    kept = train.keep + 1 + (0 if train.keep_every is None else train.steps // train.keep_every)
    text = f"{free / 1e9:,.1f} GB free; {kept} checkpoints of {size / 1e6:,.1f} MB, one of them on its way, take "
    text += f"{kept * size / 1e9:,.1f} GB"
    if free < size:
        return [Line(FAIL, f"{text}: not one of them fits")]
    return [Line(OK, text) if free > kept * size else Line(WARN, f"{text}: lower train.keep or raise train.keep_every")]


# --- The data


def shards(data: DataConfig, scored: bool, monitored: bool) -> list[Line]:
    """Which shards can be read; a run that is ``scored`` needs val and test, one that is ``monitored`` needs val."""
    needed = {f"data.train.{name}": (source.shards, True) for name, source in sorted(data.train.items())}
    needed |= {"data.val": (data.val, scored or monitored), "data.test": (data.test, scored)}
    lines = []
    for name, (patterns, matters) in needed.items():
        if not patterns:
            continue
        good, bad = open_shards(data, patterns)
        if good:
            size, count = sum(shard.size for shard in good), sum(shard.samples for shard in good)
            lines.append(Line(OK, f"{name}: {len(good):,} shards, {size / 1e6:,.1f} MB, {count:,} samples"))
        level = FAIL if matters else WARN
        lines += [Line(level, f"{name}: {text}") for text in bad[:SHOWN]]
        if bad:
            what = f"{len(bad):,} of them can't be used; `python -m data validate` says more of each"
            lines.append(Line(level, f"{name}: {what}"))
    return lines


def open_shards(data: DataConfig, patterns: Sequence[str]) -> tuple[list[Shard], list[str]]:
    """The shards that can be read, and what is wrong with the others."""
    found, bad = list[str](), list[str]()
    for pattern in patterns:
        remote = "://" in pattern or pattern.startswith("pipe:")
        try:
            found += find_shards([pattern if remote else str(Path(data.root) / pattern)])
        except (UserError, OSError) as error:
            bad.append(str(error))
    cache = open_cache(data)

    def attempt(location: str) -> Shard | str:
        try:
            return load_shard(location, cache)
        except (UserError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(16 if any(map(is_url, found)) else 1) as pool:
        opened = list(pool.map(attempt, found))
    return [each for each in opened if isinstance(each, Shard)], bad + [
        each for each in opened if isinstance(each, str)
    ]


def samples(sources: Sequence[Source], used: Sequence[str], pairs: bool) -> list[Line]:
    """How many samples have which modalities, of those that the run uses; ``pairs`` says whether it contrasts them."""
    lines, paired = [], 0
    for source in sources:
        each = (load_samples(shard, source.cache) for shard in source.shards)
        kinds = Counter(
            frozenset(MODALITIES[extension] for extension in sample.members if extension in MODALITIES) & set(used)
            for sample in islice((sample for shard in each for sample in shard), COUNTED)
        )
        counts = ", ".join(f"{sum(n for kind, n in kinds.items() if name in kind):,} with {name}" for name in used)
        counted = f"{kinds.total():,} samples" + (f" of {len(source):,}" if kinds.total() < len(source) else "")
        paired += sum(n for kind, n in kinds.items() if len(kind) > 1)
        whole = f"; {kinds[frozenset(used)]:,} have all of them" if len(used) > 1 else ""
        lines.append(Line(OK, f"{source.name}: {counted}: {counts}{whole}"))
        if kinds[frozenset()]:
            lines.append(Line(WARN, f"{source.name}: {kinds[frozenset()]:,} have none of these, and are skipped"))
        if unread := ", ".join(f".{extension}" for extension in sorted(source.unread())):
            lines.append(Line(WARN, f"{source.name}: members that nothing reads: {unread}"))
    if pairs and len(used) > 1 and not paired:
        lines.append(Line(WARN, "no sample has two modalities: contrastive learning has no pairs"))
    return lines


# --- At work


@contextmanager
def silent(accelerator: Accelerator) -> Iterator[None]:
    """Setting up prints nothing and begins no tracker's run."""
    before, accelerator.log_with = accelerator.log_with, []
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        accelerator.log_with = before


def at_work(run: Run, batches: Sequence[Batch]) -> Report:
    """How fast steps are, what they take of the memory, and whether reading keeps up."""
    device, data = run.accelerator.device, run.config.data
    local = int(os.environ.get("LOCAL_WORLD_SIZE", run.accelerator.num_processes))
    skips = Skips(data.max_bad_fraction)
    one = read_rate(run, 1, skips)
    many = one if data.workers == 1 else read_rate(run, data.workers, skips)
    seconds = time_steps(run, batches)
    rows = batches[0].size
    left = duration(seconds * run.config.train.steps)
    whole = f"{run.config.train.batch_size / seconds:,.0f} samples/s over all processes; train.steps take {left}"
    reading = keeps_up(rows / seconds, one, many, data.workers, max(1, available_cpus() // local))
    if skips.total:
        what = f"{skips.total} of {skips.rows} samples can't be used, and others take their place:\n{skips.table()}"
        reading.append(Line(WARN, f"{what}\n`python -m data validate --decode` finds all of them"))
    speed = [Line(OK, f"{1000 * seconds:,.1f} ms a step, {whole}")]
    return {"step": speed, "reading": reading, "memory": memory(device, local)}


def read_rate(run: Run, workers: int, skips: Skips) -> float:
    """Samples that ``workers`` processes of this rank read per second; what can't be used goes to ``skips``.

    Raises:
        UserError: what ends a run, too: shards that can't be read, too many samples that can't be used.
    """
    world, lanes = run.accelerator.num_processes, run.stream.order.lanes
    sources = [copy.copy(source) for source in run.stream.sources]
    for source in sources:
        source.max_epochs = None  # few samples must not run out
    stream = Stream(
        sources,
        replace(run.config.data, lanes=lanes),
        run.tokenizer,
        seed=run.config.seed,
        batch_size=lanes * max(1, 32 * world // lanes),  # small ones, of which many come in a short time
        rank=run.accelerator.process_index,
        world=world,
    )
    rows, taken, begun = 0, 0.0, 0.0
    for number, batch in enumerate(read_ahead(stream, workers)):  # its processes end with it
        if isinstance(batch, UserError):
            raise batch
        skips.add(batch.skipped, batch.size)
        if number < max(1, workers):  # each one's first batch holds its start
            begun = time.perf_counter()
            continue
        rows, taken = rows + batch.size, time.perf_counter() - begun
        if taken > SECONDS or (rows >= ROWS * max(1, workers) and number >= 4 * max(1, workers)):
            break
    return rows / taken


def keeps_up(needed: float, one: float, many: float, workers: int, cores: int) -> list[Line]:
    """Whether ``workers``, who read ``many`` samples per second, keep up with a rank's steps, and how many would."""
    enough = max(1, math.ceil(1.1 * needed / one))
    text = f"a step takes {needed:,.0f} samples/s of this process; data.workers={workers} can read {many:,.0f}"
    text += f", one worker {one:,.0f}" if workers != 1 else ""
    if workers == 0:
        return [Line(WARN, f"{text} while nothing is trained: set data.workers={enough}")]
    if many >= needed:
        return [Line(OK, f"{text}; {enough} would do")]
    advice = f"set data.workers={enough}" if enough > workers else "more workers won't help, faster storage may"
    if enough > cores:
        advice += f"; there are {cores} cores for each process, so smaller files may help more"
    return [Line(WARN, f"{text}: training will wait for data; {advice}")]


def time_steps(run: Run, batches: Sequence[Batch]) -> float:
    """Median seconds of a step. The last one is as the run's last steps are, which take most memory: nothing hidden."""
    on_device = OnDevice(run.config.data.views).to(run.accelerator.device)
    seconds = []
    run.model.train()
    for step in range(STEPS + 2):
        last = step == STEPS + 1
        begun = time.perf_counter()
        inputs = on_device(batches[step % len(batches)].to(run.accelerator.device)).split(run.config.train.accumulate)
        whole, done = last and run.config.objectives.final_whole > 0, float(last)
        go_backward(run.accelerator, run.model, inputs, step_seed(run.config.seed, step), whole, done)
        run.accelerator.clip_grad_norm_(run.model.parameters(), run.config.train.clip_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.bare.after_step(done)
        follow(run)
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:-1])  # the first one makes optimiser states, and compiles


def memory(device: torch.device, processes: int) -> list[Line]:
    """The peak of the steps so far, of the GPU's memory or of the machine's for all its ``processes``."""
    if device.type == "cuda":
        used, of = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        return [crowded(used, of, f"of {device}")]
    used, of = processes * psutil.Process().memory_info().rss, psutil.virtual_memory().total
    return [crowded(used, of, "of this machine, workers not counted")]


def crowded(used: int, of: int, what: str) -> Line:
    """Whether there is room to spare."""
    text = f"{used / 1e9:,.1f} GB of the {of / 1e9:,.1f} GB {what} ({100 * used / of:.0f} %)"
    if used > 0.9 * of:
        return Line(WARN, f"{text}: train.accumulate, train.recompute=true or a smaller train.batch_size make room")
    return Line(OK, text)

"""Progress on the terminal and in metrics.jsonl every few steps.

metrics.jsonl holds a JSON object per line, each with its ``step``. There are two kinds:

- what was trained since the line before: the means of what steps report, ``samples_per_second`` in all and
  ``samples_per_second/<modality>``, ``data_wait`` (share of the time spent waiting for data), ``memory_gb`` (peak on
  the GPU, or of this process where there is none), ``resident_gb`` (memory of this process now), ``skipped`` and
  ``skipped_samples`` (what could not be used of the data);
- what an evaluation found, under the names that it gave.

JSON has no NaN and no infinity. Such a number is null and its name stands in the line's list ``non_finite``. A mean
leaves them out where it can: ``non_finite_steps`` counts the steps that had any.
"""

import json
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, TypeVar

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from data.errors import UserError
from data.skips import Skips

T = TypeVar("T")

# Rewriting faster than one can read would only cost time.
SECONDS_BETWEEN_REWRITES = 0.2
# Values of the newest evaluation that a line has room for.
HEADLINES = 3
# Back to the first column, and clear what stands there.
_CLEAR = "\r\x1b[K"


class Progress:
    """Averages what steps report and shows it, with rates and the time to go.

    Values are kept as tensors and read only when a line is due, so that a step never waits for the device. On a
    terminal a line that is rewritten in place follows the steps between two lasting lines; its values are those of the
    last one.

    Attributes:
        probe: values of the newest evaluation, a few of which are shown.
    """

    def __init__(
        self,
        metrics_file: Path,
        steps: int,
        start: int,
        batch_size: int,
        every: Sequence[int],
        skips: Skips,
        *,
        main: bool = True,
        log: Callable[[Mapping[str, float], int], None] | None = None,
    ) -> None:
        """Show steps from ``start`` on.

        Args:
            metrics_file: gets a JSON object per line.
            steps: of the whole run.
            start: how many are done.
            batch_size: rows of a step, of all ranks.
            every: a line is due after so many steps, for each of these numbers.
            skips: what the run could not use; a line has what came since the one before.
            main: whether this rank writes and prints; the others only count.
            log: is given the numbers of each line and the step, such as ``partial(trackers.log, accelerator)``.
        """
        self.metrics_file = metrics_file
        self.steps, self.batch_size, self.every, self.skips = steps, batch_size, every, skips
        self.main, self.log = main, log
        self.probe: dict[str, float] = {}
        self.step = start
        self.begun = self.line_begun = self.rewritten = time.perf_counter()
        self.first = self.line_first = start
        self.waited = 0.0
        self.window: list[Mapping[str, Tensor | float]] = []
        self.rows: list[Mapping[str, Tensor | float]] = []
        self.shown: dict[str, float] = {}  # what the last line had
        self.told = Counter(skips.counts)

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass batches through and count the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except UserError:
                # For the samples that it may be about; of the step that was to come, which a resumed run does again.
                self._write(self.step + 1, self._newly_skipped())
                self.clear()
                raise
            self.waited += time.perf_counter() - before
            yield batch

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Do something that is no training, such as an evaluation: the rates leave its time out, the ETA does not."""
        self.clear()
        before = time.perf_counter()
        yield
        self.line_begun += time.perf_counter() - before

    @property
    def due(self) -> bool:
        """Whether the coming update shows a line."""
        return any((self.step + 1) % every == 0 for every in self.every) or self.step + 1 == self.steps

    def update(
        self,
        values: Mapping[str, Tensor | float],
        counts: Mapping[str, Tensor | float] | None = None,
        *,
        last: bool = False,
    ) -> dict[str, float] | None:
        """Take in one step's values; where a line is due, show it and return the means since the last one.

        Args:
            values: name -> scalar. A name may be missing in some steps.
            counts: modality -> rows of the step that have it, of all ranks.
            last: whether the run ends with this step, though more were planned: it has its line, too.
        """
        due = self.due or last
        self.window.append({k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()})
        self.rows.append(counts or {})
        self.step += 1
        if not due:
            self._rewrite()
            return None
        means, non_finite, bad_steps = means_of(self.window)
        line = means | self._speed() | memory()
        if bad_steps:
            line["non_finite_steps"] = bad_steps
        skipped = self._newly_skipped()
        self._write(self.step, {**line, **skipped}, non_finite)
        self.shown = means
        if self.main:
            self._say(self._text(line, skipped["skipped"]))
        self.window.clear()
        self.rows.clear()
        self.line_begun, self.line_first, self.waited = time.perf_counter(), self.step, 0.0
        return means

    def evaluated(self, values: Mapping[str, float]) -> None:
        """Add a line of its own with what an evaluation found after the newest step, and keep it as ``probe``."""
        self.probe = dict(values)
        self._write(self.step, values)

    def clear(self) -> None:
        """Take away the line that is rewritten in place, so that something else can be printed."""
        if self.main and sys.stdout.isatty():
            print(_CLEAR, end="", flush=True)

    def _speed(self) -> dict[str, float]:
        """Samples per second, in all and of each modality, and the share of the time spent waiting for data."""
        seconds = time.perf_counter() - self.line_begun
        speed = {"samples_per_second": (self.step - self.line_first) * self.batch_size / seconds}
        for modality in dict.fromkeys(name for counts in self.rows for name in counts):
            rows = sum(float(counts.get(modality, 0)) for counts in self.rows)
            speed[f"samples_per_second/{modality}"] = rows / seconds
        return speed | {"data_wait": self.waited / seconds}

    def _newly_skipped(self) -> dict[str, Any]:
        """The samples that were skipped since the line before."""
        skipped = self.skips.counts - self.told
        self.told = Counter(self.skips.counts)
        samples = [[*sample, count] for sample, count in skipped.items()]
        return {"skipped": skipped.total(), "skipped_samples": samples}

    def _write(self, step: int, values: Mapping[str, Any], non_finite: Sequence[str] = ()) -> None:
        """Add a line to the file, and log its numbers.

        Args:
            step: that the line is about.
            values: whatever JSON can hold, and numbers that are not finite.
            non_finite: names of values that were not finite at some step.
        """
        if not self.main:
            return
        lost = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        record = {"step": step, **values, **dict.fromkeys(lost)}
        if names := list(dict.fromkeys([*non_finite, *lost])):
            record["non_finite"] = names
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        if self.log is not None:
            self.log({name: value for name, value in values.items() if isinstance(value, int | float)}, step)

    def _say(self, text: str) -> None:
        """Print a line that stays."""
        self.clear()
        print(text, flush=True)
        self.rewritten = time.perf_counter()

    def _rewrite(self) -> None:
        """Show where things stand, on a terminal; reads nothing from the device."""
        now = time.perf_counter()
        if not self.main or now - self.rewritten < SECONDS_BETWEEN_REWRITES or not sys.stdout.isatty():
            return
        self.rewritten = now
        seconds = now - self.line_begun
        rate = (self.step - self.line_first) * self.batch_size / seconds
        text = self._text({**self.shown, "samples_per_second": rate, "data_wait": self.waited / seconds}, 0)
        # A line that wraps could not be taken back. The cursor waits in front of it: what others print lands there.
        print(_CLEAR + text[: get_terminal_size().columns - 1], end="\r", flush=True)

    def _text(self, line: Mapping[str, float], skipped: int) -> str:
        """A line for people, the most important first: terminals may cut it."""
        remaining = (self.steps - self.step) * (time.perf_counter() - self.begun) / (self.step - self.first)
        parts = [f"step {self.step:>{len(str(self.steps))}}/{self.steps}", f"ETA {duration(remaining)}"]
        if skipped:
            parts.append(f"SKIPPED {skipped} samples")
        if "non_finite_steps" in line:
            parts.append(f"NOT FINITE in {line['non_finite_steps']} steps")
        parts += [f"{name} {value:.3g}" for name, value in line.items() if not _hidden(name, value)]
        prefix = "samples_per_second/"
        each = [f"{name.removeprefix(prefix)} {line[name]:.0f}" for name in line if name.startswith(prefix)]
        if all(line[name] == line["samples_per_second"] for name in line if name.startswith(prefix)):
            each = []  # every sample has every modality
        parts.append(f"{line['samples_per_second']:.0f} samples/s" + (f" ({', '.join(each)})" if each else ""))
        parts.append(f"data wait {line['data_wait']:.0%}")
        if "memory_gb" in line:
            parts.append(f"memory {line['memory_gb']:.1f} GB")
        if headlines := sorted(self.probe, key=_rank)[:HEADLINES]:
            parts.append("probe " + ", ".join(f"{name} {self.probe[name]:.3g}" for name in headlines))
        return "  ".join(parts)


def means_of(window: Sequence[Mapping[str, Tensor | float]]) -> tuple[dict[str, float], list[str], int]:
    """Means of what steps reported, over the steps that did.

    Args:
        window: a step's values each.

    Returns:
        name -> mean of its finite values, NaN if there are none; the names that had others; the number of steps that
        had others.
    """
    read = [{name: float(value) for name, value in values.items()} for values in window]
    seen: dict[str, list[float]] = {}
    for values in read:
        for name, value in values.items():
            seen.setdefault(name, []).append(value)
    means, non_finite = {}, []
    for name, numbers in seen.items():
        finite = [number for number in numbers if math.isfinite(number)]
        means[name] = sum(finite) / len(finite) if finite else math.nan
        if len(finite) < len(numbers):
            non_finite.append(name)
    return means, non_finite, sum(not all(map(math.isfinite, values.values())) for values in read)


def memory() -> dict[str, float]:
    """In 10**9 bytes: ``memory_gb``, the peak on the GPU, else of this process; ``resident_gb``, of this process now.

    Workers that read data are processes of their own and not counted.
    """
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:  # Linux counts in KiB, macOS in bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"memory_gb": peak / 1e9, "resident_gb": psutil.Process().memory_info().rss / 1e9}


def duration(seconds: float) -> str:
    """Seconds as 0:42, 3:07 or 2:03:04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _hidden(name: str, value: float) -> bool:
    """Whether a value stands in the file alone, or is told in words of its own."""
    if name.startswith("cut_"):
        return value == 0
    own = ("samples_per_second", "data_wait", "memory_gb", "resident_gb", "non_finite_steps")
    # A number for each two losses would be too many.
    return name == "learning_rate" or name.startswith(("trunk_", *own))


def _rank(name: str) -> int:
    """Probes come before retrieval, and that before all else."""
    return 0 if name.startswith("ridge/") else 1 if name.endswith(("/top1", "/r1")) else 2

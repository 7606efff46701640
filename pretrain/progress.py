"""A line of progress on the terminal and in metrics.jsonl every few steps."""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from data.errors import UserError
from data.skips import Skips

T = TypeVar("T")


class Progress:
    """Averages what steps report and shows it, with rates and the time to go.

    Values are kept as tensors and read only when a line is due, so that a step never waits for the device.
    """

    def __init__(
        self, metrics_file: Path, steps: int, start: int, batch_size: int, every: Sequence[int], skips: Skips
    ) -> None:
        """Show steps from ``start`` on.

        Args:
            metrics_file: gets a JSON object per line.
            steps: of the whole run.
            start: how many are done.
            batch_size: rows of a step.
            every: a line is due after so many steps, for each of these numbers.
            skips: what the run could not use; a line has what came since the one before.
        """
        self.metrics_file = metrics_file
        self.steps, self.batch_size, self.every, self.skips = steps, batch_size, every, skips
        self.step = start
        self.begun = self.line_begun = time.perf_counter()
        self.first = self.line_first = start
        self.waited = 0.0
        self.window: defaultdict[str, list[Tensor | float]] = defaultdict(list)
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
                self._write(self.step + 1, {})
                raise
            self.waited += time.perf_counter() - before
            yield batch

    @property
    def due(self) -> bool:
        """Whether the coming update shows a line."""
        return any((self.step + 1) % every == 0 for every in self.every) or self.step + 1 == self.steps

    def update(self, values: Mapping[str, Tensor | float]) -> dict[str, float] | None:
        """Take in one step's values; where a line is due, show it and return the means since the last one."""
        due = self.due
        for name, value in values.items():
            self.window[name].append(value.detach() if isinstance(value, Tensor) else value)
        self.step += 1
        if not due:
            return None
        means = {name: sum(float(value) for value in seen) / len(seen) for name, seen in self.window.items()}
        now = time.perf_counter()
        seconds, steps = now - self.line_begun, self.step - self.line_first
        rate = steps * self.batch_size / seconds
        remaining = (self.steps - self.step) * (now - self.begun) / (self.step - self.first)
        skipped = self._write(self.step, {**means, "samples_per_second": rate, "data_wait": self.waited / seconds})
        self._print(means, rate, self.waited / seconds, skipped, remaining)
        self.window.clear()
        self.line_begun, self.line_first, self.waited = time.perf_counter(), self.step, 0.0
        return means

    def _write(self, step: int, values: Mapping[str, float]) -> int:
        """Add a line to the file; returns how many samples were skipped since the one before."""
        skipped = self.skips.counts - self.told
        self.told = Counter(self.skips.counts)
        samples = [[*sample, count] for sample, count in skipped.items()]
        record = {"step": step, **values, "skipped": skipped.total(), "skipped_samples": samples}
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return skipped.total()

    def _print(self, means: Mapping[str, float], rate: float, waited: float, skipped: int, remaining: float) -> None:
        hidden = {"learning_rate", *(name for name, value in means.items() if name.startswith("cut_") and value == 0)}
        hidden |= {name for name in means if name.startswith("trunk_")}  # a number for each two losses
        values = "  ".join(f"{name} {value:.3g}" for name, value in means.items() if name not in hidden)
        print(
            f"step {self.step:>{len(str(self.steps))}}/{self.steps}  {values}  {rate:.0f} samples/s  "
            f"data wait {waited:.0%}  "
            + (f"SKIPPED {skipped} samples  " if skipped else "")
            + f"ETA {duration(remaining)}",
            flush=True,
        )


def duration(seconds: float) -> str:
    """Seconds as 0:42, 3:07 or 2:03:04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

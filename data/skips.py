"""Samples that could not be used: each is replaced, counted and shown, and too many of them end the run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from data.errors import UserError
from data.source import SampleError
from data.terminal import printable

# Distinct samples that are kept by name; the rest are counted by shard.
MAX_KEYS = 10_000
_OTHERS = "..."
# A share is judged as if at least so many rows had been read: 1 of the first 8 is not 12 per cent.
MIN_ROWS = 1000


class StreamError(UserError):
    """The data can't go on, or are not those of the run; says what differs."""


class Skipped(NamedTuple):
    """A sample that was replaced by one of a later step.

    Attributes:
        source: name of the source.
        shard: location of the shard.
        key: of the sample.
        error: name of the error's class, such as ImageError.
        message: what was wrong.
    """

    source: str
    shard: str
    key: str
    error: str
    message: str

    @classmethod
    def of(cls, error: SampleError) -> "Skipped":
        """What an error says of its sample."""
        return cls(error.source, error.shard, error.key, error.error, str(error))


class Skips:
    """How often which sample was skipped, over the whole run and all ranks."""

    def __init__(self, max_fraction: float = 1.0) -> None:
        self.max_fraction = max_fraction
        self.counts: Counter[tuple[str, str, str, str]] = Counter()
        self.rows = 0

    @property
    def total(self) -> int:
        """Rows that were filled by another sample than their own."""
        return self.counts.total()

    def add(self, skipped: Sequence[Skipped], rows: int) -> None:
        """Count what was skipped of ``rows`` further rows.

        Raises:
            StreamError: more than ``max_fraction`` of all rows.
        """
        self.rows += rows
        for skip in skipped:
            entry = (skip.source, skip.shard, skip.key, skip.error)
            if entry not in self.counts and len(self.counts) >= MAX_KEYS:
                entry = (skip.source, skip.shard, _OTHERS, skip.error)
            self.counts[entry] += 1
        if skipped and self.total > self.max_fraction * max(self.rows, MIN_ROWS):
            raise StreamError(
                f"{self.total} of {self.rows} rows could not be used, more than "
                f"data.max_bad_fraction={self.max_fraction} allows:\n{self.table()}\n"
                f"the last one: {skipped[-1].message}\n"
                "`python -m data validate --decode` lists all bad samples of a shard"
            )

    def table(self, rows: int = 20) -> str:
        """Source, shard, error class, how often, and one of the keys; the most frequent first."""
        by_kind: Counter[tuple[str, str, str]] = Counter()
        examples: dict[tuple[str, str, str], list[str]] = {}
        for (source, shard, key, error), count in self.counts.items():
            by_kind[source, shard, error] += count
            examples.setdefault((source, shard, error), []).append(key)
        lines = []
        for kind, count in by_kind.most_common(rows):
            keys = [key for key in examples[kind] if key != _OTHERS]
            many = "" if len(keys) == len(examples[kind]) else "more than "
            example = f", such as {printable(keys[0])}" if keys else ""
            lines.append(f"  {'  '.join(kind)}  {count} times in {many}{len(keys)} samples{example}")
        if len(by_kind) > rows:
            lines.append(f"  ... and {len(by_kind) - rows} more kinds")
        return "\n".join(lines)

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return {"rows": self.rows, "samples": [[*entry, count] for entry, count in sorted(self.counts.items())]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """From `state`."""
        self.rows = int(state["rows"])
        self.counts = Counter({(str(s), str(h), str(k), str(e)): int(n) for s, h, k, e, n in state["samples"]})


def share(skipped: Sequence[Skipped], error: str | None, group: Any) -> tuple[list[Skipped], str | None]:
    """What all ranks have skipped in a step, and the first rank's error: the same on every rank.

    Args:
        skipped: of this rank.
        error: why this rank can't go on, or None.
        group: of `torch.distributed`, on the CPU; None for a single process.
    """
    if group is None:
        return list(skipped), error
    # Two numbers nearly always suffice; objects travel only when there is something to tell.
    counts = torch.tensor([len(skipped), error is not None])
    dist.all_reduce(counts, group=group)
    if not counts.any():
        return [], None
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, (list(skipped), error), group=group)
    if any(text is not None for _, text in told):
        # All will leave now. One that did so before the others have heard why would only be seen to hang up; whoever
        # sees that here has heard.
        with suppress(RuntimeError):
            dist.barrier(group=group)
    return [skip for skips, _ in told for skip in skips], next((text for _, text in told if text is not None), None)

"""The only types that cross folder borders: a Batch holds one Field per modality that is present."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Field(NamedTuple):
    """One modality of a batch, stacked over only the samples that have it.

    Attributes:
        x: (n, ...) values. From the stream: image uint8 (n, 3, H, W), text int64 (n, L), audio int16 (n, T).
            On the training device: image float (n, 3, H, W), text int64 (n, L), audio float (n, frames, mels).
        rows: (n,) int64, ascending: the row of each entry in the batch. Always on the CPU, so that asking who has
            what never waits for the device.
        valid: (n, L) bool, False where ``x`` is padding; None where nothing is padded.
        cut: how many of the n were longer than their view and lost the rest; None where none ever is.
    """

    x: Tensor
    rows: Tensor
    valid: Tensor | None = None
    cut: int | None = None

    def select(self, index: Tensor) -> "Field":
        """The entries at ``index`` (k,) int64 on the CPU, ascending; of fewer than all, ``cut`` is not known."""
        if len(index) == len(self.rows):
            return self
        on_device = index.to(self.x.device, non_blocking=True)
        valid = None if self.valid is None else self.valid[on_device]
        return Field(self.x[on_device], self.rows[index], valid)


class Batch(NamedTuple):
    """Samples of several modalities; a sample may lack any of them.

    Attributes:
        fields: modality name -> Field. A modality that no sample has is absent.
        size: number of samples (rows).
        keys: the key of each row, in order.
        seeds: (size,) int64, one random seed per row, for the augmentation on the device and for masks; on the CPU
            until ``to``. None in evaluation: no augmentation.
        skipped: samples that could not be used and were replaced, see ``data.skips.Skipped``.
        groups: (size,) int64, on the CPU; rows of equal number are of one group and no negatives of each other, those
            below 0 of none. None where nothing is grouped.
        first: number of its first row among those of its step, of which other ranks and micro-batches have the others.
    """

    fields: dict[str, Field]
    size: int
    keys: list[str]
    seeds: Tensor | None = None
    skipped: tuple[Any, ...] = ()
    groups: Tensor | None = None
    first: int = 0

    def split(self, parts: int) -> "list[Batch]":
        """Equal parts of consecutive rows; ``skipped`` stays with the first.

        Raises:
            ValueError: parts that don't divide the rows.
        """
        if self.size % parts:
            raise ValueError(f"{parts} parts of {self.size} rows: they must divide them")
        if parts == 1:
            return [self]
        size, made = self.size // parts, []
        for first in range(0, self.size, size):
            rows = slice(first, first + size)
            fields = {}
            for name, field in self.fields.items():
                chosen = ((field.rows >= first) & (field.rows < first + size)).nonzero()[:, 0]
                if len(chosen):
                    part = field.select(chosen)
                    fields[name] = part._replace(rows=part.rows - first)
            made.append(
                Batch(
                    fields,
                    size,
                    self.keys[rows],
                    None if self.seeds is None else self.seeds[rows],
                    self.skipped if first == 0 else (),
                    None if self.groups is None else self.groups[rows],
                    self.first + first,
                )
            )
        return made

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its values and seeds on ``device``."""
        fields = {
            name: field._replace(
                x=field.x.to(device, non_blocking=True),
                valid=None if field.valid is None else field.valid.to(device, non_blocking=True),
            )
            for name, field in self.fields.items()
        }
        seeds = None if self.seeds is None else self.seeds.to(device, non_blocking=True)
        return self._replace(fields=fields, seeds=seeds)

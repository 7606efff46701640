"""The only types that cross folder borders: a Batch holds one Field per modality that is present."""

from typing import NamedTuple

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
    """

    x: Tensor
    rows: Tensor
    valid: Tensor | None = None

    def select(self, index: Tensor) -> "Field":
        """The entries at ``index`` (k,) int64 on the CPU, ascending."""
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
    """

    fields: dict[str, Field]
    size: int
    keys: list[str]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its values on ``device``."""
        fields = {
            name: Field(
                field.x.to(device, non_blocking=True),
                field.rows,
                None if field.valid is None else field.valid.to(device, non_blocking=True),
            )
            for name, field in self.fields.items()
        }
        return self._replace(fields=fields)

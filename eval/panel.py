"""A fixed few samples of a source, kept decoded to be encoded time and again, on several ranks each its share."""

import hashlib
import json
import random
from bisect import bisect_right
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.batch import Batch, Field
from data.batches import Pass
from data.errors import UserError
from data.source import Chosen, Source
from data.transforms import OnDevice, Views
from eval.features import content_ids
from pretrain.model.encoder import Encoder


class Seen(NamedTuple):
    """One modality of a panel, on the CPU, for the n samples that have it.

    Attributes:
        rows: (n,) int64, ascending: which of the panel's samples.
        features: (n, D) float32, the encoder's pooled output.
        embeddings: (n, E) float32, its projection, not normalised.
        content: (n,) int64, equal for equal inputs.
        labels: (n,) int64, equal for equal labels; all 0 without a label.
    """

    rows: Tensor
    features: Tensor
    embeddings: Tensor
    content: Tensor
    labels: Tensor

    @property
    def broken(self) -> int:
        """How many of the samples have features or embeddings that are zero or not finite."""
        features, embeddings = (x.isfinite().all(1) & x.ne(0).any(1) for x in (self.features, self.embeddings))
        return int((~(features & embeddings)).sum())


class Panel:
    """Samples of a source, chosen as a function of the source alone. All ranks make one and encode it together."""

    def __init__(
        self,
        source: Source,
        samples: int,
        views: Views,
        tokenizer: PreTrainedTokenizerBase,
        label: str | None,
        device: torch.device,
        batch_size: int,
        workers: int,
        rank: int,
        world: int,
    ) -> None:
        """Read the samples into memory, each rank every ``world``-th batch; for the rest see `eval.monitor.Monitor`.

        Samples that can't be used are left out and printed.

        Raises:
            UserError: shards that can't be read any more, or a sample without ``label``; on all ranks.
        """
        self.names, self.device, self.world = list(views.used), device, world
        self.on_device = OnDevice(views).to(device)
        places = choose(source, samples)
        mine = torch.split(torch.arange(len(places)), batch_size)[rank::world]
        own = [int(row) for rows in mine for row in rows]
        chosen = Chosen(source, [places[row] for row in own], few=True)
        self.batches: list[tuple[Tensor, Batch]] = []  # with the rows of each
        labels = torch.zeros(len(places), dtype=torch.int64)
        failure = None
        try:
            if label is not None:
                numbers = [label_number(value) for value in chosen.labels(label)]
                labels[own] = torch.tensor(numbers, dtype=torch.int64)
            batches = Pass(chosen, views, tokenizer, batch_size).batches(workers)
            for rows, batch in zip(mine, batches, strict=True):
                fields = {name: _owned(field) for name, field in batch.fields.items()}
                self.batches.append((rows, Batch(fields, batch.size, batch.keys)))
                for skip in batch.skipped:
                    print(f"{source.name}: not looked at: {skip.message}", flush=True)
        except UserError as error:
            failure = error
        # A rank that raised alone would leave the others waiting for it.
        failures = int(self._sum(torch.tensor(int(failure is not None))))
        if failure is not None:
            raise failure
        if failures:
            raise UserError(f"{source.name}: {failures} other processes could not read their samples; they say why")
        content = torch.zeros(len(self.names), len(places), dtype=torch.int64)
        present = torch.zeros_like(content)
        for rows, batch in self.batches:
            for name, field in batch.fields.items():
                content[self.names.index(name), rows[field.rows]] = content_ids(field)
                present[self.names.index(name), rows[field.rows]] = 1
        self.content, self.present, self.labels = self._sum(content), self._sum(present).bool(), self._sum(labels)

    @torch.no_grad()
    def encode(self, encoder: Encoder) -> dict[str, Seen]:
        """What an encoder on the panel's device makes of all samples, by modality."""
        width = encoder.config.width
        outputs = torch.zeros(*self.present.shape, width + encoder.config.embed_dim)
        for rows, batch in self.batches:
            for name, field in self.on_device(batch.to(self.device)).fields.items():
                both = torch.cat(encoder(name, field), dim=1)
                outputs[self.names.index(name), rows[field.rows]] = both.float().cpu()
        outputs = self._sum(outputs)
        seen = {}
        for i, name in enumerate(self.names):
            rows = self.present[i].nonzero()[:, 0]
            features, embeddings = outputs[i, rows].tensor_split([width], dim=1)
            seen[name] = Seen(rows, features, embeddings, self.content[i, rows], self.labels[rows])
        return seen

    def _sum(self, x: Tensor) -> Tensor:
        """Over ranks. Each fills in its own rows of zeros, so this gathers them, in order and exactly."""
        if self.world > 1:
            x = x.to(self.device)
            dist.all_reduce(x)
        return x.cpu()


def choose(source: Source, samples: int) -> list[tuple[int, int]]:
    """(shard, sample) of at most ``samples`` samples: one from each of so many equal stretches of the source.

    Which one of a stretch is drawn, always alike: equal steps could meet one class only where classes take turns.
    """
    n, ends = len(source), list(accumulate(shard.samples for shard in source.shards))
    count, draw = min(n, samples), random.Random(0)
    numbers = [draw.randrange(i * n // count, (i + 1) * n // count) for i in range(count)]
    shards = [bisect_right(ends, number) for number in numbers]
    return [(i, number - ends[i] + source.shards[i].samples) for i, number in zip(shards, numbers, strict=True)]


def instances(a: Tensor, b: Tensor) -> Tensor:
    """(n,) int64 from the contents (n,) of both sides of n pairs: equal for pairs that share either, or are linked so.

    A caption that belongs to several images is no mistake for any of them, nor is any of several captions of one.
    """
    sides = [torch.unique(side, return_inverse=True)[1] for side in (a, b)]
    lowest = torch.arange(len(a))
    while True:
        before = lowest
        for side in sides:
            lowest = torch.full_like(lowest, len(a)).scatter_reduce(0, side, lowest, "amin")[side]
        if torch.equal(lowest, before):
            return lowest


def label_number(label: object) -> int:
    """63 bits of a label from JSON: ranks exchange numbers, and none of them has seen every name."""
    digest = hashlib.blake2b(json.dumps(label, sort_keys=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _owned(field: Field) -> Field:
    """A copy in ordinary memory: what comes from workers is shared or page-locked, of which there is little."""
    valid = None if field.valid is None else field.valid.clone()
    return field._replace(x=field.x.clone(), rows=field.rows.clone(), valid=valid)

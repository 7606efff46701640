"""The iterable: order -> read -> decode -> view -> collate. Batches of one source, in an order fixed by the seed."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase

from data.batch import Batch, Field
from data.decode import DECODERS, MAX_MEMBER_BYTES, METADATA, MODALITIES, DecodeError, decode_metadata
from data.errors import UserError
from data.index import ShardIndex
from data.order import Order
from data.transforms import Views

# Several windows of shards; a process may often open no more than 1024 files.
MAX_OPEN_FILES = 64


@dataclass
class DataConfig:
    """Shards, and what is read of them."""

    embedded: str | None = None
    """Embedded data set to build at `root` if it is not there; allowed: digits, or null."""
    root: str = "."
    """Folder that relative patterns of shards start from."""
    train: list[str] = field(default_factory=list)
    """Training shards: paths, globs (train-*.tar) or ranges (train-{00000..00009}.tar)."""
    val: list[str] = field(default_factory=list)
    """Shards on which probes choose their hyper-parameters."""
    test: list[str] = field(default_factory=list)
    """Shards on which results are reported."""
    views: Views = field(default_factory=Views)
    """Sizes and augmentation, per modality."""
    workers: int = 1
    """Processes that read ahead: 1, or 0 to read within the training process."""

    def __post_init__(self) -> None:
        if self.embedded not in (None, "digits"):
            raise ValueError(f"data.embedded={self.embedded}: allowed are digits, null")
        if not self.views.used:
            raise ValueError("data.views has no modality: at least one of image, text, audio is needed")
        if self.workers not in (0, 1):
            raise ValueError(f"data.workers={self.workers}: allowed are 0 and 1")


class StreamError(UserError):
    """A sample that can't be used; names its shard and key."""


class Source:
    """Indexed shards, read by position. File handles are opened on first use, so each worker has its own."""

    def __init__(self, shards: Sequence[ShardIndex]) -> None:
        self.shards = list(shards)
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return sum(len(shard.samples) for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Changes when any shard's content, name or place in the list changes."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.path.name} {shard.sha256}\n".encode())
        return digest.hexdigest()

    def members(self, shard: int, sample: int, modalities: Sequence[str]) -> dict[str, Any]:
        """Decoded members of a sample for the modalities asked for; what it lacks is absent.

        Raises:
            StreamError: damaged or over a limit, or several members of one modality; names shard, key and member.
        """
        index = self.shards[shard]
        found: dict[str, Any] = {}
        for extension in index.samples[sample].members:
            modality = MODALITIES.get(extension)
            if modality is None or modality not in modalities:
                continue
            if modality in found:
                raise StreamError(
                    f"{index.path}: sample {index.samples[sample].key} has more than one {modality} member: "
                    f"{', '.join(index.samples[sample].members)}"
                )
            found[modality] = self._decode(shard, sample, extension, DECODERS[modality])
        return found

    def metadata(self, shard: int, sample: int) -> dict[str, Any]:
        """The sample's ``.json`` member; empty if it has none. Raises StreamError like ``members``."""
        if METADATA not in self.shards[shard].samples[sample].members:
            return {}
        metadata: dict[str, Any] = self._decode(shard, sample, METADATA, decode_metadata)
        return metadata

    def labels(self, name: str) -> list[Any]:
        """The metadata field ``name`` of every sample, in the order of the shards.

        Raises:
            StreamError: a sample lacks it; names the sample and the fields that it has.
        """
        labels = []
        for shard, sample in self.places():
            metadata = self.metadata(shard, sample)
            if name not in metadata:
                index = self.shards[shard]
                raise StreamError(
                    f"{index.path}: sample {index.samples[sample].key} has no {name!r} in its .json; "
                    f"it has: {', '.join(sorted(metadata)) or 'nothing'}"
                )
            labels.append(metadata[name])
        return labels

    def count(self, modality: str) -> int:
        """How many samples have a member of the modality."""
        extensions = {extension for extension, name in MODALITIES.items() if name == modality}
        return sum(not extensions.isdisjoint(sample.members) for shard in self.shards for sample in shard.samples)

    def unread(self) -> set[str]:
        """Extensions of members that nothing reads."""
        found = {extension for shard in self.shards for sample in shard.samples for extension in sample.members}
        return found - set(MODALITIES) - {METADATA}

    def captions(self, limit: int) -> Iterator[str]:
        """The text of the first ``limit`` samples that have one."""
        for shard, sample in self.places():
            if limit == 0:
                return
            text = self.members(shard, sample, ("text",)).get("text")
            if text is not None:
                limit -= 1
                yield text

    def places(self) -> Iterator[tuple[int, int]]:
        """(shard, sample) of every sample, in the order of the shards."""
        for i, shard in enumerate(self.shards):
            for j in range(len(shard.samples)):
                yield i, j

    def _decode(self, shard: int, sample: int, extension: str, decode: Any) -> Any:
        index = self.shards[shard]
        key, members = index.samples[sample]
        offset, size = members[extension]
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            try:
                self._files[shard] = os.open(index.path, os.O_RDONLY)
            except OSError as error:
                raise StreamError(f"{index.path}: sample {key} can't be read: {error.strerror}") from error
        try:
            if size > MAX_MEMBER_BYTES:
                raise DecodeError(f"{size} bytes: at most {MAX_MEMBER_BYTES} are allowed")
            data = os.pread(self._files[shard], size, offset)
            if len(data) != size:
                raise DecodeError(f"{len(data)} of {size} bytes could be read; was the file changed?")
            return decode(data)
        except DecodeError as error:
            raise StreamError(f"{index.path}: sample {key}, member .{extension}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        # An open file must not be shared with another process.
        return {**self.__dict__, "_files": {}}


class Sample(NamedTuple):
    """One sample after the worker's half of its views."""

    key: str
    values: dict[str, Any]


class Stream(IterableDataset[Batch]):
    """Batches of ``Source`` samples.

    With ``order`` the stream is endless, shuffled and augmented, and starts at global position ``start``: batch b
    holds the positions ``start + b * batch_size`` and following. Without, it is one pass in the order of the
    shards, in the deterministic views; the last batch may be smaller.
    """

    def __init__(
        self,
        source: Source,
        views: Views,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        order: Order | None = None,
        start: int = 0,
    ) -> None:
        super().__init__()
        self.source = source
        self.views = views
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.order = order
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        samples = self._evaluation() if self.order is None else self._training(self.order)
        while rows := list(islice(samples, self.batch_size)):
            yield collate(rows, self.views, self.tokenizer)

    def batches(self, workers: int) -> Iterator[Batch]:
        """The stream's batches, read in this process (0 workers) or ahead in one worker process (1).

        Raises:
            StreamError: a sample that can't be used; the same error, with the same message, for either.
        """
        loader: DataLoader[Any] = DataLoader(
            _ErrorsAsValues(self),
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            prefetch_factor=4 if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            if isinstance(batch, StreamError):
                raise batch
            yield batch

    def _training(self, order: Order) -> Iterator[Sample]:
        position = self.start
        while True:
            epoch, shard, sample = order.at(position)
            key = self.source.shards[shard].samples[sample].key
            yield self._view(shard, sample, random_state(order.seed, epoch, key))
            position += 1

    def _evaluation(self) -> Iterator[Sample]:
        for shard, sample in self.source.places():
            yield self._view(shard, sample, None)

    def _view(self, shard: int, sample: int, random: np.random.Generator | None) -> Sample:
        views = self.views.used
        members = self.source.members(shard, sample, tuple(views))
        values = {name: views[name].sample(value, random) for name, value in members.items()}
        return Sample(self.source.shards[shard].samples[sample].key, values)


class _ErrorsAsValues(IterableDataset[Any]):
    """Hands an error on as the last item: raised in a worker, it would come out wrapped in the worker's traceback."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __iter__(self) -> Iterator[Batch | StreamError]:
        try:
            yield from self.stream
        except StreamError as error:
            yield error


def random_state(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The random numbers of one sample's augmentation: the same wherever and whenever it is read."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def collate(samples: Sequence[Sample], views: Views, tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Stack, per modality, only the samples that have it."""
    fields: dict[str, Field] = {}
    for name, view in views.used.items():
        rows = [row for row, sample in enumerate(samples) if name in sample.values]
        if rows:
            stacked = view.stack([samples[row].values[name] for row in rows], tokenizer)
            fields[name] = stacked._replace(rows=torch.tensor(rows))
    return Batch(fields, len(samples), [sample.key for sample in samples])


def _unchanged(batch: Any) -> Any:
    return batch

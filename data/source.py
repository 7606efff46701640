"""A source: indexed shards, of which any sample can be read at any time."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from data.cache import Cache, Reader
from data.decode import (
    DECODERS,
    MAX_MEMBER_BYTES,
    METADATA,
    MODALITIES,
    DecodeError,
    LimitError,
    decode_metadata,
)
from data.errors import UserError
from data.fetch import is_url, masked
from data.index import Sample, Shard, load_lines, parse_sample
from data.terminal import printable
from data.transforms import View

# Indexes that a process keeps, at about 150 bytes a sample.
MAX_INDEXES = 512
# Bytes between members of a remote sample that are read along rather than skipped: headers, other small members.
MAX_GAP = 1 << 16


class SampleError(UserError):
    """A sample that can't be used.

    Attributes:
        source: name of the source.
        shard: location of the shard.
        key: of the sample.
        error: name of the error's class, such as ImageError.
    """

    def __init__(self, source: str, shard: str, key: str, error: str, message: str) -> None:
        super().__init__(source, shard, key, error, message)  # from these it is made again where a worker sends it
        self.source, self.shard, self.key, self.error = source, shard, key, error

    def __str__(self) -> str:
        """Shard, key and what is wrong."""
        return f"{self.shard}: sample {printable(self.key)}, {self.args[-1]}"


class MissingModalityError(DecodeError):
    """A sample without a modality that it must have."""


class AmbiguousModalityError(DecodeError):
    """A sample with several members of one modality."""


class Source:
    """Samples by shard and number. Files are opened on first use, so each worker has its own."""

    def __init__(
        self,
        shards: Sequence[Shard],
        name: str = "train",
        *,
        weight: float | None = None,
        max_epochs: int | None = None,
        require: Sequence[str] = (),
        cache: Cache | None = None,
    ) -> None:
        """Samples of ``shards``.

        Args:
            shards: in this order, the samples are numbered.
            name: for messages, and it fixes the shuffles.
            weight: share of the rows of a mixture; by default the number of samples.
            max_epochs: after so many it leaves the mixture.
            require: modalities without which a sample is not used.
            cache: where remote shards are kept; without, samples are read over the network one by one.
        """
        self.shards = list(shards)
        self.name = name
        self.weight = weight
        self.max_epochs = max_epochs
        self.require = tuple(require)
        self.cache = cache
        self._reader = Reader(cache)
        self._lines: OrderedDict[int, list[bytes]] = OrderedDict()
        # Of a sample one asks for its key, its members and its metadata in turn.
        self._last: tuple[tuple[int, int], Sample] | None = None

    def __len__(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Changes when any shard's content, name or place in the list changes."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{os.path.basename(shard.location)} {shard.sha256}\n".encode())  # noqa: PTH119 (a URL, too)
        return digest.hexdigest()

    def sample(self, shard: int, number: int) -> Sample:
        """The key and the members of a sample.

        Raises:
            ShardError, FetchError: the index can't be read any more.
        """
        last = self._last
        if last is not None and last[0] == (shard, number):
            return last[1]
        if shard not in self._lines:
            self._lines[shard] = load_lines(self.shards[shard], self.cache)
            if len(self._lines) > MAX_INDEXES:
                self._lines.popitem(last=False)
        self._lines.move_to_end(shard)
        sample = parse_sample(self.shards[shard], self._lines[shard][number])
        self._last = (shard, number), sample
        return sample

    def values(self, shard: int, number: int, views: Mapping[str, View], training: bool) -> dict[str, Any]:
        """Decoded members of a sample for the modalities of ``views``; what it lacks is absent.

        Raises:
            SampleError: damaged, over a limit, or with several members of one modality; in training also without
                a modality of ``require``, or without any.
            FetchError: the shard can't be read any more.
        """
        sample = self.sample(shard, number)
        found: dict[str, str] = {}
        for extension in sample.members:
            modality = MODALITIES.get(extension)
            if modality is None or modality not in views:
                continue
            if modality in found:
                error = AmbiguousModalityError(f"more than one {modality} member: {', '.join(sample.members)}")
                raise self._bad(shard, sample, error)
            found[modality] = extension
        missing = [modality for modality in self.require if modality not in found] or ([] if found else list(views))
        if missing and training:  # in evaluation a sample counts for the modalities that it has
            has = ", ".join(sample.members)
            raise self._bad(shard, sample, MissingModalityError(f"no {' or '.join(missing)}, only members {has}"))
        contents = self._read(shard, sample, found.values())
        return {
            modality: self._decode(
                shard, sample, extension, contents[extension], partial(views[modality].decode, training=training)
            )
            for modality, extension in found.items()
        }

    def contents(self, shard: int, number: int) -> dict[str, bytes]:
        """Extension -> bytes of all members of a sample, not decoded.

        Raises:
            SampleError: a member over the limit.
            FetchError: the shard can't be read any more.
        """
        sample = self.sample(shard, number)
        return self._read(shard, sample, sample.members)

    def metadata(self, shard: int, number: int) -> dict[str, Any]:
        """The sample's ``.json`` member; empty if it has none.

        Raises:
            SampleError: it holds no JSON object.
            FetchError: the shard can't be read any more.
        """
        sample = self.sample(shard, number)
        if METADATA not in sample.members:
            return {}
        content = self._read(shard, sample, [METADATA])[METADATA]
        metadata: dict[str, Any] = self._decode(shard, sample, METADATA, content, decode_metadata)
        return metadata

    def labels(self, name: str) -> list[Any]:
        """The metadata field ``name`` of every sample, in the order of the shards.

        Raises:
            SampleError: a sample lacks it; names the sample and the fields that it has.
        """
        labels = []
        for shard, number in self.places():
            metadata = self.metadata(shard, number)
            if name not in metadata:
                has = ", ".join(sorted(metadata)) or "nothing"
                error = MissingModalityError(f"no {name!r} in its .json; it has: {has}")
                raise self._bad(shard, self.sample(shard, number), error)
            labels.append(metadata[name])
        return labels

    def count(self, modality: str) -> int:
        """How many members of the modality there are."""
        extensions = [extension for extension, name in MODALITIES.items() if name == modality]
        return sum(shard.members.get(extension, 0) for shard in self.shards for extension in extensions)

    def unread(self) -> set[str]:
        """Extensions of members that nothing reads."""
        return {extension for shard in self.shards for extension in shard.members} - set(MODALITIES) - {METADATA}

    def captions(self, limit: int) -> Iterator[str]:
        """The texts of the first ``limit`` samples that have a good one; training counts the bad ones."""
        decode = DECODERS["text"]
        for shard, number in self.places():
            sample = self.sample(shard, number)
            for extension in sample.members:
                if limit > 0 and MODALITIES.get(extension) == "text":
                    try:
                        content = self._read(shard, sample, [extension])[extension]
                        text: str = self._decode(shard, sample, extension, content, decode)
                    except SampleError:
                        continue
                    limit -= 1
                    yield text
            if limit <= 0:
                return

    def places(self) -> Iterator[tuple[int, int]]:
        """(shard, sample) of every sample, in the order of the shards."""
        for i, shard in enumerate(self.shards):
            for j in range(shard.samples):
                yield i, j

    def _read(self, shard: int, sample: Sample, extensions: Collection[str]) -> dict[str, bytes]:
        """Bytes of the members."""
        members = sample.members
        spans = [members[extension] for extension in extensions]
        for span in spans:
            if span[1] > MAX_MEMBER_BYTES:  # before it is in memory
                extension = next(extension for extension in extensions if members[extension] == span)
                error = LimitError(f"member .{extension}: {span[1]} bytes: at most {MAX_MEMBER_BYTES} are allowed")
                raise self._bad(shard, sample, error)
        stored = self.shards[shard]
        if self.cache is None and len(spans) > 1 and is_url(stored.location):
            contents = self._read_together(stored, spans)
        else:
            contents = self._reader.read_spans(stored, spans)
        return dict(zip(extensions, contents, strict=True))

    def _read_together(self, stored: Shard, spans: list[tuple[int, int]]) -> list[bytes]:
        """Over a network a read is a round trip, so members that lie close together are taken in one."""
        start = min(offset for offset, _ in spans)
        end = max(offset + size for offset, size in spans)
        if end - start > sum(size for _, size in spans) + MAX_GAP:
            return self._reader.read_spans(stored, spans)
        content = self._reader.read(stored, start, end - start)
        return [content[offset - start : offset - start + size] for offset, size in spans]

    def _decode(
        self, shard: int, sample: Sample, extension: str, content: bytes, decode: Callable[[bytes], Any]
    ) -> Any:
        try:
            return decode(content)
        except DecodeError as error:
            named = type(error)(f"member .{extension}: {error}")
            raise self._bad(shard, sample, named) from error

    def _bad(self, shard: int, sample: Sample, error: DecodeError) -> SampleError:
        return SampleError(self.name, masked(self.shards[shard].location), sample.key, type(error).__name__, str(error))

    def __getstate__(self) -> dict[str, Any]:
        # A worker reads its own indexes: those that it needs.
        return {**self.__dict__, "_lines": OrderedDict(), "_last": None}


class Chosen(Source):
    """Some samples of a source, in an order of their own."""

    def __init__(self, source: Source, places: Iterable[tuple[int, int]], *, few: bool = False) -> None:
        """Evaluation's view of them: nothing is required of a sample.

        Args:
            source: where they are.
            places: (shard, sample) of each.
            few: read remote ones in ranges, though there is a cache: a few of each shard are no reason to fetch it.
        """
        super().__init__(source.shards, source.name, cache=source.cache)
        self._places = list(places)
        if few:
            self._reader = Reader(None)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def fingerprint(self) -> str:
        """Changes with the shards, and with the choice."""
        return hashlib.sha256(f"{super().fingerprint} {self._places}".encode()).hexdigest()

    def places(self) -> Iterator[tuple[int, int]]:
        """(shard, sample) of those chosen, in their order."""
        yield from self._places

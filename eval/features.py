"""Frozen features: what an encoder, or no encoder at all, makes of every sample of a split. One pass, kept on disk."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch, Field
from data.batches import Pass
from data.errors import UserError
from data.skips import Skipped, Skips
from data.source import Chosen, Source
from data.terminal import printable
from data.transforms import OnDevice
from eval.cache import Cache, Entry, RowWriter, interleave
from eval.encoders import Raw
from eval.scored import LAST, Encoded, Scored, digest

PATIENCE = timedelta(days=7)  # ranks wait for the slowest, and for the first one to bring all together
_PART = "part.json"


class FeatureError(UserError):
    """Features that are no numbers, or that are lost; names the encoder, the modality and the sample, or the folder."""


class Features(NamedTuple):
    """One modality of one split, for the n samples that have it.

    Attributes:
        features: (n, D) float32, the encoder's pooled output.
        embeddings: (n, E) float32, its projection, not normalised; None where the model has no shared space.
        raw: (n, R) float32, the input itself, at most some thousand values.
        labels: (n,) int64, or (n, C) bool where a sample may have several.
        content: (n,) int64, equal for samples with the same input: these are not independent observations.
        rows: (n,) int64, ascending: places of the samples in the split.
    """

    features: Tensor
    embeddings: Tensor | None
    raw: Tensor
    labels: Tensor
    content: Tensor
    rows: Tensor


class World:
    """The processes among which a split is divided; all of them make it, and call its methods, together."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        # The default group may know devices only.
        self._group: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None

    @classmethod
    def of_torch(cls) -> "World":
        """The ranks of torch's default group, if there is one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def close(self) -> None:
        """Give back what it took of torch."""
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def agree(self, error: Exception | None) -> None:
        """Go on together or not at all: a rank that raised alone would leave the others waiting for it.

        Raises:
            Exception: ``error``, or on ranks without one a UserError.
        """
        failures = torch.tensor(int(error is not None))
        if self._group is not None:
            dist.all_reduce(failures, group=self._group)
        if error is not None:
            raise error
        if failures:
            raise UserError(f"{int(failures)} other processes could not compute their features; they say why")

    def first_says(self, flags: Sequence[bool]) -> list[bool]:
        """The first rank's flags; the others give as many."""
        told = torch.tensor(flags, dtype=torch.uint8)
        if self._group is not None:
            dist.broadcast(told, 0, group=self._group)
        return [bool(flag) for flag in told]


class _Job(NamedTuple):
    """An entry of the cache, and what is in it."""

    scored: Scored
    layers: tuple[int, ...]
    poolings: tuple[str, ...]
    dtype: torch.dtype


class _Reading(NamedTuple):
    """A split, and how it is read."""

    source: Source
    places: list[tuple[int, int]]
    device: torch.device
    batch_size: int
    workers: int

    def rows(self, number: int) -> list[tuple[int, int]]:
        """Where the samples of a batch are."""
        return self.places[number * self.batch_size : (number + 1) * self.batch_size]


def extract_features(
    scored: Scored,
    source: Source,
    labels: Sequence[int] | Tensor,
    cache: Path | None,
    device: torch.device,
    batch_size: int,
    workers: int,
    layer: int = LAST,
    pooling: str = "default",
) -> dict[str, Features]:
    """Features of every sample of a split by one encoder, layer and pooling: modality -> Features; see `sweep`."""
    found = sweep([scored], source, labels, cache, device, batch_size, workers, (layer,), (pooling,))
    return found[0][layer, pooling]


def sweep(
    several: Sequence[Scored],
    source: Source,
    labels: Sequence[int] | Tensor,
    cache: Path | None,
    device: torch.device,
    batch_size: int,
    workers: int,
    layers: Sequence[int] = (LAST,),
    poolings: Sequence[str] = ("default",),
    *,
    dtype: torch.dtype = torch.float32,
    world: World | None = None,
) -> list[dict[tuple[int, str], dict[str, Features]]]:
    """Features of every sample, in the deterministic views; what is not in the cache is computed in one pass.

    Samples that can't be used are left out, counted and printed. Under torchrun or `accelerate launch` each rank takes
    every so-manieth batch, so that the numbers are those of one process to the bit; all ranks share the cache's disk.

    Args:
        several: encoders that read alike, such as one and its ``random()``; moved to ``device``.
        source: the split.
        labels: of every sample, in the order of the shards: n numbers, or (n, C) bool. They are not kept.
        cache: folder; the features are memory-mapped from there. None: they are kept in memory.
        device: where the encoders run.
        batch_size: samples per pass.
        workers: processes that read ahead; 0 reads in this one.
        layers: see `Scored.encode`.
        poolings: see `Scored.encode`; each is taken of each layer.
        dtype: of the computation, by autocast; results are float32.
        world: ranks that share the work; by default those of `torch.distributed`, if it is initialised.

    Returns:
        per encoder: (layer, pooling) -> modality -> Features on the CPU, for the modalities that occur.

    Raises:
        EncoderError: a layer or pooling that an encoder does not have.
        FeatureError: features that are not finite.
        UserError: another rank failed.
        FetchError, ShardError: a shard that can't be read any more.
        ValueError: encoders that read differently, or labels that are not as many as samples.
    """
    if any(each.reading != several[0].reading for each in several):
        raise ValueError("encoders that read differently can't share a pass: " + ", ".join(s.name for s in several))
    places = list(source.places())
    all_labels = torch.as_tensor(labels)
    if len(all_labels) != len(places):
        raise ValueError(f"{source.name}: {len(all_labels)} labels of {len(places)} samples")
    if cache is None:
        if world is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError("several ranks need a cache, through which each gets what the others computed")
        with tempfile.TemporaryDirectory() as folder:
            found = sweep(
                several, source, labels, Path(folder), device, batch_size, workers, layers, poolings,
                dtype=dtype, world=world,
            )  # fmt: skip
            return [{key: {m: _in_memory(f) for m, f in one.items()} for key, one in each.items()} for each in found]

    ranks = world or World.of_torch()
    wanted = [_Job(each, tuple(sorted(set(layers))), tuple(sorted(set(poolings))), dtype) for each in several]
    wanted.append(_Job(Raw.of(several[0]), (LAST,), ("default",), torch.float32))
    keys = [_key(job, source.fingerprint) for job in wanted]
    jobs = dict(zip(keys, wanted, strict=True))  # the same one twice is one
    try:
        entries = _entries(Cache(cache), jobs, _Reading(source, places, device, batch_size, workers), ranks)
    finally:
        if world is None:
            ranks.close()

    skips = Skips()
    skips.restore(entries[keys[-1]].about["skips"])
    if skips.total and ranks.rank == 0:
        print(f"{source.name}: {skips.total} of {len(places)} samples can't be scored:\n{skips.table()}", flush=True)
    raw = entries[keys[-1]].arrays
    return [
        {
            (layer, pooling): {
                modality: _gathered(entries[key].arrays, raw, all_labels, modality, layer, pooling)
                for modality in each.modalities
                if f"{modality}.rows" in raw
            }
            for layer in layers
            for pooling in poolings
        }
        for each, key in zip(several, keys, strict=False)
    ]


def content_ids(field: Field) -> Tensor:
    """(n,) int64, equal for rows whose input is equal, whatever the length that their batches were padded to."""
    rows = list(field.x.cpu())
    if field.valid is not None:
        rows = [row[valid] for row, valid in zip(rows, field.valid.cpu(), strict=True)]
    hashes = [hashlib.blake2b(row.numpy().tobytes(), digest_size=8).digest() for row in rows]
    return torch.tensor([int.from_bytes(each, "little") >> 1 for each in hashes])  # 63 bits fit an int64


def _key(job: _Job, split: str) -> str:
    """Of all that features depend on; labels are not among it."""
    settings = [job.layers, job.poolings, str(job.dtype)]
    return digest({"encoder": job.scored.fingerprint, "split": split, "settings": settings})


def _gathered(
    arrays: Mapping[str, Tensor], raw: Mapping[str, Tensor], labels: Tensor, modality: str, layer: int, pooling: str
) -> Features:
    rows = arrays[f"{modality}.rows"]
    return Features(
        arrays[f"{modality}.{layer}.{pooling}"],
        arrays.get(f"{modality}.embeddings"),
        raw[f"{modality}.{LAST}.default"],
        labels[rows],
        arrays[f"{modality}.content"],
        rows,
    )


def _in_memory(features: Features) -> Features:
    return Features(*(None if part is None else part.clone() for part in features))  # type: ignore[arg-type]


def _entries(cache: Cache, jobs: Mapping[str, _Job], reading: _Reading, world: World) -> dict[str, Entry]:
    """Of all jobs, those that are missing computed by all ranks together."""
    with ExitStack() as held:
        if world.rank == 0:
            for key in sorted(jobs):  # in one order, so that no two processes wait for each other
                held.enter_context(cache.lock(key))
        there = world.first_says([world.rank == 0 and cache.open(key) is not None for key in jobs])
        missing = {key: job for (key, job), is_there in zip(jobs.items(), there, strict=True) if not is_there}
        if missing:
            if world.rank == 0:
                for key in missing:
                    shutil.rmtree(cache.partial(key), ignore_errors=True)  # left by a process that was killed
                    held.callback(shutil.rmtree, cache.partial(key), ignore_errors=True)
            world.agree(None)
            failure: UserError | OSError | None = None
            try:
                _compute(cache, missing, reading, world)
            except (UserError, OSError) as error:
                failure = error
            world.agree(failure)
            try:
                for key in missing if world.rank == 0 else ():
                    _bring_together(cache, key, world.size)
            except OSError as error:
                failure = error
            world.agree(failure)
    entries = {key: entry for key in jobs if (entry := cache.open(key, verify=False)) is not None}
    if len(entries) < len(jobs):
        raise FeatureError(f"{cache.folder}: what the first rank wrote is not there: all ranks must share that disk")
    return entries


def _compute(cache: Cache, jobs: Mapping[str, _Job], reading: _Reading, world: World) -> None:
    """This rank's batches of all jobs, written to a part of each entry."""
    device, batch_size = reading.device, reading.batch_size
    first = next(iter(jobs.values())).scored  # which reads as all others do
    views = first.views
    tokenizer: Any = first.tokenizer  # None only where no view is of text
    numbers = range(-(-len(reading.places) // batch_size))[world.rank :: world.size]
    places = [place for number in numbers for place in reading.rows(number)]
    batches = Pass(Chosen(reading.source, places), views, tokenizer, batch_size).batches(reading.workers)
    on_device = OnDevice(views).to(device)
    blocks: dict[str, list[tuple[int, str, int]]] = {key: [] for key in jobs}
    skipped: list[Skipped] = []
    with ExitStack() as opened:
        writers = {key: opened.enter_context(RowWriter(cache.partial(key) / f"rank-{world.rank}")) for key in jobs}
        for job in jobs.values():
            job.scored.to(device)
        for number, batch in zip(numbers, batches, strict=True):
            skipped += batch.skipped
            shipped = batch.to(device)
            ready = on_device(shipped)
            for modality, field in ready.fields.items():
                always = {"rows": field.rows + number * batch_size, "content": content_ids(batch.fields[modality])}
                for key, job in jobs.items():
                    given = shipped.fields[modality] if modality in job.scored.listens else field
                    with torch.autocast(device.type, job.dtype, enabled=job.dtype != torch.float32):
                        encoded = job.scored.encode(modality, given, job.layers, job.poolings)
                    for name, values in {**always, **_arrays(encoded)}.items():
                        _check_finite(values, job.scored.name, modality, name, batch, field)
                        writers[key].add(f"{modality}.{name}", values.cpu().numpy())
                        blocks[key].append((number, f"{modality}.{name}", len(values)))
    part = {"rows": len(places), "skipped": skipped}
    for key, writer in writers.items():
        (writer.folder / _PART).write_text(json.dumps({**part, "blocks": blocks[key]}))


def _arrays(encoded: Encoded) -> dict[str, Tensor]:
    """By the names under which they are kept."""
    arrays = {f"{layer}.{pooling}": values for (layer, pooling), values in encoded.features.items()}
    return arrays if encoded.embeddings is None else {**arrays, "embeddings": encoded.embeddings}


def _check_finite(values: Tensor, encoder: str, modality: str, name: str, batch: Batch, field: Field) -> None:
    finite = values.isfinite().flatten(1).all(1) if values.dim() > 1 else values.isfinite()
    if not finite.all():
        first = int((~finite).nonzero()[0, 0])
        key, others = printable(batch.keys[int(field.rows[first])]), int((~finite).sum()) - 1
        raise FeatureError(
            f"{encoder}: {name} of {modality} of sample {key} is not finite, and of {others} more of its batch: "
            "weights that are broken, or too large for their type"
        )


def _bring_together(cache: Cache, key: str, ranks: int) -> None:
    """What the ranks wrote, as one entry."""
    folders = [cache.partial(key) / f"rank-{rank}" for rank in range(ranks)]
    parts = [json.loads((folder / _PART).read_text()) for folder in folders]
    skips = Skips()
    for part in parts:
        skips.add([Skipped(*each) for each in part["skipped"]], part["rows"])
    made = folders[0]
    if ranks > 1:
        made = cache.partial(key) / "whole"
        interleave(zip(folders, (part["blocks"] for part in parts), strict=True), made)
    else:
        (made / _PART).unlink()
    cache.seal(key, made, {"skips": skips.state()})

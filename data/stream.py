"""The iterable: order -> read -> decode -> view -> batch, the same batches for any number of ranks and workers."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from data.batch import Batch
from data.batches import Row, collate, read_ahead
from data.cache import Cache
from data.decode import MODALITIES
from data.errors import UserError
from data.index import find_shards, load_shards, write_whole
from data.order import Order, Place, Slot, Supply
from data.skips import MAX_KEYS, Skipped, Skips, StreamError, share
from data.source import SampleError, Source
from data.transforms import Views

STATE = "stream.json"
_SCHEMA = 2
# So many samples of a lane in a row that can't be used are no accident.
MAX_REPLACEMENTS = 1000


@dataclass
class SourceConfig:
    """One of the sources that training mixes."""

    shards: list[str] = field(default_factory=list)
    """Paths, globs (train-*.tar), ranges (train-{00000..00009}.tar) or URLs (s3://, gs://, hf://, https://)."""
    weight: float | None = None
    """Share of the rows, relative to the other sources' weights; null for all: as many as they have samples."""
    max_epochs: int | None = None
    """Passes over this source after which the others go on without it; null: no end."""
    require: list[str] = field(default_factory=list)
    """Modalities without which a sample is skipped and counted; empty: one of any is enough."""

    def check(self, name: str) -> None:
        """Raise ValueError for what is out of bounds in the source ``name``, which only its mapping knows."""
        if not self.shards:
            raise ValueError(f"data.train.{name}.shards is empty: a source has no shards")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"data.train.{name}.weight={self.weight}: allowed is above 0, or null")
        if self.max_epochs is not None and self.max_epochs < 1:
            raise ValueError(f"data.train.{name}.max_epochs={self.max_epochs}: allowed is 1 or more, or null")
        allowed = list(dict.fromkeys(MODALITIES.values()))
        if not set(self.require) <= set(allowed):
            raise ValueError(f"data.train.{name}.require={self.require}: allowed are {', '.join(allowed)}")


@dataclass
class DataConfig:
    """Shards, and what is read of them."""

    embedded: str | None = None
    """Embedded data set to build at `root` if it is not there; allowed: digits, or null."""
    root: str = "."
    """Folder that relative patterns of shards start from."""
    train: dict[str, SourceConfig] = field(default_factory=dict)
    """Training sources by name; a plain list of shards is one source of the name train."""
    val: list[str] = field(default_factory=list)
    """Shards on which probes choose their hyper-parameters."""
    test: list[str] = field(default_factory=list)
    """Shards on which results are reported."""
    batching: str = "mixed"
    """mixed: every batch has about its share of all sources; homogeneous: all rows of a batch come from one."""
    lanes: int | None = None
    """Equal parts of a batch, which ranks share among them; null: the greatest common divisor of batch size and 192."""
    window: int = 64
    """Shards of a source that are read, and shuffled, at a time."""
    max_bad_fraction: float = 0.05
    """Share of rows whose sample can't be used above which the run stops; others, of later steps, replace them."""
    allow_changed: bool = False
    """On resuming with other shards, weights, batch size or seed: begin a new pass over the data, not an error."""
    cache: str | None = None
    """Folder in which remote shards are kept; null: read each sample over the network."""
    cache_gb: float = 100.0
    """Largest size of the cache, in 10^9 bytes; what was not used for longest goes first."""
    group: str | None = None
    """Field of each sample's .json: samples with equal values are no negatives of each other in contrastive learning,
    such as those that were paired by class; a sample without it is of no group. null: all are negatives."""
    views: Views = field(default_factory=Views)
    """Sizes and augmentation, per modality."""
    workers: int = 1
    """Processes per rank that read ahead; 0 reads within the training process. The batches are the same."""

    def __post_init__(self) -> None:
        if self.embedded not in (None, "digits"):
            raise ValueError(f"data.embedded={self.embedded}: allowed are digits, null")
        if not self.views.used:
            raise ValueError("data.views has no modality: at least one of image, text, audio is needed")
        if self.batching not in ("mixed", "homogeneous"):
            raise ValueError(f"data.batching={self.batching}: allowed are mixed, homogeneous")
        for name, source in self.train.items():
            source.check(name)
        if len({source.weight is None for source in self.train.values()}) > 1:
            raise ValueError("data.train: give all sources a weight, or none")
        for name, least in (("lanes", 1), ("window", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.{name}={value}: allowed is {least} or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction={self.max_bad_fraction}: allowed is 0 to 1")
        if not 0 < self.cache_gb < math.inf:
            raise ValueError(f"data.cache_gb={self.cache_gb}: allowed is above 0")


def open_train(config: DataConfig) -> list[Source]:
    """The indexed training sources; an index is built on first sight.

    Raises:
        ShardError: a shard is missing or damaged; names it.
        FetchError: a URL that can't be read.
    """
    return [
        Source(
            open_split(config, source.shards).shards,
            name,
            weight=source.weight,
            max_epochs=source.max_epochs,
            require=source.require,
            cache=open_cache(config),
        )
        for name, source in sorted(config.train.items())  # the order of lines in a recipe changes nothing
    ]


def open_split(config: DataConfig, patterns: Sequence[str]) -> Source:
    """The indexed shards of a split that is read in one pass. Raises what `open_train` raises."""
    # Joining leaves absolute paths as they are; a URL is none.
    rooted = [p if "://" in p or p.startswith("pipe:") else str(Path(config.root) / p) for p in patterns]
    cache = open_cache(config)
    return Source(load_shards(find_shards(rooted), cache), cache=cache)


def open_cache(config: DataConfig) -> Cache | None:
    """The cache for remote shards, if there is to be one."""
    return None if config.cache is None else Cache(Path(config.cache), int(config.cache_gb * 1e9))


def make_order(sources: Sequence[Source], config: DataConfig, seed: int, batch_size: int, run_pass: int = 0) -> Order:
    """The order in which training reads ``sources``. Raises UserError where lanes don't divide the batch."""
    supplies = [
        Supply(
            source.name,
            [shard.samples for shard in source.shards],
            len(source) if source.weight is None else source.weight,
            source.max_epochs,
        )
        for source in sources
    ]
    homogeneous = config.batching == "homogeneous"
    return Order(
        supplies,
        seed,
        batch_size,
        lanes=config.lanes,
        window=config.window,
        homogeneous=homogeneous,
        run_pass=run_pass,
    )


class Stream(IterableDataset[Batch]):
    """The training batches of one rank, endless unless every source has ``max_epochs``.

    Batch by batch and rank by rank, rows are those of `Order`. A sample that can't be used is replaced by one that its
    lane draws in a later step, so that no other row moves, and is named in the batch's ``skipped``.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Batches of ``sources`` from step 0; `load_state_dict` goes on from another.

        Args:
            sources: as in ``config.train``.
            config: batching, views, workers and limits.
            tokenizer: for texts.
            seed: fixes order and augmentation.
            batch_size: rows of a step over all ranks.
            rank: number of this process.
            world: number of processes.

        Raises:
            StreamError: a batch or lanes that ``world`` does not divide.
        """
        super().__init__()
        self.sources = list(sources)
        self.config = config
        self.views = config.views.used
        self.tokenizer = tokenizer
        self.seed = seed
        self.batch_size = batch_size
        self.step = self.begun = self.run_pass = 0
        self.skips = Skips(config.max_bad_fraction)
        # Bad samples that this process has met: they need not be decoded again. Not the errors themselves, whose
        # tracebacks hold all that was read.
        self._bad: dict[tuple[int, int, int], Skipped] = {}
        self.order = make_order(self.sources, config, seed, batch_size)
        lanes = self.order.lanes
        if lanes % world:
            raise StreamError(
                f"{world} processes can't share data.lanes={lanes} (of train.batch_size={batch_size}) equally: the "
                "number of processes must divide both; other lanes are another order of the data"
            )
        self.mine = range(rank * lanes // world, (rank + 1) * lanes // world)
        self.world = world

    @property
    def steps(self) -> int | None:
        """How many steps there are in all, where every source has ``max_epochs``; None: no end."""
        return None if self.order.steps is None else self.begun + self.order.steps

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        step = self.step + first
        while self.steps is None or step < self.steps:
            yield self.batch(step)
            step += stride

    def batch(self, step: int) -> Batch:
        """This rank's rows of one step.

        Raises:
            StreamError: a lane in which hardly any sample can be used.
            FetchError, ShardError: a shard that can't be read any more.
        """
        skipped: list[Skipped] = []
        slots = self.order.slots(step - self.begun, self.mine)
        rows = (self._row(slot, skipped) for slot in slots)
        batch = collate(rows, len(slots), self.config.views, self.tokenizer, training=True)
        return batch._replace(skipped=tuple(skipped), first=self.mine.start * self.order.per_lane)

    def _row(self, slot: Slot, skipped: list[Skipped]) -> Row:
        source = self.sources[slot.source]
        # After two epochs of a lane nothing new comes.
        attempts = min(MAX_REPLACEMENTS, 2 * -(-len(source) // self.order.lanes) + 1)
        for attempt in range(attempts):
            # From the steps to come: one of this step would be in the batch twice, and be its own negative.
            place = self.order.place(slot._replace(draw=slot.draw + attempt * self.order.per_lane))
            at = (slot.source, place.shard, place.sample)
            if at not in self._bad:
                try:
                    values = source.values(place.shard, place.sample, self.views, training=True)
                    group = None if self.config.group is None else self._group(source, place, self.config.group)
                except SampleError as error:
                    bad = Skipped.of(error)
                    if len(self._bad) < MAX_KEYS:
                        self._bad[at] = bad
                else:
                    key = source.sample(place.shard, place.sample).key
                    seed = random_seed(self.seed, self.run_pass, source.name, place.epoch, key)
                    return Row(key, values, seed, group)
            else:
                bad = self._bad[at]
            # Its replacement may be bad, too; that one is counted in the slot of its own.
            if attempt == 0:
                skipped.append(bad)
        raise StreamError(f"{source.name}: {attempts} samples in a row can't be used, the last one: {bad.message}")

    def _group(self, source: Source, place: Place, name: str) -> int:
        """A number for the value of the field ``name``, the same in every process; -1 for none."""
        value = source.metadata(place.shard, place.sample).get(name)
        if value is None:
            return -1
        digest = hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def batches(self, timeout: timedelta | None = None) -> Iterator[Batch]:
        """The rank's batches from ``step`` on, read ahead by ``config.workers`` processes.

        With several ranks every one calls this at the same time, and ``skipped`` holds what all of them skipped.

        Args:
            timeout: how long to wait for other ranks; None: as long as torch does.

        Raises:
            StreamError: on all ranks with the same message: one of them can't read its data, or more than
                ``config.max_bad_fraction`` of all rows could not be used. Where anything else fails, such as a
                worker that was killed, only the rank itself raises that.
        """
        distributed = self.world > 1 and dist.is_available() and dist.is_initialized()
        group = dist.new_group(backend="gloo", timeout=timeout) if distributed else None
        items = read_ahead(self, self.config.workers)
        try:
            while (item := _next(items)) is not None:
                failure = item if isinstance(item, Exception) else None
                skipped, message = share(() if isinstance(item, Exception) else item.skipped, _message(failure), group)
                if failure is not None and not isinstance(failure, UserError):
                    raise failure
                if message is not None or isinstance(item, Exception):
                    raise StreamError(message) from failure
                self.step += 1
                self.skips.add(skipped, self.batch_size)
                yield item._replace(skipped=tuple(skipped))
        finally:
            if group is not None and dist.is_initialized():
                dist.destroy_process_group(group)

    def fingerprint(self) -> dict[str, Any]:
        """All that fixes which sample stands where; a run that resumes must agree in it."""
        made: dict[str, Any] = {
            "seed": self.seed,
            "train.batch_size": self.batch_size,
            "data.lanes": self.order.lanes,
            "data.window": self.config.window,
            "data.batching": self.config.batching,
            "data.train": [source.name for source in self.sources],
        }
        for source in self.sources:
            of = f"data.train.{source.name}"
            made[f"{of}.weight"], made[f"{of}.max_epochs"] = source.weight, source.max_epochs
            made[f"{of}.require"] = list(source.require)
            made[f"{of}.samples"] = f"{len(source)} in {len(source.shards)} shards, sha256 {source.fingerprint[:16]}"
        return made

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the batches that `batches` has given so far; for JSON."""
        return {
            "schema": _SCHEMA,
            "step": self.step,
            "pass": self.run_pass,
            "pass_began": self.begun,
            "fingerprint": self.fingerprint(),
            "skipped": self.skips.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go on where another stream stood, of any number of ranks and workers.

        Returns:
            what has changed since then, a line each; only ever something with ``config.allow_changed``, and then a
            new pass over the data begins.

        Raises:
            StreamError: the data are not the same, or the state is of another schema.
        """
        _check_schema(state)
        then, now = state["fingerprint"], self.fingerprint()
        changed = [
            f"{key}: {then.get(key)} then, {now.get(key)} now"
            for key in {**then, **now}
            if then.get(key) != now.get(key)
        ]
        if changed and not self.config.allow_changed:
            lines = "\n".join(f"  {line}" for line in changed)
            raise StreamError(
                f"the data are not those that the run began with:\n{lines}\n"
                "Restore them, give the run another `out`, or begin a new pass with data.allow_changed=true."
            )
        self.step, self.begun, self.run_pass = state["step"], state["pass_began"], state["pass"]
        self.skips.restore(state["skipped"])
        if changed:
            self.begun, self.run_pass = self.step, self.run_pass + 1
        if self.run_pass:
            self.order = make_order(self.sources, self.config, self.seed, self.batch_size, self.run_pass)
        return changed

    def save(self, folder: Path) -> None:
        """Write `state_dict` to ``folder/stream.json``."""
        write_whole(folder / STATE, json.dumps(self.state_dict(), indent=1).encode() + b"\n")

    def load(self, folder: Path) -> list[str]:
        """`load_state_dict` of ``folder/stream.json``.

        Raises:
            StreamError: the file is missing or damaged, or what `load_state_dict` raises.
        """
        with _reading(folder / STATE) as state:
            return self.load_state_dict(state)


@contextmanager
def _reading(path: Path) -> Iterator[dict[str, Any]]:
    """The state in a file; what is wrong with it is reported with its name."""
    try:
        yield json.loads(path.read_text())
    except FileNotFoundError as error:
        raise StreamError(f"{path}: no such file; the checkpoint does not say where its data stood") from error
    except StreamError as error:
        raise StreamError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise StreamError(f"{path}: damaged ({error!r})") from error


def read_state(folder: Path) -> tuple[int, int]:
    """The step at which the pass over the data began that ``folder/stream.json`` is in, and that pass's number.

    Raises:
        StreamError: the file is missing, damaged or of another schema.
    """
    with _reading(folder / STATE) as state:
        _check_schema(state)
        return int(state["pass_began"]), int(state["pass"])


def _check_schema(state: Mapping[str, Any]) -> None:
    if state["schema"] != _SCHEMA:
        raise StreamError(f"{STATE}: schema {state['schema']}, this version reads {_SCHEMA}")


def _next(items: Iterator[Batch | UserError]) -> Batch | Exception | None:
    """The next batch, or an error, given and not raised: other ranks wait for this one until they are told."""
    try:
        return next(items, None)
    except Exception as error:  # noqa: BLE001 (raised by the caller)
        return error


def _message(failure: Exception | None) -> str | None:
    """Why a rank can't go on, for all of them."""
    if failure is None:
        return None
    if isinstance(failure, UserError):
        return str(failure)
    rank = f"rank {dist.get_rank()}" if dist.is_available() and dist.is_initialized() else "reading"
    return f"{rank} failed: {type(failure).__name__}: {failure}"


def random_seed(seed: int, run_pass: int, source: str, epoch: int, key: str) -> int:
    """Fixes the augmentation of one sample, wherever and whenever it is read: an int64, not below 0."""
    digest = hashlib.blake2b(repr((seed, run_pass, source, epoch, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

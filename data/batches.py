"""Rows to batches, in this process or ahead in others; and one pass over a source, for evaluation."""

import atexit
import gc
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from data.batch import Batch, Field
from data.errors import UserError
from data.skips import Skipped
from data.source import SampleError, Source
from data.transforms import Views


class Row(NamedTuple):
    """One decoded sample on its way into a batch.

    Attributes:
        key: of the sample.
        values: modality -> decoded member.
        seed: for the augmentation; None for none.
        group: number of the sample's group; below 0 for none, None where nothing is grouped.
    """

    key: str
    values: dict[str, Any]
    seed: int | None = None
    group: int | None = None


def collate(
    rows: Iterable[Row], size: int, views: Views, tokenizer: PreTrainedTokenizerBase, *, training: bool
) -> Batch:
    """A batch of ``size`` rows: values are written where the batch has them, of each modality only what is there."""
    used, rooms = views.used, dict[str, Any]()
    present: dict[str, list[int]] = {name: [] for name in used}
    keys, seeds, groups = [], [], []
    for number, row in enumerate(rows):
        for name, value in row.values.items():
            if name not in rooms:  # not before: shared memory costs time even where nothing is put
                rooms[name] = used[name].allocate(size, training)
            used[name].put(rooms[name], len(present[name]), value, row.seed)
            present[name].append(number)
        keys.append(row.key)
        seeds.append(row.seed)
        groups.append(row.group)
    fields: dict[str, Field] = {
        name: view.field(rooms[name], len(present[name]), tokenizer)._replace(rows=torch.tensor(present[name]))
        for name, view in used.items()
        if name in rooms
    }
    return Batch(
        fields,
        size,
        keys,
        torch.tensor(seeds) if training else None,
        groups=torch.tensor(groups) if groups and groups[0] is not None else None,
    )


class WorkerError(UserError):
    """A process that reads ahead has died."""


def read_ahead(batches: IterableDataset[Batch], workers: int) -> Iterator[Batch | UserError]:
    """Batches in order; an error comes as the last item, the same with and without workers."""
    loader = DataLoader(
        _ErrorsAsValues(batches),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        prefetch_factor=max(2, 4 // workers) if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_outlive_signals,
    )
    handler = signal.getsignal(signal.SIGCHLD)
    # What is frozen, a forked worker's garbage collector leaves alone: it would copy all of it by touching it.
    gc.freeze()
    before = active_children()
    try:
        items = iter(loader)
    finally:
        gc.unfreeze()
        if workers and threading.current_thread() is threading.main_thread():
            # torch's handler raises of a killed worker wherever the process stands, such as halfway through telling
            # the other ranks something. Without it the next batch that is asked for raises.
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    # If the program ends while they live, such as by an error whose traceback holds on to this.
    end = partial(_kill, [each for each in active_children() if each not in before])
    atexit.register(end)
    try:
        yield from items
    except (RuntimeError, OSError, EOFError) as error:
        if not workers or not _is_death(error):
            raise
        why = str(error) or type(error).__name__
        yield WorkerError(
            f"one of data.workers={workers} reading processes died ({why}); the system kills them where memory runs "
            "out, and they die where shared memory (/dev/shm) does"
        )
    finally:
        atexit.unregister(end)


def _kill(processes: Sequence[BaseProcess]) -> None:
    """End them. Python would ask each, and wait: for ever, where a worker takes its two requests for one."""
    for process in processes:
        process.kill()


def _outlive_signals(_: int) -> None:
    """In a worker: clusters send signals to all processes, and the training process needs this one to end well.

    A second SIGTERM ends it: torch and Python send one to a worker that does not end by itself.
    """

    def once(_: int, __: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, once)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _is_death(error: Exception) -> bool:
    """Whether an error means that a worker is dead, and was not raised in one that lives."""
    text = str(error)
    if text.startswith("Caught "):  # torch's words for the latter
        return False
    # What torch finds, or a connection over which a dead worker no longer hands on a batch that it announced. Where a
    # thread pins memory, that ends the thread.
    found = text.startswith(("DataLoader worker", "Pin memory thread"))
    return found or isinstance(error, ConnectionError | FileNotFoundError | EOFError)


class _ErrorsAsValues(IterableDataset[Any]):
    """Hands an error on as the last item: raised in a worker, it would come out wrapped in the worker's traceback."""

    def __init__(self, batches: IterableDataset[Batch]) -> None:
        super().__init__()
        self.batches = batches

    def __iter__(self) -> Iterator[Batch | UserError]:
        try:
            yield from self.batches
        except UserError as error:
            yield error


def _unchanged(batch: Any) -> Any:
    return batch


class Pass(IterableDataset[Batch]):
    """One pass over a source in the order of its shards, in the deterministic views; the last batch may be smaller.

    A sample that can't be used keeps its row, which then has nothing, and is named in the batch's ``skipped``.
    """

    def __init__(self, source: Source, views: Views, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        super().__init__()
        self.source = source
        self.views = views
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        places = list(self.source.places())
        for start in range(first * self.batch_size, len(places), stride * self.batch_size):
            chosen = places[start : start + self.batch_size]
            skipped: list[Skipped] = []
            rows = (self._row(*place, skipped) for place in chosen)
            batch = collate(rows, len(chosen), self.views, self.tokenizer, training=False)
            yield batch._replace(skipped=tuple(skipped))

    def _row(self, shard: int, number: int, skipped: list[Skipped]) -> Row:
        key = self.source.sample(shard, number).key
        try:
            return Row(key, self.source.values(shard, number, self.views.used, training=False))
        except SampleError as error:
            skipped.append(Skipped.of(error))
            return Row(key, {})

    def batches(self, workers: int) -> Iterator[Batch]:
        """The batches, read by ``workers`` processes; 0: in this one.

        Raises:
            FetchError, ShardError: a shard that can't be read any more.
        """
        for item in read_ahead(self, workers):
            if isinstance(item, UserError):
                raise item
            yield item

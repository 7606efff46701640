"""python -m data build: shards from a CSV or JSON Lines manifest, a folder or a Hugging Face data set.

Rows are read, checked and stripped by several processes, and written in their order. After each shard a small file
``PREFIX-build.json`` says how far the build is, so that the same command goes on from there after whatever stopped it.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from filelock import FileLock, Timeout
from tqdm import tqdm

from data.crew import available_cpus
from data.decode import MODALITIES
from data.errors import UserError
from data.index import Shard, ShardError, build_index, index_path, verify, write_index
from data.rows import Bad, Reading, Row, Sample, start_worker, to_samples
from data.shards import NewShard, parse_size, sync_folder
from data.tables import HUB, Columns, Slice, Table, open_table
from data.terminal import printable

EXAMPLES = """\
examples
  python -m data build --from photos.csv --out shards --prefix train --image file --text title
  python -m data build --from photos/ --out shards          photos/a.jpg photos/a.txt photos/a.wav are one sample
  python -m data build --from hf:uoft-cs/cifar10:train --out shards --image img
  python -m data build --from photos.csv --out shards --slice $SLURM_ARRAY_TASK_ID/8    with #SBATCH --array=0-7

A manifest is CSV (.csv .tsv, names in the first line) or JSON Lines (.jsonl .ndjson), in UTF-8. Paths in it are
relative to its folder, or absolute. Columns go by their names, which are image, text or caption, audio and label, each
also with _path or _file at its end, or by options. The text column holds the text itself, unless its name ends in _path
or _file or --text-files is given. An empty cell means that the sample lacks this. The label and all other columns go to
the .json of the sample, together with `source`, its name: the column key, id or __key__, or else the file's own name.
Keys are made of it, with the number of the row at the end.

Slices need no merging: a pattern such as 'shards/train-*.tar' reads all of them. Each slice of a data set of the hub
reads the whole stream and keeps its rows. The same command started again goes on after the last whole shard.

Files are taken over byte for byte, except that EXIF, XMP, comments, tags, cover pictures and colour profiles are left
out (but not the orientation). Fields of the .json are not looked through: leave private columns out of the manifest.

Hugging Face's load_dataset("webdataset") reads the shards, too, but takes its columns from the first five samples, and
refuses all if one of these lacks a modality that another one has, or if their images or sounds differ in format. For
it, put complete rows of one format first. JPEGs are called .jpg, however they were spelled.
"""

_SCHEMA = 1
_PREFIX = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_SLICE = re.compile(r"(\d{1,9})/(\d{1,9})")
_CHUNK = 8  # rows that a worker gets at a time
_WORTH_WORKERS = 1000  # rows; fewer are done before workers have started
_SHOWN, _LOOKED_AT = 20, 1000  # bad rows that are shown, rows after the first bad one that are looked at


class BuildError(UserError):
    """A build that can't be done as it was asked for, or found bad rows."""


class Job(NamedTuple):
    """What was asked for.

    Attributes:
        prefix: what the names of the shards of all slices begin with.
        name: what those of this slice begin with.
        limit: bytes of a shard.
    """

    source: str
    out: Path
    prefix: str
    name: str
    part: Slice
    limit: int
    columns: Columns
    keep_metadata: bool
    skip_bad: bool
    workers: int | None

    @property
    def state_path(self) -> Path:
        """Where the build says how far it is."""
        return self.out / f"{self.name}-build.json"

    @property
    def bad_path(self) -> Path:
        """Where it lists the rows that it left out."""
        return self.out / f"{self.name}-bad.jsonl"

    def shard_path(self, number: int) -> Path:
        """The name of a shard."""
        return self.out / f"{self.name}-{number:05d}.tar"


@dataclass
class State:
    """How far a build is; what ``PREFIX-build.json`` holds.

    Attributes:
        prefix: of all slices.
        slice: such as ``0/1``.
        settings: what must be equal for the shards to be the same, by the name that the user knows it by.
        source: the table's fingerprint.
        shards: name, samples, bytes and sha256 of each, in order.
        next_row: rows from this one on are in no shard yet.
        members: modality -> samples that have it.
        left_out: kind of fault -> rows.
        bad_bytes: length of the list of bad rows.
        finished: whether no row is left.
    """

    prefix: str
    slice: str
    settings: dict[str, Any]
    source: dict[str, Any]
    shards: list[dict[str, Any]] = field(default_factory=list)
    next_row: int = 0
    members: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    bad_bytes: int = 0
    finished: bool = False

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(int(shard["samples"]) for shard in self.shards)

    def save(self, path: Path) -> None:
        """Replace the file in a single step, on the disk."""
        aside = path.with_name(f".{path.name}.tmp")
        with aside.open("w") as file:
            json.dump({"schema": _SCHEMA, **asdict(self)}, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)

    @classmethod
    def load(cls, path: Path) -> "State | None":
        """The state in a file; None if there is no such file.

        Raises:
            BuildError: the file holds something else.
        """
        try:
            given = json.loads(path.read_bytes())
            schema = given.pop("schema")
            state = cls(**given) if schema == _SCHEMA else None
        except FileNotFoundError:
            return None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BuildError(
                f"{path}: says nothing of a build ({error!r}); choose another --prefix or --out"
            ) from error
        if state is None:
            raise BuildError(
                f"{path}: of schema {schema}, this version reads {_SCHEMA}; delete what it built to build anew"
            )
        return state


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``build``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="SRC",
        help="manifest (.csv .tsv .jsonl .ndjson), folder, folder saved by datasets' save_to_disk, or "
        "hf:NAME[@REVISION][:CONFIG][:SPLIT]",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards; made if need be")
    parser.add_argument("--prefix", default="train", metavar="NAME", help="start of the shards' names (train)")
    parser.add_argument(
        "--shard-size",
        default="256MB",
        metavar="SIZE",
        help="bytes of a shard at most: 500KB, 256MB, 1GB, 256MiB (256MB)",
    )
    for kind, names in (("image", "image"), ("text", "text or caption"), ("audio", "audio"), ("label", "label")):
        parser.add_argument(f"--{kind}", metavar="COL", help=f"column of the {kind} ({names})")
    parser.add_argument("--text-files", action="store_true", help="the text column holds paths to files of UTF-8 text")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read and check (as many as CPUs)")
    parser.add_argument(
        "--slice", metavar="I/N", help="build only every N-th row from row I on; I counts from 0: 0/8 .. 7/8 are all"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave bad rows out and list them in DIR/NAME-bad.jsonl, instead of stopping",
    )
    parser.add_argument("--keep-metadata", action="store_true", help="leave EXIF, tags and the like in the files")


def run(arguments: argparse.Namespace) -> int:
    """Build, go on with a build, or say that it is done.

    Returns:
        The exit code: 0, or 130 when it was interrupted from the keyboard.

    Raises:
        BuildError: arguments that don't fit; bad rows; other shards in the way; a source or settings that changed.
        TableError: the source can't be read.
    """
    job = _job(arguments)
    try:
        table = open_table(job.source, job.columns)
        job.out.mkdir(parents=True, exist_ok=True)
        with FileLock(job.out / f".{job.name}.lock", timeout=0):
            state = _begin(job, table)
            if state.finished:
                print(f"{job.out}/{job.name}-*: all done before; nothing to do")
            else:
                _show_start(job, table, state)
                _build(job, table, state)
            _show_end(job, state)
    except Timeout as error:
        raise BuildError(f"{job.out}: another process is building {job.name} here") from error
    except KeyboardInterrupt:
        print(f"\ninterrupted; whole shards in {job.out} stay, the same command goes on after them", file=sys.stderr)
        return 130
    return 0


def _job(arguments: argparse.Namespace) -> Job:
    """The arguments, checked."""
    prefix, part = arguments.prefix, _slice(arguments.slice)
    if not _PREFIX.fullmatch(prefix):
        raise BuildError(f"--prefix {prefix!r}: letters, digits, _ and - are allowed")
    if arguments.workers is not None and arguments.workers < 1:
        raise BuildError(f"--workers {arguments.workers}: must be at least 1")
    source, out = arguments.source, arguments.out
    folder = Path(source.removeprefix(HUB).partition(":")[0] if source.startswith(HUB) else source)
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise BuildError(f"--out {out}: lies in the folder {folder} that is read; choose one outside")
    return Job(
        source=source,
        out=out,
        prefix=prefix,
        name=prefix if part.count == 1 else f"{prefix}-{part.index:0{len(str(part.count - 1))}d}",
        part=part,
        limit=parse_size(arguments.shard_size),
        columns=Columns(arguments.image, arguments.text, arguments.audio, arguments.label, arguments.text_files),
        keep_metadata=arguments.keep_metadata,
        skip_bad=arguments.skip_bad,
        workers=arguments.workers,
    )


def _slice(text: str | None) -> Slice:
    if text is None:
        return Slice()
    match = _SLICE.fullmatch(text)
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not index < count:
        allowed = f"0/{count} to {count - 1}/{count}" if count else "I/N, such as 0/8 to 7/8"
        raise BuildError(f"--slice {text}: slices count from 0; allowed are {allowed}")
    return Slice(index, count)


# Before the first row: is this a new build, one to go on with, or one that others are in the way of?


def _begin(job: Job, table: Table) -> State:
    """The state to go on from; files that a killed build left half done are removed."""
    settings = {
        "--shard-size": job.limit,
        **{f"--{kind}": getattr(table.columns, kind) for kind in ("image", "text", "audio", "label")},
        "--text-files": table.columns.text_files,
        "--keep-metadata": job.keep_metadata,
    }
    new = State(job.prefix, f"{job.part.index}/{job.part.count}", settings, table.fingerprint)
    old = State.load(job.state_path)
    state = new
    if old is not None and (old.shards or old.finished):
        _refuse_changes(job.state_path, old, new, f"delete {job.out}/{job.name}-* to build anew")
        _check_shards(job, old)
        state = old
    _refuse_neighbours(job, new, old is not None, len(state.shards))
    if not state.finished:
        begun = job.shard_path(len(state.shards))
        for path in (begun, index_path(begun), *job.out.glob(f".{job.name}-*.tmp")):
            path.unlink(missing_ok=True)
        if state.bad_bytes:
            os.truncate(job.bad_path, state.bad_bytes)
        else:
            job.bad_path.unlink(missing_ok=True)
        state.save(job.state_path)
    return state


def _refuse_changes(path: Path, old: State, new: State, remedy: str) -> None:
    """Refuse to mix shards of two sources or two settings."""
    before = {"--slice": old.slice, **old.settings, **{f"source's {name}": value for name, value in old.source.items()}}
    now = {"--slice": new.slice, **new.settings, **{f"source's {name}": value for name, value in new.source.items()}}
    changed = [
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in dict.fromkeys((*before, *now))
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise BuildError(f"{path}: shards are there that were built otherwise: {'; '.join(changed)}; {remedy}")


def _check_shards(job: Job, state: State) -> None:
    """Refuse to go on, or to call it done, where whole shards are no longer what was written; indexes are made anew."""
    remedy = f"put it back, or delete {job.out}/{job.name}-* to build anew"
    for shard in tqdm(state.shards, "checking", unit=" shards", delay=5, leave=False):
        path = job.out / shard["name"]
        size = path.stat().st_size if path.exists() else None
        if size != shard["bytes"]:
            wrong = "gone" if size is None else f"of {size} bytes, not {shard['bytes']} as it was written"
            raise BuildError(f"{path}: is {wrong}; {remedy}")
        try:
            verify(Shard(str(path), size, shard["sha256"], shard["samples"], {}))
        except ShardError as error:
            raise BuildError(f"{path}: is of other content than was written; {remedy}") from error
        if not index_path(path).exists():
            write_index(build_index(path))


def _refuse_neighbours(job: Job, new: State, begun: bool, shards: int) -> None:
    """Refuse a folder in which ``PREFIX-*.tar`` would name shards that aren't of this source and these settings."""
    anew = f"delete {job.out}/{job.prefix}-* to build all of them anew"
    ours = {job.shard_path(number).name for number in range(shards + begun)}  # the last one was perhaps not counted yet
    slices = set()
    for path in sorted(job.out.glob("*-build.json")):
        other = State.load(path)
        if path == job.state_path or other is None:
            continue
        if other.prefix == job.prefix:
            slices.add(path)
        if not other.shards and not other.finished:
            continue
        if other.prefix == job.prefix:
            if other.slice.partition("/")[2] != str(job.part.count):
                raise BuildError(
                    f"{path}: slice {other.slice} of this prefix is there: --slice {new.slice} doesn't fit it"
                )
            _refuse_changes(path, _without_slice(other), _without_slice(new), f"slices must be built alike; {anew}")
        elif f"{job.prefix}-".startswith(f"{other.prefix}-") or f"{other.prefix}-".startswith(f"{job.prefix}-"):
            raise BuildError(
                f"--prefix {job.prefix}: {min(job.prefix, other.prefix, key=len)}-*.tar would name the shards of "
                f"{other.prefix}, too; choose a prefix that doesn't begin like it"
            )
    for path in sorted(job.out.glob(f"{job.prefix}-*.tar")):
        slice_name = path.name.rpartition("-")[0]
        another_slice = slice_name != job.name and (job.out / f"{slice_name}-build.json") in slices
        if path.name not in ours and not another_slice:
            raise BuildError(
                f"{path}: not of this build, but {job.prefix}-*.tar would name it; choose another --prefix"
            )


def _without_slice(state: State) -> State:
    return State(state.prefix, "", state.settings, state.source)


# Rows to samples, in parallel and in order.


def _samples(rows: Iterable[Row | Bad], reading: Reading, workers: int) -> Generator[Sample | Bad]:
    """What becomes of each row, in order; read ahead by a few rows per worker."""
    rows = iter(rows)
    if workers == 1:
        for row in rows:
            yield from to_samples([row], reading)
        return
    # Not forked: libraries of this process run threads, and a fork may copy a lock that one of them holds.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker)
    ahead: deque[tuple[list[Row | Bad], Future[list[Sample | Bad]]]] = deque()
    chunk: list[Row | Bad] = []
    try:
        while True:
            while len(ahead) < 2 * workers and (chunk := list(islice(rows, _CHUNK))):
                ahead.append((chunk, pool.submit(to_samples, chunk, reading)))
            if not ahead:
                return
            yield from ahead[0][1].result()
            ahead.popleft()
    except BrokenProcessPool as error:
        first, last = (ahead[0][0][0], ahead[-1][0][-1]) if ahead else (chunk[0], chunk[-1])
        raise BuildError(
            f"a worker died between {first.where} and {last.where}: too little memory, or a file that crashes "
            "its decoder; --workers 1 will tell"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _worker_count(job: Job, rows: int | None) -> int:
    if job.workers is not None:
        return job.workers
    if rows is not None and rows < _WORTH_WORKERS:
        return 1
    return available_cpus()


# Samples to shards.


def _build(job: Job, table: Table, state: State) -> None:
    """Write the shards that are missing."""
    total = table.count()
    rows = None if total is None else len(job.part.numbers(state.next_row, total))
    done = len(job.part.numbers(0, state.next_row))
    bad: list[Bad] = []
    members: Counter[str] = Counter()
    shard: NewShard | None = None
    # In a log a bar is a line each time.
    interval = 0.2 if sys.stderr.isatty() else 60
    bar = tqdm(total=None if rows is None else done + rows, initial=done, unit=" rows", mininterval=interval)
    reading = Reading(table.folder, job.keep_metadata)
    results = _samples(table.rows(job.part, state.next_row), reading, _worker_count(job, rows))
    try:
        with bar, closing(results):
            for result in results:
                bar.update()
                if isinstance(result, Bad):
                    if not job.skip_bad:
                        _refuse_bad(job, state, result, results)
                    bad.append(result)
                    continue
                if shard is not None and not shard.fits(result.members, job.limit):
                    _commit(job, state, shard, members, bad, result.number)
                    shard, members, bad = None, Counter(), []
                if shard is None:
                    shard = NewShard(job.shard_path(len(state.shards)))
                shard.add(result.members)
                members.update({MODALITIES[name] for name in result.members if name in MODALITIES})
        state.finished = bool(shard or state.shards or job.part.count > 1)
        _commit(job, state, shard, members, bad, state.next_row)
        shard = None
    finally:
        if shard is not None:
            shard.discard()
    if not state.finished:
        faults = f": {_counted(state.left_out)}; see {job.bad_path}" if state.left_out else ""
        raise BuildError(f"{job.source}: no row that a shard could be made of{faults}")


def _commit(
    job: Job, state: State, shard: NewShard | None, members: Mapping[str, int], bad: Sequence[Bad], next_row: int
) -> None:
    """Bring a whole shard and the bad rows before ``next_row`` to the disk, then the state that counts them in."""
    if shard is not None:
        index = shard.finish()
        name = shard.path.name
        state.shards.append({"name": name, "samples": shard.samples, "bytes": index.size, "sha256": index.sha256})
        state.members = dict(sorted((Counter(state.members) + Counter(members)).items()))
    if bad:
        with job.bad_path.open("a") as file:
            file.writelines(json.dumps(row._asdict()) + "\n" for row in bad)
            file.flush()
            os.fsync(file.fileno())
            state.bad_bytes = file.tell()
        state.left_out = dict(sorted((Counter(state.left_out) + Counter(row.kind for row in bad)).items()))
    state.next_row = next_row
    state.save(job.state_path)


def _refuse_bad(job: Job, state: State, first: Bad, others: Iterator[Sample | Bad]) -> NoReturn:
    """Name the first bad row, and the next ones that aren't far."""
    found, looked_at = [first], 0
    for other in islice(others, _LOOKED_AT):
        looked_at += 1
        if isinstance(other, Bad):
            found.append(other)
        if len(found) == _SHOWN:
            break
    lines = "\n".join(f"  {printable(f'{row.where}: {row.reason}')}" for row in found)
    kept = f" The {len(state.shards)} shards before them stay." if state.shards else ""
    mend = "Mend them and start the same command again"
    if any(job.out.glob(f"{job.prefix}-*.tar")):  # of this slice or of others, made of the source as it is
        mend = (
            f"Mend files that {job.source} names, if it is they, and start the same command again. If {job.source} "
            f"itself must change (a folder does when its files do), delete {job.out}/{job.prefix}-* and build anew, "
            "since shards are there that are made of it as it is"
        )
    rows = "bad row" if len(found) == 1 else f"{len(found)} bad rows"
    raise BuildError(
        f"{job.source}: {rows} among {looked_at + 1}, from row {first.number} on.{kept}\n{lines}\n"
        f"{mend}. Or add --skip-bad to leave bad rows out and list them in {job.bad_path}"
    )


# What the user sees.


def _show_start(job: Job, table: Table, state: State) -> None:
    columns = {**table.columns.modalities, "label": table.columns.label}
    read = ", ".join(f"{kind} from {column}" for kind, column in columns.items() if column is not None)
    print(f"from      {job.source}{f': {read}' if read else ''}")
    for note in table.notes:
        print(f"note      {printable(note)}")
    if state.shards:
        print(f"goes on   after {state.samples} samples in {len(state.shards)} shards, at row {state.next_row}")


def _show_end(job: Job, state: State) -> None:
    shards = f"{job.out}/{job.prefix}-*.tar"
    size = sum(int(shard["bytes"]) for shard in state.shards)
    members = ", ".join(f"{count} {modality}" for modality, count in sorted(state.members.items()))
    print(f"samples   {state.samples}{f': {members}' if members else ''}")
    if state.left_out:
        print(f"left out  {sum(state.left_out.values())}: {_counted(state.left_out)}; listed in {job.bad_path}")
    print(f"shards    {len(state.shards)}, {size / 1e6:.1f} MB: {job.out}/{job.name}-*.tar")
    if job.part.count > 1:
        others = [State.load(path) for path in job.out.glob(f"{job.prefix}-*-build.json")]
        done = sum(other is not None and other.prefix == job.prefix and other.finished for other in others)
        print(f"slices    {done} of {job.part.count} are done")
    print(
        f"next\n  check   python -m data validate '{shards}' --decode\n  look    python -m data stats '{shards}'\n"
        f"  train   data: {{root: {job.out}, train: [{job.prefix}-*.tar]}}    # in the recipe"
    )


def _counted(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))

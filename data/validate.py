"""python -m data validate: goes through whole shards and says what is wrong where.

A *problem* is what training stops at or has to leave out; a *warning* works, but is hardly meant. Files that nothing
reads are notes, which are counted.
"""

import argparse
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from data.cache import Cache
from data.crew import Crew, available_cpus, jobs_of
from data.decode import METADATA, MODALITIES
from data.errors import UserError
from data.fetch import FetchError, index_beside, is_url, masked, open_binary, size_of
from data.index import (
    Sample,
    ShardIndex,
    find_shards,
    load_samples,
    load_shard,
    scan,
    split_name,
    write_whole,
)
from data.terminal import columns, printable

SHOWN = 50
_BYTE = re.compile(r"\bat byte (\d+)")

T = TypeVar("T")
R = TypeVar("R")


class ValidateError(UserError):
    """A command line that can't be carried out."""


# Kind of finding -> what to do about it. The table shows them in this order.
HINTS = {
    "damage": "copy or build the shard again; what lies behind the damage is lost",
    "structure": "build the shard again: training refuses it as it is",
    "index": "if the shard is as it should be, `python -m data index --force SHARD`; else put the old one back",
    "decode": "replace the file, or leave the sample out, and build the shard again",
    "missing": "add the files, or do not ask for this modality of every sample",
    "empty": "no image, text or sound goes by such a name; a file name is cut at its first dot",
    "repeated": "give every sample of the data set a name of its own, such as with its folder in front",
}


class Finding(NamedTuple):
    """One line of the table.

    Attributes:
        level: "problem" or "warning".
        kind: key of `HINTS`.
        shard: path or URL.
        key: of the sample; "" if it is about the shard.
        member: its extension; "" if it is about the sample.
        byte: position in the shard, where known.
        what: is wrong.
    """

    level: str
    kind: str
    shard: str
    key: str
    member: str
    byte: int | None
    what: str


@dataclass
class Report:
    """What was looked at, and what was found."""

    shards: int = 0
    unusable: int = 0
    samples: int = 0
    """Of the usable shards."""
    decoded: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, level: str) -> int:
        """How many findings of this level there are."""
        return sum(finding.level == level for finding in self.findings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="shards: paths, globs, ranges {00000..00009} or URLs")
    parser.add_argument("--decode", action="store_true", help="decode every image, text, sound and .json, too")
    allowed = ", ".join(_known())
    parser.add_argument("--require", default="", metavar="NAME,...", help=f"what every sample must have: {allowed}")
    parser.add_argument(
        "--workers", type=int, default=available_cpus(), help="processes that decode (default: as many as CPUs)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all that was found to this file")


def run(arguments: argparse.Namespace) -> int:
    """Print what is wrong; returns 1 if there are problems, else 0.

    Raises:
        UserError: no such shard, an unknown modality, fewer than 1 worker, or a report that can't be written.
    """
    check_writable(arguments.json, "--json")
    require = [name.strip() for name in arguments.require.split(",") if name.strip()]
    report = validate(find_shards(arguments.paths), require, arguments.decode, arguments.workers)
    print("\n".join(render(report, shutil.get_terminal_size().columns)))
    if arguments.json is not None:
        content = vars(report) | {"findings": [finding._asdict() for finding in report.findings]}
        write_whole(arguments.json, json.dumps({"schema": 1, **content}, indent=2).encode() + b"\n")
    return 1 if report.count("problem") else 0


def check_writable(path: Path | None, option: str) -> None:
    """Refuse an output file that can't be written, before the work that leads to it.

    Raises:
        ValidateError: its folder is missing, or it is a folder itself.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise ValidateError(f"{option} {path}: no such folder: {path.absolute().parent}")
    if path is not None and path.is_dir():
        raise ValidateError(f"{option} {path}: a folder, not a file to write")


def validate(locations: Sequence[str], require: Sequence[str] = (), decode: bool = False, workers: int = 1) -> Report:
    """Look through all shards; a broken one does not hide the others.

    Args:
        locations: paths or URLs, each once.
        require: modalities that every sample must have.
        decode: whether to decode every member that training could read.
        workers: shards read at a time, and processes that decode.

    Raises:
        ValidateError: an unknown modality, or fewer than 1 worker.
    """
    unknown = [name for name in require if name not in _known()]
    if unknown:
        raise ValidateError(f"--require {','.join(unknown)}: unknown modality; allowed are {', '.join(_known())}")
    if workers < 1:
        raise ValidateError(f"--workers {workers}: must be at least 1")
    report = Report(shards=len(locations))
    unread: Counter[str] = Counter()
    first_seen: dict[str, str] = {}
    without_index = outside = 0
    with ExitStack() as stack:
        cache = stack.enter_context(_cache()) if decode and any(map(is_url, locations)) else None
        crew = stack.enter_context(Crew(workers if decode else 0, cache))
        checks = _ahead(check_shard, locations, workers)
        for checked in tqdm(checks, "shards", len(locations), unit="shard", disable=None):
            index = checked.built
            report.findings += checked.findings
            without_index += not checked.indexed
            outside += checked.outside
            if index is None:
                report.unusable += 1
                continue
            report.samples += len(index.samples)
            report.findings += _check_samples(index, require)
            report.findings += _repeated(index, first_seen)
            unread.update(extension for extension in _extensions(index.samples) if not _is_read(extension))
            if decode:
                _decode(index, crew, cache, report)
    report.notes = _notes(len(locations), without_index, outside, unread)
    order = {kind: rank for rank, kind in enumerate(HINTS)}
    report.findings = [
        finding._replace(shard=masked(finding.shard))
        for finding in sorted(report.findings, key=lambda finding: order[finding.kind])  # in the shards' order
    ]
    return report


def _known() -> list[str]:
    return list(dict.fromkeys(MODALITIES.values()))


def _is_read(extension: str) -> bool:
    return extension in MODALITIES or extension == METADATA


def _extensions(samples: Iterable[Sample]) -> Iterator[str]:
    return (extension for sample in samples for extension in sample.members)


@contextmanager
def _cache() -> Iterator[Cache]:
    """Where remote shards lie while they are decoded: member by member over the network would take far longer."""
    with tempfile.TemporaryDirectory() as folder:
        yield Cache(Path(folder), shutil.disk_usage(folder).free // 2)


def _ahead(function: Callable[[T], R], items: Iterable[T], count: int) -> Iterator[R]:
    """``function`` of each item, in order, with ``count`` under way: all at once would hold every shard's index."""
    with ThreadPoolExecutor(count) as pool:
        under_way: deque[Future[R]] = deque()
        try:
            for item in items:
                under_way.append(pool.submit(function, item))
                if len(under_way) > count:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class Checked(NamedTuple):
    """What became of a shard.

    Attributes:
        built: its index, made anew; None if the shard can't be used.
        indexed: whether an index lies beside it.
        outside: how many of its files belong to no sample.
        findings: what is wrong with the shard and the index beside it.
    """

    built: ShardIndex | None
    indexed: bool
    outside: int
    findings: list[Finding]


def _decode(index: ShardIndex, crew: Crew, cache: Cache | None, report: Report) -> None:
    """Decode a shard's members; adds what is wrong to ``report``."""
    if cache is not None and is_url(index.location):
        try:
            cache.get(index.shard)  # here, where no member's patience runs out
        except FetchError as error:
            what = f"could not be decoded: {_about(index.location, error)}"
            report.findings.append(Finding("problem", "damage", index.location, "", "", None, what))
            return
    jobs = list(jobs_of(index))
    report.decoded += len(jobs)
    results = tqdm(crew.map(jobs), "decode", len(jobs), unit="file", leave=False, disable=None)
    wrong = [(job, error) for job, error in results if error is not None]
    report.findings += [
        Finding("problem", "decode", index.location, job.key, job.extension, job.offset, error)
        for job, error in sorted(wrong, key=lambda answer: answer[0].offset)  # they come as they are done
    ]


def check_shard(location: str) -> Checked:
    """Read a shard's headers, hash it, and compare it with the index beside it. Writes nothing."""
    indexed = True
    try:
        size_of(index_beside(location))
    except FileNotFoundError:
        indexed = False
    except (UserError, OSError):  # there is something; reading it will say what is wrong
        pass
    try:
        index, outside = scan(location)
    except (ValueError, OSError) as error:  # ValueError: a UserError, or tarfile's about a malformed header
        return Checked(None, indexed, 0, _refused(location, error))
    return Checked(index, indexed, outside, _check_index(index) if indexed else [])


def _refused(location: str, error: Exception) -> list[Finding]:
    """What is wrong with a shard that can't be indexed: the error, and all else of its kind."""
    text = _about(location, error)
    found = _BYTE.search(text)
    byte = int(found[1]) if found else None
    if byte is None:  # nothing to look into: missing, unreadable, compressed, empty
        return [Finding("problem", "damage", location, "", "", byte, text)]
    try:
        findings, whole = _survey(location)
    except (UserError, OSError) as later:  # it went away meanwhile
        findings, whole = [], 0
        text += f"; then {_about(location, later)}"
    if byte not in [finding.byte for finding in findings]:
        text += f"; at least {whole:,} whole samples lie before it"
        findings.insert(0, Finding("problem", "damage", location, "", "", byte, text))
    return findings


def _about(location: str, error: Exception) -> str:
    """An error's message without the shard's name, which has a column of its own."""
    text = str(error)
    for name in (location, index_beside(location), masked(location), masked(index_beside(location))):
        text = text.removeprefix(f"{name}: ")
    return text or type(error).__name__


def _survey(location: str) -> tuple[list[Finding], int]:
    """All links, devices and repeated or scattered names in front of the damage; and how many samples end there."""
    findings: list[Finding] = []
    members: dict[str, set[str]] = {}
    current = ""

    def add(key: str, extension: str, byte: int, what: str) -> None:
        findings.append(Finding("problem", "structure", location, key, extension, byte, what))

    with open_binary(location) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        for header in _headers(file):
            if not 0 <= header.size <= size - header.offset_data:
                break
            if header.isdir():
                continue
            key, extension = split_name(header.name) or (header.name, "")
            if not header.isreg() or header.issparse():
                add(key, extension, header.offset, "a link, device or sparse file: only regular files have bytes")
                continue
            if not extension:  # it belongs to no sample
                continue
            if key != current and key in members:
                add(key, extension, header.offset, "its sample came before: members must lie together, and only once")
            elif extension in members.get(key, ()):
                add(key, extension, header.offset, "the sample's second member of this name")
            current = key
            members.setdefault(key, set()).add(extension)
    return findings, max(len(members) - 1, 0)  # the last one may go on behind the damage


def _headers(file: object) -> Iterator[tarfile.TarInfo]:
    """The headers up to the end or the first damaged one."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                tar.members = []  # or they would pile up
                yield member
    except (tarfile.TarError, ValueError):  # the latter from malformed extended headers
        return


def _check_index(index: ShardIndex) -> list[Finding]:
    """Whether the index beside a shard is that of its bytes."""
    try:
        beside = load_shard(index.location)
        samples = load_samples(beside)
    except (UserError, OSError) as error:
        what = f"stale or damaged index: {_about(index.location, error)}"
    else:
        if beside == index.shard and samples == index.samples:
            return []
        what = (
            f"stale index: sha256 is {index.sha256}, but {beside.sha256} was indexed"
            if beside.sha256 != index.sha256
            else f"damaged index: it lists other samples than the {len(index.samples)} in the shard"
        )
    return [Finding("problem", "index", index.location, "", "", None, what)]


def _check_samples(index: ShardIndex, require: Sequence[str]) -> list[Finding]:
    """Samples with too many members of a modality, without one that is required, or without any."""
    findings = []
    empty = []
    for key, members in index.samples:
        modalities = Counter(MODALITIES[extension] for extension in members if extension in MODALITIES)
        if not modalities:
            empty.append(key)
        for modality, count in modalities.items():
            if count > 1:
                names = ", ".join(extension for extension in members if MODALITIES.get(extension) == modality)
                what = f"{count} {modality} members ({names}): training reads one"
                findings.append(Finding("problem", "structure", index.location, key, "", None, what))
        missing = [modality for modality in require if modality not in modalities]
        if missing:
            what = f"has no {' and no '.join(missing)}; it has {', '.join(members)}"
            findings.append(Finding("problem", "missing", index.location, key, "", None, what))
    if empty:
        what = f"{len(empty):,} samples have no {' or '.join(_known())}; this is the first"
        findings.append(Finding("problem", "empty", index.location, empty[0], "", None, what))
    return findings


def _repeated(index: ShardIndex, first_seen: dict[str, str]) -> list[Finding]:
    """One warning if keys of this shard are in an earlier one; adds its keys to ``first_seen`` (key -> shard)."""
    repeated = [key for key, _ in index.samples if key in first_seen]
    findings = []
    if repeated:
        what = f"{len(repeated):,} keys are in earlier shards, too; this one is in {masked(first_seen[repeated[0]])}"
        findings.append(Finding("warning", "repeated", index.location, repeated[0], "", None, what))
    for key, _ in index.samples:
        first_seen.setdefault(key, index.location)
    return findings


def _notes(shards: int, without_index: int, outside: int, unread: Counter[str]) -> list[str]:
    """What is no fault, but should be known."""
    notes = []
    if without_index:
        none = f"{without_index:,} of {shards:,} shards have no index beside them"
        notes.append(f"{none}: first use writes it, or `python -m data index`")
    dotted = Counter({extension: count for extension, count in unread.items() if "." in extension})
    plain = unread - dotted
    if plain:
        notes.append(f"{plain.total():,} files that nothing reads: {_most(plain)}")
    if dotted:
        notes.append(
            f"{dotted.total():,} files that nothing reads have a dot in their extension: {_most(dotted)}; "
            "a name is cut at its first dot"
        )
    if outside:
        belong = "file belongs" if outside == 1 else "files belong"
        why = "hidden, without an extension, or in a folder named like __this__"
        notes.append(f"{outside:,} {belong} to no sample: {why}")
    return notes


def _most(counts: Counter[str]) -> str:
    """The most frequent extensions, as ``.pkl 12, .pth 3``."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = [f".{extension} {count:,}" for extension, count in ranked[:8]]
    return ", ".join(named + [f"{len(ranked) - 8:,} others"] * (len(ranked) > 8))


def render(report: Report, width: int) -> list[str]:
    """The report as lines of text for a terminal of ``width`` columns."""
    lines: list[str] = []
    if report.findings:
        shown = report.findings[:SHOWN]
        names = {finding.shard: Path(finding.shard).name for finding in report.findings}
        if len(set(names.values())) < len(names):
            names = {shard: shard for shard in names}
        cells = [
            (
                names[finding.shard],
                finding.key,
                finding.member,
                "" if finding.byte is None else str(finding.byte),
                finding.what if finding.level == "problem" else f"warning: {finding.what}",
            )
            for finding in shown
        ]
        lines += columns([("shard", "sample", "member", "byte", "what"), *cells], width)
        rest = Counter(finding.kind for finding in report.findings[SHOWN:])
        if rest:
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in rest.items())
            lines.append(f"... and {rest.total():,} more ({kinds}); --json OUT has all of them")
        lines.append("")
        lines += [
            f"{kind:10}{HINTS[kind]}" for kind in HINTS if any(finding.kind == kind for finding in report.findings)
        ]
        lines.append("")
    lines += [f"note: {printable(note)}" for note in report.notes]
    parts = [
        _plural(report.shards, "shard") + (f" ({report.unusable:,} unusable)" if report.unusable else ""),
        _plural(report.samples, "sample"),
        *([f"{_plural(report.decoded, 'file')} decoded"] if report.decoded else []),
        _plural(report.count("problem"), "problem"),
        *([_plural(report.count("warning"), "warning")] if report.count("warning") else []),
    ]
    return [*lines, ", ".join(parts)]


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"

"""python -m data stats: what is in shards. Counts and sizes come from the indexes, lengths from the files' headers."""

import argparse
import importlib.util
import io
import json
import math
import shutil
import sys
import textwrap
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from data.cache import Reader
from data.decode import (
    IMAGE_FORMATS,
    METADATA,
    MODALITIES,
    SOUND_FORMATS,
    DecodeError,
    check_size,
    decode_audio,
    decode_metadata,
    decode_text,
    orientation,
)
from data.errors import UserError
from data.fetch import masked
from data.index import Sample, Shard, find_shards, load_samples, load_shards, write_whole
from data.terminal import cut, printable
from data.validate import check_writable

LABELS = 20
"""Labels that are shown by name."""
EXACT = 8
"""So many different values each get a bar of their own."""
TAIL = 10
"""A largest value of so many medians makes a long tail, with bars that grow."""
_BLOCKS = " ▏▎▍▌▋▊▉█"


class StatsError(UserError):
    """Statistics that can't be made as they were asked for."""


class Quantity(NamedTuple):
    """Something that is measured of a member; without a unit it is a ratio."""

    modality: str
    name: str
    unit: str

    @property
    def title(self) -> str:
        """Such as "text: length in words"."""
        return f"{self.modality}: {self.name}" + (f" in {self.unit}" if self.unit else "")


SHORTER = Quantity("image", "shorter side", "pixels")
ASPECT = Quantity("image", "width / height", "")
CHARACTERS = Quantity("text", "length", "characters")
WORDS = Quantity("text", "length", "words")
SECONDS = Quantity("audio", "duration", "seconds")
RATE = Quantity("audio", "sample rate", "Hz")
QUANTITIES = (SHORTER, ASPECT, CHARACTERS, WORDS, SECONDS, RATE)


@dataclass
class Members:
    """All members of a modality."""

    samples: int = 0
    """Samples that have at least one."""
    extensions: Counter[str] = field(default_factory=Counter)
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    """Bytes of each."""


@dataclass
class Statistics:
    """What `measure` found."""

    label: str
    """Field of the metadata that is counted."""
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    """Of the shards."""
    members: dict[str, Members] = field(default_factory=dict)
    """By modality; "metadata"; and "unread" for what nothing reads."""
    combinations: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """Modalities that samples have together."""
    looked_at: int = 0
    """Samples whose members were read for what follows."""
    values: "dict[Quantity, array[float]]" = field(default_factory=dict)
    bad: dict[str, list[str]] = field(default_factory=dict)
    """Modality -> the members that could not be measured, and why."""
    labels: Counter[str] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)
    """Names at the top of the metadata."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="shards: paths, globs, ranges {00000..00009} or URLs")
    parser.add_argument("--label", default="label", metavar="NAME", help="field of .json to count (default: label)")
    parser.add_argument("--sample", type=int, metavar="N", help="look at only N samples, evenly spaced over all shards")
    parser.add_argument("--quick", action="store_true", help="read indexes only: no labels, lengths and resolutions")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw it all; needs matplotlib")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers to this file")


def run(arguments: argparse.Namespace) -> int:
    """Print what is in the shards; returns 0.

    Raises:
        UserError: no such shard, or one that can't be read; or an option that can't be followed.
    """
    check_writable(arguments.json, "--json")
    check_writable(arguments.plot, "--plot")
    if arguments.plot is not None:
        if arguments.plot.suffix.lower() != ".png":
            raise StatsError(f"--plot {arguments.plot}: the name must end in .png")
        if importlib.util.find_spec("matplotlib") is None:
            raise StatsError("--plot needs matplotlib: pip install -c constraints.txt -e '.[plot]'")
    if arguments.sample is not None and arguments.sample < 1:
        raise StatsError(f"--sample {arguments.sample}: must be at least 1")
    if arguments.quick and arguments.sample is not None:
        raise StatsError("--sample says how many samples to look at, --quick to look at none: give one of them")
    shards = load_shards(find_shards(arguments.paths))
    found = measure(shards, arguments.label, 0 if arguments.quick else arguments.sample)
    print("\n".join(render(found, shutil.get_terminal_size().columns, _shows_blocks())))
    if arguments.json is not None:
        write_whole(arguments.json, json.dumps(as_json(found), indent=2).encode() + b"\n")
    if arguments.plot is not None:
        from data.plot import draw  # an optional extra, and slow to import

        write_whole(arguments.plot, draw(found))
    return 0


def _shows_blocks() -> bool:
    try:
        _BLOCKS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


# --- Measuring


def measure(shards: Sequence[Shard], label: str = "label", limit: int | None = None) -> Statistics:
    """Count what the indexes say of all samples, and look into ``limit`` evenly spaced ones (None: all).

    Raises:
        UserError: a shard or its index can't be read.
    """
    found = Statistics(label, len(shards), bytes=sum(shard.size for shard in shards))
    total = sum(shard.samples for shard in shards)
    chosen = _evenly(total if limit is None else min(limit, total), total)
    following = next(chosen, None)
    reader = Reader()
    with tqdm(desc="stats", total=total, unit="sample", disable=None) as progress:
        for shard in shards:
            for sample in load_samples(shard):
                if found.samples == following:
                    following = next(chosen, None)
                    _look(shard, sample, reader, found)
                _count(sample, found)
                progress.update()
    found.values = {quantity: found.values[quantity] for quantity in QUANTITIES if quantity in found.values}
    return found


def _evenly(count: int, total: int) -> Iterator[int]:
    """``count`` of ``total`` positions: the middles of as many equal stretches."""
    return ((2 * i + 1) * total // (2 * count) for i in range(count))


def _kind(extension: str) -> str:
    return "metadata" if extension == METADATA else MODALITIES.get(extension, "unread")


def _count(sample: Sample, found: Statistics) -> None:
    """What the index says of a sample."""
    found.samples += 1
    kinds = {_kind(extension) for extension in sample.members}
    for kind in kinds:
        found.members.setdefault(kind, Members()).samples += 1
    for extension, (_, size) in sample.members.items():
        members = found.members[_kind(extension)]
        members.extensions[extension] += 1
        members.sizes.append(size)
    found.combinations[tuple(name for name in dict.fromkeys(MODALITIES.values()) if name in kinds)] += 1


def _look(shard: Shard, sample: Sample, reader: Reader, found: Statistics) -> None:
    """What a sample's members say."""
    found.looked_at += 1
    for extension, (offset, size) in sample.members.items():
        kind = _kind(extension)
        if kind == "unread":
            continue
        try:
            check_size(size)
            file = io.BufferedReader(_Member(reader, shard, offset, size), 1 << 16)
            if kind == "metadata":
                metadata = decode_metadata(file.read())
                found.fields.update(metadata.keys())
                if found.label in metadata:
                    found.labels[_as_text(metadata[found.label])] += 1
                continue
            for quantity, value in MEASURES[kind](file).items():
                found.values.setdefault(quantity, array("d")).append(value)
        except DecodeError as error:
            what = f"{masked(shard.location)}: sample {sample.key}, member .{extension}: {error}"
            found.bad.setdefault(kind, []).append(what)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


class _Member(io.RawIOBase):
    """A member as a file, of which only the pieces that are asked for are read."""

    def __init__(self, reader: Reader, shard: Shard, offset: int, size: int) -> None:
        self.reader, self.shard, self.offset, self.size = reader, shard, offset, size
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.size - self.at))
        buffer[:count] = self.reader.read(self.shard, self.offset + self.at, count)
        self.at += count
        return count


def measure_image(file: BinaryIO) -> dict[Quantity, float]:
    """Its shorter side and its shape, as it is shown. Reads the header.

    Raises:
        DecodeError: no header of an image of the formats that training reads.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large sizes, which we are here to see, and damaged EXIF data
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                width, height = image.size
                # Only what stands in front of the pixels: to look for more, Pillow would decode a PNG.
                turned = orientation(image) >= 5
    except UnidentifiedImageError as error:
        raise DecodeError(f"no image of the formats {', '.join(IMAGE_FORMATS)}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(f"image: {error}") from error
    if turned:
        width, height = height, width
    return {SHORTER: min(width, height), ASPECT: width / height}


def measure_text(file: BinaryIO) -> dict[Quantity, float]:
    """Its characters and words. Raises DecodeError as `decode_text` does."""
    text = decode_text(file.read())
    return {CHARACTERS: len(text), WORDS: len(text.split())}


def measure_audio(file: BinaryIO) -> dict[Quantity, float]:
    """Its duration and sample rate. Reads the header, or all of a file whose header leaves the length open.

    Raises:
        DecodeError: no header of a sound of the formats that training reads.
    """
    try:
        with soundfile.SoundFile(file) as sound:
            if sound.format not in SOUND_FORMATS:
                raise DecodeError(f"audio in format {sound.format}: allowed are {', '.join(SOUND_FORMATS)}")
            frames, rate = sound.frames, sound.samplerate
    except soundfile.LibsndfileError as error:
        raise DecodeError(f"audio: {error}") from error
    if not 0 < frames < np.iinfo(np.int64).max:
        file.seek(0)
        samples, rate = decode_audio(file.read())
        frames = len(samples)
    return {SECONDS: frames / rate, RATE: rate}


MEASURES: dict[str, Callable[[BinaryIO], dict[Quantity, float]]] = {
    "image": measure_image,
    "text": measure_text,
    "audio": measure_audio,
}


# --- Histograms


class Bar(NamedTuple):
    """How many values lie in low <= value < high, or are low where both are the same."""

    low: float
    high: float
    files: int


def histogram(values: Sequence[float], at_most: int) -> list[Bar]:
    """Bars with round borders: one per value if those are few; else equal steps, or growing ones for a long tail.

    Args:
        values: at least one, all positive.
        at_most: bars of equal steps.
    """
    known = np.asarray(values, dtype=np.float64)
    distinct, counts = np.unique(known, return_counts=True)
    if len(distinct) <= EXACT:
        return [Bar(float(value), float(value), int(count)) for value, count in zip(distinct, counts, strict=True)]
    edges = _growing(distinct, at_most) if distinct[-1] >= TAIL * np.median(known) else _equal(distinct, at_most)
    counts, _ = np.histogram(known, edges)
    return [Bar(low, high, int(count)) for low, high, count in zip(edges, edges[1:], counts, strict=False)]


def is_whole(values: Sequence[float] | npt.NDArray[np.float64]) -> bool:
    """Whether none has a fraction."""
    known = np.asarray(values)
    return bool((known == known.round()).all())


def _equal(distinct: npt.NDArray[np.float64], at_most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from the smallest value or below to above the largest."""
    low, high = float(distinct[0]), float(distinct[-1])
    whole = is_whole(distinct)
    steps = (factor * 10.0**power for power in range(0 if whole else -9, 19) for factor in (1, 2, 5))
    step = next(step for step in steps if high // step - low // step < at_most)
    return [round(i * step, 9) for i in range(int(low // step), int(high // step) + 2)]


def _growing(distinct: npt.NDArray[np.float64], at_most: int) -> list[float]:
    """1, 2, 5, 10, 20, ... or a closer series."""
    low, high = float(distinct[0]), float(distinct[-1])
    factors = (1, 2, 5) if at_most < 20 else (1, 1.5, 2, 3, 5, 7)
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 2)
    series = [round(factor * 10.0**power, 9) for power in powers for factor in factors]
    if is_whole(distinct):
        series = [edge for edge in series if edge == round(edge)]
    first = max(i for i, edge in enumerate(series) if edge <= low)
    last = min(i for i, edge in enumerate(series) if edge > high)
    return series[first : last + 1]


# --- Showing


def render(found: Statistics, width: int, blocks: bool = True) -> list[str]:
    """The statistics as lines of text for a terminal of ``width`` columns; without ``blocks`` in ASCII."""
    lines = [summary(found), "", *_files(found, width), "", "samples with"]
    lines += [*_chart(combinations(found), found.samples, width, blocks), ""]
    if found.looked_at < found.samples:
        lines += [f"looked into {found.looked_at:,} of {found.samples:,} samples, evenly spaced", ""]
    if found.labels:
        count = f"{len(found.labels):,} values in {found.labels.total():,} samples"
        lines += [f".json field {printable(found.label)!r}: {count}"]
        lines += [*_chart(top_labels(found.labels), found.labels.total(), width, blocks), ""]
    elif found.fields:
        fields = ", ".join(cut(printable(name), 30) for name, _ in found.fields.most_common(10))
        lines += [f"no .json has the field {found.label!r}; --label NAME counts another: {fields}", ""]
    for quantity, values in found.values.items():
        rows = named_bars(values, 16)
        lines += [f"{quantity.title}: {quantiles(values)}"]
        lines += [*(_chart(rows, len(values), width, blocks) if len(rows) > 1 else ()), ""]
    for kind, messages in found.bad.items():
        lines += [f"{kind}: {len(messages):,} that can't be measured; `python -m data validate --decode` lists such"]
        lines += [*(f"  {printable(message)}" for message in messages[:3]), *["  ..."] * (len(messages) > 3), ""]
    return lines[:-1]


def summary(found: Statistics) -> str:
    """How much there is, in a line."""
    return f"{found.shards:,} shards, {found.samples:,} samples, {_bytes(found.bytes)}"


def _files(found: Statistics, width: int) -> list[str]:
    """A line per modality: how many samples have it, and the sizes of its files."""
    rows: list[tuple[str, ...]] = [("", "samples", "share", "smallest", "median", "largest", "total", "extensions")]
    for kind in (*dict.fromkeys(MODALITIES.values()), "metadata", "unread"):
        if kind in found.members:
            members = found.members[kind]
            sizes = np.asarray(members.sizes)
            figures = [_bytes(float(size)) for size in (sizes.min(), np.median(sizes), sizes.max(), sizes.sum())]
            extensions = [f"{cut(printable(name), 20)} {count:,}" for name, count in members.extensions.most_common(6)]
            rest = ["..."] * (len(members.extensions) > 6)
            share = f"{100 * members.samples / found.samples:.1f} %"
            rows.append((kind, f"{members.samples:,}", share, *figures, ", ".join(extensions + rest)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *figures, last in rows:
        aligned = (f"{figure:>{w}}" for figure, w in zip(figures, widths[1:-1], strict=True))
        start = "  ".join([f"{first:{widths[0]}}", *aligned, ""])
        texts = textwrap.wrap(last, max(width - len(start), 16))
        lines += [start + texts[0], *(" " * len(start) + text for text in texts[1:])]
    return lines


def combinations(found: Statistics) -> list[tuple[str, int]]:
    """How many samples have which modalities, the most frequent first."""
    return [(" + ".join(names) or "none of them", count) for names, count in found.combinations.most_common()]


def top_labels(labels: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent labels, and all others as one."""
    ranked = sorted(labels.items(), key=lambda item: (-item[1], item[0]))
    rows = [(cut(printable(label), 30), count) for label, count in ranked[:LABELS]]
    if len(ranked) > LABELS:
        rows.append((f"the other {len(ranked) - LABELS:,}", sum(count for _, count in ranked[LABELS:])))
    return rows


def named_bars(values: Sequence[float], at_most: int) -> list[tuple[str, int]]:
    """A histogram with the values of its bars as text; of whole numbers the last one that is in a bar."""
    rows, whole = [], is_whole(values)
    for low, high, count in histogram(values, at_most):
        last = high - 1 if whole else high
        rows.append((number(low) if low >= last or low == high else f"{number(low)} .. {number(last)}", count))
    return rows


def quantiles(values: Sequence[float]) -> str:
    """Smallest, largest and median."""
    low, median, high = (number(float(value)) for value in np.quantile(values, [0, 0.5, 1]))
    return f"{low} each" if low == high else f"{low} to {high}, median {median}"


def number(value: float) -> str:
    """For people: four digits, or all of a whole number."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,.4g}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"


def _chart(rows: Sequence[tuple[str, int]], total: int, width: int, blocks: bool) -> list[str]:
    """A line per row: label, count, share of ``total``, and a bar as long as the share is of the largest."""
    names = max(len(label) for label, _ in rows)
    counts = max(len(f"{count:,}") for _, count in rows)
    room = min(max(width - names - counts - 15, 8), 60)
    largest = max(count for _, count in rows) or 1
    lines = []
    for label, count in rows:
        eighths = math.ceil(8 * room * count / largest)  # what is there is seen
        whole, rest = divmod(eighths, 8)
        bar = _BLOCKS[8] * whole + _BLOCKS[rest].strip() if blocks else "#" * math.ceil(eighths / 8)
        lines.append(f"  {label:>{names}}  {count:>{counts},}  {100 * count / total:5.1f} %  {bar}".rstrip())
    return lines


def as_json(found: Statistics) -> dict[str, Any]:
    """All numbers, for `json.dumps`."""
    return {
        "schema": 1,
        "shards": found.shards,
        "samples": found.samples,
        "bytes": found.bytes,
        "files": {
            kind: {
                "samples": members.samples,
                "extensions": dict(members.extensions.most_common()),
                "bytes": _spread(members.sizes),
            }
            for kind, members in found.members.items()
        },
        "combinations": {"+".join(names): count for names, count in found.combinations.most_common()},
        "looked_at": found.looked_at,
        "label": found.label,
        "labels": dict(found.labels.most_common()),
        "measured": [
            {**quantity._asdict(), **_spread(values), "histogram": histogram(values, 40)}  # [low, high, files]
            for quantity, values in found.values.items()
        ],
        "not_measured": found.bad,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    array_ = np.asarray(values)
    low, fifth, median, ninety_fifth, high = (float(value) for value in np.quantile(array_, [0, 0.05, 0.5, 0.95, 1]))
    return {
        "count": len(array_),
        "min": low,
        "5%": fifth,
        "median": median,
        "95%": ninety_fifth,
        "max": high,
        "total": float(array_.sum()),
    }

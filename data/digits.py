"""The embedded default data set: handwritten digits, their spoken names and captions, as shards.

Run ``python -m data.digits OUT`` to build it. See ``assets/SOURCES.md`` for what is real and what synthesised.
"""

import argparse
import hashlib
import io
import json
import random
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from data.errors import UserError
from data.index import ShardError, build_index, index_path, load_index, verify, write_whole
from data.shards import write_shards

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES: tuple[str, ...] = (
    "a handwritten {}",
    "the digit {}",
    "someone wrote the number {}",
    "this is a {}",
    "the number {} on paper",
    "a small grey picture of a {}",
    "{}, written by hand",
    "a scan of the figure {}",
    "what you see and hear is {}",
    "{} as it was written on a form",
    "a voice says {}",
    "the answer is {}",
)
SPLITS = ("train", "val", "test")

_SCHEMA = 2  # of the data set: raise it when the samples change
_ASSETS = tuple(Path(__file__).parent / "assets" / name for name in ("digits-voices.tar", "digits-voices-more.tar"))
_MARKER = "digits.json"
_SHARD = re.compile(rf"({'|'.join(SPLITS)})-\d+\.tar")
_SAMPLES_PER_SHARD = 1000
_VAL_IMAGES, _TEST_IMAGES = 30, 40  # of each digit; the rest, 104 to 113, is for training
_VAL_VOICES = {"07", "19", "31"}  # of the 8 that are kept from training; the other 5 are for testing
_PIXELS = 32

T = TypeVar("T")
Clips = dict[tuple[int, str], bytes]  # (digit, voice) -> FLAC


def build(out: Path, *, pairings: int = 3, seed: int = 0) -> dict[str, list[Path]]:
    """Build the data set in the folder ``out``, unless it is there already and whole.

    A sample is ``png`` (32x32, 8-bit grey), ``txt`` (UTF-8 caption), ``flac`` (8 kHz, mono, 16-bit) and ``json``
    (``label`` 0..9, ``image``: row of scikit-learn's set, ``voice``, ``template``: index into `TEMPLATES`). Splits
    share neither images nor voices. The same arguments give the same bytes, up to Pillow's PNG compression.

    Args:
        out: made if need be. ``digits.json``, written last, marks a whole build.
        pairings: samples per training image, each with another voice and another template. Others have one.
        seed: of the split and of the pairing.

    Returns:
        split (``train``, ``val``, ``test``) -> its shards in order.

    Raises:
        ValueError: ``pairings`` is not in 1..12 (the number of templates).
        FileExistsError: ``out`` has shards of these names that this function did not write.
    """
    if not 1 <= pairings <= len(TEMPLATES):
        raise ValueError(f"pairings must be in 1..{len(TEMPLATES)}, not {pairings}")
    recipe = {"schema": _SCHEMA, "pairings": pairings, "seed": seed}
    marker = _read_marker(out)
    if marker.get("recipe") == recipe and _is_whole(out, marker["shards"]):
        return _by_split([out / name for name in sorted(marker["shards"])])

    from sklearn.datasets import load_digits  # takes seconds, which programs that build nothing need not wait for

    out.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    labels = [int(label) for label in digits.target]
    images = _split_images(labels, seed)
    pngs = [_png(grid) for grid in digits.images]
    clips = _load_clips()
    with tempfile.TemporaryDirectory(dir=out, prefix=".digits-") as scratch:
        made: dict[str, str] = {}
        for split in SPLITS:
            count = pairings if split == "train" else 1
            plan = _pair(images[split], labels, clips[split], count, random.Random(f"{seed} {split}"))
            samples = _samples(split, images[split], plan, labels, pngs, clips[split])
            for shard in write_shards(samples, Path(scratch) / split, max_samples=_SAMPLES_PER_SHARD):
                made[shard.name] = load_index(shard).sha256
        _clear(out, made, marker.get("shards", {}))
        for name in made:
            (Path(scratch) / name).replace(out / name)
            index_path(Path(scratch) / name).replace(index_path(out / name))
            index_path(out / name).touch()  # not older than the shard, whose move counts as a change
    write_whole(out / _MARKER, json.dumps({"recipe": recipe, "shards": made}, indent=1).encode() + b"\n")
    return _by_split([out / name for name in sorted(made)])


def _read_marker(out: Path) -> dict[str, Any]:
    """What the last whole build in ``out`` wrote: its recipe, and its shards' names and hashes; or nothing."""
    try:
        marker = json.loads((out / _MARKER).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return marker if isinstance(marker, dict) and isinstance(marker.get("shards"), dict) else {}


def _is_whole(out: Path, shards: dict[str, str]) -> bool:
    """Whether ``out`` has all of ``shards`` (name -> sha256), unchanged, with their indexes."""
    try:
        for name, sha256 in shards.items():
            index = load_index(out / name)
            if index.sha256 != sha256:
                return False
            verify(index)
    except ShardError:
        return False
    return True


def _clear(out: Path, made: dict[str, str], recorded: dict[str, str]) -> None:
    """Remove from ``out`` what an earlier build left beyond ``made``; refuse to touch anyone else's shards."""
    old = [path for path in sorted(out.iterdir()) if _SHARD.fullmatch(path.name)]
    for path in old:
        # A build that was interrupted before its marker has left whole shards, the same as now.
        if path.name not in recorded and _sha256(path) != made.get(path.name):
            raise FileExistsError(f"{path}: not written by this builder; choose another folder")
    for path in old:
        if path.name not in made:
            index_path(path).unlink(missing_ok=True)
            path.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _by_split(shards: Sequence[Path]) -> dict[str, list[Path]]:
    """Group shards by the split that their names begin with."""
    return {split: sorted(path for path in shards if path.name.startswith(f"{split}-")) for split in SPLITS}


def _shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    """A shuffled copy, by random() alone: the one method whose sequence Python promises to keep."""
    return sorted(items, key=lambda _: rng.random())


def _split_images(labels: Sequence[int], seed: int) -> dict[str, list[int]]:
    """Split the rows of ``labels`` with the same number of each digit in val, and in test; in shuffled order."""
    rng = random.Random(f"{seed} images")
    images: dict[str, list[int]] = {split: [] for split in SPLITS}
    for digit in range(len(CLASS_NAMES)):
        rows = _shuffled([row for row, label in enumerate(labels) if label == digit], rng)
        images["val"] += rows[:_VAL_IMAGES]
        images["test"] += rows[_VAL_IMAGES : _VAL_IMAGES + _TEST_IMAGES]
        images["train"] += rows[_VAL_IMAGES + _TEST_IMAGES :]
    return {split: _shuffled(rows, rng) for split, rows in images.items()}


def _pair(
    images: Sequence[int], labels: Sequence[int], clips: Clips, pairings: int, rng: random.Random
) -> dict[int, list[tuple[str, int]]]:
    """Choose ``pairings`` (voice, template) for each image, all distinct, each used equally often per digit."""
    voices = sorted({voice for _, voice in clips})
    voice_uses: defaultdict[int, Counter[str]] = defaultdict(Counter)
    template_uses: defaultdict[int, Counter[int]] = defaultdict(Counter)
    plan = {}
    for image in images:
        chosen_voices = _least_used(voices, voice_uses[labels[image]], pairings, rng)
        chosen_templates = _least_used(range(len(TEMPLATES)), template_uses[labels[image]], pairings, rng)
        plan[image] = list(zip(chosen_voices, chosen_templates, strict=True))
    return plan


def _least_used(items: Sequence[T], uses: Counter[T], count: int, rng: random.Random) -> list[T]:
    """Take the ``count`` items that were taken least often, at random among equals, and count them in ``uses``."""
    chosen = sorted(items, key=lambda item: (uses[item], rng.random()))[:count]
    uses.update(chosen)
    return chosen


def _samples(
    split: str,
    images: Sequence[int],
    plan: dict[int, list[tuple[str, int]]],
    labels: Sequence[int],
    pngs: Sequence[bytes],
    clips: Clips,
) -> Iterator[dict[str, bytes | str]]:
    """The samples of a split; all images once before any comes again, so that neighbours differ."""
    for pairing in range(len(plan[images[0]])):
        for number, image in enumerate(images):
            label, (voice, template) = labels[image], plan[image][pairing]
            facts = {"label": label, "image": image, "voice": voice, "template": template}
            yield {
                "__key__": f"{split}-{number:05d}-{pairing}",
                "png": pngs[image],
                "txt": TEMPLATES[template].format(CLASS_NAMES[label]).encode(),
                "flac": clips[label, voice],
                "json": json.dumps(facts, sort_keys=True, separators=(",", ":")).encode(),
            }


def _png(grid: np.ndarray[Any, np.dtype[np.float64]]) -> bytes:
    """Encode an (8, 8) image with values 0..16 as a 32x32 8-bit grey PNG."""
    small = Image.fromarray(np.rint(grid * (255 / 16)).astype(np.uint8))
    file = io.BytesIO()
    small.resize((_PIXELS, _PIXELS), Image.Resampling.BICUBIC).save(file, format="png")
    return file.getvalue()


def _load_clips() -> dict[str, Clips]:
    """The embedded clips by split; the assets name them ``{train|val}_{digit}_{voice}.flac``."""
    clips: dict[str, Clips] = {split: {} for split in SPLITS}
    for asset in _ASSETS:
        with asset.open("rb") as file:
            for key, members in build_index(asset).samples:
                bank, digit, voice = key.split("_")
                split = "train" if bank == "train" else "val" if voice in _VAL_VOICES else "test"
                offset, size = members["flac"]
                file.seek(offset)
                clips[split][int(digit), voice] = file.read(size)
    return clips


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the data set and print what each split holds; returns 2 if that can't be done, with the reason printed."""
    parser = argparse.ArgumentParser(prog="python -m data.digits", description="Build the default data set.")
    parser.add_argument("out", type=Path, help="folder for the shards; made if need be")
    out = parser.parse_args(arguments).out
    try:
        built = build(out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for split, shards in built.items():
        indexes = [load_index(shard) for shard in shards]
        samples, size = sum(len(index.samples) for index in indexes), sum(index.size for index in indexes)
        print(f"{split:5} {samples:5} samples {size / 1e6:6.1f} MB in {len(shards)} shard(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

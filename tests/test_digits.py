import hashlib
import io
import json
import tarfile
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

from data import digits
from data.digits import CLASS_NAMES, TEMPLATES, build, main
from data.index import build_index, index_path, load_index, verify


class Row(NamedTuple):
    key: str
    png: bytes
    caption: str
    flac: bytes
    label: int
    image: int
    voice: str
    template: int


class Built(NamedTuple):
    out: Path
    shards: dict[str, list[Path]]
    rows: dict[str, list[Row]]


def read(shards: list[Path]) -> list[Row]:
    return [
        Row(sample["__key__"], sample["png"], sample["txt"].decode(), sample["flac"], **json.loads(sample["json"]))
        for sample in webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
    ]


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Shared by the tests that only read."""
    out = tmp_path_factory.mktemp("digits")
    shards = build(out)
    return Built(out, shards, {split: read(paths) for split, paths in shards.items()})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images, so that a build takes a moment."""
    whole: Any = load_digits()
    rows = [row for digit in range(10) for row in np.flatnonzero(whole.target == digit)[:6]]
    whole.images, whole.target = whole.images[rows], whole.target[rows]
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: whole)
    monkeypatch.setattr(digits, "_VAL_IMAGES", 1)
    monkeypatch.setattr(digits, "_TEST_IMAGES", 2)
    monkeypatch.setattr(digits, "_SAMPLES_PER_SHARD", 40)


def test_counts_are_the_same_for_each_digit(built: Built) -> None:
    assert {split: len(rows) for split, rows in built.rows.items()} == {"train": 3291, "val": 300, "test": 400}
    assert set(Counter(row.label for row in built.rows["val"]).values()) == {30}
    assert set(Counter(row.label for row in built.rows["test"]).values()) == {40}
    assert sum(len(load_index(shard).samples) for shard in built.shards["train"]) == 3291


def test_splits_share_no_image_and_no_voice(built: Built) -> None:
    images = {split: {row.image for row in rows} for split, rows in built.rows.items()}
    voices = {split: {row.voice for row in rows} for split, rows in built.rows.items()}

    assert set.union(*images.values()) == set(range(1797))
    assert sum(map(len, images.values())) == 1797
    assert {split: len(found) for split, found in voices.items()} == {"train": 64, "val": 3, "test": 5}
    assert len(set.union(*voices.values())) == 72


def test_image_label_caption_and_clip_agree(built: Built) -> None:
    source: Any = load_digits()
    clips: dict[str, bytes] = {}
    for asset in digits._ASSETS:
        with tarfile.open(asset) as bank:
            clips |= {member.name: bank.extractfile(member).read() for member in bank}  # type: ignore[union-attr]
    for split, rows in built.rows.items():
        for row in rows:
            assert row.label == source.target[row.image]
            assert row.caption == TEMPLATES[row.template].format(CLASS_NAMES[row.label])
            bank_split = "train" if split == "train" else "val"
            assert row.flac == clips[f"{bank_split}_{row.label}_{row.voice}.flac"]


def test_the_image_is_the_sources(built: Built) -> None:
    source: Any = load_digits()
    for row in built.rows["val"]:
        with Image.open(io.BytesIO(row.png)) as image:
            assert (image.mode, image.size, image.format) == ("L", (32, 32), "PNG")
            pixels = np.asarray(image, dtype=float)
        # The mean over each 4x4 field gives about the pixel it was enlarged from; other images are far off.
        coarse = pixels.reshape(8, 4, 8, 4).mean(axis=(1, 3)) / 255 * 16
        distance = np.abs(source.images - coarse).mean(axis=(1, 2))
        assert distance.argmin() == row.image
        assert distance[row.image] < 1
        assert pixels.max() > 200
        assert len(np.unique(pixels)) > 17  # smooth: more levels than the source has


def test_clips_are_8_khz_mono_16_bit(built: Built) -> None:
    for flac in {row.flac for row in built.rows["test"]}:
        info = soundfile.info(io.BytesIO(flac))
        assert (info.samplerate, info.channels, info.format, info.subtype) == (8000, 1, "FLAC", "PCM_16")
        assert 0.2 < info.duration < 1


def test_a_training_image_comes_with_other_voices_and_templates(built: Built) -> None:
    by_image = defaultdict(list)
    for row in built.rows["train"]:
        by_image[row.image].append(row)

    for rows in by_image.values():
        assert len({row.voice for row in rows}) == len({row.template for row in rows}) == len(rows) == 3
        assert len({row.png for row in rows}) == 1
        assert len({row.key.rsplit("-", 1)[0] for row in rows}) == 1
        assert sorted(row.key[-1] for row in rows) == ["0", "1", "2"]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_voices_and_templates_are_spread_evenly_over_each_digit(built: Built, split: str) -> None:
    voices = Counter((row.label, row.voice) for row in built.rows[split])
    templates = Counter((row.label, row.template) for row in built.rows[split])

    assert len(voices) == 10 * len({row.voice for row in built.rows[split]})
    assert len(templates) == 10 * 12
    for digit in range(10):
        for counts in (voices, templates):
            of_digit = [count for (label, _), count in counts.items() if label == digit]
            assert max(of_digit) - min(of_digit) <= 1


def test_neither_voice_nor_order_tells_the_template_or_digit(built: Built) -> None:
    rows = built.rows["train"]
    # Each of 64 x 12 combinations is expected 4.3 times, and 1.4 % of them never: a voice tied to a template would
    # leave many at 0.
    pairs = Counter((row.voice, row.template) for row in rows)
    assert len(pairs) > 0.95 * 64 * 12
    assert max(pairs.values()) < 20
    # Neighbours in the shards are of one digit by chance only (1 in 10), and never of one image.
    assert sum(a.label == b.label for a, b in pairwise(rows)) < 0.15 * len(rows)
    assert len({row.image for row in rows[:1097]}) == 1097


def test_captions_are_distinct_and_name_one_digit(built: Built) -> None:
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 12
    for row in built.rows["train"]:
        words = row.caption.replace(",", "").split()
        assert [word for word in words if word in CLASS_NAMES] == [CLASS_NAMES[row.label]]


def test_building_twice_gives_the_same_bytes(built: Built, tmp_path: Path) -> None:
    build(tmp_path)
    assert hashes(tmp_path) == hashes(built.out)
    assert set(json.loads((tmp_path / "digits.json").read_text())["shards"]) == {
        shard.name for shards in built.shards.values() for shard in shards
    }


def test_a_whole_build_is_left_alone(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = build(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr("sklearn.datasets.load_digits", None)  # a rebuild would call it

    assert build(tmp_path) == shards
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("harm", ["no marker", "no shard", "cut", "changed bit", "bad index", "bad marker"])
def test_an_incomplete_build_is_rebuilt(small: None, tmp_path: Path, harm: str) -> None:
    shards = build(tmp_path)
    before = hashes(tmp_path)
    shard = shards["train"][1]
    content = bytearray(shard.read_bytes())
    if harm == "no marker":
        (tmp_path / "digits.json").unlink()
    elif harm == "no shard":
        shard.unlink()
    elif harm == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif harm == "changed bit":
        content[700] ^= 1
        shard.write_bytes(content)
    elif harm == "bad index":
        index_path(shard).write_text("{")
    else:
        (tmp_path / "digits.json").write_text(json.dumps({"recipe": None, "shards": 3}))

    assert build(tmp_path) == shards
    assert hashes(tmp_path) == before
    for path in shards["train"]:
        verify(load_index(path))


def test_another_recipe_replaces_the_shards(small: None, tmp_path: Path) -> None:
    first = build(tmp_path)
    assert [len(first[split]) for split in ("train", "val", "test")] == [3, 1, 1]
    val = first["val"][0].read_bytes()

    second = build(tmp_path, pairings=1)
    assert [path.name for path in second["train"]] == ["train-00000.tar"]
    assert sorted(path.name for path in tmp_path.glob("train-*")) == ["train-00000.tar", "train-00000.tar.index.jsonl"]
    assert len(read(second["train"])) == 30
    assert second["val"][0].read_bytes() == val  # what is scored does not depend on how often training pairs

    assert build(tmp_path, pairings=1, seed=1)["val"][0].read_bytes() != val


def test_other_peoples_shards_are_not_touched(small: None, tmp_path: Path) -> None:
    for name in ("train-00000.tar", "val-00007.tar"):
        (tmp_path / name).write_bytes(b"precious")
        with pytest.raises(FileExistsError, match=name):
            build(tmp_path)
        assert hashes(tmp_path) == {name: hashlib.sha256(b"precious").hexdigest()}
        (tmp_path / name).unlink()


@pytest.mark.parametrize("pairings", [0, 13])
def test_pairings_beyond_the_templates_are_refused(tmp_path: Path, pairings: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.12, not {pairings}"):
        build(tmp_path / "out", pairings=pairings)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_samples_and_size(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines] == [
        ["train", "90", "samples"],
        ["val", "10", "samples"],
        ["test", "20", "samples"],
    ]
    assert float(lines[0][3]) == pytest.approx(
        sum(path.stat().st_size for path in tmp_path.glob("train-*.tar")) / 1e6, abs=0.05
    )


def test_the_command_says_what_stands_in_its_way(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train-00000.tar").write_bytes(b"precious")
    assert main([str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path}/train-00000.tar: not written by this builder; choose another folder\n"
    )


def test_the_embedded_clips_are_all_there() -> None:
    keys = [sample.key.split("_") for asset in digits._ASSETS for sample in build_index(asset).samples]
    assert Counter(split for split, _, _ in keys) == {"train": 640, "val": 80}
    assert {(digit, voice) for _, digit, voice in keys} == {
        (str(digit), f"{voice:02d}") for digit in range(10) for voice in range(72)
    }
    for asset in digits._ASSETS:
        assert (asset.parent / "SOURCES.md").is_file()
        assert not index_path(asset).exists()  # a build must not write into the installed package

import argparse
import io
import json
import struct
import sys
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from data import stats
from data.cache import Reader
from data.index import ShardError, load_shards
from data.stats import (
    ASPECT,
    CHARACTERS,
    RATE,
    SECONDS,
    SHORTER,
    WORDS,
    StatsError,
    add_arguments,
    as_json,
    histogram,
    measure,
    named_bars,
    render,
    run,
)


def image(width: int, height: int, format_: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, format_, **options)
    return file.getvalue()


def sound(frames: int, rate: int, format_: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(frames), rate, format=format_)
    return file.getvalue()


def label(value: object) -> bytes:
    return json.dumps({"label": value, "site": "north"}).encode()


def write_shard(path: Path, samples: Sequence[Mapping[str, bytes]], prefix: str = "k") -> str:
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples):
            for extension, content in sample.items():
                info = tarfile.TarInfo(f"{prefix}{i}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def call(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(list(map(str, arguments))))


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Seven samples in two shards."""
    first = [
        {"jpg": image(40, 20), "txt": b"a cat", "json": label("cat")},
        {"png": image(20, 60, "PNG"), "txt": "größe".encode(), "json": label("cat")},
        {"jpg": image(30, 30), "json": label(7)},
        {"wav": sound(16_000, 8_000), "flac.bak": b"??"},
    ]
    second = [
        {"ogg": sound(24_000, 16_000, "OGG"), "txt": b"  one two three\n", "json": label(["x"])},
        {"txt": b"\xff", "jpg": image(20, 20)[:8]},
        {"pkl": b"1234", "json": b"{}"},
    ]
    return [write_shard(tmp_path / "a.tar", first), write_shard(tmp_path / "b.tar", second, "q")]


def test_every_number_of_a_small_set(shards: list[str]) -> None:
    found = measure(load_shards(shards))

    assert (found.shards, found.samples, found.looked_at) == (2, 7, 7)
    assert found.bytes == sum(Path(shard).stat().st_size for shard in shards)
    assert {kind: (members.samples, dict(members.extensions)) for kind, members in found.members.items()} == {
        "image": (4, {"jpg": 3, "png": 1}),
        "text": (4, {"txt": 4}),
        "audio": (2, {"wav": 1, "ogg": 1}),
        "metadata": (5, {"json": 5}),
        "unread": (2, {"flac.bak": 1, "pkl": 1}),
    }
    assert sorted(found.members["text"].sizes) == [1, 5, 7, 16]
    assert found.combinations == {
        ("image", "text"): 3,
        ("image",): 1,
        ("audio",): 1,
        ("text", "audio"): 1,
        (): 1,
    }
    assert {quantity: list(values) for quantity, values in found.values.items()} == {
        SHORTER: [20, 20, 30],
        ASPECT: [2, 1 / 3, 1],
        CHARACTERS: [5, 5, 13],
        WORDS: [2, 1, 3],
        SECONDS: [2, 1.5],
        RATE: [8_000, 16_000],
    }
    assert found.labels == {"cat": 2, "7": 1, '["x"]': 1}
    assert found.fields == {"label": 4, "site": 4}
    assert {kind: len(messages) for kind, messages in found.bad.items()} == {"text": 1, "image": 1}
    assert found.bad["text"][0].startswith(f"{shards[1]}: sample q1, member .txt: text is not UTF-8")


def test_only_headers_of_images_and_sounds_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    file, noise = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    soundfile.write(noise, np.random.default_rng(0).uniform(-1, 1, 400_000), 16_000, format="FLAC")
    shard = write_shard(tmp_path / "x.tar", [{"png": file.getvalue(), "flac": noise.getvalue()}])
    assert min(len(file.getvalue()), len(noise.getvalue())) > 500_000  # so a header is a small part
    read = Reader.read
    sizes = []

    def counted(self: Reader, shard: Any, offset: int, size: int) -> bytes:
        sizes.append(size)
        return read(self, shard, offset, size)

    monkeypatch.setattr(Reader, "read", counted)
    found = measure(load_shards([shard]))
    assert (list(found.values[SHORTER]), list(found.values[SECONDS])) == ([700], [25])
    assert sum(sizes) < 300_000


def test_images_count_as_they_are_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    shard = write_shard(tmp_path / "x.tar", [{"jpg": image(40, 10, exif=exif)}])
    assert list(measure(load_shards([shard])).values[ASPECT]) == [0.25]


def test_a_sound_of_open_length_is_as_long_as_it_is(tmp_path: Path) -> None:
    data = bytearray(sound(4_000, 8_000))
    data[4:8] = data[40:44] = struct.pack("<I", 0)
    shard = write_shard(tmp_path / "x.tar", [{"wav": bytes(data)}])
    assert list(measure(load_shards([shard])).values[SECONDS]) == [0.5]


def test_hostile_members_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = bytearray(image(10, 10, "PNG"))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    samples = [{"png": bytes(bomb)}, {"png": b""}, {"jpg": b"GIF89a" + bytes(20)}, {"json": b"[" * 5000}]
    samples += [{"txt": b"x" * 10_001}]
    monkeypatch.setattr("data.decode.MAX_MEMBER_BYTES", 10_000)
    found = measure(load_shards([write_shard(tmp_path / "x.tar", samples)]))
    assert {kind: len(messages) for kind, messages in found.bad.items()} == {"image": 3, "metadata": 1, "text": 1}
    assert "exceeds limit" in found.bad["image"][0]
    assert found.values == {}


def test_a_sample_is_evenly_spaced_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [{"txt": b"x" * (i + 1)} for i in range(10)]
    shards = [write_shard(tmp_path / f"{i}.tar", texts[5 * i : 5 * i + 5], f"{i}-") for i in range(2)]
    assert list(measure(load_shards(shards), limit=2).values[CHARACTERS]) == [3, 8]
    assert list(measure(load_shards(shards), limit=99).values[CHARACTERS]) == list(range(1, 11))

    assert call(*shards, "--sample", 5) == 0
    out = capsys.readouterr().out
    assert "2 shards, 10 samples" in out
    assert "looked into 5 of 10 samples, evenly spaced" in out
    assert "characters: 2 to 10, median 6" in out


def test_quick_reads_no_member(
    shards: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(Reader, "read")
    assert call(*shards, "--quick") == 0
    out = capsys.readouterr().out
    assert "looked into 0 of 7 samples" in out
    assert "image + text  3   42.9 %" in out


def test_labels_are_cut_and_the_rest_is_counted(tmp_path: Path) -> None:
    values = [f"v{i:02}" for i in range(25) for _ in range(30 - i)]
    values += ["\x1b[2J"] * 99
    shard = write_shard(tmp_path / "x.tar", [{"json": label(value)} for value in values])
    lines = render(measure(load_shards([shard])), 100)
    start = next(i for i, line in enumerate(lines) if line.startswith(".json field 'label': 26 values in 549 samples"))
    assert lines[start + 1].split()[:2] == ["\\x1b[2J", "99"]
    assert lines[start + 2].split()[:2] == ["v00", "30"]
    assert lines[start + 20].split()[:2] == ["v18", "12"]
    assert lines[start + 21].split()[:4] == ["the", "other", "6", "51"]
    assert "\x1b" not in "".join(lines)


def test_a_label_that_is_not_there_names_those_that_are(shards: list[str]) -> None:
    text = "\n".join(render(measure(load_shards(shards), "species"), 80))
    assert "no .json has the field 'species'; --label NAME counts another: label, site" in text
    assert "'site': 1 values in 4" in "\n".join(render(measure(load_shards(shards), "site"), 80))


@pytest.mark.parametrize("at_most", [12, 40])
def test_histograms_hold_each_value_once(at_most: int) -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        values = random.lognormal(random.uniform(-5, 8), random.uniform(0.01, 3), random.integers(1, 60))
        if random.random() < 0.5:
            values = np.ceil(values)
        bars = histogram(values.tolist(), at_most)
        if all(bar.low == bar.high for bar in bars):
            assert len(bars) <= stats.EXACT
        else:
            assert all(after.low == before.high > before.low for before, after in pairwise(bars))
            assert bars[0].files
            assert bars[-1].files
        for bar in bars[:-1]:
            expected = (values >= bar.low) & ((values < bar.high) | (values == bar.low))
            assert bar.files == expected.sum()
        assert sum(bar.files for bar in bars) == len(values)


def test_bars_have_round_borders() -> None:
    assert named_bars([3, 3, 28], 16) == [("3", 2), ("28", 1)]
    assert named_bars(list(range(100)), 10) == [(f"{10 * i} .. {10 * i + 9}", 10) for i in range(10)]
    assert [name for name, _ in named_bars([i / 100 for i in range(5, 60)], 8)][:2] == ["0 .. 0.1", "0.1 .. 0.2"]
    tail = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1000]
    assert named_bars(tail, 16) == [
        *[("1", 1), ("2 .. 4", 3), ("5 .. 9", 5), ("10 .. 19", 0), ("20 .. 49", 0), ("50 .. 99", 0)],
        *[("100 .. 199", 0), ("200 .. 499", 0), ("500 .. 999", 0), ("1,000 .. 1,999", 1)],
    ]
    assert [bar.low for bar in histogram(tail, 40)][:7] == [1, 2, 3, 5, 7, 10, 15]


def test_charts_keep_to_the_terminal(tmp_path: Path) -> None:
    samples = [{"txt": b"x" * (1 + i % 30), "json": label("l" * 90)} for i in range(40)]
    found = measure(load_shards([write_shard(tmp_path / "x.tar", samples)]))
    for width in (60, 80, 200):
        lines = render(found, width)
        assert max(len(line) for line in lines if line.startswith("  ") and "%" in line) <= width
    assert "█" in "".join(lines)
    assert "".join(render(found, 80, blocks=False)).isascii()


def test_json_has_the_numbers(shards: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert call(*shards, "--json", out) == 0
    content = json.loads(out.read_text())
    assert content == json.loads(json.dumps(as_json(measure(load_shards(shards)))))
    assert content["files"]["text"]["bytes"] | {"5%": 0, "95%": 0} == {
        **{"count": 4, "min": 1, "median": 6, "max": 16, "total": 29},
        **{"5%": 0, "95%": 0},
    }
    assert content["combinations"]["image+text"] == 3
    assert content["measured"][0]["histogram"] == [[20, 20, 2], [30, 30, 1]]


@pytest.mark.filterwarnings("error")
def test_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # another test may have needed it
    pytest.importorskip("matplotlib")
    random = np.random.default_rng(0)
    samples = [
        {"txt": b"word " * int(random.lognormal(2, 1.5) + 1), "json": label(f"$\\frac$ {i % 30}"), "pkl": b""}
        for i in range(60)
    ]
    samples += [{"png": image(8 + i, 8, "PNG"), "flac": sound(1 + 99 * i, 8_000, "FLAC")} for i in range(30)]
    shard = write_shard(tmp_path / "x.tar", samples)
    for number, options in enumerate(([], ["--sample", "3"], ["--quick"])):
        out = tmp_path / f"{number}.png"
        assert call(shard, "--plot", out, *options) == 0
        with Image.open(out) as picture:
            assert picture.format == "PNG"
            assert picture.width > 900
            assert len(picture.convert("L").getcolors() or []) > 20
    assert "matplotlib.pyplot" not in sys.modules


def test_usage_mistakes(shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StatsError, match="--sample 0: must be at least 1"):
        call(*shards, "--sample", 0)
    with pytest.raises(StatsError, match="give one of them"):
        call(*shards, "--sample", 1, "--quick")
    with pytest.raises(StatsError, match=r"out\.pdf: the name must end in \.png"):
        call(*shards, "--plot", tmp_path / "out.pdf")
    with pytest.raises(ShardError, match=r"gone\.tar"):
        call(tmp_path / "gone.tar")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(StatsError, match=r"--plot needs matplotlib: pip install .*\[plot\]"):
        call(*shards, "--plot", tmp_path / "out.png")

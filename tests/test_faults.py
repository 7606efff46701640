"""What happens to damaged data: refused at the start, replaced and counted, or ignored and said.

Never a hang, a wrong pairing, a silent loss or code from data that runs.
"""

import io
import itertools
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from data.errors import UserError
from data.stream import DataConfig, SourceConfig, Stream, open_train
from data.transforms import AudioView, ImageView, TextView, Views
from pretrain.config import load_config
from pretrain.start import modalities_of
from tests.samples import encode_image, encode_sound, members, noise, noise_image, tokenizer
from tests.tiny import write_recipe

VIEWS = Views(ImageView(size=8), TextView(max_tokens=40), AudioView(frames=8, mels=16))
COUNT, BATCH = 24, 8


def write_tar(path: Path, files: list[tuple[str, bytes]], end: int = 10240) -> Path:
    """A tar as `tar` writes it, padded to records of ``end`` bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def files(count: int = COUNT, first: int = 0, kinds: str = "ita") -> list[tuple[str, bytes]]:
    """Samples s000, s001, ... whose texts end in their number."""
    return [
        (f"s{number:03d}.{extension}", content)
        for number in range(first, first + count)
        for extension, content in sorted(members(number, kinds).items())
    ]


def config(folder: Path, **settings: Any) -> DataConfig:
    source = SourceConfig(["train-*.tar"], require=settings.pop("require", []))
    return DataConfig(root=str(folder), train={"mine": source}, views=VIEWS, **settings)


def stream(folder: Path, **settings: Any) -> Stream:
    made = config(folder, **{"workers": 0, **settings})
    return Stream(open_train(made), made, tokenizer(), seed=0, batch_size=BATCH)


def assert_paired(made: Stream, steps: int) -> list[Any]:
    """Read some steps; what stands in a row belongs together. Returns what was skipped."""
    skipped: list[Any] = []
    for batch in itertools.islice(made.batches(), steps):
        skipped += batch.skipped
        text = batch.fields["text"]
        for row, ids in zip(text.rows.tolist(), text.x, strict=True):
            number = int(batch.keys[row][1:])
            assert str(tokenizer().decode(ids, skip_special_tokens=True)).split()[-1] == str(number)
        image = batch.fields["image"]
        for row, pixels in zip(image.rows.tolist(), image.x, strict=True):
            expected = noise_image(20, 12, int(batch.keys[row][1:])).resize((8, 8), 2)
            difference = pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)
            assert np.abs(difference).max() <= 2  # of rounding; another picture differs by 100
    return skipped


def test_intact_shards_are_read_in_right_pairs(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", files())
    assert assert_paired(stream(tmp_path), 6) == []


# Refused at the start


def header_of(content: bytes, name: str) -> int:
    """Where the header of a member begins."""
    return content.index(name.encode() + b"\0")


def in_a_header(content: bytes) -> bytes:
    return content[: header_of(content, "s011.txt") + 100]


def in_a_body(content: bytes) -> bytes:
    return content[: header_of(content, "s011.png") + 512 + 10]


def between_members(content: bytes) -> bytes:
    return content[: header_of(content, "s011.txt")]


def corrupt_header(content: bytes) -> bytes:
    at = header_of(content, "s011.txt")
    return content[: at + 124] + b"9" + content[at + 125 :]


def zeroed_header(content: bytes) -> bytes:
    at = header_of(content, "s011.txt")
    return content[:at] + bytes(512) + content[at + 512 :]


def no_end_marker(content: bytes) -> bytes:
    at = header_of(content, "s023.wav")
    size = int(content[at + 124 : at + 135], 8)
    return content[: at + 512 + -(-size // 512) * 512]


@pytest.mark.parametrize(
    "damage", [in_a_header, in_a_body, between_members, corrupt_header, zeroed_header, no_end_marker]
)
def test_a_damaged_tar_is_refused_at_the_start(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    shard = write_tar(tmp_path / "train-0.tar", files())
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(UserError, match=r"train-0\.tar: truncated or damaged at byte \d+"):
        open_train(config(tmp_path))


def test_a_duplicate_key_is_refused_at_the_start(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", [*files(3), *files(1)])
    with pytest.raises(UserError, match=r"train-0\.tar: 's000\.json' .*'s000' came before"):
        open_train(config(tmp_path))


def test_interleaved_members_are_refused_at_the_start(tmp_path: Path) -> None:
    a, b = files(1), files(1, first=1)
    write_tar(tmp_path / "train-0.tar", [member for pair in zip(a, b, strict=True) for member in pair])
    with pytest.raises(UserError, match=r"train-0\.tar: .*its members must lie together"):
        open_train(config(tmp_path))


def test_a_shard_that_changed_since_it_was_indexed_is_refused_at_the_start(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "train-0.tar", files())
    open_train(config(tmp_path))
    write_tar(shard, [*files(COUNT - 1), ("s999.txt", b"x" * 20000)])
    with pytest.raises(UserError, match=r"train-0\.tar: changed since it was indexed"):
        open_train(config(tmp_path))

    # With the same size, too.
    write_tar(shard, files(first=100))
    Path(f"{shard}.index.jsonl").unlink()
    open_train(config(tmp_path))
    size, later = shard.stat().st_size, Path(f"{shard}.index.jsonl").stat().st_mtime_ns + 10**9
    shard.write_bytes(shard.read_bytes().replace(b"s100", b"s200"))
    os.utime(shard, ns=(later, later))
    assert shard.stat().st_size == size
    with pytest.raises(UserError, match=r"train-0\.tar: sha256 is"):
        open_train(config(tmp_path))


@pytest.mark.parametrize(
    "url",
    ["pipe:touch HERE/ran", "pipe://touch HERE/ran", "file:///x.tar", "simplecache::memory://x.tar", "ssh://h/x.tar"],
)
def test_commands_and_other_urls_are_refused_at_the_start(tmp_path: Path, url: str) -> None:
    recipe = write_recipe(tmp_path)
    made = load_config(recipe, [f"data.train=['{url.replace('HERE', str(tmp_path))}']"])
    with pytest.raises(UserError, match="allowed are"):
        open_train(made.data)
    assert not (tmp_path / "ran").exists()


# Replaced and counted


def bomb() -> bytes:
    """A PNG of a kilobyte that says it has 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def hour_of_silence() -> bytes:
    """An hour in a FLAC of some hundred kilobytes."""
    return encode_sound(np.zeros(3600 * 1000, dtype=np.int16), "FLAC", rate=1000)


def truncated(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


JPEG = encode_image(noise_image(64, 48), "JPEG")
FLAC = encode_sound(noise(16_000), "FLAC")
WAV = encode_sound(noise(16_000), "WAV")
OGG = encode_sound(noise(16_000), "OGG")

BAD: dict[str, tuple[dict[str, bytes], str]] = {
    "undecodable JPEG": ({"jpg": b"\xff\xd8\xff\xe0" + bytes(range(256)), "txt": b"7"}, "ImageError"),
    "truncated JPEG": ({"jpg": truncated(JPEG), "txt": b"7"}, "ImageError"),
    "truncated PNG": ({"png": truncated(encode_image(noise_image(64, 48))), "txt": b"7"}, "ImageError"),
    "truncated FLAC": ({"flac": truncated(FLAC), "txt": b"7"}, "AudioError"),
    "truncated WAV": ({"wav": truncated(WAV), "txt": b"7"}, "AudioError"),
    "truncated Ogg": ({"ogg": truncated(OGG), "txt": b"7"}, "AudioError"),
    "text that is not UTF-8": ({"txt": "größe".encode("latin-1")}, "TextError"),
    "zero-length image": ({"jpg": b"", "txt": b"7"}, "EmptyError"),
    "zero-length text": ({"txt": b"", "png": members(7)["png"]}, "EmptyError"),
    "zero-length sound": ({"wav": b"", "txt": b"7"}, "EmptyError"),
    "decompression bomb": ({"png": bomb(), "txt": b"7"}, "LimitError"),
    "hour-long audio": ({"flac": hour_of_silence(), "txt": b"7"}, "LimitError"),
    "two images": ({"png": members(7)["png"], "jpg": JPEG, "txt": b"7"}, "AmbiguousModalityError"),
    "no modality": ({"json": b"{}"}, "MissingModalityError"),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_replaced_and_counted(tmp_path: Path, fault: str, workers: int) -> None:
    bad, error = BAD[fault]
    content = [
        *files(7),
        *((f"s007.{extension}", data) for extension, data in sorted(bad.items())),
        *files(16, first=8),
    ]
    write_tar(tmp_path / "train-0.tar", content)
    skipped = assert_paired(stream(tmp_path, workers=workers), 6)  # two epochs of 24
    assert [(skip.source, skip.shard, skip.key, skip.error) for skip in skipped] == [
        ("mine", str(tmp_path / "train-0.tar"), "s007", error)
    ] * 2


def test_a_missing_member_is_said_or_with_require_replaced(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", [file for file in files() if file[0] != "s007.png"])
    assert assert_paired(stream(tmp_path), 3) == []
    said = modalities_of(load_config(write_recipe(tmp_path / "recipe")), open_train(config(tmp_path)))
    assert "24: 23 with image, 24 with text, 24 with audio" in said

    (skip,) = assert_paired(stream(tmp_path, require=["image", "text"]), 3)
    assert (skip.key, skip.error) == ("s007", "MissingModalityError")


# Ignored and said


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_members_never_runs_and_is_said(tmp_path: Path) -> None:
    content = pickle.dumps(Bomb(tmp_path / "exploded"))
    extra = [(f"s{number:03d}.{extension}", content) for number in range(COUNT) for extension in ("pkl", "pyd", "pth")]
    write_tar(tmp_path / "train-0.tar", sorted([*files(), *extra]))
    assert assert_paired(stream(tmp_path), 3) == []
    said = modalities_of(load_config(write_recipe(tmp_path / "recipe")), open_train(config(tmp_path)))
    assert "nothing reads: .pkl, .pth, .pyd" in said
    assert not (tmp_path / "exploded").exists()


def test_dotted_keys_are_grouped_as_webdataset_does_and_said(tmp_path: Path) -> None:
    # "scan.1.png" and "scan.2.png" are members 1.png and 2.png of the sample "scan": nobody's image.
    dotted = [("scan.1.png", members(1)["png"]), ("scan.1.txt", b"one"), ("scan.2.png", b"x"), ("scan.2.txt", b"two")]
    write_tar(tmp_path / "train-0.tar", [*dotted, *files(23)])
    sources = open_train(config(tmp_path))
    assert len(sources[0]) == 24
    said = modalities_of(load_config(write_recipe(tmp_path / "recipe")), sources)
    assert "nothing reads: .1.png, .1.txt, .2.png, .2.txt" in said
    (skip,) = assert_paired(stream(tmp_path), 3)
    assert (skip.key, skip.error) == ("scan", "MissingModalityError")


# While a run is going


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("fault", ["vanished", "shortened", "index vanished"])
def test_a_shard_that_goes_away_stops_the_run_by_name(tmp_path: Path, workers: int, fault: str) -> None:
    for number in range(4):
        write_tar(tmp_path / f"train-{number}.tar", files(first=COUNT * number))
    made = stream(tmp_path, workers=workers, window=1)
    shard = tmp_path / "train-2.tar"
    if fault == "vanished":
        shard.unlink()
    elif fault == "shortened":
        os.truncate(shard, 5000)
    else:
        shard.unlink()
        Path(f"{shard}.index.jsonl").unlink()
    with pytest.raises(UserError, match=r"train-2\.tar"):
        list(itertools.islice(made.batches(), 12))


def test_sources_with_equal_shard_names_do_not_mix_in_the_cache(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    made = DataConfig(
        train={name: SourceConfig([f"memory://{name}/train-0.tar"]) for name in ("one", "two")},
        views=VIEWS,
        workers=0,
        cache=str(tmp_path / "cache"),
    )
    for name, first in (("one", 0), ("two", 500)):
        shard = write_tar(tmp_path / name / "train-0.tar", files(first=first))
        memory.pipe_file(f"/{name}/train-0.tar", shard.read_bytes())
    try:
        cached = Stream(open_train(made), made, tokenizer(), seed=0, batch_size=BATCH)
        assert assert_paired(cached, 6) == []
        keys = {key for batch in itertools.islice(cached.batches(), 6) for key in batch.keys}
        assert {key[:2] for key in keys} == {"s0", "s5"}
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
    finally:
        for name in ("one", "two"):
            memory.rm(f"/{name}", recursive=True)

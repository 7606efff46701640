from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import webdataset

from data.errors import UserError
from data.index import build_index, index_path, load_index
from data.shards import NewShard, packed_size, parse_size, shard_size, write_shards

Sample = dict[str, bytes | str]


def samples(count: int) -> list[Sample]:
    return [{"__key__": f"cats/{i:04d}", "png": bytes([i]) * i * 100, "txt": f"cat {i}".encode()} for i in range(count)]


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_webdataset_reads_back_what_was_written(tmp_path: Path) -> None:
    given = samples(7)
    shards = write_shards(given, tmp_path / "new" / "train", max_samples=3)

    assert [shard.name for shard in shards] == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    read = [
        {name: sample[name] for name in ("__key__", "png", "txt")}
        for sample in webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
    ]
    assert read == given


def test_each_shard_has_its_index(tmp_path: Path) -> None:
    given = samples(7)
    shards = write_shards(given, tmp_path / "train", max_samples=3)

    assert listing(tmp_path) == sorted(path.name for shard in shards for path in (shard, index_path(shard)))
    found = []
    for shard in shards:
        content = shard.read_bytes()
        for key, members in load_index(shard).samples:
            found.append({"__key__": key} | {e: content[at : at + size] for e, (at, size) in members.items()})
    assert found == given
    assert [len(load_index(shard).samples) for shard in shards] == [3, 3, 1]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_shards(samples(5), tmp_path / "a" / "train", max_samples=3)
    monkeypatch.setattr("time.time", lambda: 4e9)
    reordered = [dict(reversed(sample.items())) for sample in samples(5)]
    second = write_shards(reordered, tmp_path / "b" / "train", max_samples=3)

    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_it_is_silent_and_readable_to_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (shard,) = write_shards(samples(2), tmp_path / "train", max_samples=3)
    (tmp_path / "plain").touch()

    assert capfd.readouterr() == ("", "")
    assert shard.stat().st_mode == index_path(shard).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_names_of_any_length_and_odd_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    key = "größe/" + "k" * 300
    (shard,) = write_shards([{"__key__": key, "seg.png": b"x"}], Path("a:100%d") / "v1.0%s", max_samples=1)

    assert shard == Path("a:100%d/v1.0%s-00000.tar")
    assert [sample.key for sample in load_index(shard).samples] == [key]


@pytest.mark.parametrize("key", ["a.b", "a.b/c", "/a", "a/", "", "a\nb", "a\0", "__meta__/a"])
def test_keys_that_would_not_come_back_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="must be printable") as error:
        write_shards([*samples(2), {"__key__": key, "txt": b""}], tmp_path / "train", max_samples=1)
    assert repr(key) in str(error.value)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("extension", ["PNG", ".png", "_png", "a/b", ""])
def test_extensions_that_would_not_come_back_are_refused(tmp_path: Path, extension: str) -> None:
    with pytest.raises(ValueError, match=f"key 'k': extension '{extension}'"):
        write_shards([{"__key__": "k", "txt": b"", extension: b""}], tmp_path / "train", max_samples=1)
    assert listing(tmp_path) == []


def test_repeated_keys_are_refused_across_shards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'cats/0000': comes twice"):
        write_shards([*samples(3), *samples(1)], tmp_path / "train", max_samples=2)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"__key__": "k", "txt": "text"}, "'k': 'txt' must be bytes, not str"),
        ({"__key__": b"k", "txt": b""}, "__key__ must be a string, not b'k'"),
        ({"txt": b""}, "__key__ must be a string, not None"),
    ],
)
def test_other_types_are_refused(tmp_path: Path, sample: Sample, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        write_shards([sample], tmp_path / "train", max_samples=1)


def test_nothing_to_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no samples"):
        write_shards([], tmp_path / "train", max_samples=1)
    with pytest.raises(ValueError, match="'k': has no members"):
        write_shards([{"__key__": "k"}], tmp_path / "train", max_samples=1)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        write_shards(samples(1), tmp_path / "train", max_samples=0)
    assert listing(tmp_path) == []


def test_a_failing_source_leaves_nothing(tmp_path: Path) -> None:
    seen: list[str] = []

    def source() -> Iterator[Mapping[str, bytes | str]]:
        yield from samples(5)
        seen.extend(path.name for path in tmp_path.glob("*.tar"))
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_shards(source(), tmp_path / "train", max_samples=2)
    assert seen == []  # no shard is to be seen before all are whole
    assert listing(tmp_path) == []


def test_shards_that_are_there_are_kept(tmp_path: Path) -> None:
    (tmp_path / "train-00004.tar").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"train-00004\.tar"):
        write_shards(samples(5), tmp_path / "train", max_samples=2)
    assert listing(tmp_path) == ["train-00004.tar"]

    assert len(write_shards(samples(1), tmp_path / "train-b", max_samples=2)) == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1B", 1),
        ("500KB", 500_000),
        ("256MB", 256_000_000),
        ("1.5 GB", 1_500_000_000),
        ("2tb", 2 * 10**12),
        ("3KiB", 3072),
        ("256MiB", 256 * 2**20),
        ("1GiB", 2**30),
    ],
)
def test_sizes_are_decimal_or_binary(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "256", "MB", "0MB", "-1MB", "1 XB", "1iB", "256M", "1e3KB", "0.1B"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="a number and a unit are needed, such as 500KB"):
        parse_size(text)


@pytest.mark.parametrize("count", [1, 3, 7, 12])
def test_the_size_of_a_shard_is_known_before_it_is_written(tmp_path: Path, count: int) -> None:
    shard = NewShard(tmp_path / "x.tar")
    for sample in samples(count):
        before = shard.packed
        shard.add(sample)
        assert shard.packed == before + packed_size(sample)
    index = shard.finish()
    assert (tmp_path / "x.tar").stat().st_size == shard_size(shard.packed) == index.size
    assert index == build_index(tmp_path / "x.tar")
    assert len(index.samples) == shard.samples == count


def test_a_sample_fits_to_the_last_byte_and_always_into_an_empty_shard(tmp_path: Path) -> None:
    shard = NewShard(tmp_path / "x.tar")
    sample: Sample = {"__key__": "a", "txt": bytes(10240 - 512 - 1024)}
    assert shard.fits(sample, 1)
    shard.add(sample)
    assert not shard.fits({"__key__": "b", "txt": b""}, 20479)
    assert shard.fits({"__key__": "b", "txt": b""}, 20480)
    assert not shard.fits({"__key__": "b", "txt": bytes(10240)}, 20480)
    shard.discard()


def test_a_new_shard_is_seen_when_it_is_whole_and_gone_when_discarded(tmp_path: Path) -> None:
    for finished in (True, False):
        shard = NewShard(tmp_path / "x.tar")
        shard.add(samples(1)[0])
        assert not list(tmp_path.glob("*.tar"))
        if finished:
            shard.finish()
            assert listing(tmp_path) == ["x.tar", "x.tar.index.jsonl"]
            for path in tmp_path.iterdir():
                path.unlink()
        else:
            shard.discard()
            assert listing(tmp_path) == []

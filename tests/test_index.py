import errno
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import webdataset

from data.index import (
    ShardError,
    ShardIndex,
    build_index,
    find_shards,
    index_path,
    load_index,
    verify,
    write_index,
)

MEMBERS = [
    ("a/000.png", b"\x89PNG" + bytes(range(256)) * 3),
    ("a/000.TXT", b"a cat"),
    ("a/001.seg.png", b""),
    ("a/001.txt", b"x" * 512),
    ("b/000.txt", b"y" * 513),
]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]] = MEMBERS) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "train-00000.tar")


def read(index: ShardIndex) -> dict[str, dict[str, bytes]]:
    content = index.path.read_bytes()
    return {
        key: {extension: content[offset : offset + size] for extension, (offset, size) in members.items()}
        for key, members in index.samples
    }


def end_of_members(path: Path) -> int:
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512


def test_offsets_give_the_exact_bytes_grouped_as_webdataset_does(tar: Path) -> None:
    index = build_index(tar)

    assert [sample.key for sample in index.samples] == ["a/000", "a/001", "b/000"]
    assert read(index) == {
        "a/000": {"png": MEMBERS[0][1], "txt": b"a cat"},
        "a/001": {"seg.png": b"", "txt": b"x" * 512},
        "b/000": {"txt": b"y" * 513},
    }
    assert index.size == tar.stat().st_size
    assert index.sha256 == hashlib.sha256(tar.read_bytes()).hexdigest()


def test_long_and_foreign_names_keep_their_bytes(tmp_path: Path) -> None:
    # Such names put extra blocks before the header, so an offset that is counted from the header is wrong.
    members = [("d" * 300 + "/0.txt", b"long"), ("größe.txt", b"foreign"), ("1.txt", b"plain")]
    tar = write_tar(tmp_path / "x.tar", members)

    assert read(build_index(tar)) == {
        "d" * 300 + "/0": {"txt": b"long"},
        "größe": {"txt": b"foreign"},
        "1": {"txt": b"plain"},
    }


def test_names_that_webdataset_skips_are_no_samples(tmp_path: Path) -> None:
    members = [
        ("README", b"r"),
        ("._0.txt", b"mac"),
        ("__meta__/0.txt", b"m"),
        ("0.txt", b"0"),
        ("__x__.y__", b"m"),
        ("0.png", b"1"),
    ]
    tar = write_tar(tmp_path / "x.tar", members)
    theirs = [
        {extension: value for extension, value in sample.items() if not extension.startswith("__")}
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False)
    ]

    assert read(build_index(tar)) == {"0": {"txt": b"0", "png": b"1"}}
    assert theirs == [{"txt": b"0", "png": b"1"}]


def test_a_cut_anywhere_before_the_end_blocks_is_refused(tar: Path) -> None:
    whole = tar.read_bytes()
    enough = end_of_members(tar) + 1024
    assert enough < len(whole)  # the rest is padding
    with tarfile.open(tar) as archive:
        borders = {at for member in archive for at in (member.offset, member.offset_data)}
    cuts = {*range(0, enough, 97), *borders, *(at - 1 for at in borders if at), enough - 512, enough - 1}
    for cut in sorted(cuts):
        tar.write_bytes(whole[:cut])
        with pytest.raises(ShardError, match=r"train-00000\.tar: truncated or damaged at byte \d+"):
            build_index(tar)

    tar.write_bytes(whole[:enough])
    assert len(build_index(tar).samples) == 3


def test_a_cut_body_names_its_member(tar: Path) -> None:
    offset, size = build_index(tar).samples[1].members["txt"]
    tar.write_bytes(tar.read_bytes()[: offset + size - 1])
    with pytest.raises(ShardError, match=rf"at byte {offset + size - 1}: 'a/001\.txt' reaches to byte {offset + size}"):
        build_index(tar)


def test_every_damaged_header_is_refused(tar: Path) -> None:
    whole = tar.read_bytes()
    with tarfile.open(tar) as archive:
        headers = [member.offset for member in archive]
    for header in headers:
        for at in (0, 124, 148):  # name, size, checksum
            damaged = bytearray(whole)
            damaged[header + at] ^= 0x15
            tar.write_bytes(damaged)
            with pytest.raises(ShardError, match=rf"train-00000\.tar: truncated or damaged at byte {header}\b"):
                build_index(tar)


def test_a_zeroed_stretch_is_not_taken_for_the_end(tar: Path) -> None:
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as archive:
        middle = archive.getmembers()[2].offset
    content[middle : middle + 1024] = bytes(1024)
    tar.write_bytes(content)

    with pytest.raises(ShardError, match="damaged at byte"):
        build_index(tar)


def test_a_second_archive_behind_the_first_is_not_lost(tar: Path) -> None:
    end = tar.stat().st_size
    tar.write_bytes(tar.read_bytes() * 2)

    with pytest.raises(ShardError, match=f"damaged at byte {end}"):
        build_index(tar)


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (["0.txt", "0.png", "0.txt"], "0"),  # a member twice
        (["0.txt", "0.TXT"], "0"),  # the same once read in lower case
        (["0.txt", "7.txt", "0.png"], "0"),  # interleaved
        (["0.txt", "7.txt", "8.txt", "7.txt"], "7"),  # a sample twice
    ],
)
def test_repeated_and_interleaved_samples_are_refused(tmp_path: Path, names: list[str], key: str) -> None:
    tar = write_tar(tmp_path / "x.tar", [(name, b"") for name in names])
    with pytest.raises(ShardError, match=rf"x\.tar.*sample '{key}'"):
        build_index(tar)


def test_folders_are_ignored(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("a.d")
    folder.type = tarfile.DIRTYPE
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a/0.txt"))
        archive.addfile(folder)
    assert [sample.key for sample in build_index(tmp_path / "x.tar").samples] == ["a/0"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_members_without_plain_bytes_are_refused(tmp_path: Path, kind: bytes) -> None:
    other = tarfile.TarInfo("a/1.txt")
    other.type, other.linkname = kind, "a/0.txt"
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a/0.txt"))
        archive.addfile(other)
    with pytest.raises(ShardError, match=r"x\.tar: 'a/1\.txt' at byte 512 is a link"):
        build_index(tmp_path / "x.tar")


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_refused_with_a_hint(tmp_path: Path, mode: str) -> None:
    with tarfile.open(tmp_path / "x.tar", mode) as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("0.txt"))
    with pytest.raises(ShardError, match=r"x\.tar: compressed with .*unpack"):
        build_index(tmp_path / "x.tar")


@pytest.mark.parametrize("content", [bytes(10240), b"", b"no tar at all" * 100])
def test_a_file_without_samples_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ShardError, match=r"x\.tar"):
        build_index(tmp_path / "x.tar")


def test_missing_shard_and_folder_name_the_path(tmp_path: Path) -> None:
    for load in (build_index, load_index):
        with pytest.raises(ShardError, match=r"gone\.tar: no such shard"):
            load(tmp_path / "gone.tar")
        with pytest.raises(ShardError, match=rf"{tmp_path.name}: a folder"):
            load(tmp_path)


def test_load_writes_at_first_sight_and_then_reads(tar: Path) -> None:
    first = load_index(tar)
    assert first == build_index(tar)
    assert json.loads(index_path(tar).read_text())["schema"] == 1

    # With as many other bytes, only a loader that read the file beside would return the same again.
    before = tar.stat()
    tar.write_bytes(bytes(first.size))
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_index(tar) == first
    assert sorted(path.name for path in tar.parent.iterdir()) == [tar.name, f"{tar.name}.index.json"]


def test_a_shard_written_anew_with_the_same_size_is_refused(tar: Path) -> None:
    content = tar.read_bytes()
    load_index(tar)
    later = index_path(tar).stat().st_mtime_ns + 1_000_000_000
    os.utime(tar, ns=(later, later))
    load_index(tar)  # newer, but the same
    tar.write_bytes(content[:600] + b"x" + content[601:])
    os.utime(tar, ns=(later, later))
    with pytest.raises(ShardError, match="sha256"):
        load_index(tar)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_in_a_read_only_folder_the_index_is_only_returned(
    tar: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(self: Path, content: bytes) -> int:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert len(load_index(tar).samples) == 3
    assert not index_path(tar).exists()


def test_a_full_disk_is_not_passed_over_and_leaves_nothing(tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(OSError, match="No space left"):
        load_index(tar)
    assert list(tar.parent.iterdir()) == [tar]


def test_a_shard_of_another_size_is_refused(tar: Path) -> None:
    size = load_index(tar).size
    tar.write_bytes(tar.read_bytes() + bytes(512))

    with pytest.raises(ShardError, match=rf"train-00000\.tar: changed.*{size} bytes then, {size + 512} now.*delete"):
        load_index(tar)
    index_path(tar).unlink()
    assert load_index(tar).size == size + 512


def test_verify_sees_one_changed_bit(tar: Path) -> None:
    index = load_index(tar)
    verify(index)
    content = bytearray(tar.read_bytes())
    content[index.samples[0].members["png"][0]] ^= 1
    tar.write_bytes(content)

    with pytest.raises(ShardError, match=rf"train-00000\.tar: sha256 is .*{index.sha256}"):
        verify(load_index(tar))

    tar.unlink()
    for look in (lambda: verify(index), lambda: load_index(tar)):
        with pytest.raises(ShardError, match=r"train-00000\.tar: no such shard"):
            look()


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"size": None},
        {"samples": 3},
        {"samples": [["0", {"txt": [512]}]]},
        {"samples": [["0", {"txt": [512, 10**9]}]]},
        {"samples": [["0", {"txt": [-1, 1]}]]},
    ],
)
def test_an_index_that_is_none_is_named(tar: Path, change: dict[str, object]) -> None:
    write_index(build_index(tar))
    beside = index_path(tar)
    beside.write_text(json.dumps(json.loads(beside.read_text()) | change))
    with pytest.raises(ShardError, match=r"train-00000\.tar\.index\.json: .*delete it"):
        load_index(tar)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"x"', "\ufffd"])
def test_an_index_that_is_no_json_object_is_named(tar: Path, text: str) -> None:
    index_path(tar).write_text(text)
    with pytest.raises(ShardError, match=r"train-00000\.tar\.index\.json: malformed"):
        load_index(tar)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with shards in it and next to it."""
    inside = tmp_path / "here"
    inside.mkdir()
    for name in ("train-00000", "train-00001", "train-00002", "val-00000", ".train-00003"):
        (inside / f"{name}.tar").touch()
    (inside / "train-00000.tar.index.json").touch()
    (inside / "train-9.tar").mkdir()
    monkeypatch.chdir(inside)
    return inside


def names(shards: list[Path]) -> list[str]:
    return [str(shard) for shard in shards]


def test_find_keeps_the_patterns_order_and_sorts_within(folder: Path) -> None:
    train = ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    assert names(find_shards(["val-00000.tar", "train-*.tar*"])) == ["val-00000.tar", *train]
    assert names(find_shards(["train-{00002..00000}.tar"])) == train
    assert names(find_shards(["{train,val}-*0.tar"])) == [train[0], "val-00000.tar"]
    assert names(find_shards(["../*/val-*.tar"])) == ["../here/val-00000.tar"]
    assert find_shards([f"{folder}/train-*.tar"]) == [folder / name for name in train]
    assert find_shards([]) == []


def test_find_takes_an_existing_name_as_it_is(folder: Path) -> None:
    for name in ("x-[1].tar", "x-{0..1}.tar", "x-*.tar"):
        (folder / name).touch()
        assert names(find_shards([name])) == [name]


@pytest.mark.parametrize(
    ("pattern", "missing", "where"),
    [
        ("train-00007.tar", "train-00007.tar", "here"),
        ("train-{00001..00003}.tar", "train-00003.tar", "here"),
        ("test-*.tar", "test-*.tar", "here"),
        ("other/test-*.tar", "other/test-*.tar", "here/other"),
        ("", "", "here"),
    ],
)
def test_find_names_what_is_missing_and_where(folder: Path, pattern: str, missing: str, where: str) -> None:
    with pytest.raises(ShardError) as error:
        find_shards(["val-00000.tar", pattern])
    assert str(error.value) == f"{missing}: no such shard; looked in {folder.parent / where}"


@pytest.mark.parametrize(
    "patterns",
    [["train-*.tar", "train-00001.tar"], ["../here/val-00000.tar", "val-00000.tar"], ["{val,val}-00000.tar"]],
)
def test_find_refuses_duplicates(folder: Path, patterns: list[str]) -> None:
    with pytest.raises(ShardError, match=r"0000\d\.tar: named twice"):
        find_shards(patterns)


@pytest.mark.parametrize("pattern", ["https://x.org/a.tar", "s3://b/{0..1}.tar", "pipe:cat a.tar", "file:///a.tar"])
def test_find_refuses_what_is_not_local(pattern: str) -> None:
    with pytest.raises(ShardError, match="only local paths"):
        find_shards([pattern])


def test_find_refuses_a_single_string_and_open_braces(folder: Path) -> None:
    with pytest.raises(TypeError, match="list of strings"):
        find_shards("train-00000.tar")
    with pytest.raises(ShardError, match=r"train-\{00000"):
        find_shards(["train-{00000..00001.tar"])

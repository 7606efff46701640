import errno
import hashlib
import io
import json
import os
import pickle
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import fsspec
import pytest
import webdataset

import data.index
from data.cache import Cache, Reader
from data.fetch import FetchError
from data.index import (
    Sample,
    Shard,
    ShardError,
    ShardIndex,
    build_index,
    find_shards,
    index_path,
    load_index,
    load_lines,
    load_samples,
    load_shard,
    load_shards,
    parse_sample,
    scan,
    verify,
    write_index,
)
from tests.server import Server, run_server

server = pytest.fixture(run_server)

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
    content = Path(index.location).read_bytes()
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


def test_a_damaged_extended_header_is_refused(tmp_path: Path) -> None:
    # tarfile itself lets the ValueError of such a number through.
    odd = tarfile.TarInfo("0.txt")
    odd.pax_headers = {"GNU.sparse.map": "no numbers"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(odd)
    with pytest.raises(ShardError, match=r"x\.tar: truncated or damaged at byte 0\b"):
        build_index(tmp_path / "x.tar")


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
    for load in (build_index, load_index, load_shard):
        with pytest.raises(ShardError, match=r"gone\.tar: no such shard"):
            load(tmp_path / "gone.tar")
        with pytest.raises(ShardError, match=rf"{tmp_path.name}: a folder"):
            load(tmp_path)


def test_load_writes_at_first_sight_and_then_reads(tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_index(tar)
    assert first == build_index(tar)

    monkeypatch.setattr("data.index.build_index", None)
    assert load_index(tar) == first
    assert sorted(path.name for path in tar.parent.iterdir()) == [tar.name, f"{tar.name}.index.jsonl"]


def test_a_shard_of_the_same_size_is_refused_though_its_time_is_older(tar: Path) -> None:
    load_index(tar)
    time.sleep(0.02)  # the clock of a file system is coarse
    tar.write_bytes(bytes(tar.stat().st_size))
    os.utime(tar, (0, 0))  # as rsync -t and tar -x do
    with pytest.raises(ShardError, match="sha256"):
        load_index(tar)


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


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which shards were scanned, each time."""
    scanned: list[str] = []

    def scan(location: Path | str) -> ShardIndex:
        scanned.append(str(location))
        return build_index(location)

    monkeypatch.setattr(data.index, "build_index", scan)
    return scanned


def refuse_to_write(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(self: Path, content: bytes) -> int:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_in_a_read_only_folder_a_shard_is_scanned_once_and_its_index_kept_in_memory(
    tar: Path, monkeypatch: pytest.MonkeyPatch, scans: list[str], code: int
) -> None:
    other = write_tar(tar.with_name("other.tar"), MEMBERS[:1])
    refuse_to_write(monkeypatch, code)
    for _ in range(3):
        shard = load_shard(tar)
        assert shard == build_summary(tar)
        assert load_samples(shard) == load_index(tar).samples == build_index(tar).samples
        assert load_index(other) == build_index(other)
    assert scans == [str(tar), str(other)]
    assert sorted(tar.parent.iterdir()) == [other, tar]


def test_a_shard_that_went_missing_in_a_read_only_folder_is_named_where_it_is_read(
    tar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_write(monkeypatch, errno.EROFS)
    shard = load_shard(tar)
    tar.unlink()
    with pytest.raises(ShardError, match=r"train-00000\.tar: no such shard"):
        verify(shard)


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


@pytest.mark.parametrize("indexed", [False, True])
def test_a_shard_replaced_while_it_is_hashed_is_seen_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indexed: bool
) -> None:
    one, other = (write_tar(tmp_path / f"{name}.tar", [("k.txt", name.encode())]) for name in ("aaa", "bbb"))
    content = other.read_bytes()
    if indexed:
        load_shard(one)
        one.write_bytes(one.read_bytes())  # as new as it can be, so that it is verified
    hashing = data.index._sha256

    def slowly(file: Any) -> str:
        found = hashing(file)
        time.sleep(0.02)  # the clock of files ticks every few milliseconds
        other.write_bytes(content)
        other.replace(one)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(data.index, "_sha256", slowly)
        load_shard(one)
    with pytest.raises(ShardError, match="sha256 is"):
        load_shard(one)


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


def test_the_file_is_a_head_and_a_line_per_sample(tar: Path) -> None:
    write_index(build_index(tar))
    head, *lines = index_path(tar).read_text().splitlines()
    assert json.loads(head) == {
        "schema": 2,
        "size": tar.stat().st_size,
        "sha256": hashlib.sha256(tar.read_bytes()).hexdigest(),
        "samples": 3,
        "members": {"png": 1, "seg.png": 1, "txt": 3},
    }
    assert [json.loads(line) for line in lines] == [
        [sample.key, {extension: list(place) for extension, place in sample.members.items()}]
        for sample in build_index(tar).samples
    ]
    assert index_path(tar).read_bytes().endswith(b"]\n")


def test_keys_with_line_breaks_and_quotes_stay_one_line(tmp_path: Path) -> None:
    names = ["a\nb.txt", 'c"d.txt', "e\u2028f.txt", "größe.txt"]
    tar = write_tar(tmp_path / "x.tar", [(name, b"") for name in names])
    load_index(tar)
    assert [sample.key for sample in load_index(tar).samples] == [name.removesuffix(".txt") for name in names]


def test_names_that_are_no_utf8_keep_their_bytes(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo("größe.txt"))
    for _ in range(2):
        (sample,) = load_index(tmp_path / "x.tar").samples
        assert sample.key.encode("utf-8", "surrogateescape") == "größe".encode("latin-1")


def damage(tar: Path, line: int, content: bytes | None) -> None:
    """Put ``content`` in the place of a line of the shard's index; None removes the line."""
    write_index(build_index(tar))
    lines = index_path(tar).read_bytes().splitlines()
    lines[line : line + 1] = [] if content is None else [content]
    index_path(tar).write_bytes(b"\n".join([*lines, b""]))


def test_only_the_head_is_read_before_samples_are_asked_for(tar: Path) -> None:
    damage(tar, 2, b"no JSON")
    shard = load_shard(tar)
    assert shard == build_index(tar).shard
    assert shard == Shard(str(tar), tar.stat().st_size, shard.sha256, 3, {"png": 1, "seg.png": 1, "txt": 3})

    lines = load_lines(shard)
    assert parse_sample(shard, lines[0]) == build_index(tar).samples[0]
    for load in (lambda: load_samples(shard), lambda: load_index(tar)):
        with pytest.raises(ShardError, match=r"train-00000\.tar: malformed index .*delete its \.index\.jsonl file"):
            load()


def test_the_samples_are_those_of_the_tar(tar: Path) -> None:
    assert load_samples(load_shard(tar)) == build_index(tar).samples == load_samples(load_shard(tar))


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 1},
        {"schema": "2"},
        {"schema": None},
        {"size": None},
        {"size": 10240.0},
        {"size": float("inf")},
        {"samples": -1},
        {"samples": 0},
        {"samples": True},
        {"samples": "3"},
        {"members": None},
        {"members": ["png"]},
        {"members": {"png": -1}},
    ],
)
def test_a_head_that_is_none_is_named(tar: Path, change: dict[str, object]) -> None:
    head = json.loads(json.dumps({"schema": 2, **build_index(tar).shard._asdict()})) | change
    damage(tar, 0, json.dumps(head).encode())
    with pytest.raises(ShardError, match=r"train-00000\.tar\.index\.jsonl: .*delete it to re-index"):
        load_shard(tar)


@pytest.mark.parametrize("key", ["schema", "size", "sha256", "samples", "members"])
def test_a_head_that_lacks_a_key_is_named(tar: Path, key: str) -> None:
    head = {"schema": 2, **build_index(tar).shard._asdict()}
    del head[key]
    damage(tar, 0, json.dumps(head).encode())
    with pytest.raises(ShardError, match=rf"train-00000\.tar\.index\.jsonl: malformed index \(KeyError\('{key}'\)\)"):
        load_shard(tar)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'"x"', b"null", b"\xff\xfe", b"[" * 100_000])
def test_an_index_that_is_no_json_object_is_named(tar: Path, content: bytes) -> None:
    index_path(tar).write_bytes(content)
    with pytest.raises(ShardError, match=r"train-00000\.tar\.index\.jsonl: malformed"):
        load_shard(tar)


def test_an_index_that_cant_be_opened_is_named(tar: Path) -> None:
    index_path(tar).mkdir()
    with pytest.raises(ShardError, match=r"train-00000\.tar\.index\.jsonl: Is a directory"):
        load_shard(tar)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"null",
        b'["0"]',
        b'["0", {}, 1]',
        b'["0", ["txt"]]',
        b'["0", {"txt": 512}]',
        b'["0", {"txt": [512]}]',
        b'["0", {"txt": [512, 3, 1]}]',
        b'["0", {"txt": "12"}]',
        b'["0", {"txt": [512.0, 3]}]',
        b'["0", {"txt": [true, 3]}]',
        b'["0", {"txt": [Infinity, 3]}]',
        b'["0", {"txt": [-1, 1]}]',
        b'["0", {"txt": [512, -1]}]',
        b'["0", {"txt": [512, 1000000000]}]',
        b'["0", {"png": [512, 3], "txt": [1000000000, 0]}]',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_a_line_that_is_no_sample_of_the_shard_is_named(tar: Path, line: bytes) -> None:
    damage(tar, 1, line)
    shard = load_shard(tar)
    with pytest.raises(ShardError, match=r"train-00000\.tar: malformed index \("):
        parse_sample(shard, load_lines(shard)[0])


def test_a_member_may_reach_to_the_last_byte_but_not_further() -> None:
    shard = Shard("x.tar", 1024, "", 1, {"txt": 1})
    assert parse_sample(shard, b'["0",{"txt":[512,512],"png":[1024,0]}]') == Sample(
        "0", {"txt": (512, 512), "png": (1024, 0)}
    )
    for place in (b"[512,513]", b"[1025,0]"):
        with pytest.raises(ShardError, match=r"x\.tar: malformed index .*sample '0' reaches outside of the shard"):
            parse_sample(shard, b'["0",{"txt":%s}]' % place)


@pytest.mark.parametrize(("line", "content", "count"), [(3, None, 2), (1, None, 2), (3, b'["x",{}]\n["y",{}]', 4)])
def test_too_few_and_too_many_lines_are_counted(tar: Path, line: int, content: bytes | None, count: int) -> None:
    damage(tar, line, content)
    shard = load_shard(tar)
    with pytest.raises(ShardError, match=rf"tar\.index\.jsonl: malformed index \({count} of 3 samples\); delete it"):
        load_lines(shard)


def test_an_index_that_was_cut_anywhere_is_refused(tar: Path) -> None:
    write_index(build_index(tar))
    whole = index_path(tar).read_bytes()
    for cut in range(len(whole) - 1):  # without the last line break nothing is missing
        index_path(tar).write_bytes(whole[:cut])
        with pytest.raises(ShardError, match="malformed index"):
            load_index(tar)
    index_path(tar).write_bytes(whole[:-1])
    assert load_index(tar) == build_index(tar)


def test_an_index_that_changes_while_it_is_in_use_is_refused(tar: Path) -> None:
    shard = load_shard(tar)
    write_tar(tar, [("other.txt", b"with another content")])
    write_index(build_index(tar))
    for load in (load_lines, load_samples):
        with pytest.raises(ShardError, match=r"train-00000\.tar\.index\.jsonl: changed while it was in use"):
            load(shard)


def test_an_index_that_vanishes_while_it_is_in_use_is_made_again_if_the_shard_is_the_same(tar: Path) -> None:
    shard = load_shard(tar)
    index_path(tar).unlink()
    assert load_samples(shard) == build_index(tar).samples

    index_path(tar).unlink()
    write_tar(tar, [("other.txt", b"with another content")])
    with pytest.raises(ShardError, match="changed while it was in use"):
        load_samples(shard)


def test_many_shards_keep_their_order_and_the_bad_one_is_named(tmp_path: Path) -> None:
    tars = [str(write_tar(tmp_path / f"{i}.tar", [(f"k{j}.txt", b"") for j in range(i + 1)])) for i in range(4)]
    shards = load_shards([*tars[::-1]])
    assert [(shard.location, shard.samples) for shard in shards] == [(tars[i], i + 1) for i in (3, 2, 1, 0)]
    assert load_shards([]) == []

    with pytest.raises(ShardError, match=r"gone\.tar: no such shard"):
        load_shards([*tars, str(tmp_path / "gone.tar")])


def test_threads_that_see_a_shard_for_the_first_time_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = write_tar(tmp_path / "x.tar", [(f"{i:04d}.txt", b"") for i in range(300)])
    all_have_written, replace = Barrier(4, timeout=10), Path.replace

    def together(self: Path, target: Path) -> Path:
        all_have_written.wait()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", together)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load_index(tar), range(4)))
    assert len(loaded[0].samples) == 300
    assert all(index == loaded[0] for index in loaded)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar", "x.tar.index.jsonl"]


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    """A URL under which nothing is stored yet."""
    fs = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}"
    yield url
    if fs.exists(url):
        fs.rm(url, recursive=True)


def upload(path: Path, url: str) -> str:
    fsspec.filesystem("memory").pipe_file(url, path.read_bytes())
    return url


def stored(bucket: str) -> list[str]:
    return sorted(Path(name).name for name in fsspec.filesystem("memory").find(bucket))


def forbidden(*args: object) -> None:
    raise AssertionError(f"read {args}")


def build_summary(tar: Path) -> Shard:
    """What the index says, from the tar itself."""
    sha256 = hashlib.sha256(tar.read_bytes()).hexdigest()
    return Shard(str(tar), tar.stat().st_size, sha256, 3, {"png": 1, "seg.png": 1, "txt": 3})


def test_a_remote_shard_with_an_index_beside_it_is_not_read(
    tar: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_index(build_index(tar))
    url = upload(tar, f"{bucket}/a.tar")
    upload(index_path(tar), f"{url}.index.jsonl")
    monkeypatch.setattr(data.index, "open_binary", forbidden)
    for cache in (None, Cache(tmp_path / "cache", 10**6)):
        assert load_shard(url, cache) == build_summary(tar)._replace(location=url)
        assert load_index(url, cache).samples == load_index(tar).samples
    assert stored(bucket) == ["a.tar", "a.tar.index.jsonl"]


@pytest.mark.parametrize("load", [load_index, load_shard])
def test_a_remote_shard_without_an_index_needs_a_cache(
    tar: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], object]
) -> None:
    url = upload(tar, f"{bucket}/a.tar")
    with monkeypatch.context() as patch:
        patch.setattr(data.index, "open_binary", forbidden)  # each start would read it whole
        with pytest.raises(ShardError, match=r"there is no \.index\.jsonl file beside it: .*data\.cache") as error:
            load(url)
    assert str(error.value).startswith(f"{url}: ")
    assert stored(bucket) == ["a.tar"]

    # Whoever asks for an index, gets one.
    assert build_index(url) == build_index(tar)._replace(location=url)
    verify(build_index(url))
    assert stored(bucket) == ["a.tar"]


def test_the_cache_keeps_the_index_of_a_remote_shard(
    tar: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(tar, f"{bucket}/a.tar")
    cache = Cache(tmp_path / "cache", 10**6)
    first = load_index(url, cache)
    assert first == build_index(tar)._replace(location=url)
    assert stored(bucket) == ["a.tar"]
    assert [path for path in cache.folder.iterdir() if path.is_file()] == [cache.index_of(url)]

    # The next process reads the shard no more.
    monkeypatch.setattr(data.index, "open_binary", forbidden)
    assert load_index(url, Cache(tmp_path / "cache", 10**6)) == first
    with pytest.raises(ShardError, match=r"there is no \.index\.jsonl file beside it"):
        load_shard(url)  # nothing was kept elsewhere


def test_the_cache_keeps_a_copy_of_the_index_beside_a_remote_shard(tar: Path, server: Server, tmp_path: Path) -> None:
    write_index(build_index(tar))
    url = f"{server.url}/a.tar"
    server.files = {"/a.tar": tar.read_bytes(), "/a.tar.index.jsonl": index_path(tar).read_bytes()}
    cache = Cache(tmp_path / "cache", 10**6)
    for _ in range(2):
        assert load_index(url, cache) == build_index(tar)._replace(location=url)
        assert load_samples(load_shard(url, cache), cache) == build_index(tar).samples
    assert cache.index_of(url).read_bytes() == index_path(tar).read_bytes()
    assert [path for path in cache.folder.iterdir() if path.is_file()] == [cache.index_of(url)]
    assert len(server.gets("/a.tar.index.jsonl")) == 1
    assert server.gets("/a.tar") == []

    # Of a URL, what lies beside it is asked for only where there is no copy; a copy that vanished is made again.
    shard = load_shard(url, cache)
    cache.index_of(url).unlink()
    assert load_samples(shard, cache) == build_index(tar).samples
    assert cache.index_of(url).is_file()
    assert len(server.gets("/a.tar.index.jsonl")) == 2


def test_a_remote_index_that_vanishes_while_it_is_in_use_is_made_again_in_the_cache(
    tar: Path, bucket: str, tmp_path: Path, scans: list[str]
) -> None:
    url = upload(tar, f"{bucket}/a.tar")
    cache = Cache(tmp_path / "cache", 10**6)
    shard = load_shard(url, cache)
    cache.index_of(url).unlink()
    assert load_samples(shard, cache) == build_index(tar).samples
    assert cache.index_of(url).is_file()
    assert scans == [url, url]

    with pytest.raises(ShardError, match=r"a\.tar: there is no \.index\.jsonl file beside it"):
        load_samples(shard)


def test_an_index_that_the_cache_cant_be_given_is_kept_in_memory(
    tar: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scans: list[str]
) -> None:
    url = upload(tar, f"{bucket}/a.tar")
    cache = Cache(tmp_path / "cache", 10**6)
    refuse_to_write(monkeypatch, errno.EROFS)
    for _ in range(2):
        assert load_index(url, cache).samples == build_index(tar).samples
    assert scans == [url]


SIGNED = "?X-Signature=secret&a=/b.tar"


def test_the_query_of_a_signed_url_stays_behind_the_name_of_its_index(
    tar: Path, server: Server, tmp_path: Path
) -> None:
    write_index(build_index(tar))
    url = f"{server.url}/a.tar{SIGNED}"
    server.files = {"/a.tar": tar.read_bytes(), "/a.tar.index.jsonl": index_path(tar).read_bytes()}
    for cache in (None, Cache(tmp_path / "cache", 10**6)):
        assert load_index(url, cache) == build_index(tar)._replace(location=url)
    assert {path for _, path, _ in server.log} == {f"/a.tar{SIGNED}", f"/a.tar.index.jsonl{SIGNED}"}


def test_the_question_mark_in_the_name_of_a_local_shard_begins_no_query(tmp_path: Path, scans: list[str]) -> None:
    tar = write_tar(tmp_path / "a?b.tar")
    for _ in range(2):
        assert load_index(tar) == build_index(tar)
    assert scans == [str(tar)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a?b.tar", "a?b.tar.index.jsonl"]


def test_a_cache_is_nothing_to_local_shards(tar: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 10**6)
    assert load_index(tar, cache) == build_index(tar)
    assert index_path(tar).is_file()
    assert [path.name for path in cache.folder.iterdir()] == ["locks"]


def test_signatures_are_not_shown(tar: Path, server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/a.tar{SIGNED}"
    shown = rf"^{server.url}/a\.tar\?\*\*\*: "
    beside = rf"^{server.url}/a\.tar\.index\.jsonl\?\*\*\*: "
    cache = Cache(tmp_path / "cache", 10**6)
    write_index(build_index(tar))
    content, index = tar.read_bytes(), index_path(tar).read_bytes()
    shard = build_index(tar).shard._replace(location=url)
    damaged = content[:512] + b"x" + content[513:]

    def refused(words: str, call: Callable[[], object], **files: bytes) -> None:
        server.files = {f"/a.{name.replace('_', '.')}": stored for name, stored in files.items()}
        with pytest.raises(ShardError, match=words) as error:
            call()
        assert "secret" not in str(error.value)

    for load in (build_index, load_index, load_shard, partial(load_shard, cache=cache)):
        refused(f"{shown}no such shard$", partial(load, url))
    refused(f"{shown}there is no", lambda: load_shard(url), tar=content)
    refused(f"{shown}truncated or damaged", lambda: build_index(url), tar=content[:700])
    refused(f"{shown}'a/000.png' at byte 0 is a link", lambda: build_index(url), tar=a_link(tmp_path))
    refused(f"{shown}sha256 is", lambda: verify(shard), tar=damaged)
    refused(f"{shown}no such shard$", lambda: verify(shard))
    refused(f"{shown}malformed index", lambda: parse_sample(shard, b"[]"))
    refused(f"{shown}changed since", lambda: load_shard(url), tar=content + bytes(512), tar_index_jsonl=index)
    refused(f"{beside}malformed index", lambda: load_shard(url), tar=content, tar_index_jsonl=b"{}")
    old = index.replace(b'"schema":2', b'"schema":1')
    refused(f"{beside}schema 1", lambda: load_shard(url), tar=content, tar_index_jsonl=old)
    cut = b"".join(index.splitlines(keepends=True)[:-1])
    refused(rf"{beside}malformed index \(", lambda: load_lines(shard), tar=content, tar_index_jsonl=cut)
    other = index.replace(b'"samples":3', b'"samples":2')
    refused(f"{beside}changed while", lambda: load_lines(shard), tar=content, tar_index_jsonl=other)
    refused(f"{shown}named twice, by .*a.tar.*and by ", lambda: find_shards([url, url]), tar=content)
    braces = f"{server.url}/{{a.tar{SIGNED}"
    refused(rf"^{server.url}/\{{a\.tar\?\*\*\*: its braces don't match$", lambda: find_shards([braces]))


def a_link(tmp_path: Path) -> bytes:
    """A tar that holds a link."""
    link = tarfile.TarInfo("a/000.png")
    link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        archive.addfile(link)
    return (tmp_path / "link.tar").read_bytes()


def test_a_remote_shard_of_another_size_is_refused_and_its_index_named(tar: Path, bucket: str, tmp_path: Path) -> None:
    url = upload(tar, f"{bucket}/a.tar")
    cache = Cache(tmp_path / "cache", 10**6)
    size = load_shard(url, cache).size
    tar.write_bytes(tar.read_bytes() + bytes(512))
    upload(tar, url)
    with pytest.raises(ShardError, match=rf"a\.tar: changed.*{size} bytes then, {size + 512} now") as error:
        load_shard(url, cache)
    assert f"delete {cache.index_of(url)}" in str(error.value)

    cache.index_of(url).unlink()
    assert load_shard(url, cache).size == size + 512


def test_a_remote_shard_whose_index_is_damaged_is_refused(tar: Path, bucket: str) -> None:
    url = upload(tar, f"{bucket}/a.tar")
    damage(tar, 1, None)
    upload(index_path(tar), f"{url}.index.jsonl")
    shard = load_shard(url)
    with pytest.raises(ShardError, match=r"a\.tar\.index\.jsonl: malformed index \(2 of 3 samples\)"):
        load_samples(shard)

    damage(tar, 0, b"{}")
    upload(index_path(tar), f"{url}.index.jsonl")
    with pytest.raises(ShardError, match=r"a\.tar\.index\.jsonl: malformed index"):
        load_shard(url)


@pytest.mark.parametrize("load", [build_index, load_index, load_shard])
def test_a_remote_shard_that_is_not_there_is_named(bucket: str, load: Callable[[str], object]) -> None:
    with pytest.raises(ShardError, match=rf"^{bucket}/gone\.tar: no such shard$"):
        load(f"{bucket}/gone.tar")


def test_a_remote_index_without_its_shard_is_no_shard(tar: Path, bucket: str, tmp_path: Path) -> None:
    write_index(build_index(tar))
    upload(index_path(tar), f"{bucket}/a.tar.index.jsonl")
    for cache in (None, Cache(tmp_path / "cache", 10**6)):
        with pytest.raises(ShardError, match=rf"^{bucket}/a\.tar: no such shard$"):
            load_shard(f"{bucket}/a.tar", cache)


def test_many_remote_shards_are_indexed_at_once_and_in_order(tmp_path: Path, bucket: str) -> None:
    urls = []
    for i in range(20):
        tar = write_tar(tmp_path / "x.tar", [(f"{i}-{j}.txt", b"") for j in range(i + 1)])
        urls.append(upload(tar, f"{bucket}/{i:02d}.tar"))
    cache = Cache(tmp_path / "cache", 10**6)
    for _ in range(2):  # from the shards, from the cache
        shards = load_shards(urls, cache)
        assert [(shard.location, shard.samples) for shard in shards] == [(url, i + 1) for i, url in enumerate(urls)]
    assert load_samples(shards[7], cache)[7].key == "7-7"
    files = [path for path in cache.folder.iterdir() if path.is_file()]
    assert sorted(files) == sorted(map(cache.index_of, urls))


def with_another_text(content: bytes) -> bytes:
    assert content.count(b"a cat") == 1
    return content.replace(b"a cat", b"a dog")


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_replaced_after_the_start_is_refused_where_it_is_read(tar: Path, tmp_path: Path, indexed: bool) -> None:
    if indexed:
        write_index(build_index(tar))
    shard = load_shard(tar)
    place = load_samples(shard)[0].members["txt"]
    copy = pickle.loads(pickle.dumps(shard))  # noqa: S301  (as workers get it)
    assert Reader().read(copy, *place) == b"a cat"
    time.sleep(0.02)  # the clock of a file system is coarse
    (tmp_path / "new").write_bytes(with_another_text(tar.read_bytes()))
    os.utime(tmp_path / "new", (0, 0))  # as rsync -t does
    (tmp_path / "new").replace(tar)
    for each in (shard, copy):
        with pytest.raises(FetchError, match=r"train-00000\.tar: changed since it was indexed: sha256"):
            Reader().read(each, *place)


def test_a_shard_replaced_in_a_read_only_folder_is_refused_and_then_scanned_again(
    tar: Path, monkeypatch: pytest.MonkeyPatch, scans: list[str]
) -> None:
    content = with_another_text(tar.read_bytes())
    with monkeypatch.context() as patch:
        refuse_to_write(patch, errno.EROFS)
        shard = load_shard(tar)
        assert load_shard(tar) == shard
        patch.undo()
    place = build_index(tar).samples[0].members["txt"]
    time.sleep(0.02)
    tar.write_bytes(content)
    with pytest.raises(FetchError, match=r"train-00000\.tar: changed since it was indexed"):
        Reader().read(shard, *place)
    refuse_to_write(monkeypatch, errno.EROFS)
    again = load_shard(tar)
    assert again == build_index(tar).shard != shard
    assert Reader().read(again, *place) == b"a dog"


@pytest.mark.parametrize("kind", ["memory", "http"])
def test_a_url_replaced_after_the_start_is_refused_where_its_store_tells(
    tar: Path, server: Server, bucket: str, tmp_path: Path, kind: str
) -> None:
    write_index(build_index(tar))
    server.etags = True
    url = {"memory": f"{bucket}/a.tar", "http": f"{server.url}/a.tar"}[kind]

    def put() -> None:
        server.files |= {"/a.tar": tar.read_bytes(), "/a.tar.index.jsonl": index_path(tar).read_bytes()}
        upload(tar, f"{bucket}/a.tar")
        upload(index_path(tar), f"{bucket}/a.tar.index.jsonl")

    put()
    shard = load_shard(url)
    place = load_samples(shard)[0].members["txt"]
    assert Reader().read(shard, *place) == b"a cat"
    content = tar.read_bytes()
    tar.write_bytes(with_another_text(content))
    put()
    for reader in (Reader(), Reader(Cache(tmp_path / "cache", 10**6))):
        with pytest.raises(FetchError, match=r"/a\.tar: changed since it was indexed: sha256"):
            reader.read(shard, *place)
    tar.write_bytes(content)
    put()
    assert Reader().read(shard, *place) == b"a cat", "written anew, but the same"


def test_shards_are_equal_whenever_they_were_seen(tar: Path) -> None:
    shard = load_shard(tar)
    os.utime(tar)
    later = load_shard(tar)
    assert later.stamp != shard.stamp
    assert later == shard
    assert not later != shard  # noqa: SIM202  (a tuple has an operator for it)
    assert hash(later) == hash(shard)
    assert len(load_lines(shard)) == len(load_lines(later)) == 3
    others = [shard._replace(location="x"), shard._replace(size=1), shard._replace(sha256="x")]
    for other in (*others, shard._replace(samples=9), shard._replace(members={"txt": 3})):
        assert other != shard
    assert shard != tuple(shard)


def test_of_a_remote_index_only_the_start_is_read_at_first(tmp_path: Path, server: Server) -> None:
    tar = write_tar(tmp_path / "a.tar", [(f"{i:06}.txt", b"") for i in range(3000)])
    write_index(build_index(tar))
    server.files = {"/a.tar": tar.read_bytes(), "/a.tar.index.jsonl": index_path(tar).read_bytes()}
    assert len(server.files["/a.tar.index.jsonl"]) > 65_536
    shard = load_shard(f"{server.url}/a.tar")
    assert shard.samples == 3000
    assert server.gets("/a.tar.index.jsonl") == ["bytes=0-65535"]
    assert len(load_samples(shard)) == 3000


def test_the_index_of_a_url_signed_anew_is_found_in_the_cache(tar: Path, server: Server, tmp_path: Path) -> None:
    server.files = {"/a.tar": tar.read_bytes()}
    cache = Cache(tmp_path / "cache", 10**6)
    for signature in "ab":
        assert load_shard(f"{server.url}/a.tar?Signature={signature}", cache).samples == 3
    assert len(server.gets("/a.tar?Signature=a")) == 1
    assert server.gets("/a.tar?Signature=b") == []


@pytest.mark.parametrize(("line", "content"), [(0, b"{}"), (2, None), (2, b"no JSON")])
def test_a_malformed_remote_index_is_not_copied_into_the_cache(
    tar: Path, bucket: str, tmp_path: Path, line: int, content: bytes | None
) -> None:
    url = upload(tar, f"{bucket}/a.tar")
    damage(tar, line, content)
    upload(index_path(tar), f"{url}.index.jsonl")
    cache = Cache(tmp_path / "cache", 10**6)
    with pytest.raises(ShardError, match="malformed index"):
        load_shard(url, cache)
    assert [path.name for path in cache.folder.iterdir()] == ["locks"]

    write_index(build_index(tar))  # mended
    upload(index_path(tar), f"{url}.index.jsonl")
    assert load_index(url, cache).samples == build_index(tar).samples


@pytest.mark.parametrize("indexed", [True, False])
def test_a_cache_that_takes_no_index_is_named(
    tar: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indexed: bool
) -> None:
    url = upload(tar, f"{bucket}/a.tar")
    if indexed:
        write_index(build_index(tar))
        upload(index_path(tar), f"{url}.index.jsonl")
    cache = Cache(tmp_path / "cache", 10**6)
    refuse_to_write(monkeypatch, errno.ENOSPC)
    with pytest.raises(FetchError, match=rf"^{cache.folder}: can't be used as a cache: No space left on device$"):
        load_shard(url, cache)


def test_files_that_belong_to_no_sample_are_counted(tmp_path: Path) -> None:
    names = ["a/0.txt", ".hidden", "a/README", "__meta__/x.json", "a/1.txt", "a/.1.txt"]
    tar = write_tar(tmp_path / "x.tar", [(name, b"") for name in names])
    with tarfile.open(tar, "a") as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    index, outside = scan(tar)
    assert [sample.key for sample in index.samples] == ["a/0", "a/1"]
    assert outside == 4


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with shards in it and next to it."""
    inside = tmp_path / "here"
    inside.mkdir()
    for name in ("train-00000", "train-00001", "train-00002", "val-00000", ".train-00003"):
        (inside / f"{name}.tar").touch()
    (inside / "train-00000.tar.index.jsonl").touch()
    (inside / "train-9.tar").mkdir()
    monkeypatch.chdir(inside)
    return inside


def test_find_keeps_the_patterns_order_and_sorts_within(folder: Path) -> None:
    train = ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    assert find_shards(["val-00000.tar", "train-*.tar*"]) == ["val-00000.tar", *train]
    assert find_shards(["train-{00002..00000}.tar"]) == train
    assert find_shards(["{train,val}-*0.tar"]) == [train[0], "val-00000.tar"]
    assert find_shards(["../*/val-*.tar"]) == ["../here/val-00000.tar"]
    assert find_shards([f"{folder}/train-*.tar"]) == [f"{folder}/{name}" for name in train]
    assert find_shards([]) == []


@pytest.mark.parametrize("name", [".", "../here", "../here/"])
def test_find_says_how_to_name_the_shards_of_a_folder(folder: Path, name: str) -> None:
    with pytest.raises(ShardError) as error:
        find_shards([name])
    assert str(error.value) == f"{name}: a folder; name the shards in it, such as '{name.rstrip('/')}/*.tar'"


def test_find_takes_an_existing_name_as_it_is(folder: Path) -> None:
    for name in ("x-[1].tar", "x-{0..1}.tar", "x-*.tar"):
        (folder / name).touch()
        assert find_shards([name]) == [name]


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


def test_find_takes_urls(folder: Path, tar: Path, bucket: str) -> None:
    a, b, c = (upload(tar, f"{bucket}/{name}.tar") for name in ("x-0", "x-1", "y-0"))
    upload(tar, f"{a}.index.jsonl")
    assert find_shards([f"{bucket}/y-0.tar", f"{bucket}/x-*.tar"]) == [c, a, b]
    assert find_shards([f"{bucket}/x-{{1..0}}.tar"]) == [a, b]
    assert find_shards([f"{bucket}/*-0.tar*"]) == [a, c]
    assert find_shards([f"{bucket}/{{x,y}}-0.tar", "val-*.tar"]) == [a, c, "val-00000.tar"]
    with pytest.raises(ShardError, match=r"x-0\.tar: named twice, by '.*/x-\*\.tar' and by '.*/x-0\.tar'"):
        find_shards([f"{bucket}/x-*.tar", a])


@pytest.mark.parametrize(
    ("pattern", "missing"),
    [("x-7.tar", "x-7.tar"), ("x-{0..2}.tar", "x-1.tar"), ("z-*.tar", "z-*.tar"), ("x-0.tar.index.jsonl*", "x-0.")],
)
def test_find_names_the_url_that_names_nothing(tar: Path, bucket: str, pattern: str, missing: str) -> None:
    upload(tar, f"{bucket}/x-0.tar")
    upload(tar, f"{bucket}/x-0.tar.index.jsonl")
    with pytest.raises(FetchError) as error:
        find_shards([f"{bucket}/{pattern}"])
    assert str(error.value).startswith(f"{bucket}/{missing}")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("pipe:cat a.tar", "commands are never run"),
        ("{pipe:cat,pipe:tac} a.tar", "commands are never run"),
        ("file:///a.tar", "scheme 'file' is not supported"),
        ("ftp://x.org/{0..1}.tar", "scheme 'ftp' is not supported"),
        ("simplecache::memory://a.tar", "chaining"),
        ("https://user:secret@x.org/a.tar", "password"),
    ],
)
def test_find_refuses_urls_of_other_kinds(folder: Path, pattern: str, words: str) -> None:
    with pytest.raises(FetchError, match=words) as error:
        find_shards([pattern])
    assert "secret" not in str(error.value)


def test_find_refuses_a_single_string_and_open_braces(folder: Path) -> None:
    with pytest.raises(TypeError, match="list of strings"):
        find_shards("train-00000.tar")
    with pytest.raises(ShardError, match=r"^train-\{00000\.\.00001\.tar: its braces don't match$"):
        find_shards(["train-{00000..00001.tar"])

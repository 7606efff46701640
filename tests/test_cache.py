import contextlib
import gc
import hashlib
import multiprocessing
import os
import pickle
import resource
import threading
import time
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import fsspec
import pytest

import data.cache
from data.cache import Cache, Reader, Stored
from data.fetch import FetchError, MissingError, state_of
from tests.server import A, B, Server, Shard, empty_memory, run_server, shard, skip_waits

server = pytest.fixture(run_server)
waits = pytest.fixture(autouse=True)(skip_waits)
memory = pytest.fixture(empty_memory)


# --- Reader


def test_reads_local_shards_exactly(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(A)
    reader = Reader()
    for offset, size in ((0, 1), (7, 1000), (len(A) - 3, 3), (0, len(A)), (5, 0), (len(A), 0)):
        assert reader.read(shard(path), offset, size) == A[offset : offset + size]
    for offset, size in ((-1, 1), (0, -1), (len(A) - 3, 4), (1 << 60, 1)):
        with pytest.raises(FetchError, match=r"a.tar: bytes .* are not within its 102400"):
            reader.read(shard(path), offset, size)
    with pytest.raises(FetchError, match=r"absent.tar: no such file"):
        reader.read(shard(tmp_path / "absent.tar"), 0, 1)
    with pytest.raises(FetchError, match=r"Is a directory"):
        reader.read(Shard(str(tmp_path), tmp_path.stat().st_size, ""), 0, 1)


def test_large_members_are_read_in_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(A)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 1000), offset))  # 2 GiB on Linux
    assert Reader().read(shard(path), 7, 5500) == A[7:5507]


def test_a_changed_shard_is_refused(tmp_path: Path, server: Server) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(A + b"more")
    server.files["/a"] = A + b"more"
    for location in (str(path), f"{server.url}/a"):
        for reader in (Reader(), Reader(Cache(tmp_path / "cache", 10**6))):
            with pytest.raises(FetchError, match=r"/a.*: changed since it was indexed: 102400 bytes then, 102404 now"):
                reader.read(shard(location), 0, 1)
    path.write_bytes(A)
    reader = Reader()
    reader.read(shard(path), 0, 1)
    path.write_bytes(A[:100])
    with pytest.raises(FetchError, match=r"changed since it was indexed: it ends at byte 100"):
        reader.read(shard(path), 90, 20)


@pytest.mark.parametrize("kind", ["local", "http", "memory"])
def test_a_shard_replaced_by_one_of_its_size_is_refused(
    tmp_path: Path, server: Server, memory: fsspec.AbstractFileSystem, kind: str
) -> None:
    path = tmp_path / "a.tar"
    server.etags = True

    def put(content: bytes) -> None:
        time.sleep(0.02)  # the clock of a file system is coarse
        path.write_bytes(content)
        server.files["/a.tar"] = content
        memory.pipe_file("/a.tar", content)

    put(A)
    location = {"local": str(path), "http": f"{server.url}/a.tar", "memory": "memory://a.tar"}[kind]
    one = shard(location)._replace(stamp=state_of(location)[1])
    assert Reader().read(one, 3, 9) == A[3:12]
    put(B)
    changed = rf"a\.tar: changed since it was indexed: sha256 {one.sha256} then, {shard('', B).sha256} now"
    reader = Reader()
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(FetchError, match=changed):
            reader.read(one, 3, 9)
    assert Reader().read(one._replace(stamp=""), 3, 9) == B[3:12], "nothing tells"
    assert Reader().read(shard(location, B)._replace(stamp=state_of(location)[1]), 3, 9) == B[3:12]
    put(A)
    assert reader.read(one, 3, 9) == A[3:12], "written anew with the same content"


def test_a_touched_shard_is_hashed_once_and_an_untouched_one_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[None] = []
    file_digest = hashlib.file_digest

    def counted(*args: Any) -> Any:
        hashed.append(None)
        return file_digest(*args)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    paths = [tmp_path / f"{name}.tar" for name in "ab"]
    for path in paths:
        path.write_bytes(A)
    shards = [shard(path)._replace(stamp=state_of(str(path))[1]) for path in paths]
    for touched in (False, True):
        reader = Reader(max_open=1)  # so that each read opens its file anew
        for each in shards * 3:
            assert reader.read(each, 3, 9) == A[3:12]
        assert len(hashed) == touched
        os.utime(paths[0], (5, 5))


def test_several_spans_come_in_their_order(tmp_path: Path, server: Server, memory: fsspec.AbstractFileSystem) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(A)
    server.files["/a.tar"] = A
    memory.pipe_file("/a.tar", A)
    end = len(A)
    spans = [(700, 300), (0, 1), (700, 300), (end - 5, 5), (end, 0), (690, 20)]
    locations = [str(path), f"{server.url}/a.tar", "memory://a.tar"]
    for location in locations:
        for cache in (None, Cache(tmp_path / "cache", 10**6)):
            reader = Reader(cache)
            assert reader.read_spans(shard(location), spans) == [A[start : start + size] for start, size in spans]
            assert reader.read_spans(shard(location), []) == []
            for bad in ((end - 3, 4), (-1, 1), (0, -1), (end + 1, 0)):
                says = rf"a\.tar: bytes {bad[0]} to {sum(bad)} are not within its {end}"
                with pytest.raises(FetchError, match=says):
                    reader.read_spans(shard(location), [(0, 1), bad])


def test_a_shard_that_gets_shorter_while_it_is_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(A)
    reader = Reader()
    assert reader.read_spans(shard(path), [(0, 9)]) == [A[:9]]
    os.truncate(path, 1000)
    assert reader.read_spans(shard(path), [(0, 9), (990, 10)]) == [A[:9], A[990:1000]]
    for span, end in (((990, 11), 1000), ((2000, 5), 2000)):
        with pytest.raises(FetchError, match=rf"a\.tar: changed since it was indexed: it ends at byte {end}"):
            reader.read_spans(shard(path), [(0, 9), span])


@pytest.mark.parametrize(
    ("url", "says"),
    [("ftp://host/x.tar", "'ftp' is not supported"), ("pipe:cat x", "never run"), ("zip::s3://b/x", "chaining")],
)
def test_urls_of_other_kinds_are_not_read(url: str, says: str, tmp_path: Path) -> None:
    for reader in (Reader(), Reader(Cache(tmp_path, 10**6))):
        with pytest.raises(FetchError, match=says):
            reader.read(shard(url), 0, 1)


def open_files(folder: Path) -> int:
    """How many files of a folder this process has open, deleted ones too."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them, and those of other threads
            count += str(link.readlink()).startswith(f"{folder}/")
    return count


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_open_files_are_bounded_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{i}.tar" for i in range(6)]
    for path in paths:
        path.write_bytes(A)
    reader = Reader(max_open=3)
    for path in paths:
        reader.read(shard(path), 0, 1)
    assert open_files(tmp_path) == 3
    paths[3].unlink()
    paths[0].unlink()
    assert reader.read(shard(paths[3]), 0, 1) == A[:1], "the last three are open"
    with pytest.raises(FetchError, match=r"0.tar: no such file"):
        reader.read(shard(paths[0]), 0, 1)
    reader.read(shard(paths[1]), 0, 1)
    assert reader.read(shard(paths[3]), 0, 1) == A[:1], "it was used more recently than 4 and 5"
    reader.close()
    assert open_files(tmp_path) == 0
    assert reader.read(shard(paths[5]), 0, 1) == A[:1], "closing is not for good"
    del reader
    gc.collect()
    assert open_files(tmp_path) == 0

    monkeypatch.setattr(resource, "getrlimit", lambda _: (4, 4))
    reader = Reader(max_open=3)
    for path in paths[1:3]:
        reader.read(shard(path), 0, 1)
    for path in paths[4:]:
        reader.read(shard(path), 0, 1)
    assert open_files(tmp_path) == 2


def test_threads_share_a_reader(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.tar" for i in range(4)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 5000)
    shards = [shard(path, path.read_bytes()) for path in paths]
    reader = Reader(max_open=1)  # so that each read closes the file of another thread
    wrong: list[object] = []

    def work(i: int) -> None:
        try:
            wrong.extend(1 for _ in range(500) if reader.read(shards[i], 0, 5000) != bytes([i]) * 5000)
        except FetchError as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_reads_ranges_of_urls(server: Server, memory: fsspec.AbstractFileSystem) -> None:
    server.files["/a.tar"] = A
    memory.pipe_file("/a.tar", A)
    reader = Reader()
    for url in (f"{server.url}/a.tar", "memory://a.tar"):
        for offset, size in ((0, 1), (7, 1000), (len(A) - 3, 3), (5, 0)):
            assert reader.read(shard(url), offset, size) == A[offset : offset + size]
        with pytest.raises(FetchError, match=r"absent: no such file"):
            reader.read(shard(f"{url}.absent"), 0, 1)
    assert server.gets("/a.tar") == ["bytes=0-0", "bytes=7-1006", "bytes=102397-102399"]
    assert len(server.log) == 4 + 3, "the size of a shard is asked for once"
    assert server.encodings == {"identity"}, "ranges of a compressed file are other bytes"
    del server.files["/a.tar"]
    with pytest.raises(FetchError, match=r"a.tar: no such file"):
        reader.read(shard(f"{server.url}/a.tar"), 0, 1)


def test_a_server_that_ignores_ranges(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.files["/a.tar"] = A
    server.ranges = False
    url = f"{server.url}/a.tar"
    assert Reader().read(shard(url), 0, 50) == A[:50], "that much can be done"
    with pytest.raises(FetchError, match=r"a.tar: the server can't send a part of a file; use a cache"):
        Reader().read(shard(url), 7, 50)
    assert waits == []
    assert Reader(Cache(tmp_path, len(A))).read(shard(url), 7, 50) == A[7:57]


def test_cut_connections(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = A
    for cuts in (1, 4):
        server.cuts = cuts
        assert Reader().read(shard(f"{server.url}/a"), 10, 20_000) == A[10:20_010]
        server.cuts = cuts
        cache = Cache(tmp_path / str(cuts), len(A))
        assert cache.get(shard(f"{server.url}/a")).read_bytes() == A
    server.cuts = 5
    with pytest.raises(FetchError, match=r"failed 5 times"):
        Cache(tmp_path / "5", len(A)).get(shard(f"{server.url}/a"))
    server.lengths = False
    server.cuts = 2  # the size is asked for first, and cut as well
    assert Cache(tmp_path / "lengths", len(A)).get(shard(f"{server.url}/a")).read_bytes() == A


def test_a_reader_can_be_pickled(server: Server, tmp_path: Path) -> None:
    server.files["/a.tar"] = A
    reader = Reader(Cache(tmp_path, len(A)), max_open=7)
    reader.read(shard(f"{server.url}/a.tar"), 0, 1)
    assert len(reader._files) == 1
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301
    assert not copy._files
    assert copy.max_open == 7
    assert copy.read(shard(f"{server.url}/a.tar"), 3, 9) == A[3:12]
    assert len(server.gets("/a.tar")) == 1, "the copy uses the same cache"


def child_reads(reader: Reader, shards: list[Shard], results: "multiprocessing.Queue[list[bytes]]") -> None:
    results.put([reader.read(each, 3, 9) for each in shards])


@pytest.mark.parametrize("context", [ForkContext(), SpawnContext()], ids=["fork", "spawn"])
def test_processes_inherit_a_reader(server: Server, tmp_path: Path, context: ForkContext | SpawnContext) -> None:
    path = tmp_path / "b.tar"
    path.write_bytes(B)
    server.files["/a.tar"] = A
    shards = [shard(f"{server.url}/a.tar"), shard(path, B)]
    reader = Reader()
    expected = [reader.read(each, 3, 9) for each in shards]
    results: multiprocessing.Queue[list[bytes]] = context.Queue()
    child = context.Process(target=child_reads, args=(reader, shards, results))
    child.start()
    assert results.get(timeout=60) == expected
    child.join()
    assert [reader.read(each, 3, 9) for each in shards] == expected


# --- Cache


def test_downloads_once_under_its_hash(server: Server, tmp_path: Path) -> None:
    server.files = {"/x/train-0.tar": A, "/y/train-0.tar": B, "/z/copy.tar": A}
    x, y, z = (shard(server.url + path, content) for path, content in server.files.items())
    cache = Cache(tmp_path / "new" / "cache", 10**6)
    assert cache.get(x) == cache.folder / f"{x.sha256}.tar"
    assert [cache.get(each).read_bytes() for each in (x, y, z, x)] == [A, B, A, A]
    assert [path for method, path, _ in server.log if method == "GET"] == ["/x/train-0.tar", "/y/train-0.tar"]
    assert sorted(path.suffix for path in cache.folder.iterdir()) == ["", ".tar", ".tar"]


def test_a_typed_shard_is_enough(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/a.tar", A)
    stored: Stored = shard("memory://a.tar")
    assert Reader(Cache(tmp_path, 10**6)).read(stored, 3, 9) == A[3:12]


def test_wrong_content_is_not_kept(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.files["/a.tar"] = B
    cache = Cache(tmp_path, 10**6)
    expected, found = shard("", A).sha256, shard("", B).sha256
    with pytest.raises(FetchError, match=rf"/a.tar: changed .*: sha256 {expected} then, {found} now"):
        cache.get(shard(f"{server.url}/a.tar", A))
    assert [path.name for path in tmp_path.iterdir()] == ["locks"]
    assert waits == []


def test_an_endless_answer_is_cut(server: Server, tmp_path: Path) -> None:
    server.files["/a.tar"] = A * 50
    server.lengths = False
    with pytest.raises(FetchError, match=r"/a.tar: sends more than the 102400 bytes"):
        Cache(tmp_path, 10**6).get(shard(f"{server.url}/a.tar", A))
    assert [path.name for path in tmp_path.iterdir()] == ["locks"]


def test_hashes_that_are_none_make_no_paths(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/a.tar", A)
    for sha256 in ("../../evil", "", "A" * 64, "0" * 64 + "\n"):
        with pytest.raises(FetchError, match=r"memory://a.tar: its index gives .* no hash"):
            Cache(tmp_path, 10**6).get(Shard("memory://a.tar", len(A), sha256))


def test_a_damaged_copy_is_fetched_again(server: Server, tmp_path: Path) -> None:
    server.files["/a.tar"] = A
    cache = Cache(tmp_path, len(A))
    path = cache.get(shard(f"{server.url}/a.tar"))
    path.write_bytes(A[:-1])
    assert cache.get(shard(f"{server.url}/a.tar")).read_bytes() == A
    assert len(server.gets("/a.tar")) == 2


def test_the_least_recently_used_are_evicted(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    contents = [bytes([i]) * 1000 for i in range(5)]
    shards = [shard(f"memory://{i}.tar", content) for i, content in enumerate(contents)]
    for i, content in enumerate(contents):
        memory.pipe_file(f"/{i}.tar", content)
    cache = Cache(tmp_path, 3500)
    (tmp_path / "mine.tar").write_bytes(A)
    cache.index_of("memory://0.tar").write_bytes(A)
    paths = [cache.get(each) for each in shards[:3]]
    for age, path in zip((30, 20, 10), paths, strict=True):
        os.utime(path, (time.time() - age,) * 2)
    assert cache.get(shards[0]) == paths[0]  # the oldest becomes the newest
    cache.get(shards[3])
    assert [path.exists() for path in paths] == [True, False, True]
    cache.get(shards[4])
    assert [path.exists() for path in paths] == [True, False, False]
    assert (tmp_path / "mine.tar").exists(), "what the cache did not write, it does not delete"
    assert cache.index_of("memory://0.tar").exists()


def test_a_shard_larger_than_the_cache(server: Server, tmp_path: Path) -> None:
    server.files["/a.tar"] = A
    cache = Cache(tmp_path, len(A) - 1)
    with pytest.raises(FetchError, match=rf"/a.tar: has 102400 bytes, and the whole cache {tmp_path} may have 102399"):
        cache.get(shard(f"{server.url}/a.tar"))
    assert server.log == []


def test_where_indexes_are_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1)
    assert cache.index_of("s3://b/a.tar").parent == tmp_path
    assert cache.index_of("s3://b/a.tar") == cache.index_of("s3://b/a.tar")
    assert cache.index_of("s3://b/a.tar") != cache.index_of("s3://c/a.tar")


def test_a_url_that_is_signed_anew_keeps_its_index(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1)
    one, other = (cache.index_of(f"https://h/a.tar?Signature={i}") for i in range(2))
    assert one == other == cache.index_of("https://h/a.tar") != cache.index_of("https://h/b.tar?Signature=0")
    for named_by_query in ("https://h/get?file=", "s3://b/a.tar?"):
        assert cache.index_of(f"{named_by_query}0.tar") != cache.index_of(f"{named_by_query}1.tar")


def test_a_folder_that_cannot_be_one(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FetchError, match=r"file/cache: can't be the folder of a cache: Not a directory"):
        Cache(tmp_path / "file" / "cache", 1)
    memory.pipe_file("/a.tar", A)
    cache = Cache(tmp_path / "cache", 10**6)
    (tmp_path / "cache" / "locks").rmdir()
    (tmp_path / "cache" / "locks").write_bytes(b"")
    with pytest.raises(FetchError, match=r"cache: can't be used as a cache: .*locks"):
        cache.get(shard("memory://a.tar"))


def test_a_missing_shard_is_named(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"memory://a.tar: no such file"):
        Cache(tmp_path, 10**6).get(shard("memory://a.tar"))


def test_reading_survives_eviction(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    memory.pipe_file("/a.tar", A)
    reader = Reader(Cache(tmp_path, 10**6))
    one = shard("memory://a.tar")
    assert reader.read(one, 3, 9) == A[3:12]
    (tmp_path / f"{one.sha256}.tar").unlink()
    memory.store.clear()
    assert reader.read(one, 4, 9) == A[4:13]


def test_eviction_between_download_and_opening(
    memory: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe_file("/a.tar", A)
    cache, evictions = Cache(tmp_path, 10**6), [True, True, False]
    get = cache.get

    def get_and_evict(one: Stored) -> Path:
        path = get(one)
        if evictions.pop(0):
            path.unlink()
        return path

    monkeypatch.setattr(cache, "get", get_and_evict)
    assert Reader(cache).read(shard("memory://a.tar"), 3, 9) == A[3:12]
    evictions = [True] * 9
    with pytest.raises(FetchError, match=r"evicted 5 times before it could be opened: 1000000 bytes are too few"):
        Reader(cache).read(shard("memory://a.tar"), 3, 9)


def test_idle_evicted_files_give_their_disk_back(
    memory: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(data.cache, "monotonic", lambda: now[0])
    shards = [shard(f"memory://{i}.tar", bytes([i]) * 1000) for i in range(4)]
    for i in range(4):
        memory.pipe_file(f"/{i}.tar", bytes([i]) * 1000)
    cache = Cache(tmp_path, 10**6)
    reader = Reader(cache)
    paths = [tmp_path / f"{each.sha256}.tar" for each in shards]
    for each in shards[:3]:
        reader.read(each, 0, 1)
    os.utime(paths[1], (0, 0))
    paths[0].unlink()
    paths[1].unlink()
    now[0] += 70
    reader.read(shards[1], 0, 1)  # in use, if evicted
    reader.read(shards[3], 0, 1)
    assert [location for location, _ in reader._files] == ["memory://2.tar", "memory://1.tar", "memory://3.tar"]


def test_reading_keeps_a_shard_recent(
    memory: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(data.cache, "monotonic", lambda: now[0])
    memory.pipe_file("/a.tar", A)
    one = shard("memory://a.tar")
    reader = Reader(Cache(tmp_path, 10**6))
    reader.read(one, 0, 1)
    path = tmp_path / f"{one.sha256}.tar"
    os.utime(path, (5, 5))
    reader.read(one, 0, 1)
    assert path.stat().st_mtime == 5, "not at every read"
    now[0] += 31
    reader.read(one, 0, 1)
    assert path.stat().st_mtime > time.time() - 60


def child_gets(cache: Cache, one: Shard, barrier: Barrier, results: "multiprocessing.Queue[bytes]") -> None:
    barrier.wait(60)
    results.put(cache.get(one).read_bytes())


def test_processes_download_once(server: Server, tmp_path: Path) -> None:
    server.files["/a.tar"] = A
    server.pause = 0.2
    context = SpawnContext()
    barrier, results = context.Barrier(2), context.Queue()
    args = (Cache(tmp_path, 10**6), shard(f"{server.url}/a.tar"), barrier, results)
    children = [context.Process(target=child_gets, args=args) for _ in range(2)]
    for child in children:
        child.start()
    assert [results.get(timeout=60) for _ in children] == [A, A]
    for child in children:
        child.join()
    assert server.gets("/a.tar") == [None]


def test_downloads_under_way_count_and_stay(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards at once in a cache with room for one: the second waits for the first, which is whole meanwhile."""
    server.files = {"/a.tar": A, "/b.tar": B}
    server.pause = 0.1
    cache = Cache(tmp_path, len(A) + 10)
    sizes: list[int] = []

    def wait(seconds: float) -> None:
        with contextlib.suppress(FileNotFoundError):  # renamed just now
            sizes.append(sum(path.stat().st_size for path in tmp_path.glob("*.*")))
        time.sleep(0.05)

    monkeypatch.setattr(data.cache, "sleep", wait)
    threads = [
        threading.Thread(target=cache.get, args=(shard(server.url + path, content),))
        for path, content in server.files.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(sizes) == {len(A)}, "one of them waited; the other took its whole room from the start"
    assert len(server.gets("/a.tar")) == len(server.gets("/b.tar")) == 1
    assert len(list(tmp_path.glob("*.tar"))) == 1


@pytest.mark.parametrize("again", [True, False])
def test_what_a_killed_download_leaves_is_removed(server: Server, tmp_path: Path, again: bool) -> None:
    server.files = {"/a.tar": A, "/b.tar": B}
    server.pause = 60.0
    a, b = shard(f"{server.url}/a.tar"), shard(f"{server.url}/b.tar", B)
    cache = Cache(tmp_path, len(A) + 10)
    context = SpawnContext()
    barrier, results = context.Barrier(1), context.Queue()
    child = context.Process(target=child_gets, args=(cache, a, barrier, results))
    child.start()
    deadline = time.monotonic() + 60
    while not server.gets("/a.tar") and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.join()
    server.pause = 0.0
    assert (tmp_path / f"{a.sha256}.part").exists()
    one, content = (a, A) if again else (b, B)
    assert cache.get(one).read_bytes() == content, "the leftover takes no room"
    assert not list(tmp_path.glob("*.part"))

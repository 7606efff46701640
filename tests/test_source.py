import os
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.decode import MODALITIES
from data.errors import UserError
from data.source import Chosen, SampleError, Source
from data.transforms import ImageView, TextView, Views
from tests.samples import CAPTIONS, members, write_source

SUBSETS = ["ita", "it", "a", "t", "ia", "", "i", "ta", "ita", "it"]
VIEWS = Views(ImageView(size=8), TextView(max_tokens=30), None).used


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Ten samples in four shards, with every subset of the modalities."""
    return write_source(tmp_path_factory.mktemp("source"), [members(i, subset) for i, subset in enumerate(SUBSETS)])


def test_a_sample_is_found_by_shard_and_number(source: Source) -> None:
    assert len(source) == 10
    assert [source.sample(*place).key for place in source.places()] == [f"k{i}" for i in range(10)]
    for i, place in enumerate(source.places()):
        values = source.values(*place, VIEWS, training=False)
        assert set(values) == {name for name in VIEWS if name[0] in SUBSETS[i]}
        if "t" in SUBSETS[i]:
            assert values["text"] == f"{CAPTIONS[i % 6]} {i}"
        assert source.metadata(*place)["number"] == i


def test_samples_asked_for_again_and_in_any_order_are_not_mixed_up(source: Source) -> None:
    places = list(source.places())  # numbers within a shard come once in each
    order = [0, 0, 3, 0, 1, 4, 1, 3, 3, 6, 9, 6]
    assert [source.sample(*places[i]).key for i in order] == [f"k{i}" for i in order]


def test_some_samples_of_a_source_are_one_in_their_own_order(source: Source) -> None:
    places = list(source.places())
    some = Chosen(source, [places[7], places[0], places[4]])
    assert len(some) == 3
    assert [some.sample(*place).key for place in some.places()] == ["k7", "k0", "k4"]
    assert some.labels("number") == [7, 0, 4]
    others = [source, Chosen(source, places), Chosen(source, [places[0], places[7], places[4]])]
    assert len({each.fingerprint for each in (some, *others)}) == 4
    assert some.fingerprint == Chosen(source, [places[7], places[0], places[4]]).fingerprint


def test_it_counts_members_and_names_what_nothing_reads(source: Source, tmp_path: Path) -> None:
    assert {name: source.count(name) for name in VIEWS} == {
        name: sum(name[0] in subset for subset in SUBSETS) for name in VIEWS
    }
    assert source.unread() == set()
    odd = write_source(tmp_path, [{**members(0), "pkl": b"x", "seg.png": b"y"}])
    assert odd.unread() == {"pkl", "seg.png"}


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_other_members_are_never_decoded(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    names = ("pkl", "pickle", "pyd", "pth", "npy", "cls", "seg.png", "mp4", "gz")
    source = write_source(tmp_path / "shards", [{**members(0, "t"), **dict.fromkeys(names, bomb)}])
    assert source.values(0, 0, Views().used, training=True) == {"text": "a cat 0"}
    assert not (tmp_path / "exploded").exists()
    assert source.unread() == set(names)
    assert set(MODALITIES) == {"jpg", "jpeg", "png", "webp", "txt", "wav", "flac", "ogg"}


def test_modalities_that_are_not_used_are_not_decoded(tmp_path: Path) -> None:
    source = write_source(tmp_path, [{**members(0, "it"), "flac": b"broken"}])
    assert set(source.values(0, 0, VIEWS, training=True)) == {"image", "text"}


@pytest.mark.parametrize(
    ("extension", "content", "error"),
    [
        ("png", b"\x89PNG", "ImageError"),
        ("txt", b"\xff", "TextError"),
        ("txt", b"", "EmptyError"),
        ("flac", b"fLaC", "AudioError"),
        ("wav", b"", "EmptyError"),
        ("jpeg", b"x", "ImageError"),
    ],
)
def test_a_damaged_member_is_named_with_shard_key_and_kind(
    tmp_path: Path, extension: str, content: bytes, error: str
) -> None:
    source = write_source(tmp_path, [members(0, "a"), {"json": b"{}", extension: content}], name="mine")
    with pytest.raises(SampleError) as raised:
        source.values(0, 1, Views().used, training=True)
    found = raised.value
    assert (found.source, found.shard, found.key) == ("mine", str(tmp_path / "train-00000.tar"), "k1")
    assert found.error == error
    assert str(found).startswith(f"{tmp_path / 'train-00000.tar'}: sample k1, member .{extension}: ")


def test_two_members_of_one_modality_are_refused(tmp_path: Path) -> None:
    sample = members(0)
    source = write_source(tmp_path, [{**sample, "webp": sample["png"]}])
    with pytest.raises(SampleError, match=r"train-00000\.tar: sample k0, more than one image member: .*webp") as error:
        source.values(0, 0, VIEWS, training=True)
    assert error.value.error == "AmbiguousModalityError"
    assert source.values(0, 0, {"text": VIEWS["text"]}, training=True) == {"text": "a cat 0"}


def test_what_must_be_there_is_asked_for_in_training_only(source: Source) -> None:
    strict = Source(source.shards, require=["image", "text"])
    assert set(strict.values(0, 0, VIEWS, training=True)) == {"image", "text"}
    with pytest.raises(SampleError, match=r"sample k3, no image, only members txt, json|members json, txt") as error:
        strict.values(1, 0, VIEWS, training=True)
    assert error.value.error == "MissingModalityError"
    assert set(strict.values(1, 0, VIEWS, training=False)) == {"text"}

    with pytest.raises(SampleError, match=r"sample k5, no image or text, only members json"):
        source.values(1, 2, VIEWS, training=True)
    assert source.values(1, 2, VIEWS, training=False) == {}


def test_a_member_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path, [members(0)])
    monkeypatch.setattr("data.source.MAX_MEMBER_BYTES", 100)
    monkeypatch.setattr(source, "_reader", None)
    with pytest.raises(SampleError, match=r"member \.png: \d+ bytes: at most 100 are allowed") as error:
        source.values(0, 0, {"image": VIEWS["image"]}, training=True)
    assert error.value.error == "LimitError"


def test_labels_are_in_the_order_of_the_shards(source: Source) -> None:
    assert source.labels("number") == list(range(10))


def test_a_missing_label_is_named_with_what_there_is(tmp_path: Path) -> None:
    for i, (content, has) in enumerate([(b'{"b": 1, "a": 2}', "a, b"), (None, "nothing")]):
        sample = {"txt": b"x"} if content is None else {"json": content}
        source = write_source(tmp_path / str(i), [{"json": b'{"label": 1}'}, sample])
        with pytest.raises(
            SampleError, match=rf"train-00000\.tar: sample k1, no 'label' in its \.json; it has: {has}$"
        ):
            source.labels("label")


def test_damaged_metadata_is_named(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=r"sample k0, member \.json: metadata is a JSON list"):
        write_source(tmp_path, [{"json": b"[]"}]).metadata(0, 0)


def test_captions_are_those_of_the_first_samples_that_have_a_good_one(tmp_path: Path, source: Source) -> None:
    captions = [f"{CAPTIONS[i % 6]} {i}" for i, subset in enumerate(SUBSETS) if "t" in subset]
    assert list(source.captions(4)) == captions[:4]
    assert list(source.captions(100)) == captions
    assert list(source.captions(0)) == []
    damaged = write_source(tmp_path, [members(0, "t"), {"txt": b"\xff"}, members(2, "t"), members(3, "t")])
    assert list(damaged.captions(2)) == [f"{CAPTIONS[i]} {i}" for i in (0, 2)]


def test_a_vanished_shard_is_named(tmp_path: Path) -> None:
    source = write_source(tmp_path, [members(0, "t")])
    Path(source.shards[0].location).unlink()
    with pytest.raises(UserError, match=r"train-00000\.tar"):
        source.values(0, 0, VIEWS, training=True)


def test_a_shard_that_became_shorter_is_named(tmp_path: Path) -> None:
    source = write_source(tmp_path, [members(0, "t"), members(1, "t")])
    with Path(source.shards[0].location).open("r+b") as file:
        file.truncate(source.sample(0, 1).members["txt"][0] + 2)
    with pytest.raises(UserError, match=r"train-00000\.tar.* changed since it was indexed"):
        source.values(0, 1, VIEWS, training=True)


def test_it_travels_to_another_process(tmp_path: Path) -> None:
    source = write_source(tmp_path, [members(0, "t")])
    before = source.metadata(0, 0)
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert copy.metadata(0, 0) == before


def test_what_a_key_holds_reaches_no_terminal() -> None:
    error = SampleError("train", "a.tar", "k\x1b[31m", "TextError", "bad")
    assert str(error) == "a.tar: sample k\\x1b[31m, bad"
    assert error.key == "k\x1b[31m"


def test_indexes_in_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.source.MAX_INDEXES", 2)
    source = write_source(tmp_path, [members(i, "t") for i in range(5)], per_shard=1)
    for i in (0, 1, 2, 0, 3, 4, 1):
        assert source.sample(i, 0).key == f"k{i}"
        assert len(source._lines) <= 2


@pytest.fixture
def few_files() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * len(os.listdir("/proc/self/fd")) + 100, limits[1]))  # noqa: PTH208
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
@pytest.mark.usefixtures("few_files")
def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    source = write_source(tmp_path, [members(i, "t") for i in range(150)], per_shard=1)
    assert source.labels("number") == list(range(150))
    assert [source.metadata(i % 150, 0)["number"] for i in range(0, 1500, 7)] == [i % 150 for i in range(0, 1500, 7)]


def test_the_fingerprint_sees_content_names_and_order(tmp_path: Path, source: Source) -> None:
    assert Source(source.shards, "other").fingerprint == source.fingerprint
    shard = source.shards[0]
    others = [
        source.shards[::-1],
        source.shards[1:],
        [shard._replace(sha256="0" * 64), *source.shards[1:]],
        [shard._replace(location=str(Path(shard.location).with_name("other.tar"))), *source.shards[1:]],
    ]
    assert len({Source(shards).fingerprint for shards in [source.shards, *others]}) == 5
    moved = [shard._replace(location=str(tmp_path / Path(shard.location).name)) for shard in source.shards]
    assert Source(moved).fingerprint == source.fingerprint  # a copy elsewhere is the same data

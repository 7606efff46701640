import itertools
import os
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import data.stream
from data.batch import Batch
from data.decode import MODALITIES
from data.order import Order
from data.stream import DataConfig, Source, Stream, StreamError, random_state
from data.transforms import AudioView, ImageView, TextView, Views
from tests.samples import CAPTIONS, members, tokenizer, write_source

AUGMENTED = Views(
    image=ImageView(size=8, crop_scale=0.5, flip=True),
    text=TextView(max_tokens=30),
    audio=AudioView(frames=12, mels=16, speed=0.1, shift=0.02, noise=0.3, gain=6.0),
)
SUBSETS = ["ita", "it", "a", "t", "ia", "", "i", "ta", "ita", "it"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Ten samples in four shards, with every subset of the modalities."""
    return write_source(tmp_path_factory.mktemp("source"), [members(i, subset) for i, subset in enumerate(SUBSETS)])


def training(source: Source, start: int = 0, seed: int = 3, views: Views = AUGMENTED, batch_size: int = 4) -> Stream:
    order = Order([len(shard.samples) for shard in source.shards], seed, window=2)
    return Stream(source, views, tokenizer(), batch_size, order, start)


def evaluation(source: Source, views: Views = AUGMENTED, batch_size: int = 4) -> Stream:
    return Stream(source, views, tokenizer(), batch_size)


def first(batches: Any, count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def rows(batches: list[Batch]) -> list[tuple[str, dict[str, Any]]]:
    """Key and values of every row; of text and sound only what is no padding."""
    found = []
    for batch in batches:
        for row, key in enumerate(batch.keys):
            values = {}
            for name, field in batch.fields.items():
                for i in (field.rows == row).nonzero()[:, 0]:
                    value = field.x[i] if field.valid is None else field.x[i][field.valid[i]]
                    values[name] = value.tolist()
            found.append((key, values))
    return found


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x.keys, x.size, list(x.fields)) == (y.keys, y.size, list(y.fields))
        for name in x.fields:
            for part, other in zip(x.fields[name], y.fields[name], strict=True):
                assert (part is None) == (other is None)
                if part is not None and other is not None:
                    assert part.dtype == other.dtype
                    assert torch.equal(part, other)


def test_a_worker_process_gives_the_same_batches(source: Source) -> None:
    here = first(training(source).batches(workers=0), 6)
    assert_equal(here, first(training(source).batches(workers=1), 6))
    assert_equal(here, first(training(source), 6))


def test_the_evaluation_pass_ends_with_a_worker_too(source: Source) -> None:
    assert_equal(list(evaluation(source).batches(workers=0)), list(evaluation(source).batches(workers=1)))


def test_starting_at_a_position_equals_skipping_to_it(source: Source) -> None:
    whole = first(training(source), 8)
    assert_equal(whole[3:], first(training(source, start=12), 5))
    assert rows(whole)[5:29] == rows(first(training(source, start=5), 6))  # not a multiple of the batch size
    assert_equal(whole, first(training(source), 8))


def test_batches_hold_the_positions_of_the_order(source: Source) -> None:
    stream = training(source, start=7)
    assert stream.order is not None
    keys = [key for batch in first(stream, 6) for key in batch.keys]
    places = [stream.order.at(position) for position in range(7, 31)]
    assert keys == [source.shards[place.shard].samples[place.sample].key for place in places]
    assert [batch.size for batch in first(stream, 6)] == [4] * 6


def test_fields_hold_only_the_samples_that_have_them(source: Source) -> None:
    (batch,) = evaluation(source, batch_size=20)
    assert (batch.size, batch.keys) == (10, [f"k{i}" for i in range(10)])
    assert list(batch.fields) == ["image", "text", "audio"]
    for name, field in batch.fields.items():
        assert field.rows.tolist() == [row for row, subset in enumerate(SUBSETS) if name[0] in subset]
        assert field.rows.dtype == torch.int64
        assert len(field.x) == len(field.rows)
    for row, text in zip(batch.fields["text"].rows.tolist(), batch.fields["text"].x, strict=True):
        assert tokenizer().decode(text, skip_special_tokens=True) == f" {CAPTIONS[row % len(CAPTIONS)]} {row}"


def test_a_modality_that_no_sample_of_a_batch_has_is_absent(source: Source) -> None:
    batches = list(evaluation(source, batch_size=1))
    assert [list(batch.fields) for batch in batches] == [
        [name for name in ("image", "text", "audio") if name[0] in subset] for subset in SUBSETS
    ]
    assert [batch.size for batch in batches] == [1] * 10


def test_values_are_small_integers(source: Source) -> None:
    (batch,) = evaluation(source, batch_size=20)
    image, text, audio = (batch.fields[name] for name in ("image", "text", "audio"))
    assert (image.x.dtype, image.x.shape, image.valid) == (torch.uint8, (6, 3, 8, 8), None)
    assert text.x.dtype == torch.int64
    assert text.valid is not None
    assert torch.equal(text.valid, text.x != tokenizer().pad_token_id)
    assert text.x.shape == text.valid.shape
    assert (audio.x.dtype, audio.x.shape) == (torch.int16, (5, 400 + 11 * 160))
    assert audio.valid is not None
    lengths = [min(1000 + 100 * row, 400 + 11 * 160) for row in audio.rows.tolist()]
    assert audio.valid.sum(dim=1).tolist() == lengths
    assert not audio.x[~audio.valid].any()


def test_the_evaluation_pass_has_each_sample_once_in_the_order_of_the_shards(source: Source) -> None:
    batches = list(evaluation(source))
    assert [batch.keys for batch in batches] == [["k0", "k1", "k2", "k3"], ["k4", "k5", "k6", "k7"], ["k8", "k9"]]
    assert [batch.size for batch in batches] == [4, 4, 2]
    assert_equal(batches, list(evaluation(source)))
    assert rows(batches) == rows(list(evaluation(source, batch_size=3)))
    assert len(source) == 10


def test_the_evaluation_pass_is_not_augmented(source: Source) -> None:
    plain = Views(ImageView(size=8), TextView(max_tokens=30), AudioView(frames=12, mels=16))
    assert_equal(list(evaluation(source)), list(evaluation(source, plain)))


def epoch(source: Source, number: int, seed: int = 3, batch_size: int = 5) -> dict[str, dict[str, Any]]:
    return dict(rows(first(training(source, 10 * number, seed, batch_size=batch_size), 10 // batch_size)))


def test_augmentation_depends_on_seed_epoch_and_key_alone(tmp_path: Path, source: Source) -> None:
    again = epoch(source, 1)
    assert epoch(source, 1, batch_size=2) == again
    # The same samples cut into other shards come in another order, and look the same.
    recut = write_source(tmp_path, [members(i, subset) for i, subset in enumerate(SUBSETS)], per_shard=4)
    assert epoch(recut, 1) == again

    assert set(again) == {f"k{i}" for i in range(10)}
    for other in (epoch(source, 2), epoch(source, 1, seed=4)):
        for key, subset in zip(again, map(SUBSETS.__getitem__, (int(key[1:]) for key in again)), strict=True):
            for name in ("image", "audio"):
                assert (again[key].get(name) != other[key].get(name)) == (name[0] in subset)
            assert again[key].get("text") == other[key].get("text")


def test_samples_of_one_epoch_have_random_numbers_of_their_own() -> None:
    states = [(0, 0, "a"), (0, 0, "b"), (0, 1, "a"), (1, 0, "a"), (1, 1, "a"), (11, 1, "a"), (1, 11, "a")]
    assert len({random_state(*state).random() for state in states}) == len(states)
    assert random_state(1, 2, "größe").random() == random_state(1, 2, "größe").random()


def test_augmentation_never_changes() -> None:
    # Checkpoints rely on it, as they do on the order.
    assert random_state(7, 1, "k3").integers(1000, size=5).tolist() == [264, 772, 989, 129, 906]


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_other_members_are_never_decoded(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    names = ("pkl", "pickle", "pyd", "pth", "npy", "cls", "seg.png", "mp4", "gz")
    sample = {**members(0, "t"), **dict.fromkeys(names, bomb)}
    (batch,) = evaluation(write_source(tmp_path / "shards", [sample]))
    assert list(batch.fields) == ["text"]
    assert not (tmp_path / "exploded").exists()
    assert set(MODALITIES) == {"jpg", "jpeg", "png", "webp", "txt", "wav", "flac", "ogg"}


def test_modalities_that_are_not_used_are_not_decoded(tmp_path: Path) -> None:
    source = write_source(tmp_path, [{**members(0, "it"), "flac": b"broken"}])
    (batch,) = evaluation(source, Views(audio=None))
    assert list(batch.fields) == ["image", "text"]


@pytest.mark.parametrize(
    ("extension", "content"), [("png", b"\x89PNG"), ("txt", b"\xff"), ("flac", b"fLaC"), ("wav", b""), ("jpeg", b"x")]
)
def test_a_damaged_member_is_named_with_shard_and_key(tmp_path: Path, extension: str, content: bytes) -> None:
    source = write_source(tmp_path, [members(0, "a"), {"json": b"{}", extension: content}])
    with pytest.raises(StreamError) as error:
        list(evaluation(source))
    assert str(tmp_path / "train-00000.tar") in str(error.value)
    assert f"sample k1, member .{extension}: " in str(error.value)


def test_a_damaged_member_stops_a_worker_with_the_same_error(tmp_path: Path) -> None:
    source = write_source(tmp_path, [{"txt": b"\xff"}])
    with pytest.raises(StreamError) as here:
        list(evaluation(source).batches(workers=0))
    with pytest.raises(StreamError) as there:
        list(evaluation(source).batches(workers=1))
    assert "sample k0, member .txt: text is not UTF-8" in str(here.value)
    assert str(there.value) == str(here.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanished_is_named(tmp_path: Path, workers: int) -> None:
    source = write_source(tmp_path, [members(0, "t")])
    (tmp_path / "train-00000.tar").unlink()
    with pytest.raises(StreamError, match=r"^\S*train-00000\.tar: sample k0 can't be read: No such file"):
        list(evaluation(source).batches(workers=workers))


def test_a_shard_that_became_shorter_is_named(tmp_path: Path) -> None:
    source = write_source(tmp_path, [members(0, "t"), members(1, "t")])
    offset, size = source.shards[0].samples[1].members["txt"]
    with (tmp_path / "train-00000.tar").open("r+b") as file:
        file.truncate(offset + 2)
    with pytest.raises(StreamError, match=rf"sample k1, member \.txt: 2 of {size} bytes"):
        list(evaluation(source))


def test_two_members_of_one_modality_are_refused(tmp_path: Path) -> None:
    sample = members(0)
    source = write_source(tmp_path, [{**sample, "webp": sample["png"]}])
    with pytest.raises(StreamError, match=r"train-00000\.tar: sample k0 has more than one image member: .*webp"):
        source.members(0, 0, ("image",))
    assert source.members(0, 0, ("text",)) == {"text": "a cat 0"}


def test_labels_are_in_the_order_of_the_shards(source: Source) -> None:
    assert source.labels("number") == list(range(10))


def test_a_missing_label_is_named_with_what_there_is(tmp_path: Path) -> None:
    source = write_source(tmp_path, [{"json": b'{"label": 1}'}, {"json": b'{"b": 1, "a": 2}'}, {"txt": b"x"}])
    with pytest.raises(StreamError, match=r"train-00000\.tar: sample k1 has no 'label' in its \.json; it has: a, b$"):
        source.labels("label")
    with pytest.raises(StreamError, match=r"sample k2 has no 'label' in its \.json; it has: nothing$"):
        Source([source.shards[0]._replace(samples=source.shards[0].samples[2:])]).labels("label")


def test_damaged_metadata_is_named(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"sample k0, member \.json: metadata is a JSON list"):
        write_source(tmp_path, [{"json": b"[]"}]).metadata(0, 0)


def test_captions_are_those_of_the_first_samples_that_have_one(source: Source) -> None:
    captions = [f"{CAPTIONS[i % 6]} {i}" for i, subset in enumerate(SUBSETS) if "t" in subset]
    assert list(source.captions(4)) == captions[:4]
    assert list(source.captions(100)) == captions
    assert list(source.captions(0)) == []


def test_a_pickled_source_has_no_open_files(tmp_path: Path) -> None:
    source = write_source(tmp_path, [members(0, "t")])
    source.metadata(0, 0)
    assert source._files
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert copy._files == {}
    assert source._files
    assert copy.metadata(0, 0) == source.metadata(0, 0)


def test_a_stream_travels_to_another_process(source: Source) -> None:
    # Where worker processes are not forked (macOS, Windows, Python 3.14), the stream is pickled.
    stream = training(source)
    before = first(stream, 3)
    assert_equal(before, first(pickle.loads(pickle.dumps(stream)), 3))  # noqa: S301


@pytest.fixture
def few_files() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, limits[1]))  # noqa: PTH208
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
@pytest.mark.usefixtures("few_files")
def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    shards = write_source(tmp_path, [members(i) for i in range(3)]).shards * 150
    source = Source(shards)
    assert source.labels("number") == [0, 1, 2] * 150
    assert [source.metadata(i % 150, 1)["number"] for i in range(0, 1500, 7)] == [1] * 215


def test_the_fingerprint_sees_content_names_and_order(tmp_path: Path, source: Source) -> None:
    assert Source(source.shards).fingerprint == source.fingerprint
    shard = source.shards[0]
    others = [
        source.shards[::-1],
        source.shards[1:],
        [shard._replace(sha256="0" * 64), *source.shards[1:]],
        [shard._replace(path=shard.path.with_name("other.tar")), *source.shards[1:]],
    ]
    assert len({Source(shards).fingerprint for shards in [source.shards, *others]}) == 5
    moved = [shard._replace(path=tmp_path / shard.path.name) for shard in source.shards]
    assert Source(moved).fingerprint == source.fingerprint  # a copy elsewhere is the same data


def test_collate_keeps_rows_of_the_batch() -> None:
    sound = np.zeros(5, dtype=np.int16)
    samples = [data.stream.Sample("a", {}), data.stream.Sample("b", {"audio": sound, "text": "a dog"})]
    batch = data.stream.collate(samples, AUGMENTED, tokenizer())
    assert (batch.size, batch.keys, list(batch.fields)) == (2, ["a", "b"], ["text", "audio"])
    assert [field.rows.tolist() for field in batch.fields.values()] == [[1], [1]]
    assert data.stream.collate(samples[:1], AUGMENTED, tokenizer()) == Batch({}, 1, ["a"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embedded": "cats"}, r"data\.embedded=cats: allowed are digits"),
        ({"workers": 2}, r"data\.workers=2: allowed are 0 and 1"),
        ({"views": Views(None, None, None)}, r"data\.views has no modality"),
    ],
)
def test_settings_out_of_bounds_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)

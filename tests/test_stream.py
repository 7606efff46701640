"""The same batches for any number of ranks and workers, damaged samples or not, and across stops."""

import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from data.batch import Batch
from data.decode import DECODERS
from data.errors import UserError
from data.skips import Skipped, Skips, StreamError
from data.source import Source
from data.stream import DataConfig, SourceConfig, Stream, open_train, random_seed
from data.transforms import AudioView, ImageView, TextView, Views
from tests.samples import members, tokenizer, write_source

VIEWS = Views(
    image=ImageView(size=8, crop_scale=0.5, flip=True),
    text=TextView(max_tokens=30),
    audio=AudioView(frames=12, mels=16, speed=0.1, shift=0.02, noise=0.3, gain=6.0),
)
PAIRS = [(1, 0), (1, 2), (2, 1), (2, 2), (4, 0), (3, 2)]  # of ranks and workers
BATCH = 12
SUBSETS = ["ita", "it", "a", "t", "ia", "i", "ta"]
DAMAGE: list[tuple[str, bytes, str]] = [
    ("png", b"\x89PNG", "ImageError"),
    ("txt", b"\xff", "TextError"),
    ("wav", b"RIFF", "AudioError"),
    ("txt", b"", "EmptyError"),
    ("jpg", b"x", "AmbiguousModalityError"),
]


def write_damaged(folder: Path, count: int, every: int = 33, **settings: Any) -> Source:
    """A source in which 3 % of the samples can't be used, two of them side by side."""
    samples = []
    for i in range(count):
        sample = members(i, SUBSETS[i % len(SUBSETS)] if i % every > 1 else "ita")
        if i % every == 0 or i == 1:
            extension, content, _ = DAMAGE[i // every % len(DAMAGE)]
            sample[extension] = content
        samples.append(sample)
    return write_source(folder, samples, per_shard=17, **settings)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """100 samples in 6 shards, of which 5 are damaged."""
    return write_damaged(tmp_path_factory.mktemp("damaged"), 100)


def stream(source: Source | list[Source], rank: int = 0, world: int = 1, **settings: Any) -> Stream:
    sources = source if isinstance(source, list) else [source]
    seed, batch_size = settings.pop("seed", 3), settings.pop("batch_size", BATCH)
    settings = {"workers": 0, "max_bad_fraction": 1.0, "views": VIEWS, **settings}
    config = DataConfig(**settings)
    return Stream(sources, config, tokenizer(), seed=seed, batch_size=batch_size, rank=rank, world=world)


class Step(NamedTuple):
    """A global batch: what is compared."""

    keys: list[str]
    rows: list[dict[str, Any]]
    seeds: list[int]
    skipped: list[Any]


def values(batch: Batch) -> list[dict[str, Any]]:
    """Modality -> bytes of every row; of text and sound only what is no padding."""
    found: list[dict[str, Any]] = [{} for _ in range(batch.size)]
    for name, field in batch.fields.items():
        for i, row in enumerate(field.rows.tolist()):
            value = field.x[i] if field.valid is None else field.x[i][field.valid[i]]
            found[row][name] = value.contiguous().numpy().tobytes()
    return found


def steps(
    source: Source | list[Source], count: int, world: int = 1, workers: int = 0, state: Any = None, **settings: Any
) -> list[Step]:
    """Global batches, put together from all ranks."""
    parts = []
    for rank in range(world):
        made = stream(source, rank, world, workers=workers, **settings)
        if state is not None:
            made.load_state_dict(state)
        parts.append(list(itertools.islice(made.batches(), count)))
    return [
        Step(
            [key for batch in batches for key in batch.keys],
            [row for batch in batches for row in values(batch)],
            [seed for batch in batches for seed in batch.seeds.tolist()],
            sorted(skip for batch in batches for skip in batch.skipped),
        )
        for batches in zip(*parts, strict=True)
    ]


@pytest.fixture(scope="module")
def reference(source: Source) -> list[Step]:
    return steps(source, 20)


@pytest.mark.parametrize(("world", "workers"), PAIRS)
def test_ranks_and_workers_make_no_difference(source: Source, reference: list[Step], world: int, workers: int) -> None:
    assert steps(source, 20, world, workers) == reference


@pytest.mark.parametrize("stop", [1, 4, 9])
@pytest.mark.parametrize(("before", "after"), list(zip(PAIRS, PAIRS[1:] + PAIRS[:1], strict=True)))
def test_a_stop_and_a_start_with_others_make_no_difference(
    source: Source, reference: list[Step], before: tuple[int, int], after: tuple[int, int], stop: int
) -> None:
    first = stream(source, 0, before[0], workers=before[1])
    for _ in itertools.islice(first.batches(), stop):
        pass
    state = json.loads(json.dumps(first.state_dict()))
    assert steps(source, 12 - stop, *after, state=state) == reference[stop:12]


def test_every_sample_comes_once_per_epoch_but_the_damaged(source: Source, reference: list[Step]) -> None:
    # 100 samples of batches of 12: the first 8 batches are within the first epoch.
    keys = [key for step in reference[:8] for key in step.keys]
    skipped = {skip.key for step in reference[:8] for skip in step.skipped}
    good = [key for key in keys if keys.count(key) == 1]
    # A damaged sample's row holds a second time what follows in its lane, at most one row further.
    assert len(keys) - len(set(keys)) <= len(skipped)
    assert not skipped & set(keys)
    assert len(set(good)) >= 96 - 2 * len(skipped)


def test_replacing_moves_no_other_row(tmp_path: Path, source: Source, reference: list[Step]) -> None:
    clean = write_source(tmp_path, [members(i, SUBSETS[i % len(SUBSETS)]) for i in range(100)], per_shard=17)
    intact = steps(clean, 20)
    damaged = {f"k{i}" for i in (0, 1, 33, 66, 99)}
    for ours, theirs in zip(reference, intact, strict=True):
        for key, other in zip(ours.keys, theirs.keys, strict=True):
            assert (key != other) == (other in damaged)
            assert key not in damaged


def test_what_was_skipped_is_named_once_for_its_row(source: Source, reference: list[Step]) -> None:
    skips = [skip for step in reference[:17] for skip in step.skipped]  # two epochs and a bit
    assert {(skip.key, skip.error) for skip in skips} == {
        ("k0", "ImageError"),
        ("k1", "ImageError"),
        ("k33", "TextError"),
        ("k66", "AudioError"),
        ("k99", "EmptyError"),
    }
    assert all(skip.source == "train" and skip.shard.endswith(".tar") and skip.key in skip.message for skip in skips)
    assert 10 <= len(skips) <= 15


def mixture(folder: Path) -> list[Source]:
    """Three sources of different modalities, of which the last one ends."""
    return [
        write_damaged(folder / "a", 60, name="a", weight=3),
        write_source(folder / "b", [members(100 + i, "it") for i in range(20)], 4, name="b", weight=2),
        write_source(folder / "c", [members(200 + i, "a") for i in range(9)], 4, name="c", weight=1, max_epochs=2),
    ]


@pytest.mark.parametrize("batching", ["mixed", "homogeneous"])
def test_mixtures_too(tmp_path: Path, batching: str) -> None:
    sources = mixture(tmp_path)
    expected = steps(sources, 9, batching=batching)
    for world, workers in PAIRS[1:]:
        assert steps(sources, 9, world, workers, batching=batching) == expected
    state = stream(sources, batching=batching).state_dict() | {"step": 5}
    assert steps(sources, 4, 2, 1, state=state, batching=batching) == expected[5:]


def test_homogeneous_batches_have_the_modalities_of_one_source(tmp_path: Path) -> None:
    sources = mixture(tmp_path)[1:]
    names = [frozenset(name for row in step.rows for name in row) for step in steps(sources, 6, batching="homogeneous")]
    assert set(names) == {frozenset({"image", "text"}), frozenset({"audio"})}


def test_fields_hold_only_the_samples_that_have_them(source: Source) -> None:
    batch = next(iter(stream(source)))
    assert (batch.size, len(batch.keys)) == (BATCH, BATCH)
    for name, field in batch.fields.items():
        having = [row for row, key in enumerate(batch.keys) if name[0] in (SUBSETS[int(key[1:]) % len(SUBSETS)])]
        assert field.rows.tolist() == having
        assert len(field.x) == len(having)
    assert batch.seeds is not None
    assert (batch.seeds.dtype, batch.seeds.shape) == (torch.int64, (BATCH,))


def test_samples_without_a_required_modality_are_replaced(tmp_path: Path) -> None:
    source = write_source(tmp_path, [members(i, "it" if i % 4 else "t") for i in range(24)], require=["image", "text"])
    skips: list[Skipped] = []
    for batch in itertools.islice(stream(source).batches(), 4):
        assert set(batch.fields) == {"image", "text"}
        assert len(batch.fields["image"].rows) == len(batch.fields["text"].rows) == BATCH
        skips += batch.skipped
    assert {skip.error for skip in skips} == {"MissingModalityError"}
    assert all("no image" in skip.message for skip in skips)


def test_samples_without_any_modality_in_use_are_replaced(tmp_path: Path) -> None:
    source = write_source(tmp_path, [members(i, "it" if i else "a") for i in range(12)])
    made = stream(source, views=Views(ImageView(size=8), TextView(), None))
    batch = next(made.batches())
    assert [(skip.key, skip.error) for skip in batch.skipped] == [("k0", "MissingModalityError")]
    assert len(batch.fields["image"].rows) == BATCH


def test_seeds_depend_on_seed_pass_source_epoch_and_key() -> None:
    states = [
        (0, 0, "s", 0, "a"),
        (1, 0, "s", 0, "a"),
        (0, 1, "s", 0, "a"),
        (0, 0, "t", 0, "a"),
        (0, 0, "s", 1, "a"),
        (0, 0, "s", 0, "b"),
    ]
    made = [random_seed(*state) for state in states]
    assert len(set(made)) == len(states)
    assert all(0 <= seed < 2**63 for seed in made)


def test_augmentation_never_changes() -> None:
    # Checkpoints rely on it, as they do on the order.
    assert random_seed(7, 0, "train", 1, "k3") == 9010739498279130188


def test_the_same_sample_looks_different_in_the_next_epoch(tmp_path: Path) -> None:
    source = write_source(tmp_path, [members(i) for i in range(BATCH)])
    first, second = steps(source, 2)
    assert sorted(first.keys) == sorted(second.keys)
    assert not set(first.seeds) & set(second.seeds)
    again = dict(zip(second.keys, second.rows, strict=True))
    sounds = [row["audio"] != again[key]["audio"] for key, row in zip(first.keys, first.rows, strict=True)]
    assert sum(sounds) > BATCH // 2  # the speed is drawn in whole per cents, so it may be the same


def test_it_travels_to_another_process(source: Source) -> None:
    # Where worker processes are not forked (macOS, Windows, Python 3.14), the stream is pickled.
    made = stream(source)
    before = next(iter(made))
    after = next(iter(pickle.loads(pickle.dumps(made))))  # noqa: S301
    assert values(before) == values(after)


def test_a_stream_of_limited_epochs_ends(tmp_path: Path) -> None:
    source = write_source(tmp_path, [members(i, "t") for i in range(30)], max_epochs=2)
    for workers in (0, 2):
        made = stream(source, workers=workers)
        keys = [key for batch in made.batches() for key in batch.keys]
        assert made.steps == made.step == 5
        assert len(keys) == 60
        assert set(keys) == {f"k{i}" for i in range(30)}


# State


def changed_settings(tmp_path: Path, source: Source) -> list[tuple[dict[str, Any], str]]:
    other = write_source(tmp_path / "other", [members(i, "t") for i in range(30)])
    return [
        ({"seed": 4}, r"seed: 3 then, 4 now"),
        ({"batch_size": 24}, r"train\.batch_size: 12 then, 24 now"),
        ({"window": 2}, r"data\.window: 64 then, 2 now"),
        ({"lanes": 6}, r"data\.lanes: 12 then, 6 now"),
        ({"batching": "homogeneous"}, r"data\.batching: mixed then, homogeneous now"),
        ({"source": other}, r"data\.train\.train\.samples: 100 in 6 shards, sha256 \w+ then, 30 in 10 shards"),
        ({"source": [source, Source(other.shards, "new")]}, r"data\.train\.new\.samples: None then, 30 in 10 shards"),
        ({"source": Source(source.shards, weight=2)}, r"data\.train\.train\.weight: None then, 2 now"),
        (
            {"source": Source(source.shards, require=["text"])},
            r"data\.train\.train\.require: \[\] then, \['text'\] now",
        ),
    ]


def test_other_data_are_refused_with_what_changed(tmp_path: Path, source: Source) -> None:
    state = stream(source).state_dict()
    for settings, message in changed_settings(tmp_path, source):
        chosen = settings.pop("source", source)
        with pytest.raises(StreamError, match=message) as error:
            stream(chosen, **settings).load_state_dict(state)
        assert "data.allow_changed=true" in str(error.value)


def test_changed_data_begin_a_new_pass_when_allowed(tmp_path: Path, source: Source) -> None:
    first = stream(source)
    old = [batch.keys for batch in itertools.islice(first.batches(), 7)]
    grown = [source, write_source(tmp_path, [members(i, "t") for i in range(30)], name="new")]
    second = stream(grown, allow_changed=True)
    assert [line.split(":")[0] for line in second.load_state_dict(first.state_dict())] == [
        "data.train",
        "data.train.new.require",
        "data.train.new.samples",
    ]
    assert (second.step, second.begun, second.run_pass) == (7, 7, 1)
    new = [batch.keys for batch in itertools.islice(second.batches(), 4)]
    # Stopped and resumed again, it goes on in the new pass.
    third = stream(grown, 1, 3)
    assert third.load_state_dict(json.loads(json.dumps(second.state_dict()))) == []
    assert third.step == 11
    state = second.state_dict() | {"step": 7}
    assert [step.keys for step in steps(grown, 4, 3, 0, state=state)] == new
    assert new[0] != old[0]


def test_a_pass_begun_anew_is_shuffled_anew(source: Source) -> None:
    first = stream(source)
    keys = next(first.batches()).keys
    second = stream(source, window=63, allow_changed=True)  # changes nothing of six shards but the fingerprint
    second.load_state_dict(first.state_dict())
    assert next(second.batches()).keys != keys


def test_moved_shards_are_the_same_data(tmp_path: Path, source: Source) -> None:
    moved = Source([shard._replace(location=str(tmp_path / Path(shard.location).name)) for shard in source.shards])
    assert stream(moved).load_state_dict(stream(source).state_dict()) == []


def test_a_stream_goes_on_from_what_was_saved(tmp_path: Path, source: Source, reference: list[Step]) -> None:
    first = stream(source)
    for _ in itertools.islice(first.batches(), 3):
        pass
    first.save(tmp_path)
    assert json.loads((tmp_path / "stream.json").read_text())["step"] == 3
    second = stream(source)
    assert second.load(tmp_path) == []
    assert [batch.keys for batch in itertools.islice(second.batches(), 3)] == [step.keys for step in reference[3:6]]
    assert second.skips.total == sum(len(step.skipped) for step in reference[:6])


def test_states_that_are_none_are_named(tmp_path: Path, source: Source) -> None:
    with pytest.raises(StreamError, match=r"stream\.json: no such file"):
        stream(source).load(tmp_path)
    for text in ("{", "[]", "{}", '{"schema": 9}', '{"schema": 1}'):
        (tmp_path / "stream.json").write_text(text)
        with pytest.raises(StreamError, match=r"stream\.json"):
            stream(source).load(tmp_path)


def test_the_state_is_small(source: Source) -> None:
    assert len(json.dumps(stream(source).state_dict())) < 1000


# Too much damage


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    source = write_source(tmp_path, [members(i, "t") if i % 3 else {"txt": b"\xff"} for i in range(240)])
    made = stream(source, max_bad_fraction=0.05)
    seen = 0
    with pytest.raises(StreamError) as error:
        for batch in made.batches():
            seen += batch.size
    # Counted as if 1,000 rows had been read, 50 may be bad.
    assert 100 < seen < 200
    message = str(error.value)
    assert "data.max_bad_fraction=0.05" in message
    assert "TextError" in message
    assert "train-000" in message
    assert "python -m data validate" in message


def test_with_a_fraction_of_zero_the_first_stops(tmp_path: Path) -> None:
    source = write_source(tmp_path, [members(i, "t") for i in range(11)] + [{"txt": b"\xff"}])
    with pytest.raises(StreamError, match="1 of 12 rows could not be used"):
        next(stream(source, max_bad_fraction=0.0).batches())


def test_bad_samples_keep_nothing_of_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path, [{"txt": b"\xff" * 50}, *({"txt": b"a cat"} for _ in range(11))])
    made, decoded = stream(source), 0
    decode = DECODERS["text"]

    def counting(data: bytes, training: bool) -> Any:
        nonlocal decoded
        decoded += data.startswith(b"\xff")
        return decode(data)

    monkeypatch.setattr(made.views["text"], "decode", counting)
    for step in range(20):
        made.batch(step)
    assert decoded == 1  # what is known to be bad is not decoded again
    assert not any(isinstance(held, BaseException | bytes) for bad in made._bad.values() for held in bad)


def test_samples_of_an_equal_field_are_of_one_group(tmp_path: Path) -> None:
    labels = [3, "3", 3, None, {"a": 1, "b": 2}, {"b": 2, "a": 1}, 4, "absent"]
    made = [
        {"txt": b"a cat"} if label == "absent" else {"txt": b"a cat", "json": json.dumps({"label": label}).encode()}
        for label in labels
    ]
    source = write_source(tmp_path, made)
    for workers in (0, 1):
        batch = next(stream(source, workers=workers, batch_size=8, group="label").batches())
        assert batch.groups is not None
        groups = dict(zip(batch.keys, batch.groups.tolist(), strict=True))
        by_number = [groups[f"k{i}"] for i in range(8)]
        assert by_number[0] == by_number[2]
        assert by_number[4] == by_number[5]
        assert by_number[3] == by_number[7] == -1
        assert len({*by_number}) == 5
    assert next(stream(source, batch_size=8).batches()).groups is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_of_nothing_but_damage_ends_with_an_error(tmp_path: Path, workers: int) -> None:
    source = write_source(tmp_path, [{"txt": b"\xff"}, {"txt": b""}])
    with pytest.raises(
        StreamError, match=r"3 samples in a row can't be used, the last one: \S*train-00000\.tar: sample k"
    ):
        next(stream(source, workers=workers).batches())


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_shard_that_vanishes_during_a_run_is_named(tmp_path: Path, workers: int) -> None:
    source = write_source(tmp_path, [members(i, "t") for i in range(24)], per_shard=12)
    Path(source.shards[1].location).unlink()
    with pytest.raises(UserError, match=r"train-00001\.tar"):
        list(itertools.islice(stream(source, workers=workers).batches(), 2))


def test_beyond_so_many_samples_skips_are_counted_without_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.skips.MAX_KEYS", 3)
    skips = Skips()
    skips.add([Skipped("a", "a.tar", f"k{i}", "TextError", "bad") for i in (0, 1, 2, 3, 4, 0)], 100)
    again = Skips()
    again.restore(json.loads(json.dumps(skips.state())))
    for counted in (skips, again):
        assert counted.total == 6
        assert counted.table() == "  a  a.tar  TextError  6 times in more than 3 samples, such as k0"


RANKS = """
import itertools, sys
import torch.distributed as dist
from pathlib import Path
from data.decode import DECODERS
from data.index import find_shards, load_shards
from data.skips import StreamError
from data.source import Source
from data.stream import DataConfig, Stream
from data.transforms import TextView, Views
from tests.samples import tokenizer

folder, rank, fraction, workers = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
config = DataConfig(views=Views(None, TextView(), None), max_bad_fraction=fraction, workers=workers)
sources = [Source(load_shards(find_shards([f"{folder}/train-*.tar"])))]
stream = Stream(sources, config, tokenizer(), seed=0, batch_size=12, rank=rank, world=2)
try:
    for batch in itertools.islice(stream.batches(), 8):
        pass
except StreamError as error:
    print("stopped", stream.step, error)
else:
    print("done", stream.state_dict()["skipped"])
dist.barrier()
dist.destroy_process_group()
"""


def both_ranks(folder: Path, script: str, *arguments: float) -> list[str]:
    (folder / "meet").unlink(missing_ok=True)
    root = Path(__file__).parents[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder), str(rank), *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return outputs


def test_all_ranks_count_alike_and_stop_together(tmp_path: Path) -> None:
    write_source(tmp_path, [members(i, "t") if i % 8 else {"txt": b"\xff"} for i in range(96)], per_shard=12)
    counted, other = both_ranks(tmp_path, RANKS, 1.0, 0)
    assert counted == other
    assert counted.startswith("done")
    assert counted.count("TextError") == 12  # all, whichever rank met them

    stopped, other = both_ranks(tmp_path, RANKS, 0.005, 1)
    assert stopped == other
    assert stopped.startswith("stopped")
    assert "data.max_bad_fraction=0.005" in stopped


KILLED = """
import multiprocessing, sys
import torch.distributed as dist
from data.index import find_shards, load_shards
from data.skips import StreamError
from data.source import Source
from data.stream import DataConfig, Stream
from data.transforms import TextView, Views
from tests.samples import tokenizer

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
sources = [Source(load_shards(find_shards([f"{folder}/train-*.tar"])))]
stream = Stream(sources, DataConfig(views=Views(None, TextView(), None), workers=1), tokenizer(), seed=0, batch_size=12,
                rank=rank, world=2)
try:
    for batch in stream.batches():
        if stream.step == 3 and rank == 1:
            multiprocessing.active_children()[0].kill()
except StreamError as error:
    print(error)
dist.destroy_process_group()
"""


def test_a_killed_worker_stops_all_ranks(tmp_path: Path) -> None:
    write_source(tmp_path, [members(i, "t") for i in range(96)], per_shard=12)
    waiting, failed = both_ranks(tmp_path, KILLED)
    assert waiting == failed
    assert failed.startswith("one of data.workers=1 reading processes died")


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embedded": "cats"}, r"data\.embedded=cats: allowed are digits"),
        ({"workers": -1}, r"data\.workers=-1: allowed is 0 or more"),
        ({"lanes": 0}, r"data\.lanes=0: allowed is 1 or more"),
        ({"window": 0}, r"data\.window=0: allowed is 1 or more"),
        ({"batching": "odd"}, r"data\.batching=odd: allowed are mixed, homogeneous"),
        ({"max_bad_fraction": 1.5}, r"data\.max_bad_fraction=1\.5: allowed is 0 to 1"),
        ({"cache_gb": 0.0}, r"data\.cache_gb=0\.0: allowed is above 0"),
        ({"views": Views(None, None, None)}, r"data\.views has no modality"),
        (
            {"train": {"a": SourceConfig(["a.tar"], weight=1.0), "b": SourceConfig(["b.tar"])}},
            r"give all sources a weight, or none",
        ),
    ],
)
def test_settings_out_of_bounds_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_ranks_that_do_not_share_equally_are_refused(source: Source) -> None:
    with pytest.raises(StreamError, match=r"5 processes can't share data\.lanes=12 .*batch_size=12"):
        stream(source, 0, 5)
    with pytest.raises(UserError, match=r"data\.lanes=5 does not divide train\.batch_size=12"):
        stream(source, lanes=5)


def test_the_order_of_sources_in_a_recipe_changes_nothing(tmp_path: Path) -> None:
    write_source(tmp_path / "a", [members(i, "t") for i in range(12)])
    write_source(tmp_path / "b", [members(20 + i, "t") for i in range(12)])
    keys = []
    for names in ("ab", "ba"):
        config = DataConfig(train={n: SourceConfig([f"{tmp_path}/{n}/*.tar"]) for n in names}, views=VIEWS, workers=0)
        made = Stream(open_train(config), config, tokenizer(), seed=0, batch_size=8)
        keys.append([batch.keys for batch in itertools.islice(made.batches(), 3)])
    assert keys[0] == keys[1]
    swapped = stream([Source(made.sources[1].shards, "b"), Source(made.sources[0].shards, "a")])
    with pytest.raises(StreamError, match=r"data\.train: \['b', 'a'\] then, \['a', 'b'\] now"):
        stream(made.sources).load_state_dict(swapped.state_dict())


def test_rows_of_other_batch_sizes_count_as_they_were(tmp_path: Path) -> None:
    source = write_source(tmp_path, [members(i, "t") for i in range(48)])
    first = stream(source, batch_size=24)
    for _ in itertools.islice(first.batches(), 2):
        pass
    second = stream(source, batch_size=6, allow_changed=True)
    second.load_state_dict(first.state_dict())
    next(second.batches())
    assert second.skips.rows == 54

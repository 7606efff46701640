"""The benchmark of reading: all sides end with the same tensors."""

import itertools
from pathlib import Path

import pytest
import torch

from benchmarks import loader
from benchmarks.loader import WORDS, make, samples
from data.shards import write_shards
from data.text import train_tokenizer

COUNT, SMALL = 24, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shards")
    train_tokenizer([" ".join(WORDS)] * 100, 400).save_pretrained(made / "tokenizer")
    list(write_shards(samples(COUNT), made / "train", max_samples=8))
    return made


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "BATCH", SMALL)


@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_all_sides_read_the_same_samples(folder: Path) -> None:
    plain, streamed = (list(make(name, folder).batches(0)) for name in ("webdataset", "datasets"))
    assert len(plain) == COUNT // SMALL
    for one, other in zip(plain, streamed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    ours = list(make("ours", folder).batches(0))
    assert len(ours) == COUNT // SMALL
    # Ours are shuffled: each of them is the sample that its words and its picture tell.
    known = {
        tuple(ids.tolist()): (x, mel) for x, texts, mels in plain for x, ids, mel in zip(x, texts, mels, strict=True)
    }
    fields = [batch.fields for batch in ours]
    rows = itertools.chain.from_iterable(
        zip(each["text"].x, each["image"].x, each["audio"].x, strict=True) for each in fields
    )
    seen = set()
    for ids, x, mel in rows:
        image, sound = known[tuple(ids.tolist())]
        assert (x - image).abs().mean() < 0.1  # another decoder, another way to make it smaller
        torch.testing.assert_close(mel, sound, atol=1e-3, rtol=1e-3)
        seen.add(tuple(ids.tolist()))
    assert len(seen) == COUNT


def test_without_sounds_none_are_read(folder: Path) -> None:
    batch = next(iter(make("ours, image and text", folder).batches(0)))
    assert list(batch.fields) == ["image", "text"]


def test_ours_reads_as_many_bytes_as_webdataset(folder: Path) -> None:
    shards = loader.shards_in(folder)
    assert loader.read_ours(shards) == loader.read_plain(shards) == COUNT


def test_as_many_samples_as_workers_need(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        loader.main(["--samples", "7"])
    assert "--samples 7: allowed is 8 or more" in capsys.readouterr().err

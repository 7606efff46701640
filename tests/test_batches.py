import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from data.batch import Batch
from data.batches import Pass, Row, collate
from data.decode import Waveform
from data.fetch import FetchError
from data.source import Source
from data.transforms import AudioView, ImageView, TextView, Views
from tests.samples import CAPTIONS, members, noise, tokenizer, write_source

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


def evaluation(source: Source, views: Views = AUGMENTED, batch_size: int = 4) -> Pass:
    return Pass(source, views, tokenizer(), batch_size)


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


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_make_no_difference(source: Source, workers: int) -> None:
    here, there = (
        list(evaluation(source, batch_size=2).batches(0)),
        list(evaluation(source, batch_size=2).batches(workers)),
    )
    assert [batch.keys for batch in there] == [[f"k{2 * i}", f"k{2 * i + 1}"] for i in range(5)]
    assert rows(here) == rows(there)


def test_fields_hold_only_the_samples_that_have_them(source: Source) -> None:
    (batch,) = evaluation(source, batch_size=20)
    assert (batch.size, batch.keys) == (10, [f"k{i}" for i in range(10)])
    assert list(batch.fields) == ["image", "text", "audio"]
    assert batch.seeds is None
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


def test_a_pass_has_each_sample_once_in_the_order_of_the_shards(source: Source) -> None:
    batches = list(evaluation(source))
    assert [batch.keys for batch in batches] == [["k0", "k1", "k2", "k3"], ["k4", "k5", "k6", "k7"], ["k8", "k9"]]
    assert [batch.size for batch in batches] == [4, 4, 2]
    assert rows(batches) == rows(list(evaluation(source, batch_size=3)))


def test_a_pass_is_not_augmented(source: Source) -> None:
    plain = Views(ImageView(size=8), TextView(max_tokens=30), AudioView(frames=12, mels=16))
    assert rows(list(evaluation(source))) == rows(list(evaluation(source, plain)))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_damaged_sample_keeps_its_row_in_a_pass_and_is_named(tmp_path: Path, workers: int) -> None:
    source = write_source(tmp_path, [*(members(i, "t") for i in range(5)), {"txt": b"\xff"}, members(6, "t")])
    batches = list(evaluation(source, batch_size=2).batches(workers))
    assert [key for batch in batches for key in batch.keys] == [f"k{i}" for i in range(7)]
    assert [batch.fields["text"].rows.tolist() for batch in batches] == [[0, 1], [0, 1], [0], [0]]
    ((skip,),) = (batch.skipped for batch in batches if batch.skipped)
    assert (skip.key, skip.error, skip.shard) == ("k5", "TextError", str(tmp_path / "train-00001.tar"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanished_stops_a_pass(tmp_path: Path, workers: int) -> None:
    source = write_source(tmp_path, [members(i, "t") for i in range(6)])
    Path(source.shards[1].location).unlink()
    with pytest.raises(FetchError, match=r"train-00001\.tar: no such file"):
        list(evaluation(source, batch_size=2).batches(workers))


def test_collate_keeps_rows_of_the_batch() -> None:
    sound = Waveform(noise(800), 16_000)
    given = [Row("a", {}), Row("b", {"audio": sound, "text": "a dog"})]
    batch = collate(given, 2, AUGMENTED, tokenizer(), training=False)
    assert (batch.size, batch.keys, list(batch.fields)) == (2, ["a", "b"], ["text", "audio"])
    assert [field.rows.tolist() for field in batch.fields.values()] == [[1], [1]]
    assert collate(given[:1], 1, AUGMENTED, tokenizer(), training=False) == Batch({}, 1, ["a"])


ENDS_BADLY = """
import os, signal
from multiprocessing import active_children
from torch.utils.data import IterableDataset
from data.batches import read_ahead

class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield 0

items = read_ahead(Endless(), 1)  # which is still there at the end, as in an error's traceback
next(items)
(reader,) = active_children()
os.kill(reader.pid, signal.SIGSTOP)  # on a busy machine, too, it may not see one request to end before the next
print(reader.pid, flush=True)
raise RuntimeError("out of memory")
"""


def test_a_program_that_fails_waits_for_no_reader() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ENDS_BADLY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        reader = int(program.stdout.readline())
        try:
            _, error = program.communicate(timeout=30)
            assert program.returncode == 1
            assert "RuntimeError: out of memory" in error
            assert not psutil.pid_exists(reader)
        finally:
            program.kill()
            if psutil.pid_exists(reader):
                os.kill(reader, signal.SIGKILL)

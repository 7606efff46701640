import argparse
import csv
import functools
import io
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import soundfile
import webdataset
from PIL import Image

import data.build
import data.shards
from data.build import add_arguments
from data.errors import UserError
from data.index import build_index, load_index
from data.rows import to_samples

ROWS = 40
SMALL = "30KB"


def run(*arguments: Any) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return data.build.run(parser.parse_args([str(argument) for argument in arguments]))


def write_files(folder: Path, numbers: range) -> None:
    exif = Image.Exif()
    exif[0x010F] = "SECRET-CAMERA"
    for number in numbers:
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (12 + number % 5, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", exif=exif.tobytes())
        soundfile.write(folder / f"{number}.wav", rng.standard_normal(300) * 0.1, 8000)


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "text", "audio", "label", "id", "site"])
        writer.writerows(rows)
    return path


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A manifest of rows that have an image, a text, and every third one no sound; every tenth shares its id."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_files(folder, range(ROWS))
    rows = [
        [
            f"{n}.jpg",
            f"text {n}",
            "" if n % 3 == 2 else f"{n}.wav",
            n % 4,
            "same" if n % 10 == 0 else f"id.{n}",
            f"s{n}",
        ]
        for n in range(ROWS)
    ]
    return write_csv(folder / "rows.csv", rows)


def contents(folder: Path) -> dict[str, bytes]:
    """All that a build left, hidden files but the lock included."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.endswith(".lock")}


def shards(folder: Path, pattern: str = "*.tar") -> list[Path]:
    return sorted(folder.glob(pattern))


def samples(folder: Path, pattern: str = "*.tar") -> list[dict[str, Any]]:
    read = webdataset.WebDataset([str(path) for path in shards(folder, pattern)], shardshuffle=False)
    return [
        {name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")} for sample in read
    ]


def row_of(sample: dict[str, Any]) -> int:
    return int(sample["__key__"].rpartition("-")[2])


def test_rows_come_back_paired_and_stripped(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("--from", source, "--out", out, "--shard-size", SMALL) == 0

    assert len(shards(out)) > 3
    found = samples(out)
    assert [row_of(sample) for sample in found] == list(range(ROWS))
    assert len({sample["__key__"] for sample in found}) == ROWS
    for number, sample in enumerate(found):
        facts = json.loads(sample["json"])
        assert facts == {
            "label": number % 4,
            "id": facts["id"],
            "site": f"s{number}",
            "source": "same" if number % 10 == 0 else f"id.{number}",
        }
        assert sample["txt"].decode() == f"text {number}"
        assert b"SECRET" not in sample["jpg"]
        assert ("wav" in sample) == (number % 3 != 2)
        with Image.open(source.parent / f"{number}.jpg") as image, Image.open(io.BytesIO(sample["jpg"])) as built:
            np.testing.assert_array_equal(np.asarray(built), np.asarray(image))


def test_shards_are_filled_and_never_too_large(source: Path, tmp_path: Path) -> None:
    run("--from", source, "--out", tmp_path / "out", "--shard-size", SMALL)
    sizes = [path.stat().st_size for path in shards(tmp_path / "out")]
    assert max(sizes) <= 30_000
    largest = max(
        sum(512 + -(-len(v) // 512) * 512 for k, v in s.items() if k != "__key__") for s in samples(tmp_path / "out")
    )
    assert all(size + largest > 30_000 - 10_240 for size in sizes[:-1])

    run("--from", source, "--out", tmp_path / "each", "--shard-size", "1B")  # no sample fits
    assert [len(load_index(path).samples) for path in shards(tmp_path / "each")] == [1] * ROWS


def test_every_shard_has_an_index_that_is_right(source: Path, tmp_path: Path) -> None:
    run("--from", source, "--out", tmp_path, "--shard-size", SMALL)
    for path in shards(tmp_path):
        assert (tmp_path / f"{path.name}.index.jsonl").exists()
        assert load_index(path) == build_index(path)


def test_datasets_reads_what_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    (tmp_path / "in").mkdir()
    write_files(tmp_path / "in", range(6))
    # Without sounds, for which datasets needs torchcodec.
    rows = [[f"{number}.jpg", f"text {number}", "", number, number, ""] for number in range(6)]
    run("--from", write_csv(tmp_path / "in" / "rows.csv", rows), "--out", tmp_path / "out", "--shard-size", SMALL)

    files, cache = str(tmp_path / "out" / "train-*.tar"), str(tmp_path / "cache")
    read = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=cache)
    found = [(row["__key__"], row["txt"], row["json"]["label"], row["jpg"].size) for row in read]
    assert found == [(f"{number}-{number:09d}", f"text {number}", number, (16, 12 + number % 5)) for number in range(6)]


def test_datasets_reads_jpegs_of_both_spellings_and_what_lacks_a_modality_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    (tmp_path / "in").mkdir()
    write_files(tmp_path / "in", range(8))
    (tmp_path / "in" / "1.jpg").rename(tmp_path / "in" / "1.JPEG")
    names = ["0.jpg", "1.JPEG", "2.jpg", "3.jpg", "4.jpg", "", "6.jpg", "7.jpg"]
    files, load = str(tmp_path / "out" / "train-*.tar"), functools.partial(datasets.load_dataset, "webdataset")
    for late in (True, False):
        rows = [[name, f"text {number}", "", number, number, ""] for number, name in enumerate(names)]
        out = tmp_path / f"late-{late}"
        run("--from", write_csv(tmp_path / "in" / "rows.csv", rows if late else rows[::-1]), "--out", out)
        files = str(out / "train-*.tar")
        if late:
            found = load(data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
            assert [row["jpg"] is None for row in found] == [name == "" for name in names]
        else:  # what the help says of it
            with pytest.raises(ValueError, match="the same types"):
                load(data_files=files, split="train", cache_dir=str(tmp_path / "cache"))


def test_a_folder_and_a_manifest_of_it_give_the_same_members(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_files(folder, range(3))
    (folder / "1.txt").write_text("one")
    (folder / "1.json").write_text('{"label": "cat"}')
    run("--from", folder, "--out", tmp_path / "out")
    found = samples(tmp_path / "out")
    assert [sample["__key__"] for sample in found] == ["0-000000000", "1-000000001", "2-000000002"]
    assert [sorted(sample)[1:] for sample in found] == [
        ["jpg", "json", "wav"],
        ["jpg", "json", "txt", "wav"],
        ["jpg", "json", "wav"],
    ]
    assert json.loads(found[1]["json"]) == {"label": "cat", "source": "1"}


def test_paths_may_be_absolute_or_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "files").mkdir()
    write_files(tmp_path / "files", range(2))
    rows = [[path, "", "", "", "", ""] for path in ("../files/0.jpg", tmp_path / "files" / "1.jpg")]
    run("--from", write_csv(tmp_path / "in" / "rows.csv", rows), "--out", tmp_path / "out")
    assert [sample["__key__"] for sample in samples(tmp_path / "out")] == ["0-000000000", "1-000000001"]


def test_any_number_of_workers_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    add_bad_rows(source)
    options = ("--from", source, "--shard-size", SMALL, "--skip-bad")
    for workers in (1, 2):
        assert run(*options, "--out", tmp_path / str(workers), "--workers", workers) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_metadata_stay_on_request(source: Path, tmp_path: Path) -> None:
    run("--from", source, "--out", tmp_path / "out", "--keep-metadata")
    assert samples(tmp_path / "out")[3]["jpg"] == (source.parent / "3.jpg").read_bytes()


# Slices


def test_slices_are_disjoint_complete_and_read_by_one_pattern(source: Path, tmp_path: Path) -> None:
    out, count = tmp_path / "out", 3
    for index in (2, 0, 1):
        assert (
            run("--from", source, "--out", out, "--prefix", "web", "--shard-size", SMALL, "--slice", f"{index}/{count}")
            == 0
        )
    run("--from", source, "--out", tmp_path / "whole", "--prefix", "web")

    sliced = samples(out, "web-*.tar")
    assert sorted(sliced, key=row_of) == samples(tmp_path / "whole")
    for index in range(count):
        rows = [row_of(sample) for sample in samples(out, f"web-{index}-*.tar")]
        assert rows == list(range(index, ROWS, count))


def test_slice_numbers_have_equal_width(source: Path, tmp_path: Path) -> None:
    run("--from", source, "--out", tmp_path / "out", "--slice", "7/11")
    assert shards(tmp_path / "out")[0].name == "train-07-00000.tar"


def test_a_slice_without_rows_is_done(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert run("--from", source, "--out", tmp_path / "out", "--slice", f"{ROWS + 1}/{ROWS + 2}") == 0
    assert shards(tmp_path / "out") == []
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "allowed"), [("8/8", "0/8 to 7/8"), ("1/0", "I/N"), ("-1/8", "I/N"), ("1", "I/N"), ("a/b", "I/N")]
)
def test_slices_out_of_range_are_refused(source: Path, tmp_path: Path, text: str, allowed: str) -> None:
    with pytest.raises(UserError, match=f"--slice {text}: slices count from 0; allowed are {allowed}"):
        run("--from", source, "--out", tmp_path / "out", f"--slice={text}")


# Going on after a kill


KILLED_AT: list[tuple[Any, str, int]] = [
    (data.shards.NewShard, "add", 1),
    (data.shards.NewShard, "add", 23),
    (data.shards.NewShard, "finish", 3),
    (data.shards, "sync_folder", 2),  # the shard has its name, but no index
    (data.shards, "write_index", 1),
    *((data.build.State, "save", call) for call in range(2, 10)),  # all but the state is written
    (os, "fsync", 4),
]


def build_and_die(module: Any, name: str, call: int, arguments: tuple[Any, ...]) -> None:
    original: Callable[..., Any] = getattr(module, name)
    calls = itertools.count(1)

    def killing(*given: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **named)

    setattr(module, name, killing)
    run(*arguments)


def add_bad_rows(source: Path) -> None:
    lines = source.read_text().splitlines()
    lines[7:7] = ["gone.jpg,x,,1,a,b", "too,few"]
    lines[30:30] = [",,,,,"]
    lines.append("rows.csv,x,,1,a,b")
    source.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("module", "name", "call"), KILLED_AT)
def test_a_killed_build_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, module: Any, name: str, call: int
) -> None:
    add_bad_rows(source)
    options = ("--from", source, "--shard-size", SMALL, "--skip-bad", "--workers", 1)
    run(*options, "--out", tmp_path / "whole")

    arguments = (*options, "--out", tmp_path / "out")
    process = get_context("fork").Process(target=build_and_die, args=(module, name, call, arguments))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    whole = contents(tmp_path / "whole")
    for path in shards(tmp_path / "out"):
        assert path.read_bytes() == whole[path.name]
    assert contents(tmp_path / "out") != whole

    assert run(*arguments) == 0
    assert contents(tmp_path / "out") == whole


def test_finished_shards_are_not_read_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--from", source, "--out", tmp_path / "out", "--shard-size", SMALL)
    saves = itertools.count(1)
    save = data.build.State.save

    def interrupted(state: data.build.State, path: Path) -> None:
        save(state, path)
        if next(saves) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data.build.State, "save", interrupted)
        assert run(*arguments) == 130
    done = sum(len(load_index(path).samples) for path in shards(tmp_path / "out"))
    assert len(shards(tmp_path / "out")) == 3
    assert not list((tmp_path / "out").glob("*.tmp"))

    read: list[int] = []

    def recorded(rows: Any, reading: Any) -> Any:
        read.extend(row.number for row in rows)
        return to_samples(rows, reading)

    monkeypatch.setattr(data.build, "to_samples", recorded)
    assert run(*arguments) == 0
    assert read == list(range(done, ROWS))
    assert f"{done}/{ROWS} [" in (progress := capsys.readouterr().err)
    assert f"{ROWS}/{ROWS} [" in progress


def test_a_finished_build_does_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--from", source, "--out", tmp_path / "out", "--shard-size", SMALL)
    run(*arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    first = capsys.readouterr().out
    monkeypatch.setattr(data.build, "_samples", lambda *_: pytest.fail("read"))
    monkeypatch.chdir(tmp_path)
    assert run("--from", "in/rows.csv", "--out", "out", "--shard-size", SMALL, "--workers", 3, "--skip-bad") == 0
    again = capsys.readouterr().out
    assert "nothing to do" in again
    assert "samples   40: 27 audio, 40 image, 40 text" in again
    assert "samples   40: 27 audio, 40 image, 40 text" in first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shard-size", "40KB"), "--shard-size was 30000, is 40000"),
        (("--shard-size", SMALL, "--keep-metadata"), "--keep-metadata was False, is True"),
        (("--shard-size", SMALL, "--label", "site"), "--label was label, is site"),
        (("--shard-size", SMALL, "--slice", "1/2"), "slice 0/1 of this prefix is there: --slice 1/2"),
    ],
)
def test_other_settings_are_refused_with_what_changed(
    source: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    run("--from", source, "--out", tmp_path / "out", "--shard-size", SMALL)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=re.escape(message)):
        run("--from", source, "--out", tmp_path / "out", *options)
    assert contents(tmp_path / "out") == before


def test_another_source_is_refused(source: Path, tmp_path: Path) -> None:
    run("--from", source, "--out", tmp_path / "out")
    source.write_text(source.read_text().replace("text 3\n", "text three\n").replace("text 3,", "text three,"))
    with pytest.raises(
        UserError, match=r"train-build\.json: .* source's sha256 was \w+, is \w+; delete .*out/train-\*"
    ):
        run("--from", source, "--out", tmp_path / "out")


def test_a_finished_shard_that_is_gone_is_named(source: Path, tmp_path: Path) -> None:
    run("--from", source, "--out", tmp_path / "out", "--shard-size", SMALL)
    (tmp_path / "out" / "train-00001.tar").unlink()
    with pytest.raises(UserError, match=r"train-00001\.tar: is gone"):
        run("--from", source, "--out", tmp_path / "out", "--shard-size", SMALL)
    (tmp_path / "out" / "train-00001.tar").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"train-00001\.tar: is of 3 bytes"):
        run("--from", source, "--out", tmp_path / "out", "--shard-size", SMALL)


@pytest.mark.parametrize("finished", [True, False])
def test_a_shard_of_other_content_is_named_and_a_missing_index_made_anew(
    source: Path, tmp_path: Path, finished: bool
) -> None:
    arguments = ("--from", source, "--out", tmp_path / "out", "--shard-size", SMALL)
    if not finished:
        (source.parent / "39.jpg").rename(tmp_path / "39.jpg")
        with pytest.raises(UserError, match="39\\.jpg"):
            run(*arguments)
        (tmp_path / "39.jpg").rename(source.parent / "39.jpg")
    else:
        run(*arguments)
    shard = tmp_path / "out" / "train-00001.tar"
    index = tmp_path / "out" / "train-00001.tar.index.jsonl"
    before, indexed = shard.read_bytes(), index.read_bytes()
    shard.write_bytes(before.replace(b"text ", b"test "))
    with pytest.raises(UserError, match=r"train-00001\.tar: is of other content than was written; put it back"):
        run(*arguments)
    shard.write_bytes(before)
    index.unlink()
    assert run(*arguments) == 0
    assert index.read_bytes() == indexed


@pytest.mark.parametrize("name", ["train-00000.tar", "train-other-00000.tar", "train-0-00000.tar", "train-x.tar"])
def test_shards_of_others_are_not_touched_nor_mixed_with_ours(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"precious")
    with pytest.raises(UserError, match=re.escape(f"{name}: not of this build")):
        run("--from", source, "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == {name: b"precious"}


@pytest.mark.parametrize(("first", "second"), [("train", "train-b"), ("train-b", "train")])
def test_prefixes_that_one_pattern_would_mix_are_refused(source: Path, tmp_path: Path, first: str, second: str) -> None:
    run("--from", source, "--out", tmp_path / "out", "--prefix", first)
    with pytest.raises(UserError, match=r"train-\*\.tar would name|not of this build"):
        run("--from", source, "--out", tmp_path / "out", "--prefix", second)
    assert run("--from", source, "--out", tmp_path / "out", "--prefix", "val") == 0


def test_slices_of_other_settings_are_refused(source: Path, tmp_path: Path) -> None:
    run("--from", source, "--out", tmp_path / "out", "--slice", "0/2")
    with pytest.raises(UserError, match=r"slice 0/2 of this prefix is there: --slice 1/3"):
        run("--from", source, "--out", tmp_path / "out", "--slice", "1/3")
    with pytest.raises(UserError, match="--keep-metadata was False, is True; slices must be built alike"):
        run("--from", source, "--out", tmp_path / "out", "--slice", "1/2", "--keep-metadata")
    assert run("--from", source, "--out", tmp_path / "out", "--slice", "1/2") == 0


def test_two_builds_at_once_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--from", source, "--out", tmp_path / "out")

    def again(*_: Any) -> None:
        with pytest.raises(UserError, match="another process is building train here"):
            run(*arguments)

    monkeypatch.setattr(data.build, "_show_start", again)
    assert run(*arguments) == 0


# Bad rows


def test_bad_rows_stop_the_build_and_are_named(source: Path, tmp_path: Path) -> None:
    add_bad_rows(source)
    with pytest.raises(UserError) as error:
        run("--from", source, "--out", tmp_path / "out", "--shard-size", "1KB")
    lines = str(error.value).splitlines()
    assert lines[0] == f"{source}: 4 bad rows among 38, from row 6 on. The 5 shards before them stay."
    assert lines[1:5] == [
        f"  {source}:8: image gone.jpg: No such file or directory ({source.parent}/gone.jpg)",
        f"  {source}:9: 2 fields, the first line names 6",
        f"  {source}:31: has none of image, text, audio",
        f"  {source}:45: image rows.csv: of no known format; allowed are jpg, jpeg, png, webp",
    ]
    assert "--skip-bad" in lines[5]
    assert [row_of(sample) for sample in samples(tmp_path / "out")] == [0, 1, 2, 3, 4]
    assert not list((tmp_path / "out").glob(".*.tmp"))

    assert run("--from", source, "--out", tmp_path / "out", "--shard-size", "1KB", "--skip-bad") == 0
    assert len(samples(tmp_path / "out")) == ROWS


def test_what_the_message_says_can_be_done_can_be_done(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--from", source, "--out", out, "--shard-size", "1KB")
    (source.parent / "20.jpg").rename(tmp_path / "20.jpg")
    lines = source.read_text()
    source.write_text(lines.replace("30.jpg,", '"30".jpg,'))
    remedy = f"delete {out}/train-\\* and build anew"
    with pytest.raises(UserError, match=rf"(?s)19 shards before them stay.*{remedy}.*Or add --skip-bad"):
        run(*arguments)
    (tmp_path / "20.jpg").rename(source.parent / "20.jpg")
    with pytest.raises(UserError, match="29 shards before them stay"):  # a file was mended
        run(*arguments)
    source.write_text(lines)
    with pytest.raises(UserError, match=r"source's sha256 was"):
        run(*arguments)
    for path in out.glob("train-*"):
        path.unlink()
    assert run(*arguments) == 0
    assert len(samples(out)) == ROWS


def test_a_manifest_that_is_bad_before_the_first_shard_may_be_mended(source: Path, tmp_path: Path) -> None:
    lines = source.read_text()
    source.write_text(lines.replace("30.jpg,", '"30".jpg,'))
    with pytest.raises(UserError, match=r"\nMend them and start the same command again\. Or add --skip-bad"):
        run("--from", source, "--out", tmp_path / "out")
    source.write_text(lines)
    assert run("--from", source, "--out", tmp_path / "out") == 0


def test_malformed_lines_of_a_csv_are_skipped_and_counted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source.write_text(source.read_text().replace("30.jpg,", '"30".jpg,').replace("31.jpg,", '"31.jpg,'))
    arguments = ("--from", source, "--out", tmp_path / "out", "--skip-bad")
    with pytest.raises(UserError, match=r"rows\.csv:\d+: .*quotation mark"):  # left open in line 33
        run(*arguments)
    source.write_text(source.read_text().replace('"31.jpg,', "31.jpg,"))
    assert run(*arguments) == 0
    assert [row_of(sample) for sample in samples(tmp_path / "out")] == [n for n in range(ROWS) if n != 30]
    assert "left out  1: 1 malformed line; listed in" in capsys.readouterr().out
    (bad,) = (tmp_path / "out" / "train-bad.jsonl").read_text().splitlines()
    assert json.loads(bad)["where"] == f"{source}:32"


def test_bad_rows_are_shown_up_to_a_number(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "rows.csv", [["\x1b[31mgone.jpg", "", "", "", "", ""]] * 50)
    with pytest.raises(UserError) as error:
        run("--from", source, "--out", tmp_path / "out")
    assert str(error.value).count("\n  ") == 20
    assert "\x1b" not in str(error.value)
    assert "\\x1b[31mgone.jpg" in str(error.value)


def test_skipped_rows_are_counted_and_listed(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_bad_rows(source)
    assert run("--from", source, "--out", tmp_path / "out", "--shard-size", SMALL, "--skip-bad") == 0
    found = [json.loads(line) for line in (tmp_path / "out" / "train-bad.jsonl").read_text().splitlines()]
    assert [(row["number"], row["where"].rpartition(":")[2], row["kind"]) for row in found] == [
        (6, "8", "file is missing"),
        (7, "9", "malformed line"),
        (29, "31", "nothing in it"),
        (43, "45", "image of a format that is not allowed"),
    ]
    assert {*map(row_of, samples(tmp_path / "out"))} == set(range(ROWS + 4)) - {6, 7, 29, 43}
    assert (
        "left out  4: 1 file is missing, 1 image of a format that is not allowed, 1 malformed line, 1 nothing in it; "
        f"listed in {tmp_path}/out/train-bad.jsonl"
    ) in capsys.readouterr().out


def test_a_source_without_a_good_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no row that a shard could be made of$"):
        run("--from", write_csv(tmp_path / "rows.csv", []), "--out", tmp_path / "out")
    source = write_csv(tmp_path / "rows.csv", [["gone.jpg", "", "", "", "", ""]])
    for _ in range(2):
        with pytest.raises(UserError, match=r"could be made of: 1 file is missing; see .*train-bad\.jsonl"):
            run("--from", source, "--out", tmp_path / "out", "--skip-bad")
        assert len((tmp_path / "out" / "train-bad.jsonl").read_text().splitlines()) == 1
    write_files(tmp_path, range(1))
    (tmp_path / "0.jpg").rename(tmp_path / "gone.jpg")
    assert run("--from", source, "--out", tmp_path / "out", "--skip-bad") == 0
    assert not (tmp_path / "out" / "train-bad.jsonl").exists()


def test_wrong_arguments_are_refused(source: Path, tmp_path: Path) -> None:
    for options, message in (
        (("--prefix", "a*b"), "letters, digits"),
        (("--prefix", "../x"), "letters, digits"),
        (("--workers", "0"), "at least 1"),
        (("--shard-size", "256"), "'256': a number and a unit are needed"),
    ):
        with pytest.raises(UserError, match=message):
            run("--from", source, "--out", tmp_path / "out", *options)
    with pytest.raises(UserError, match="lies in the folder"):
        run("--from", source.parent, "--out", source.parent / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-build.json").write_text("[]")
    with pytest.raises(UserError, match=r"train-build\.json: says nothing of a build"):
        run("--from", source, "--out", tmp_path / "out")
    (tmp_path / "out" / "train-build.json").write_text('{"schema": 99}')
    with pytest.raises(UserError, match=r"train-build\.json: of schema 99"):
        run("--from", source, "--out", tmp_path / "out")


def test_a_full_disk_leaves_no_half_shard(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--from", source, "--out", tmp_path / "out", "--shard-size", SMALL)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    fsync = os.fsync
    calls = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: full(handle) if next(calls) == 8 else fsync(handle))
        with pytest.raises(OSError, match="No space left"):
            run(*arguments)
    for path in shards(tmp_path / "out"):
        build_index(path)
    assert run(*arguments) == 0
    run("--from", source, "--out", tmp_path / "whole", "--shard-size", SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# Workers


def run_aside(error: Path, arguments: tuple[Any, ...]) -> None:
    """What a process does that is to be killed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with error.open("w", buffering=1) as sys.stderr:
        sys.exit(run(*arguments))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_a_killed_parent_and_on_ctrl_c(tmp_path: Path, number: signal.Signals) -> None:
    source = tmp_path / "rows.jsonl"
    with source.open("w") as file:
        file.writelines(json.dumps({"text": f"text {number}"}) + "\n" for number in range(200_000))
    out, error = tmp_path / "out", tmp_path / "error"
    arguments = ("--from", source, "--out", out, "--shard-size", "1MB", "--workers", 2)
    process = get_context("fork").Process(target=run_aside, args=(error, arguments))
    process.start()
    wait_for(lambda: shards(out) != [] or not process.is_alive())
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    os.kill(process.pid or 0, number)
    process.join(30)

    assert process.exitcode == (-number if number == signal.SIGKILL else 130)
    assert "Traceback" not in error.read_text()
    assert (f"whole shards in {out} stay" in error.read_text()) == (number == signal.SIGINT)
    wait_for(lambda: not any(worker.is_running() for worker in workers))
    for path in shards(out):
        build_index(path)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_worker_that_dies_is_reported_with_its_rows(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.build, "start_worker", functools.partial(os._exit, 1))
    with pytest.raises(UserError, match=r"a worker died between .*rows\.csv:2 and .*rows\.csv:\d+: too little memory"):
        run("--from", source, "--out", tmp_path / "out", "--workers", 2)

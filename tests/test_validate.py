import argparse
import io
import json
import os
import tarfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import soundfile
from PIL import Image

from data import crew as crew_module
from data import validate as validate_module
from data.cache import Reader
from data.crew import Crew, CrewError, Job
from data.errors import UserError
from data.index import ShardError, build_index, find_shards, index_path, write_index
from data.terminal import columns
from data.validate import (
    SHOWN,
    Finding,
    Report,
    ValidateError,
    add_arguments,
    render,
    run,
    validate,
)
from tests.server import Server, run_server

server = pytest.fixture(run_server)


def members(number: int, modalities: str = "ita") -> dict[str, bytes]:
    """Members of a sample: i image, t text, a audio; and metadata. Not tests.samples: workers would load torch."""
    image, sound = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (20, 12), (number, 0, 0)).save(image, "PNG")
    soundfile.write(sound, np.linspace(-0.5, 0.5, 1000), 16_000, format="WAV")
    made = {"png": image.getvalue(), "txt": f"a cat {number}".encode(), "wav": sound.getvalue()}
    kept = {name: data for (name, data), letter in zip(made.items(), "ita", strict=True) if letter in modalities}
    return {"json": json.dumps({"number": number}).encode(), **kept}


def write_tar(path: Path, files: Iterable[tuple[str, bytes | None]]) -> str:
    """A tar of these files; None makes a symbolic link."""
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def write_samples(path: Path, count: int = 4, modalities: str = "ita", start: int = 0) -> str:
    files = [(i, members(i, modalities)) for i in range(start, start + count)]
    return write_tar(path, [(f"k{i}.{extension}", data) for i, sample in files for extension, data in sample.items()])


def call(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([*map(str, arguments), "--workers", "2"]))


def offset(path: str, name: str) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


def test_whole_shards_are_passed_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = [write_samples(tmp_path / "a.tar"), write_samples(tmp_path / "b.tar", 3, "t", start=4)]
    write_index(build_index(shards[0]))
    before = sorted(tmp_path.iterdir())

    assert call(*shards, "--decode", "--require", "text") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "2 shards, 7 samples, 22 files decoded, 0 problems"
    assert out[:-1] == ["note: 1 of 2 shards have no index beside them: first use writes it, or `python -m data index`"]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("damage", ["in a header", "in a body", "between members", "no end", "bad header"])
def test_a_broken_shard_names_its_byte_and_hides_no_other(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [write_samples(tmp_path / f"{name}.tar", 4, "t", start) for name, start in (("a", 0), ("b", 4), ("c", 8))]
    path = Path(shards[0])
    whole = bytearray(path.read_bytes())
    header = offset(shards[0], "k2.txt")
    end = offset(shards[0], "k3.txt") + 1024
    cut = {"in a header": header + 100, "in a body": header + 515, "between members": header, "no end": end + 512}
    if damage in cut:
        path.write_bytes(whole[: cut[damage]])
    else:
        whole[header + 150] ^= 0x11
        path.write_bytes(whole)
    # The third is broken in another way.
    write_tar(Path(shards[2]), [("k8.txt", b"x"), ("k9.txt", None)])

    assert call(*shards) == 1
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    byte = {**cut, "in a header": header, "bad header": header}[damage]
    assert ["a.tar", str(byte)] in [line[:2] for line in lines]
    # k2 has a .json before its .txt, so it is whole only where nothing of it is missing.
    assert f"{3 if damage == 'no end' else 2} whole samples lie before it" in " ".join(out.split())
    assert ["c.tar", "k9", "txt", "1024"] in [line[:4] for line in lines]
    assert lines[-1] == ["3", "shards", "(2", "unusable),", "4", "samples,", "2", "problems"]
    assert "build the shard again" in out


def test_all_links_and_scattered_or_repeated_members_are_listed(tmp_path: Path) -> None:
    names = ["a/0.txt", "a/0.png", "a/1.txt", "a/0.json", "a/1.TXT", "a/1.flac", "b/0.txt", "b/0.txt"]
    shard = write_tar(tmp_path / "x.tar", [*((name, b"") for name in names), ("b/0.wav", None), ("a/2.txt", b"")])

    report = validate([shard])
    assert [(finding.key, finding.member, finding.byte) for finding in report.findings] == [
        ("a/0", "json", 3 * 512),
        ("a/1", "txt", 4 * 512),
        ("b/0", "txt", 7 * 512),
        ("b/0", "wav", 8 * 512),
    ]
    assert {(finding.level, finding.kind) for finding in report.findings} == {("problem", "structure")}
    assert (report.unusable, report.samples) == (1, 0)


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, bytes(10240), b"\x1f\x8b" + bytes(600)])
def test_what_is_no_shard_is_one_problem(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    [finding] = validate([str(tmp_path / "x.tar")]).findings
    assert (finding.level, finding.kind) == ("problem", "damage")


def test_malformed_extended_headers_are_a_problem(tmp_path: Path) -> None:
    # tarfile raises a plain ValueError here.
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0.txt")
        info.pax_headers = {"GNU.sparse.size": "x", "GNU.sparse.map": "1,a"}
        tar.addfile(info)
    [finding] = validate([str(tmp_path / "x.tar")]).findings
    assert (finding.level, finding.kind) == ("problem", "damage")


def test_a_stale_or_damaged_index_is_said(tmp_path: Path) -> None:
    stale, garbage, other, moved, good = shards = [write_samples(tmp_path / f"{name}.tar", 3, "t") for name in "abcde"]
    for shard in shards:
        write_index(build_index(shard))
    # As many bytes, and older than its index: only hashing tells.
    content = bytearray(Path(stale).read_bytes())
    content[offset(stale, "k0.txt") + 512] ^= 1
    Path(stale).write_bytes(content)
    os.utime(stale, (0, 0))
    index_path(garbage).write_bytes(b"\xff{")
    index = build_index(other)
    write_index(index._replace(samples=index.samples[:2]))
    text = index_path(moved).read_text()
    index_path(moved).write_text(text.replace('"txt":[1536,', '"txt":[512,'))
    assert index_path(moved).read_text() != text

    findings = [finding for finding in validate(shards).findings if finding.level == "problem"]
    assert [finding.shard for finding in findings] == [stale, garbage, other, moved]
    assert {finding.kind for finding in findings} == {"index"}
    assert "index: sha256 is" in findings[0].what
    assert "malformed" in findings[1].what
    assert "other samples" in findings[2].what
    assert "other samples" in findings[3].what
    assert good not in str(findings)


def test_required_modalities(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "x.tar",
        [("0.jpg", b""), ("0.txt", b""), ("1.txt", b""), ("2.webp", b""), ("2.txt", b""), ("3.wav", b"")],
    )
    assert [(f.key, f.what) for f in validate([shard], ["image", "text"]).findings] == [
        ("1", "has no image; it has txt"),
        ("3", "has no image and no text; it has wav"),
    ]
    assert validate([shard]).findings == []
    with pytest.raises(ValidateError, match=r"--require img: unknown modality; allowed are image, text, audio"):
        call(shard, "--require", "image,img")


def test_two_members_of_a_modality_are_a_problem(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", [("0.jpg", b""), ("0.png", b""), ("0.txt", b"")])
    [finding] = validate([shard]).findings
    assert (finding.level, finding.key) == ("problem", "0")
    assert "2 image members (jpg, png)" in finding.what


def test_undecodable_members_are_named(tmp_path: Path) -> None:
    good = members(0)
    broken = {"png": good["png"][:45], "txt": b"\xff\xfe", "wav": b"RIFF" + bytes(40), "json": b"[1]"}
    files = [(f"x/a.{extension}", data) for extension, data in broken.items()]
    shards = [
        write_tar(tmp_path / "x.tar", files),
        write_tar(tmp_path / "y.tar", [(f"b.{extension}", data) for extension, data in good.items()]),
    ]

    report = validate(shards, decode=True, workers=2)
    assert sorted((f.shard, f.key, f.member, f.byte) for f in report.findings if f.level == "problem") == sorted(
        (shards[0], "x/a", extension, 512 + offset(shards[0], f"x/a.{extension}")) for extension in broken
    )
    assert report.decoded == 8
    assert validate(shards).count("problem") == 0


def test_remote_shards(tmp_path: Path) -> None:
    names = [f"memory://validate-{tmp_path.name}/{name}.tar" for name in "abc"]
    memory = fsspec.filesystem("memory")
    good = Path(write_samples(tmp_path / "a.tar"))
    bad = Path(write_tar(tmp_path / "b.tar", [("z.txt", b"\xff"), ("y.txt", b"y")]))
    for name, content in zip(names, [good.read_bytes(), bad.read_bytes(), b"RIFF" * 500], strict=True):
        memory.pipe(name, content)

    report = validate(find_shards([names[0].replace("a.tar", "*.tar")]), decode=True, workers=2)
    assert [(f.kind, f.shard, f.key) for f in report.findings] == [("damage", names[2], ""), ("decode", names[1], "z")]
    assert (report.samples, report.decoded) == (6, 18)


def test_the_index_beside_a_signed_url_is_looked_at(tmp_path: Path, server: Server) -> None:
    shard = write_samples(tmp_path / "a.tar", 2, "t")
    write_index(build_index(shard))
    url = f"{server.url}/a.tar?Signature=secret"
    server.files = {"/a.tar": Path(shard).read_bytes(), "/a.tar.index.jsonl": index_path(shard).read_bytes()}
    report = validate([url])
    assert (report.findings, report.notes) == ([], [])
    server.files["/a.tar.index.jsonl"] = b"{}"
    [finding] = validate([url]).findings
    assert (finding.kind, finding.shard) == ("index", f"{server.url}/a.tar?***")
    assert finding.what.startswith("stale or damaged index: malformed index")
    del server.files["/a.tar.index.jsonl"]
    report = validate([url])
    assert report.findings == []
    assert report.notes[0].startswith("1 of 1 shards have no index")


def answer_late(reader: Reader, job: Job) -> str | None:
    """Finds something in every member, and the later the earlier it lies."""
    time.sleep(0.1 if int(job.key[1:]) < crew_module._CHUNK else 0)
    return f"seen {job.key}"


def test_findings_come_in_the_order_of_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_module, "_CHUNK", 2)
    monkeypatch.setattr(validate_module, "Crew", partial(Crew, decode=answer_late))
    names = [f"k{number}" for number in range(8)]
    shards = [write_tar(tmp_path / f"{name}.tar", [(f"{key}.txt", b"x") for key in names]) for name in "ab"]
    findings = [finding for finding in validate(shards, decode=True, workers=2).findings if finding.kind == "decode"]
    assert [(finding.shard, finding.key) for finding in findings] == [(shard, key) for shard in shards for key in names]


def hang_or_crash(reader: Reader, job: Job) -> str | None:
    """What a broken decoding library might do."""
    if job.key == "crash":
        os._exit(7)
    if job.key == "hang":
        time.sleep(600)
    return f"seen {job.key}" if job.key == "bad" else None


def jobs(keys: Iterable[str], tmp_path: Path) -> list[Job]:
    shard = build_index(write_samples(tmp_path / "x.tar", 1, "t")).shard
    return [Job(shard, key, "txt", number, 0) for number, key in enumerate(keys)]


def test_a_crash_or_a_stuck_decoder_costs_one_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_module, "PATIENCE", 10.0)  # the time that a process takes to start counts, too
    monkeypatch.setattr(crew_module, "_CHUNK", 5)
    keys = ["", "crash", "bad", "hang", "crash", "", "", "", "bad", "crash", *[""] * 30]
    given = jobs(keys, tmp_path)
    with Crew(2, None, hang_or_crash) as crew:
        results = [*crew.map(given[:10]), *crew.map(given[10:])]
        processes = [worker.process for worker in crew.workers]
    assert sorted(job.offset for job, _ in results) == list(range(len(keys)))
    for job, error in results:
        expected = {"crash": "crashed (exit code 7)", "hang": "not decoded after", "bad": "seen bad"}.get(job.key)
        assert error is None if expected is None else expected in str(error)
    assert not any(process.is_alive() for process in processes)


class DiesOnArrival:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)

    def __call__(self, reader: Reader, job: Job) -> str | None:
        return None


def test_workers_that_cannot_start_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CrewError, match="exit code 3"), Crew(1, None, DiesOnArrival()) as crew:
        list(crew.map(jobs("ab", tmp_path)))


def test_keys_in_several_shards_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    starts = {"a": 0, "b": 3, "c": 2, "d": 2}
    shards = [write_samples(tmp_path / f"{name}.tar", 3, "t", start) for name, start in starts.items()]
    assert call(*shards) == 0
    out = capsys.readouterr().out
    for finding, shard in zip(validate(shards).findings, shards[2:], strict=True):
        assert (finding.level, finding.shard, finding.key) == ("warning", shard, "k2")
        assert finding.what == f"3 keys are in earlier shards, too; this one is in {shards[0]}"
    assert "warning: 3 keys" in out
    assert out.splitlines()[-1] == "4 shards, 12 samples, 0 problems, 2 warnings"


def test_files_that_nothing_reads_are_counted(tmp_path: Path) -> None:
    files = [
        ("README", b""),
        ("0.txt", b"x"),
        ("0.pkl", b""),
        ("1.pkl", b""),
        ("1.pth", b""),
        ("a.b.jpg", b""),
        ("a.c.jpg", b""),
    ]
    report = validate([write_tar(tmp_path / "x.tar", files)], decode=True)
    assert report.notes[1] == "3 files that nothing reads: .pkl 2, .pth 1"
    assert report.notes[2].startswith("2 files that nothing reads have a dot in their extension: .b.jpg 1, .c.jpg 1")
    assert (
        report.notes[3]
        == "1 file belongs to no sample: hidden, without an extension, or in a folder named like __this__"
    )
    assert report.decoded == 1
    [empty] = report.findings
    assert (empty.level, empty.key) == ("problem", "1")
    assert empty.what.startswith("2 samples have no image or text or audio")


def test_the_table_is_cut_and_the_file_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = write_tar(tmp_path / "x.tar", [(f"{i:03}.txt", b"\xff") for i in range(SHOWN + 7)])
    out = tmp_path / "out.json"
    assert call(shard, "--require", "image", "--decode", "--json", out) == 1
    text = capsys.readouterr().out
    assert sum(line.startswith("x.tar ") for line in text.splitlines()) == SHOWN
    assert f"... and {SHOWN + 14} more (decode 7, missing {SHOWN + 7})" in text
    assert text.splitlines()[-1] == "1 shard, 57 samples, 57 files decoded, 114 problems"
    content = json.loads(out.read_text())
    assert (content["schema"], content["samples"]) == (1, SHOWN + 7)
    assert len(content["findings"]) == 2 * SHOWN + 14
    assert content["findings"][0] == {
        "level": "problem",
        "kind": "decode",
        "shard": shard,
        "key": content["findings"][0]["key"],
        "member": "txt",
        "byte": content["findings"][0]["byte"],
        "what": content["findings"][0]["what"],
    }


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", [("\x1b[2J\n0.wav", b""), ("\udcff1.pkl\x07", b"")])
    text = "\n".join(render(validate([shard], ["text"]), 80))
    assert "\\x1b[2J\\n0" in text
    assert "\\x07" in text
    assert all(letter.isprintable() or letter == "\n" for letter in text)


def test_shards_of_one_name_are_told_apart() -> None:
    findings = [Finding("problem", "damage", f"{folder}/x.tar", "", "", None, "gone") for folder in "ab"]
    lines = render(Report(shards=2, findings=findings), 80)
    assert [line.split()[0] for line in lines[2:4]] == ["a/x.tar", "b/x.tar"]


def test_columns_wrap_the_last_and_fit() -> None:
    lines = columns([("name", "what"), ("k" * 50, "word " * 30), ("b", "")], 80)
    assert max(map(len, lines)) <= 80
    assert lines[2].startswith("k" * 17 + "..." + "k" * 16 + "  word")
    assert lines[3].startswith(" " * 38 + "word")
    assert " ".join(lines).count("word") == 30


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["gone.tar"], ShardError, "gone.tar"),
        (["x.tar", "--json", "gone/out.json"], ValidateError, "no such folder"),
        (["x.tar", "--json", "."], ValidateError, "a folder, not a file"),
    ],
)
def test_usage_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: type[UserError], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_samples(tmp_path / "x.tar", 1)
    with pytest.raises(error, match=message):
        call(*arguments)
    with pytest.raises(ValidateError, match="--workers 0: must be at least 1"):
        validate(["x.tar"], workers=0)

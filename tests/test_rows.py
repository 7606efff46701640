import json
import os
import re
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

import data.rows
from data.errors import UserError
from data.rows import Bad, File, Reading, Row, Sample, portable_key, to_sample, to_samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of every kind, and some that won't do."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x010F] = "SECRET-CAMERA"
    for name in ("a.jpg", "a.png", "a.webp", "a.gif"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif.tobytes())
    for name in ("a.wav", "a.flac", "a.ogg", "a.mp3"):
        soundfile.write(tmp_path / name, pixels[..., 0].ravel() / 256, 16_000)
    (tmp_path / "a.txt").write_text("größe\n")
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "a.json").write_text('{"label": 3, "source": "web"}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "cut.json").write_text('{"label"')
    (tmp_path / "photo.JPEG").write_bytes((tmp_path / "a.jpg").read_bytes())
    (tmp_path / "liar.jpg").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    (tmp_path / "nowhere.jpg").symlink_to("gone.jpg")
    (tmp_path / "round.jpg").symlink_to("round.jpg")
    return tmp_path


def row(files: dict[str, Any], name: str | None = "n", **facts: Any) -> Row:
    made = {modality: file if isinstance(file, File) else File(file) for modality, file in files.items()}
    return Row(7, "rows.csv:9", name, made, facts)


def sample(given: Row, reading: Reading) -> dict[str, Any]:
    made = to_sample(given, reading)
    assert isinstance(made, Sample), made
    assert made.number == given.number
    return made.members


def fault(given: Row, reading: Reading) -> str:
    made = to_sample(given, reading)
    assert isinstance(made, Bad), made
    assert (made.number, made.where) == (given.number, given.where)
    return f"{made.kind}: {made.reason}"


def test_every_format_comes_through_as_it_is(folder: Path) -> None:
    reading = Reading(folder, keep_metadata=True)
    for modality, names in (("image", ("jpg", "png", "webp")), ("audio", ("wav", "flac", "ogg")), ("text", ("txt",))):
        for extension in names:
            members = sample(row({modality: f"a.{extension}"}), reading)
            assert members.keys() == {"__key__", extension, "json"}
            assert members[extension] == (folder / f"a.{extension}").read_bytes()


def test_metadata_go_unless_they_are_to_stay(folder: Path) -> None:
    assert b"SECRET-CAMERA" in sample(row({"image": "a.jpg"}), Reading(folder, keep_metadata=True))["jpg"]
    assert b"SECRET-CAMERA" not in sample(row({"image": "a.jpg"}), Reading(folder))["jpg"]


@pytest.mark.parametrize(("name", "extension"), [("photo.JPEG", "jpg"), ("liar.jpg", "png"), ("link.jpg", "jpg")])
def test_the_extension_agrees_with_the_content(folder: Path, name: str, extension: str) -> None:
    assert extension in sample(row({"image": name}), Reading(folder))


def test_bytes_without_a_name_go_by_their_content(folder: Path) -> None:
    members = sample(
        row({"image": File(None, (folder / "a.webp").read_bytes()), "text": File(None, b"x")}), Reading(None)
    )
    assert members.keys() == {"__key__", "webp", "txt", "json"}


def test_facts_and_source_become_json(folder: Path) -> None:
    facts = {"label": 3, "day": date(2024, 2, 29), "price": Decimal("1.50"), "nan": float("nan"), "deep": [{"x": None}]}
    members = sample(row({"text": "a.txt"}, "Größe.1", **facts), Reading(folder))
    assert json.loads(members["json"]) == {
        "label": 3,
        "day": "2024-02-29",
        "price": "1.50",
        "nan": None,
        "deep": [{"x": None}],
        "source": "Größe.1",
    }
    assert members["__key__"] == "Gro_e_1-000000007"


def test_a_sidecar_is_taken_in_and_a_source_of_its_own_stays(folder: Path) -> None:
    members = sample(row({"text": "a.txt", "json": "a.json"}), Reading(folder))
    assert json.loads(members["json"]) == {"label": 3, "source": "web", "_source": "n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "nothing in it: has none of image, text, audio"),
        ({"json": "a.json"}, "nothing in it"),
        ({"image": "gone.jpg"}, "file is missing: image gone.jpg: No such file"),
        ({"image": "nowhere.jpg"}, "file is missing"),
        ({"image": "round.jpg"}, "file can't be read: image round.jpg: Too many levels of symbolic links"),
        ({"image": "folder.jpg"}, "not a file"),
        ({"image": "pipe.jpg"}, "not a file"),
        ({"image": "a.jpg/b.jpg"}, "file can't be read: image a.jpg/b.jpg: Not a directory"),
        ({"image": "a\0.jpg"}, "file can't be read: .*null"),
        ({"image": "x" * 5000}, "file can't be read: .*too long"),
        ({"image": "empty.jpg"}, "file is empty: image empty.jpg: 0 bytes"),
        ({"image": "https://x.org/a.jpg"}, "file at an address: image https://x.org/a.jpg: only files.*download"),
        ({"image": "hf://datasets/a/b/c.jpg"}, "file at an address"),
        (
            {"image": "a.gif"},
            "image of a format that is not allowed: .*the format gif; allowed are jpg, jpeg, png, webp",
        ),
        ({"audio": "a.mp3"}, "audio of a format that is not allowed: .*the format mp3; allowed are wav, flac, ogg"),
        ({"image": "a.wav"}, "image of a format that is not allowed: .*the format wav"),
        ({"image": "a.txt"}, "image of a format that is not allowed: .*of no known format"),
        ({"image": "cut.png"}, "image is damaged: image cut.png: PNG: chunk b'IDAT' at byte"),
        ({"text": "latin.txt"}, "text can't be used.*: text latin.txt: .*UTF-8"),
        ({"text": "blank.txt"}, "text can't be used.*: text blank.txt: "),
        ({"text": "a.txt", "image": "gone.jpg"}, "file is missing"),
        ({"text": "a.txt", "json": "list.json"}, "json can't be read: json list.json: a list, an object is needed"),
        ({"text": "a.txt", "json": "cut.json"}, "json can't be read: json cut.json"),
    ],
)
def test_faults_are_named(folder: Path, files: dict[str, str], expected: str) -> None:
    assert re.match(expected, fault(row(files), Reading(folder)))


def test_facts_without_a_json_form_are_faults(folder: Path) -> None:
    assert "bytes can't be written" in fault(row({"text": "a.txt"}, x=[b"raw"]), Reading(folder))
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert "nested too deeply" in fault(row({"text": "a.txt"}, x=deep), Reading(folder))


def test_large_files_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.rows, "MAX_MEMBER_BYTES", 8)
    assert "txt" in sample(row({"text": "a.txt"}), Reading(folder))
    assert "image a.jpg: at most 8 bytes" in fault(row({"image": "a.jpg"}), Reading(folder))
    assert "at most 8 bytes" in fault(row({"text": File(None, b"123456789")}), Reading(folder))


def test_data_of_the_hub_can_not_name_files_of_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (str(folder / "a.jpg"), "a.jpg", "file:///etc/passwd", "zip://a.jpg::/etc/x.zip", "http://10.0.0.1/a"):
        assert re.match("file (of this machine|at an address)", fault(row({"image": name}), Reading(None)))

    asked: list[str] = []

    def fake_open(name: str, mode: str) -> Any:
        asked.append(name)
        return (folder / "a.jpg").open(mode)

    monkeypatch.setattr("fsspec.open", fake_open)
    for name in ("hf://datasets/a/b@1/x.jpg", "zip://x.jpg::hf://datasets/a/b@1/x.zip"):
        assert "jpg" in sample(row({"image": name}), Reading(None))
    assert asked == ["hf://datasets/a/b@1/x.jpg", "zip://x.jpg::hf://datasets/a/b@1/x.zip"]


def test_a_failing_disk_names_the_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(UserError, match=r"rows\.csv:9: .*Input/output error"):
        to_samples([row({"text": "a.txt"})], Reading(folder))


def test_any_other_failure_names_the_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(data.rows, "strip", fail)
    with pytest.raises(ZeroDivisionError) as error:
        to_samples([row({"text": "a.txt"})], Reading(folder))
    assert error.value.__notes__ == ["while reading rows.csv:9"]


NAMES = [
    "cats/0001",
    "cats_0001",
    "CATS_0001",
    "a.b.c",
    "größe",
    "Ångström",
    "CON",
    "nul",
    "__meta__",
    "../../etc/passwd",
    "/absolute",
    "C:\\x",
    "a\nb\0c",
    "-rf",
    "日本",
    "x" * 1000,
    "x" * 999,
    "",
    "000000003",
    "a-000000005",
    " ",
    "\udcff",
    None,
]


def test_keys_are_portable_and_unique_even_where_case_is_ignored() -> None:
    keys = [portable_key(name, number) for number, name in enumerate(NAMES)]
    keys += [portable_key(key, number) for number, key in enumerate(keys, len(keys))]  # named as others' keys
    keys += [portable_key("1", 10**9), portable_key(None, 11 * 10**8)]
    for key in keys:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", key)
        assert key.lower() not in ("con", "nul")
    assert len({key.lower() for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("cats/0001", "cats_0001-000000012"),
        ("Ångström.v2", "Angstrom_v2-000000012"),
        ("IMG-20", "IMG-20-000000012"),
        ("__x__", "x-000000012"),
        ("日本", "000000012"),
        (None, "000000012"),
        ("CON", "CON-000000012"),
    ],
)
def test_keys_stay_readable(name: str | None, key: str) -> None:
    assert portable_key(name, 12) == key

import json
import os
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pytest

from data.rows import Bad, File, Row
from data.tables import Columns, Slice, Table, TableError, open_table

ANY = Columns()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def manifest(folder: Path, text: str | bytes, name: str = "rows.csv") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def rows(table: Table, part: Slice | None = None, start: int = 0) -> list[Row | Bad]:
    return list(table.rows(part or Slice(), start))


def good(table: Table) -> list[Row]:
    found = rows(table)
    assert all(isinstance(row, Row) for row in found), found
    return [row for row in found if isinstance(row, Row)]


def reasons(table: Table) -> list[str]:
    return [f"{row.where.rsplit('/', 1)[-1]}: {row.reason}" for row in rows(table) if isinstance(row, Bad)]


def test_a_csv_gives_files_text_and_facts(tmp_path: Path) -> None:
    text = '\ufeffimage,caption,audio,label,site\na.jpg,"two\nlines, and more",,3,x\n\n,größe, s/b.wav ,-4,\n'
    table = open_table(manifest(tmp_path, text), ANY)

    assert table.columns == Columns("image", "caption", "audio", "label")
    assert table.count() == 2
    where = str(tmp_path / "rows.csv")
    assert rows(table) == [
        Row(
            0,
            f"{where}:3",
            "a",
            {"image": File("a.jpg"), "text": File(None, b"two\nlines, and more")},
            {"label": 3, "site": "x"},
        ),
        Row(
            1,
            f"{where}:5",
            "b",
            {"text": File(None, "größe".encode()), "audio": File("s/b.wav")},
            {"label": -4, "site": ""},
        ),
    ]


def test_a_tsv_and_json_lines_give_the_same(tmp_path: Path) -> None:
    tsv = open_table(manifest(tmp_path, "image\ttext\tlabel\na.jpg\tx, y\t3\n", "rows.TSV"), ANY)
    lines = '\n{"image": "a.jpg", "text": "x, y", "label": 3}\n'
    jsonl = open_table(manifest(tmp_path, lines, "rows.jsonl"), ANY)
    for ours, theirs in zip(good(tsv), good(jsonl), strict=True):
        assert ours._replace(where="") == theirs._replace(where="")


@pytest.mark.parametrize(
    ("labels", "read"),
    [
        (["0", "12", "-1"], [0, 12, -1]),
        (["0", "cat", "2"], ["0", "cat", "2"]),
        (["01", "2", "3"], ["01", "2", "3"]),  # a code, not a number
        (["1", "", "2"], [1, None, 2]),
        (["1.0", "2", "3"], ["1.0", "2", "3"]),
    ],
)
def test_labels_of_a_csv_are_numbers_if_all_of_them_are(tmp_path: Path, labels: list[str], read: list[Any]) -> None:
    table = open_table(manifest(tmp_path, "text,label\n" + "".join(f"x,{label}\n" for label in labels)), ANY)
    assert [row.facts.get("label") for row in good(table)] == read
    (last,) = table.rows(Slice(), 2)  # the same where others aren't read
    assert isinstance(last, Row)
    assert last.facts["label"] == read[2]


def test_other_columns_are_named(tmp_path: Path) -> None:
    path = manifest(tmp_path, "file,title,kind,label\na.jpg,x,bird,old\n")
    table = open_table(path, Columns(image="file", text="title", label="kind"))
    (row,) = good(table)
    assert row.files == {"image": File("a.jpg"), "text": File(None, b"x")}
    assert row.facts == {"label": "bird", "_label": "old"}


@pytest.mark.parametrize(
    ("header", "wanted", "message"),
    [
        (
            "image,text",
            Columns(image="imgae"),
            r"no column 'imgae' \(--image\); did you mean image\? It has: image, text",
        ),
        ("image,text", Columns(label="zzz"), r"no column 'zzz' \(--label\)\. It has: image, text"),
        ("text,caption", ANY, "columns text and caption could be the text: choose with --text"),
        ("image,image_path", ANY, "columns image and image_path could be the image"),
        ("a,b", ANY, "none of the columns image, text, caption and audio; .* It has: a, b"),
        ("image;text", ANY, "none of the columns .* It has: image;text"),
        ("image,label", Columns(text="image"), "column 'image' stands for 2 of"),
        ("image,a,a", ANY, "column 'a' comes twice"),
        ("", ANY, "empty"),
        ("image,Caption", ANY, "column 'Caption' is not taken for 'caption', .* add --text \"Caption\", or rename it"),
        (" text,image", ANY, "column ' text' is not taken for 'text', .* add --text \" text\", or rename it"),
        ("TEXT ,x", ANY, "column 'TEXT ' is not taken for 'text'"),
        ("text,Image_Path", ANY, "column 'Image_Path' is not taken for 'image_path', .* --image"),
        ("text,LABEL", ANY, "column 'LABEL' is not taken for 'label', .* --label"),
        ("text,Audio", Columns(text="text"), "column 'Audio' is not taken for 'audio', .* --audio"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path: Path, header: str, wanted: Columns, message: str) -> None:
    with pytest.raises(TableError, match=rf"rows\.csv: {message}"):
        open_table(manifest(tmp_path, f"{header}\nx,y\n" if header else ""), wanted)


def test_a_named_column_may_be_spelled_in_any_way_and_others_be_like_it(tmp_path: Path) -> None:
    header = "Caption, TEXT,Image,id\na.jpg,b,c.jpg,d\n"
    (row,) = good(open_table(manifest(tmp_path, header), Columns(text=" TEXT", image="Caption")))
    assert row.files == {"image": File("a.jpg"), "text": File(None, b"b")}
    assert row.facts == {"Image": "c.jpg", "id": "d"}  # the image is known
    (row,) = good(open_table(manifest(tmp_path, "text,Caption\na,b\n"), ANY))
    assert (row.files, row.facts) == ({"text": File(None, b"a")}, {"Caption": "b"})
    (row,) = good(open_table(manifest(tmp_path, "text,Label\na,b\n"), Columns(image="Label")))
    assert row.files == {"image": File("b"), "text": File(None, b"a")}


@pytest.mark.parametrize("column", ["text_path", "caption_file"])
def test_text_is_read_from_files_only_where_the_user_said_so(tmp_path: Path, column: str) -> None:
    (row,) = good(open_table(manifest(tmp_path, f"{column}\na.txt\n"), ANY))
    assert row.files == {"text": File("a.txt")}
    (row,) = good(open_table(manifest(tmp_path, "text\na.txt\n"), Columns(text_files=True)))
    assert row.files == {"text": File("a.txt")}

    assert reasons(open_table(manifest(tmp_path, "text\na.txt\nsee a.txt\n"), ANY)) == [
        "rows.csv:2: column text: 'a.txt' looks like a path; --text-files reads files"
    ]


def test_names_come_from_key_or_id_or_the_file(tmp_path: Path) -> None:
    lines = [
        {"key": "k", "id": 5, "image": "a.jpg"},
        {"key": "", "id": 5, "image": "a.jpg"},
        {"image": "s/a.b.jpg", "audio": "c.wav"},
        {"audio": "c.wav", "text": "t"},
        {"text": "t"},
    ]
    table = open_table(manifest(tmp_path, "\n".join(map(json.dumps, lines)), "rows.jsonl"), ANY)
    assert [row.name for row in good(table)] == ["k", "5", "a.b", "c", None]
    assert good(table)[0].facts == {"key": "k", "id": 5}


def test_malformed_lines_are_bad_rows_with_their_number(tmp_path: Path) -> None:
    csv = open_table(manifest(tmp_path, "image,text\na.jpg,x\na.jpg,x,y\na.jpg\nb.jpg,z\n"), ANY)
    assert reasons(csv) == [
        "rows.csv:3: 3 fields, the first line names 2",
        "rows.csv:4: 1 fields, the first line names 2",
    ]
    assert [row.number for row in rows(csv)] == [0, 1, 2, 3]

    lines = ['{"text": "x"}', "[1]", "3", '{"text": ', "", '{"text": 5}', '{"text": "\\ud800"}', '{"image": [1, 2]}']
    lines += ['{"a":' * 100_000]
    jsonl = open_table(manifest(tmp_path, "\n".join(lines), "rows.jsonl"), Columns(image=None))
    found = reasons(jsonl)
    assert found[:3] == [
        "rows.jsonl:2: a list, an object is needed",
        "rows.jsonl:3: a int, an object is needed",
        "rows.jsonl:4: not JSON at character 9: Expecting value",
    ]
    assert found[3] == "rows.jsonl:6: column text: text is needed, not a int"
    assert found[4].startswith("rows.jsonl:7: column text: 'utf-8' codec can't encode")
    assert found[5] == "rows.jsonl:8: column image: a path is needed, not a list"
    assert found[6].startswith("rows.jsonl:9: not JSON: ")
    assert jsonl.count() == len(rows(jsonl)) == 8


def test_an_open_quotation_mark_does_not_swallow_the_rest(tmp_path: Path) -> None:
    table = open_table(manifest(tmp_path, 'text\nx\n"never closed\ny\nz\n'), ANY)
    with pytest.raises(TableError, match=r"rows\.csv:5: .*quotation mark"):
        rows(table)


def test_a_line_with_misplaced_quotation_marks_is_a_bad_row(tmp_path: Path) -> None:
    text = 'text,label\na,1\n"b" or c,2\n"two ""or\nmore"" lines",3\n\n"d"e,x\n5 " long,5,6\nf,7\n'
    text = text.replace("5 ", '5 "')
    table = open_table(manifest(tmp_path, text), ANY)
    assert reasons(table) == [
        f"rows.csv:{line}: ',' expected after '\"'; a quotation mark inside of a quoted text is written twice"
        for line in (3, 7)
    ] + ["rows.csv:8: 3 fields, the first line names 2"]
    sound = [(row.number, row.files["text"].content, row.facts) for row in rows(table) if isinstance(row, Row)]
    assert sound == [
        (0, b"a", {"label": 1}),
        (2, b'two "or\nmore" lines', {"label": 3}),
        (5, b"f", {"label": 7}),  # x is no label, as its line is none
    ]
    assert table.count() == 6
    check_slices(table)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('text\nx\n"a "b" is\nopen"\n', 3),
        ('text\nx\n"a\nb"c\ny\n', 4),  # of two lines
        ('text\nx\n"a 5" pipe\nis open"\ny\n', 4),
        ('text\nx\n"a 5" pipe\nis\nopen"\ny\n', 5),
    ],
)
def test_quotation_marks_that_hide_where_records_begin_are_refused(tmp_path: Path, text: str, line: int) -> None:
    with pytest.raises(TableError, match=rf"rows\.csv:{line}: .*quotation mark"):
        rows(open_table(manifest(tmp_path, text), ANY))


def test_a_first_line_with_misplaced_quotation_marks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"rows\.csv:1: .*; names of the columns are needed there"):
        open_table(manifest(tmp_path, '"image"s,text\na,b\n'), ANY)


def test_long_fields_are_read(tmp_path: Path) -> None:
    (row,) = good(open_table(manifest(tmp_path, f"text\n{'x ' * 200_000}\n"), ANY))
    assert len(row.files["text"].content or b"") == 400_000


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_manifests_that_are_not_utf8_name_the_line(tmp_path: Path, name: str) -> None:
    text = "text\nok\ngr\xf6\xdfe\n" if name.endswith("csv") else '{"text": "ok"}\n\n{"text": "gr\xf6\xdfe"}\n'
    with pytest.raises(TableError, match=rf"{name}:3: not UTF-8"):
        open_table(manifest(tmp_path, text.encode("latin-1"), name), ANY)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.csv", "no such file or folder$"),
        ("user/name", "no such file or folder; data sets of the hub are written hf:user/name"),
        ("rows.json", r"manifests end in \.csv \.tsv \.jsonl \.ndjson"),
        ("rows.jsonl", "holds no JSON object"),
        ("empty", "no files to read"),
        ("hf:", "is needed"),
        ("hf:a:b:c:d", "is needed"),
    ],
)
def test_other_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    manifest(tmp_path, "{}", "rows.json")
    manifest(tmp_path, "\n\n", "rows.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TableError, match=message):
        open_table(source, ANY)


def check_slices(table: Table) -> None:
    """Slices are disjoint and complete, and each can start anywhere."""
    everything = rows(table)
    for count in (1, 2, 3, len(everything) + 2):
        parts = [rows(table, Slice(index, count)) for index in range(count)]
        assert sorted((row for part in parts for row in part), key=lambda row: row.number) == everything
        for index, part in enumerate(parts):
            for start in range(len(everything) + 1):
                assert rows(table, Slice(index, count), start) == [row for row in part if row.number >= start]


def test_slices_of_manifests_and_folders(tmp_path: Path) -> None:
    check_slices(open_table(manifest(tmp_path, "text\na\n\nb\nc,d\ne\n"), ANY))
    check_slices(open_table(manifest(tmp_path, '{"text": "a"}\n\n[]\n{"text": "b"}\n', "rows.jsonl"), ANY))
    for name in "abcde":
        (tmp_path / f"{name}.txt").touch()
    check_slices(open_table(str(tmp_path), ANY))


def test_a_fingerprint_sees_every_change(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.txt").write_text("x")
    seen = [open_table(str(tmp_path / "f"), ANY).fingerprint]
    (tmp_path / "f" / "a.txt").write_text("y")
    os.utime(tmp_path / "f" / "a.txt", ns=(1, 1))
    seen.append(open_table(str(tmp_path / "f"), ANY).fingerprint)
    (tmp_path / "f" / "a.txt").rename(tmp_path / "f" / "b.txt")
    seen.append(open_table(str(tmp_path / "f"), ANY).fingerprint)
    seen.append(open_table(manifest(tmp_path, "text\na\n"), ANY).fingerprint)
    seen.append(open_table(manifest(tmp_path, "text\nb\n"), ANY).fingerprint)
    assert all(one != other for at, one in enumerate(seen) for other in seen[:at])
    assert open_table(str(tmp_path / "rows.csv"), ANY).fingerprint == seen[-1]


def test_a_folder_pairs_files_by_their_path(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    elsewhere = tmp_path / "elsewhere"
    for path in ("b/x.v1.JPG", "b/x.v1.txt", "b/x.v1.json", "a/x.wav", "x.flac", "x.opus", "y.gif", ".hidden.txt"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    for path in ("notes.pdf", "README", "rows.csv", ".git/x.txt"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    elsewhere.mkdir()
    (elsewhere / "z.txt").touch()
    (folder / "link").symlink_to(elsewhere)
    (folder / "nowhere.txt").symlink_to("gone")
    table = open_table(str(folder), ANY)

    assert {row.name: row.files for row in rows(table) if isinstance(row, Row)} == {
        "a/x": {"audio": File("a/x.wav")},
        "b/x.v1": {"image": File("b/x.v1.JPG"), "json": File("b/x.v1.json"), "text": File("b/x.v1.txt")},
        "link/z": {"text": File("link/z.txt")},
        "nowhere": {"text": File("nowhere.txt")},
        "y": {"image": File("y.gif")},
    }
    assert [(row.where, row.reason) for row in rows(table) if isinstance(row, Bad)] == [
        (f"{folder}/x", "x.flac and x.opus")
    ]
    (note,) = table.notes
    assert note.endswith("passed by: 1 README, 1 .pdf, 1 .csv")
    with pytest.raises(TableError, match="a folder has no columns"):
        open_table(str(folder), Columns(image="x"))


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    with pytest.raises(TableError, match="a/up: a symbolic link to a folder that it lies in"):
        open_table(str(tmp_path), ANY)


def hf_data() -> Any:
    features = {
        "img": datasets.Image(),
        "mask": datasets.List(datasets.Image()),
        "text": datasets.Value("string"),
        "sound": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "raw": datasets.List(datasets.Value("float32")),
    }
    column: dict[str, list[Any]] = {
        "img": [{"path": "a.png", "bytes": b"PNG a"}, None, {"path": None, "bytes": b"PNG c"}],
        "mask": [[], [], []],
        "text": ["one", "", None],
        "sound": [{"path": None, "bytes": b"WAV a"}, {"path": "s.wav", "bytes": b"WAV b"}, None],
        "label": [0, 1, 1],
        "raw": [[1.0], [2.0], []],
    }
    made = datasets.Dataset.from_dict(column, features=datasets.Features(features))
    return made.cast_column("sound", datasets.Audio())  # to make it so at once would need torchcodec


HF_COLUMNS = Columns(image="img", audio="sound")
HF_ROWS: list[tuple[str | None, dict[str, File], int]] = [
    ("a", {"image": File("a.png", b"PNG a"), "text": File(None, b"one"), "audio": File(None, b"WAV a")}, 0),
    ("s", {"audio": File("s.wav", b"WAV b")}, 1),
    (None, {"image": File(None, b"PNG c")}, 1),
]


def check_data_set(table: Table) -> None:
    found = [(row.name, row.files, row.facts["label"]) for row in good(table)]
    assert found == HF_ROWS
    assert [row.facts["raw"] for row in good(table)] == [[1.0], [2.0], []]
    assert "mask" not in good(table)[0].facts
    assert table.notes == [
        "column 'mask' holds List and is left out",
        "labels are numbers; their names, for eval.classes: [cat, dog]",
    ]
    check_slices(table)


def test_a_saved_data_set_gives_undecoded_bytes(tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    hf_data().with_format("numpy").save_to_disk(folder)
    table = open_table(folder, HF_COLUMNS)
    assert table.count() == 3
    check_data_set(table)
    assert open_table(folder, HF_COLUMNS).fingerprint == table.fingerprint

    datasets.DatasetDict({"train": hf_data(), "test": hf_data()}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(TableError, match=f"give one of {tmp_path}/both/test, {tmp_path}/both/train"):
        open_table(str(tmp_path / "both"), ANY)


def test_a_streamed_data_set_gives_undecoded_bytes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        hf_data().to_parquet(tmp_path / "pq" / f"{split}-00000.parquet")
    table = open_table(f"hf:{tmp_path}/pq:train", HF_COLUMNS)
    assert table.count() is None
    check_data_set(table)

    for source, message in (
        (f"hf:{tmp_path}/pq", "several splits; add one of :train, :test"),
        (f"hf:{tmp_path}/pq:tran", "no split 'tran'; add one of :train, :test"),
        (f"hf:{tmp_path}/pq:other:train", "BuilderConfig 'other' not found"),
        ("hf:nobody/nothing", "Couldn't reach 'nobody/nothing'"),
    ):
        with pytest.raises(TableError, match=message):
            open_table(source, ANY)


def test_columns_of_data_sets_that_are_no_files_are_refused(tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    hf_data().save_to_disk(folder)
    for wanted, message in (
        (Columns(audio="raw"), r"column 'raw' holds List.*for audio, Audio, bytes or paths are needed"),
        (Columns(text="img"), "column 'img' holds Image.*for text, text are needed"),
        (Columns(image="imgs"), "did you mean img"),
        (Columns(text_files=True), "must hold the text itself"),
    ):
        with pytest.raises(TableError, match=message):
            open_table(folder, wanted)


def test_an_image_folder_is_read_by_path(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "birds"
    for name in ("crow", "owl"):
        (folder / "train" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / "train" / name / "1.png")
    table = open_table(f"hf:{folder}", ANY)
    assert table.folder == folder
    assert [(row.files["image"], row.facts) for row in good(table)] == [
        (File(str(folder / "train" / name / "1.png")), {"label": label}) for label, name in enumerate(("crow", "owl"))
    ]

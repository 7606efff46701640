"""What the report draws: that it is true to its sources, and that it stays within its size."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.errors import UserError
from data.shards import write_shards
from data.source import Source
from eval import page
from eval.page import Joint
from tests.tiny import open_shards, picture, samples

HOSTILE = "</script><img src=x onerror=alert(1)>"


def random_joint(rows: Sequence[int], seed: int, classes: int = 3, width: int = 8) -> Joint:
    """Random directions; a sample's class is its row modulo ``classes``."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.tensor(rows)
    groups = places % classes
    embeddings = torch.randn(len(rows), width, generator=generator)
    return Joint(embeddings, places, page.class_names(groups), groups, places)


def png(side: int, seed: int = 0) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, format="png")
    return file.getvalue()


def write(folder: Path, *changes: dict[str, Any], max_samples: int = 2) -> Source:
    """Tiny samples, changed one by one: a member that becomes None is left out."""
    changed = [
        {name: value for name, value in {**sample, **change}.items() if value is not None}
        for sample, change in zip(samples("test", len(changes)), changes, strict=True)
    ]
    return open_shards(write_shards(iter(changed), folder / "test", max_samples=max_samples))


def content(uri: str, kind: str) -> bytes:
    head, _, coded = uri.partition(",")
    assert head == f"data:{kind};base64"
    return base64.b64decode(coded)


# ---- Curves ----


def test_curves_are_the_numbers_of_all_lines(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 3.0, "skipped_samples": [], "flag": True},
        {"step": 2, "loss": None, "rankme/image": 4},
        {"step": 3, "loss": 1.5},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')  # still being written
    assert page.read_curves(path) == {"loss": [[1, 3.0], [3, 1.5]], "rankme/image": [[2, 4]]}
    assert page.read_curves(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', "3"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2"):
        page.read_curves(path)


@pytest.mark.parametrize("count", [500, 501, 503, 1000, 12_345])
def test_thinning_keeps_the_ends_and_every_spike(count: int) -> None:
    points = [[float(i), 0.0] for i in range(count)]
    points[count // 3][1], points[count // 2][1] = 9.0, -9.0
    kept = page.thinned(points, 500)
    assert len(kept) <= 500
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert {value for _, value in kept} == {0.0, 9.0, -9.0}


# ---- Confusion ----


def test_rows_of_the_confusion_are_the_true_classes() -> None:
    true, predicted = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 2, 2, 1, 1])
    found = page.confusion(predicted, true, ["a", "b", "c"])
    assert found == {"classes": ["a", "b", "c"], "counts": [[1, 0, 2], [0, 1, 0], [0, 1, 0]]}
    # A class that is only ever predicted has a row, too, and without names their numbers are shown.
    assert page.confusion(torch.tensor([7]), torch.tensor([4])) == {"classes": ["4", "7"], "counts": [[0, 1], [0, 0]]}


def test_of_many_classes_the_most_missed_ones_stand_alone() -> None:
    true = torch.arange(100).repeat(5)
    predicted = true.clone()
    predicted[true == 77] = 5
    predicted[true == 12] = 99
    found = page.confusion(predicted, true)
    classes, counts = found["classes"], torch.tensor(found["counts"])
    assert len(classes) == page.CLASSES
    assert classes[-1] == f"{100 - page.CLASSES + 1} others"
    assert counts.sum() == 500
    at = {name: i for i, name in enumerate(classes)}
    assert counts[at["77"], at["5"]] == 5
    assert counts[at["12"], -1] == 5
    assert counts[-1, -1] == 5 * (100 - page.CLASSES + 1)


def test_a_sample_of_several_classes_has_all_their_names() -> None:
    labels = torch.tensor([[True, False, True], [False, False, False]])
    assert page.class_names(labels, ["a", "b", "c"]) == ["a + c", "none"]
    assert page.class_names(torch.tensor([2, 0]), ["a", "b", "c"]) == ["c", "a"]


# ---- Map ----


def test_pca_is_of_unit_vectors_and_says_what_it_keeps() -> None:
    joint = random_joint(range(40), 0)
    scaled = joint._replace(embeddings=joint.embeddings * torch.rand(40, 1).add(0.1))
    found = page.joint_map({"image": scaled})
    assert found is not None
    units = torch.nn.functional.normalize(joint.embeddings.double())
    centred = units - units.mean(0)
    spread = torch.linalg.svdvals(centred).square()
    assert f"keep {100 * float(spread[:2].sum() / spread.sum()):.0f} % of the variance" in found["caption"]
    flat = torch.tensor([point[:2] for point in found["points"]], dtype=torch.float64)
    torch.testing.assert_close(flat.square().sum(0), spread[:2], rtol=1e-3, atol=1e-3)
    # Which point is which: inner products with the plane's own axes.
    axes = torch.linalg.lstsq(flat, centred).solution
    torch.testing.assert_close(flat @ axes @ axes.T, flat, rtol=1e-2, atol=1e-3)


def test_points_are_named_after_their_samples() -> None:
    joint = {"image": random_joint(range(0, 30, 2), 0), "audio": random_joint([3, 4, 29], 1)}
    found = page.joint_map(joint)
    assert found is not None
    named = [tuple(point[2:]) for point in found["points"]]
    assert named == [("image", str(row % 3), str(row)) for row in range(0, 30, 2)] + [
        ("audio", str(row % 3), str(row)) for row in (3, 4, 29)
    ]


def test_drawn_samples_stay_in_all_their_modalities() -> None:
    joint = {"image": random_joint(range(100), 0), "text": random_joint(range(100), 1)}
    first, again, other = (page.joint_map(joint, limit=30, seed=seed) for seed in (0, 0, 1))
    assert first is not None
    assert other is not None
    assert first == again
    assert "15 of 100 samples" in first["caption"]
    rows = {name: [point[4] for point in first["points"] if point[2] == name] for name in joint}
    assert rows["image"] == rows["text"]
    assert len(set(rows["image"])) == 15
    assert rows["image"] != [point[4] for point in other["points"] if point[2] == "image"]


def test_tsne_keeps_neighbours_together_and_is_always_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(8)[:3].repeat_interleave(12, 0)
    joint = random_joint(range(36), 0)._replace(embeddings=centres + 0.05 * torch.randn(36, 8, generator=generator))
    found = page.joint_map({"image": joint}, "tsne")
    assert found is not None
    assert found == page.joint_map({"image": joint}, "tsne")
    assert found["caption"].startswith("t-SNE")
    flat = torch.tensor([point[:2] for point in found["points"]])
    distances = torch.cdist(flat, flat).fill_diagonal_(torch.inf)
    cluster = torch.arange(36) // 12
    assert bool((cluster[distances.argmin(1)] == cluster).all())


def test_there_is_no_map_of_nothing() -> None:
    assert page.joint_map({}) is None
    assert page.joint_map({"image": random_joint(range(3), 0)}) is None
    assert page.joint_map({"image": random_joint(range(30), 0, width=1)}) is None


def test_a_map_that_can_not_be_drawn_is_refused() -> None:
    with pytest.raises(UserError, match="'umap' is unknown; allowed are pca, tsne"):
        page.joint_map({"image": random_joint(range(30), 0)}, "umap")
    broken = random_joint(range(30), 0)
    broken.embeddings[4] = 0
    with pytest.raises(ValueError, match="image embeddings must have finite, non-zero rows"):
        page.joint_map({"image": broken})


# ---- Gallery ----


def test_found_samples_are_the_nearest_ones() -> None:
    queries, gallery = random_joint(range(20), 0), random_joint(range(5, 45), 1)
    for listed in page.found_by(queries, gallery):
        cosines = torch.cosine_similarity(queries.embeddings[int(listed["query"])], gallery.embeddings)
        nearest = cosines.topk(5)
        assert [int(found["sample"]) for found in listed["found"]] == (nearest.indices + 5).tolist()
        assert [found["cosine"] for found in listed["found"]] == pytest.approx(nearest.values.tolist(), abs=1e-4)
        same = [int(found["sample"]) % 3 == int(listed["query"]) % 3 for found in listed["found"]]
        assert [found["correct"] for found in listed["found"]] == same


def test_queries_are_drawn_by_seed_among_those_with_an_answer() -> None:
    queries, gallery = random_joint(range(50), 0, classes=25), random_joint(range(4), 1, classes=25)
    drawn = {seed: [listed["query"] for listed in page.found_by(queries, gallery, seed)] for seed in (0, 1, 2)}
    assert drawn[0] == [listed["query"] for listed in page.found_by(queries, gallery, 0)]
    assert len({tuple(rows) for rows in drawn.values()}) > 1
    assert all(int(row) % 25 < 4 for rows in drawn.values() for row in rows)
    assert all(len(rows) == page.QUERIES for rows in drawn.values())
    assert page.found_by(queries, gallery._replace(groups=gallery.groups + 100)) == []


def test_equal_inputs_are_found_once() -> None:
    gallery = random_joint(range(9), 1)
    alike = gallery._replace(embeddings=gallery.embeddings[:3].repeat(3, 1), content=torch.arange(3).repeat(3))
    for listed in page.found_by(random_joint(range(9), 0), alike):
        # Which one of equal inputs it is depends on the last bit of a product.
        assert sorted(int(found["sample"]) % 3 for found in listed["found"]) == [0, 1, 2]


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="one width, got 8 and 4"):
        page.found_by(random_joint(range(9), 0), random_joint(range(9), 1, width=4))


# ---- Samples ----


def read(source: Source, rows: Sequence[int], limit: int = 10**7) -> tuple[dict[str, Any], list[str]]:
    return page.read_samples(source, {str(row): f"class {row}" for row in rows}, limit)


def test_samples_are_read_from_their_places(tmp_path: Path) -> None:
    source = write(tmp_path, *[{}] * 5)  # in three shards
    shown, left_out = read(source, [4, 0, 1])
    assert left_out == []
    assert {row: (sample["key"], sample["class"]) for row, sample in shown.items()} == {
        row: (f"test-00{row}", f"class {row}") for row in ("4", "0", "1")
    }
    original = list(samples("test", 5))[4]
    assert content(shown["4"]["audio"], "audio/flac") == original["flac"]
    assert shown["4"]["text"] == bytes(original["txt"]).decode()  # type: ignore[arg-type]
    assert shown["4"]["notes"] == []


def test_thumbnails_are_small_and_true(tmp_path: Path) -> None:
    wide = io.BytesIO()
    Image.new("RGB", (400, 100), (200, 30, 60)).save(wide, format="png")
    shown, _ = read(write(tmp_path, {"png": wide.getvalue()}, {"png": png(500)}, {}), [0, 1, 2])
    flat = Image.open(io.BytesIO(content(shown["0"]["image"], "image/png")))
    assert flat.size == (page.THUMBNAIL, page.THUMBNAIL // 4)
    assert flat.getpixel((5, 5)) == (200, 30, 60)
    noisy = Image.open(io.BytesIO(content(shown["1"]["image"], "image/jpeg")))
    assert noisy.size == (page.THUMBNAIL, page.THUMBNAIL)
    tiny = Image.open(io.BytesIO(content(shown["2"]["image"], "image/jpeg")))
    original = picture(2, np.random.default_rng([4, ord("t"), 2]))
    assert tiny.size == original.size  # never enlarged


def test_what_can_not_be_shown_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, {"png": b"no picture"}, {"flac": None}, {"txt": b"x" * 1000}, {})
    monkeypatch.setattr(page, "MAX_CLIP", len(bytes(next(samples("test", 1))["flac"])) // 2)  # type: ignore[arg-type]
    shown, _ = read(source, [0, 1, 2, 3])
    assert "image" not in shown["0"]
    assert any(note.startswith("image left out: image of 10 bytes") for note in shown["0"]["notes"])
    assert shown["1"]["notes"] == []  # it has none
    assert "audio" not in shown["3"]
    assert shown["3"]["notes"][0].startswith("audio left out: a clip of ")
    assert len(shown["2"]["text"]) == page.MAX_TEXT
    assert shown["2"]["text"].endswith("x…")


def test_the_first_samples_have_the_space_and_thumbnails_go_before_sounds(tmp_path: Path) -> None:
    source = write(tmp_path, *[{"png": png(60, seed=i)} for i in range(5)])
    whole, _ = read(source, range(5))
    sounds = [len(json.dumps(sample["audio"])) for sample in whole.values()]
    limit = len(json.dumps(whole)) - sum(sounds) + 2 * sounds[0]
    shown, left_out = read(source, range(5), limit)
    assert all("image" in sample and "text" in sample for sample in shown.values())
    assert len(json.dumps(shown)) <= limit + 500  # the notes on what is missing
    silent = [row for row, sample in shown.items() if "audio" not in sample]
    assert silent in (["2", "3", "4"], ["1", "2", "3", "4"])  # the first ones have theirs
    assert left_out == [f"audio of {len(silent)} samples: the page would be too large"]
    assert all("audio left out: the page would be too large" in shown[row]["notes"] for row in silent)

    nothing, left_out = read(source, range(5), 0)
    assert all(set(sample) == {"key", "class", "notes"} for sample in nothing.values())
    assert len(left_out) == 3


# ---- Pictures ----


def test_pictures_are_from_the_first_to_the_last(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"step-{i}.png").write_bytes(png(8, seed=i))
    shown, notes = page.read_pictures(tmp_path, 10**6)
    assert [each["title"] for each in shown] == ["step-0", "step-3", "step-5", "step-8"]
    assert content(shown[1]["png"], "image/png") == png(8, seed=3)
    assert notes == ["5 of 9 pictures of the run"]
    one = len(json.dumps(shown[-1]))
    assert [each["title"] for each in page.read_pictures(tmp_path, 2 * one)[0]] == ["step-5", "step-8"]
    assert page.read_pictures(tmp_path / "none", 10**6) == ([], [])


# ---- The whole page ----


def test_a_page_is_whole_and_within_its_size(tmp_path: Path) -> None:
    source = write(tmp_path, *[{"txt": HOSTILE.encode(), "png": png(96, seed=i)} for i in range(12)], max_samples=30)
    joint = {name: random_joint(range(12), i) for i, name in enumerate(("image", "text", "audio"))}
    labels: Tensor = joint["image"].groups
    confusions = {"linear/image": page.confusion(labels, labels)}
    made = page.make(source, joint, confusions)
    assert set(made) == {"schema", "left_out", "confusion", "map", "gallery", "samples"}  # no run, so no curves
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert set(made["gallery"]) == {f"{a}_to_{b}" for a in joint for b in joint if a != b}
    named = {point[4] for point in made["map"]["points"]}
    named |= {row for queries in made["gallery"].values() for query in queries for row in page._rows_of(query)}
    assert named == set(made["samples"])
    assert made["samples"]["4"]["class"] == "1"

    small = page.make(source, joint, confusions, limit=60_000)
    assert len(json.dumps(small)) < 62_000 < len(json.dumps(made))
    assert set(small["samples"]) == named
    assert small["left_out"]


def test_a_page_without_a_joint_space_has_the_rest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "pictures").mkdir(parents=True)
    (run / "pictures" / "step-1.png").write_bytes(png(8))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    made = page.make(write(tmp_path, {}), {}, {}, run)
    assert made == {
        "schema": page.SCHEMA,
        "left_out": [],
        "curves": {"loss": [[1, 2.0]]},
        "pictures": [{"title": "step-1", "png": f"data:image/png;base64,{base64.b64encode(png(8)).decode()}"}],
    }

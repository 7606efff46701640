import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from eval.compare import CompareError, compare, paired_bootstrap, plot, table
from eval.metrics import bootstrap_interval


def scores(n: int, share: float, seed: int) -> Tensor:
    return (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share).double()


def folder(path: Path, tasks: dict[str, Any], split: str = "0123456789abcdef", schema: int = 2) -> Path:
    """A folder of results; a task is its scores, or (scores, rows), or (scores, rows, content)."""
    path.mkdir(parents=True)
    about = {"splits": {"test": {"sha256": split}}}
    (path / "results.json").write_text(json.dumps({"schema": schema, "about": about, "results": {}}))
    tensors = dict[str, Tensor]()
    for task, given in tasks.items():
        parts = list(given) if isinstance(given, tuple) else [given]
        parts += [torch.arange(len(parts[0]))] * (3 - len(parts))
        tensors |= {f"{task}.{key}": x.clone() for key, x in zip(("correct", "rows", "content"), parts, strict=True)}
    save_file(tensors, path / "predictions.safetensors")
    return path


# The bootstrap


def test_equal_scores_differ_by_exactly_nothing() -> None:
    a = torch.rand(300, generator=torch.Generator().manual_seed(0))
    for groups in (None, torch.arange(300) // 7):
        assert paired_bootstrap(a, a.clone(), groups=groups) == (0.0, (0.0, 0.0), 0.0)
        assert paired_bootstrap(a, a).verdict == "unclear"


def test_a_known_difference_is_found_which_unpaired_resampling_would_miss() -> None:
    # b fails where a does, and on 3 % more rows.
    a = scores(1000, 0.6, 0)
    b = a * scores(1000, 0.95, 1)
    found = paired_bootstrap(a, b)
    assert found.value == pytest.approx((a - b).mean().item())
    assert found.interval is not None
    assert 0 < found.interval[0] < found.value < found.interval[1]
    assert (found.ahead, found.verdict) == (1.0, "ahead")
    behind = paired_bootstrap(b, a)
    assert (behind.ahead, behind.verdict) == (0.0, "behind")
    assert behind.interval == pytest.approx((-found.interval[1], -found.interval[0]))
    low_a, high_a = bootstrap_interval(a, seed=1)
    low_b, high_b = bootstrap_interval(b, seed=2)
    unpaired = ((high_a - low_a) ** 2 + (high_b - low_b) ** 2) ** 0.5
    assert found.interval[1] - found.interval[0] < unpaired / 2
    assert low_a < high_b  # intervals of their own overlap


@pytest.mark.parametrize("grouped", [False, True])
def test_intervals_are_those_of_the_mean_difference(grouped: bool) -> None:
    a, b = scores(200, 0.7, 0), scores(200, 0.6, 1)
    groups = torch.randint(40, (200,), generator=torch.Generator().manual_seed(2)) * 10**15 if grouped else None
    found = paired_bootstrap(a, b, groups=groups, seed=5)
    assert found.interval == bootstrap_interval(a - b, groups=groups, seed=5)


def test_groups_widen_the_interval_and_share_ahead_follows_the_normal_law() -> None:
    sources = torch.arange(40).repeat_interleave(25)
    a, b = scores(40, 0.6, 0)[sources], scores(40, 0.5, 1)[sources]
    alone, together = paired_bootstrap(a, b), paired_bootstrap(a, b, groups=sources)
    assert alone.interval is not None
    assert together.interval is not None
    width = together.interval[1] - together.interval[0]
    assert width > 4 * (alone.interval[1] - alone.interval[0])  # five times as wide: 40 draws, not 1,000
    one_each = paired_bootstrap(a[::25], b[::25])
    assert (together.interval, together.ahead) == (one_each.interval, one_each.ahead)
    # Scores of any size: equal means, which are nobody's lead, hardly occur.
    a, b = (torch.rand(2000, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
    found = paired_bootstrap(a, b, samples=4000)
    z = found.value / ((a - b).std().item() / 2000**0.5)
    assert found.ahead == pytest.approx(0.5 * (1 + torch.erf(torch.tensor(z / 2**0.5)).item()), abs=0.02)


def test_the_bootstrap_refuses_what_is_not_paired() -> None:
    ones = torch.ones(3)
    with pytest.raises(ValueError, match=r"one shape \(N,\) with N >= 1, got \(3,\) and \(2,\)"):
        paired_bootstrap(ones, torch.ones(2))
    with pytest.raises(ValueError, match=r"^groups must be \(3,\) like a and b, got \(2,\)"):
        paired_bootstrap(ones, ones, groups=torch.arange(2))
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        paired_bootstrap(ones, ones, samples=0)
    with pytest.raises(ValueError, match="got NaN or infinity in 1 of 3 rows"):
        paired_bootstrap(ones, torch.tensor([1.0, torch.nan, 0.0]))
    assert paired_bootstrap(ones, 0 * ones, groups=torch.zeros(3)) == (1.0, None, None)


# Folders


def test_rows_are_matched_by_number_and_in_groups_of_either_side(tmp_path: Path) -> None:
    # In a, rows 3 and 4 are one input; in b, rows 4 and 5: the three are one group.
    a = folder(
        tmp_path / "a" / "eval",
        {"linear/image": (torch.tensor([1.0, 0, 1, 1]), torch.tensor([5, 3, 4, 8]), torch.tensor([3, 1, 1, 7]))},
    )
    b = folder(
        tmp_path / "b" / "eval",
        {
            "linear/image": (
                torch.tensor([0.0, 0.5, 1, 0, 0]),
                torch.tensor([3, 4, 5, 8, 9]),
                torch.tensor([1, 2, 2, 3, 4]),
            )
        },
    )
    comparison = compare([a, b])
    (row,) = comparison.compared
    assert (comparison.names, row.task, row.a, row.b) == (["a", "b"], "linear/image", "a", "b")
    assert (row.rows, row.groups, row.left_out) == (4, 2, 1)
    assert (row.mean_a, row.mean_b) == (0.75, 0.375)
    assert row.difference == paired_bootstrap(
        torch.tensor([0, 1, 1, 1.0]), torch.tensor([0, 0.5, 1, 0]), groups=torch.tensor([0, 0, 0, 1])
    )
    assert "linear/image: 1 rows were scored by only one of a and b, and are left out" in table(comparison)


def test_every_two_folders_in_every_task_that_both_have(tmp_path: Path) -> None:
    same = scores(50, 0.5, 0)
    folders = [
        folder(tmp_path / "x", {"knn/image": same, "linear/text": same}),
        folder(tmp_path / "y", {"knn/image": same, "linear/text": scores(50, 0.5, 1)}),
        folder(tmp_path / "z", {"knn/image": torch.zeros(50), "fusion/mean": same}),
    ]
    comparison = compare(folders)
    assert [(row.task, row.a, row.b) for row in comparison.compared] == [
        *(("knn/image", "x", "y"), ("knn/image", "x", "z"), ("knn/image", "y", "z")),
        ("linear/text", "x", "y"),
    ]
    assert comparison.compared[0].difference == (0.0, (0.0, 0.0), 0.0)
    assert comparison.only_in == {"linear/text": ["x", "y"], "fusion/mean": ["z"]}
    lines = table(comparison).splitlines()
    assert len(lines) == 2 + 4 + 2
    assert lines[2].split() == [
        *("knn/image", "x", "y", f"{100 * same.mean():.1f}", f"{100 * same.mean():.1f}", "+0.0"),
        *("+0.0", "..", "+0.0", "0.0%", "50", "50", "unclear"),
    ]
    assert lines[3].endswith("ahead")
    assert lines[-2:] == ["linear/text: only in x, y", "fusion/mean: only in z"]


def test_other_test_splits_are_refused(tmp_path: Path) -> None:
    tasks = {"linear/image": scores(9, 0.5, 0)}
    a, b = folder(tmp_path / "a", tasks), folder(tmp_path / "b", tasks, split="fedcba9876543210")
    with pytest.raises(CompareError, match=r"^a and b were scored on different test splits .*0123456789ab.*fedcba98"):
        compare([a, b])


def test_folders_that_cannot_be_compared_say_why(tmp_path: Path) -> None:
    x = scores(9, 0.5, 0)
    a = folder(tmp_path / "a", {"linear/image": x})
    for folders, message in (([a], "two or more folders, got 1"), ([a, tmp_path / "b" / ".." / "a"], "is given twice")):
        with pytest.raises(CompareError, match=message):
            compare(folders)
    with pytest.raises(FileNotFoundError):
        compare([a, tmp_path / "none"])
    bad: list[tuple[dict[str, Any], str]] = [
        ({"linear/image": (x, torch.arange(9) + 9)}, "linear/image: a and b0 scored no row in common"),
        ({"knn/image": x}, r"no task is in two of the folders: a has \['linear/image'\], b1 has \['knn/image'\]"),
        ({"linear/image": (x, torch.zeros(9).long())}, "b2/predictions.safetensors: linear/image.rows must differ"),
        ({"linear/image": x / 0}, "b3/predictions.safetensors: linear/image.correct must be finite"),
        (
            {"linear/image": (x, torch.arange(8))},
            r"linear/image: correct, rows and content must have one shape .*\(8,\)",
        ),
        ({"linear/image": (x, torch.rand(9))}, "linear/image: rows and content must be int64, got torch.float32 and"),
    ]
    for i, (tasks, message) in enumerate(bad):
        with pytest.raises(CompareError, match=message):
            compare([a, folder(tmp_path / f"b{i}", tasks)])
    b = folder(tmp_path / "b", {"linear/image": x})
    save_file({"linear/image.correct": x, "linear/image.rows": torch.arange(9)}, b / "predictions.safetensors")
    with pytest.raises(CompareError, match=r"linear/image.correct has no linear/image.content beside it"):
        compare([a, b])
    (b / "predictions.safetensors").write_bytes(b"damaged!")
    with pytest.raises(CompareError, match=r"b/predictions.safetensors: not a safetensors file"):
        compare([a, b])
    for content, message in (
        ("{", "b/results.json: not JSON"),
        ("[]", "schema must be 2, got None"),
        ('{"schema": 1}', "schema must be 2, got 1"),
        ('{"schema": 2, "about": {"splits": {"test": null}}}', "about.splits.test.sha256 is missing"),
    ):
        (b / "results.json").write_text(content)
        with pytest.raises(CompareError, match=message):
            compare([a, b])


# The plot


def test_the_plot_shows_each_difference_in_its_colour(tmp_path: Path) -> None:
    base = scores(400, 0.5, 0)
    a = folder(tmp_path / "a$1", {"linear/image": base, "knn/image": base, "linear/text": base})
    b = folder(
        tmp_path / "b$2",
        {"linear/image": base * scores(400, 0.7, 1), "knn/image": scores(400, 0.5, 2), "linear/text": torch.ones(400)},
    )
    path = tmp_path / "out.png"
    plot(path, compare([a, b]))
    picture = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    colours = {colour: count for count, colour in picture.getcolors(2**24) or []}
    marks = [colours.get(colour, 0) for colour in ((0x3B, 0x6E, 0xA8), (0xC2, 0x70, 0x3D), (0x8A, 0x8A, 0x8A))]
    assert min(marks) > 50  # one ahead, one behind, one unclear


def test_the_plot_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = {"linear/image": scores(9, 0.5, 0)}
    comparison = compare([folder(tmp_path / "a", x), folder(tmp_path / "b", x)])
    with pytest.raises(CompareError, match=r"out.pdf: the name must end in .png"):
        plot(tmp_path / "out.pdf", comparison)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CompareError, match="the plot needs matplotlib"):
        plot(tmp_path / "out.png", comparison)

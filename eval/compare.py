"""Which of several encoders is ahead, and is that more than luck? Paired differences between folders of results."""

import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.errors import UserError
from data.index import write_whole
from eval.metrics import percentiles, resampled_means
from eval.panel import instances
from eval.report import SCHEMA, aligned

_AHEAD, _BEHIND, _UNCLEAR = "#3b6ea8", "#c2703d", "#8a8a8a"


class CompareError(UserError):
    """Results that can't be compared; says which, and why."""


class Difference(NamedTuple):
    """How far a is ahead of b on the same rows, in the unit of the scores.

    Attributes:
        value: mean score of a less that of b.
        interval: 95 % interval of ``value``; None with fewer than two groups of rows, which say nothing of luck.
        ahead: share in [0, 1] of resamples in which a's mean is above b's; equal ones don't count. None likewise.
    """

    value: float
    interval: tuple[float, float] | None
    ahead: float | None

    @classmethod
    def of(cls, value: float, means: Tensor) -> "Difference":
        """That of ``value``, from what it is in each resample: ``means`` (B,)."""
        return cls(value, percentiles(means), (means > 0).double().mean().item())

    @property
    def verdict(self) -> str:
        """``ahead`` or ``behind`` where the interval is on one side of 0, else ``unclear``."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return "unclear"
        return "ahead" if self.value > 0 else "behind"


class Compared(NamedTuple):
    """Two folders in one task.

    Attributes:
        task: such as ``linear/image``.
        a: name of the first folder.
        b: name of the second.
        mean_a: mean score of the first on the rows that both scored.
        mean_b: of the second.
        difference: of the two.
        rows: number of rows that both scored.
        groups: number of groups of rows that are independent of each other.
        left_out: rows that only one of them scored.
    """

    task: str
    a: str
    b: str
    mean_a: float
    mean_b: float
    difference: Difference
    rows: int
    groups: int
    left_out: int


class Comparison(NamedTuple):
    """Outcome of ``compare``.

    Attributes:
        names: of the folders, in the order given: what their paths don't have in common.
        compared: every task of every two folders that both have it.
        only_in: task -> names of the folders that have it, for tasks that not all have.
    """

    names: list[str]
    compared: list[Compared]
    only_in: dict[str, list[str]]


class _Scores(NamedTuple):
    """One task of one folder, each (n,): score, row in the test split, and content of each sample."""

    scores: Tensor
    rows: Tensor
    content: Tensor


def paired_bootstrap(
    a: Tensor, b: Tensor, *, groups: Tensor | None = None, samples: int = 1000, seed: int = 0
) -> Difference:
    """How far scores ``a`` (N,) are ahead of ``b`` (N,) of the same N rows.

    In each resample both are averaged over the same rows, so that what makes a row hard for both cancels. With
    ``groups`` (N,), integer ids, whole groups are resampled, as in ``bootstrap_interval``. The same ``seed`` gives the
    same answer on every device.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), section 13.3; Koehn 2004, Statistical
    Significance Tests for Machine Translation Evaluation, section 4, for resampling pairs.

    Raises:
        ValueError: ``a`` and ``b`` are not of one shape (N,) with N >= 1, or hold NaN or infinity; ``groups`` has
            another shape; ``samples`` is below 1.
    """
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"a and b must have one shape (N,) with N >= 1, got {tuple(a.shape)} and {tuple(b.shape)}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if groups is not None and groups.shape != a.shape:
        raise ValueError(f"groups must be {tuple(a.shape)} like a and b, got {tuple(groups.shape)}")
    by_row = (a.double() - b.double()).cpu()
    broken = int((~by_row.isfinite()).sum())
    if broken:
        raise ValueError(f"a and b must be finite, got NaN or infinity in {broken} of {len(a)} rows")
    value = by_row.mean().item()
    if len(a if groups is None else torch.unique(groups)) < 2:
        return Difference(value, None, None)
    return Difference.of(value, resampled_means(by_row[:, None], groups, samples, seed)[:, 0])


def compare(folders: Sequence[Path], samples: int = 1000) -> Comparison:
    """Every two of the folders in every task that both have, on the rows that both scored.

    A folder holds ``results.json`` and ``predictions.safetensors``. Rows are resampled in groups of equal content, as
    either folder sees it: encoders with views of their own may not agree on what is equal.

    Raises:
        CompareError: there are fewer than two folders, or one is given twice; a file is damaged, of another schema, or
            lacks what is needed; scores are not finite; test splits or labels differ; no task is in two
            folders; the two scored no row in common.
        OSError: a file can't be read.
    """
    names = _names(folders)
    splits, labels, scores = {}, {}, {}
    for name, folder in zip(names, folders, strict=True):
        splits[name], labels[name] = _scored_on(folder / "results.json")
        scores[name] = _read_scores(folder / "predictions.safetensors")
    first = names[0]
    for name in names[1:]:
        if splits[name] != splits[first]:
            raise CompareError(
                f"{first} and {name} were scored on different test splits (about.splits.test.sha256 is "
                f"{splits[first][:12]}... and {splits[name][:12]}...): score both on the same shards"
            )
        if labels[name] != labels[first]:
            raise CompareError(
                f"{first} and {name} were scored by different labels (about.eval.label is {labels[first]} and "
                f"{labels[name]}): score both by the same"
            )
    tasks = list(dict.fromkeys(task for name in names for task in scores[name]))
    compared = []
    for task in tasks:
        for a, b in combinations([name for name in names if task in scores[name]], 2):
            compared.append(_compare(task, a, b, scores[a][task], scores[b][task], samples))
    if not compared:
        raise CompareError(
            f"no task is in two of the folders: {', '.join(f'{n} has {list(scores[n])}' for n in names)}"
        )
    having = {task: [name for name in names if task in scores[name]] for task in tasks}
    return Comparison(names, compared, {task: have for task, have in having.items() if len(have) < len(names)})


def table(comparison: Comparison) -> str:
    """The differences as aligned text, in points (hundredths)."""
    lines = [("task", "a", "b", "score a", "score b", "a - b", "95 % interval", "a ahead in", "rows", "groups", "")]
    lines += [
        (
            *(row.task, row.a, row.b, f"{100 * row.mean_a:.1f}", f"{100 * row.mean_b:.1f}"),
            *difference_cells(row.difference),
            *(str(row.rows), str(row.groups), row.difference.verdict),
        )
        for row in comparison.compared
    ]
    notes = [
        f"{row.task}: {row.left_out} rows were scored by only one of {row.a} and {row.b}, and are left out"
        for row in comparison.compared
        if row.left_out
    ]
    notes += [f"{task}: only in {', '.join(having)}" for task, having in comparison.only_in.items()]
    return "\n".join([aligned(lines, left=(0, 1, 2, len(lines[0]) - 1)), *notes])


def difference_cells(difference: Difference) -> tuple[str, str, str]:
    """Value, interval and share ahead, for tables in points."""
    if difference.interval is None or difference.ahead is None:
        return f"{100 * difference.value:+.1f}", "", ""
    low, high = difference.interval
    return f"{100 * difference.value:+.1f}", f"{100 * low:+.1f} .. {100 * high:+.1f}", f"{difference.ahead:.1%}"


def plot(path: Path, comparison: Comparison) -> None:
    """Write the differences with their intervals as a PNG: a panel for every two folders, a line for every task.

    Raises:
        CompareError: the name does not end in .png, or matplotlib (extra ``plot``) is not installed.
        OSError: the file can't be written.
    """
    if path.suffix.lower() != ".png":
        raise CompareError(f"{path}: the name must end in .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise CompareError("the plot needs matplotlib: pip install -c constraints.txt -e '.[plot]'")
    from matplotlib.figure import Figure  # it takes its time

    pairs = list(dict.fromkeys((row.a, row.b) for row in comparison.compared))
    tasks = list(dict.fromkeys(row.task for row in comparison.compared))
    across = min(len(pairs), 3)
    down = -(-len(pairs) // across)
    size = (1.6 + 4.2 * across, 0.4 + down * (1.2 + 0.32 * len(tasks)))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for spare in grid.flat[len(pairs) :]:
        spare.set_visible(False)
    colours = {"ahead": _AHEAD, "behind": _BEHIND, "unclear": _UNCLEAR}
    for axes, (a, b) in zip(grid.flat, pairs, strict=False):
        axes.axvline(0, color="black", linewidth=0.8)
        axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        for row in comparison.compared:
            if (row.a, row.b) != (a, b):
                continue
            place, value = tasks.index(row.task), 100 * row.difference.value
            low, high = (100 * end for end in row.difference.interval or (row.difference.value,) * 2)
            colour = colours[row.difference.verdict]
            hollow = row.difference.interval is None  # nothing is known of its luck
            axes.hlines(place, low, high, color=colour, linewidth=2)
            axes.plot(value, place, "o", color=colour, markersize=6, markerfacecolor="white" if hollow else colour)
            axes.annotate(f"{value:+.1f}", (value, place), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        # Names come from paths: a $ in them begins no formula.
        axes.set_title(f"{a}\nminus {b}", fontsize=10, parse_math=False)
        axes.set_yticks(range(len(tasks)), tasks, fontsize=9)
        axes.set_ylim(len(tasks) - 0.4, -0.7)
        axes.tick_params(labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[max(0, len(pairs) - across) : len(pairs)]:
        axes.set_xlabel("difference in points, 95 % interval", fontsize=9)
        axes.tick_params(labelbottom=True)
    meaning = "the first is ahead (blue), behind (orange), or it is unclear (grey; hollow: too few inputs to tell)"
    figure.supxlabel(meaning if across > 1 else meaning.replace(", or", ",\nor"), fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    write_whole(path, file.getvalue())


def _compare(task: str, a: str, b: str, first: _Scores, second: _Scores, samples: int) -> Compared:
    in_a, in_b = torch.isin(first.rows, second.rows), torch.isin(second.rows, first.rows)
    x, y = (_Scores(*(t[both] for t in s)) for s, both in ((first, in_a), (second, in_b)))
    if not len(x.rows):
        raise CompareError(f"{task}: {a} and {b} scored no row in common")
    groups = instances(x.content, y.content)
    return Compared(
        task,
        a,
        b,
        x.scores.mean().item(),
        y.scores.mean().item(),
        paired_bootstrap(x.scores, y.scores, groups=groups, samples=samples),
        len(x.rows),
        len(torch.unique(groups)),
        int((~in_a).sum() + (~in_b).sum()),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """What the paths don't have in common at their ends: runs/a/eval and runs/b/eval are a and b."""
    if len(folders) < 2:
        raise CompareError(f"compare needs two or more folders, got {len(folders)}")
    parts = [list(folder.resolve().parts) for folder in folders]
    for i, path in enumerate(parts):
        if path in parts[:i]:
            raise CompareError(f"{folders[i]} is given twice")
    for end in (0, -1):
        while all(len(path) > 1 for path in parts) and len({path[end] for path in parts}) == 1:
            for path in parts:
                del path[end]
    return [str(Path(*path)) for path in parts]


def _scored_on(path: Path) -> tuple[str, Any]:
    """The digest of the test split that results are about, and the field of the labels."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CompareError(f"{path}: not JSON: {error}") from error
    schema = found.get("schema") if isinstance(found, Mapping) else None
    if schema != SCHEMA:
        raise CompareError(f"{path}: schema must be {SCHEMA}, got {schema}: score the encoder again")
    settings = found["about"].get("eval") if isinstance(found.get("about"), Mapping) else None
    label = settings.get("label") if isinstance(settings, Mapping) else None
    for key in ("about", "splits", "test", "sha256"):
        if not isinstance(found, Mapping) or key not in found:
            raise CompareError(f"{path}: about.splits.test.sha256 is missing: the test split can't be checked")
        found = found[key]
    return str(found), label


def _read_scores(path: Path) -> dict[str, _Scores]:
    """Task -> scores, in ascending order of rows."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CompareError(f"{path}: not a safetensors file: {error}") from error
    found = {}
    for task in sorted(name.removesuffix(".correct") for name in tensors if name.endswith(".correct")):
        for key in ("rows", "content"):
            if f"{task}.{key}" not in tensors:
                raise CompareError(f"{path}: {task}.correct has no {task}.{key} beside it")
        scores, rows, content = (tensors[f"{task}.{key}"] for key in ("correct", "rows", "content"))
        if scores.ndim != 1 or not scores.shape == rows.shape == content.shape:
            shapes = [tuple(t.shape) for t in (scores, rows, content)]
            raise CompareError(f"{path}: {task}: correct, rows and content must have one shape (n,), got {shapes}")
        if rows.dtype != torch.int64 or content.dtype != torch.int64:
            raise CompareError(f"{path}: {task}: rows and content must be int64, got {rows.dtype} and {content.dtype}")
        scores = scores.double()
        if not scores.isfinite().all():
            raise CompareError(f"{path}: {task}.correct must be finite, got NaN or infinity")
        order = rows.argsort()
        if (rows[order].diff() == 0).any():
            raise CompareError(f"{path}: {task}.rows must differ, got one more than once")
        found[task] = _Scores(scores[order], rows[order], content[order])
    return found

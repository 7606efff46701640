"""Results as files, results.json and the reports made of it, and as a table.

results.json is ``{"schema": 2, "about": ..., "results": {TASK: ENTRY}}``. ``about`` names the encoder, the splits and
the settings. TASK is a task and what it is about, such as ``linear/image``. ENTRY has

- ``metrics``: name -> ``value``, a fraction where it is a share, and ``interval``, its 95 % interval or null;
- ``baselines``: ``random_init`` (the architecture with random weights), ``raw`` (the input itself), ``majority`` and
  ``chance`` -> metric -> value, as far as they have it;
- ``chosen``: what validation samples chose, if anything; ``counts``: of samples, distinct inputs, queries.

Beside it are predictions.safetensors, for `eval.compare`: ``TASK.correct`` (n,), how right each test sample is,
``TASK.rows``, its place in the split, and ``TASK.content``, equal for equal inputs; and page.json, see `eval.page`.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from data.errors import UserError
from data.index import write_whole
from eval import html, markdown
from eval.page import SCHEMA as PAGE_SCHEMA

SCHEMA = 2
RESULTS, PREDICTIONS, PAGE = "results.json", "predictions.safetensors", "page.json"
HEADER = ("task", "metric", "score", "95 % interval", "random encoder", "raw input", "chance")
# What the table shows of a task; the reports show all.
HEADLINES = {
    "linear": ("top1", "map"),
    "knn": ("top1",),
    "attentive": ("top1",),
    "fewshot": ("top1_1shot", "top1_10shot"),
    "zeroshot": ("top1",),
    "retrieval": ("r1", "r10"),
    "fusion": ("top1",),
}

Results = dict[str, dict[str, Any]]
"""Task -> entry, see above."""


class ReportError(UserError):
    """A folder that holds no results, or other ones than this version reads."""


def write_results(path: Path, results: Results, about: Mapping[str, Any]) -> None:
    """Write results.json, whole or not at all."""
    document = {"schema": SCHEMA, "about": about, "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def write_evaluation(
    folder: Path,
    results: Results,
    about: Mapping[str, Any],
    predictions: Mapping[str, Tensor],
    page: Mapping[str, Any],
) -> None:
    """Write everything that there is of an evaluation into a folder, results.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / PREDICTIONS, save({name: tensor.clone() for name, tensor in predictions.items()}))
    write_whole(folder / PAGE, (json.dumps(page, allow_nan=False) + "\n").encode())
    document = {"schema": SCHEMA, "about": json.loads(json.dumps(about)), "results": results}
    _write_reports(folder, document, page)
    write_results(folder / RESULTS, results, about)


def write_reports(folder: Path) -> list[Path]:
    """Make report.md and report.html anew from results.json and page.json; returns their paths.

    Raises:
        ReportError: a file is missing or damaged, or of another schema.
    """
    found = {}
    for name in (RESULTS, PAGE):
        try:
            found[name] = json.loads((folder / name).read_text(encoding="utf-8"), parse_constant=_no_number)
        except FileNotFoundError as error:
            raise ReportError(f"{folder}: no {name}; `python -m eval run ... --out {folder}` makes one") from error
        except ValueError as error:
            raise ReportError(f"{folder / name} is damaged: {error}") from error
        if not isinstance(found[name], dict):
            raise ReportError(f"{folder / name} is damaged: no JSON object")
    for name, schema in ((RESULTS, SCHEMA), (PAGE, PAGE_SCHEMA)):
        if found[name].get("schema") != schema:
            raise ReportError(
                f"{folder / name}: schema {found[name].get('schema')}; this version reads {schema}. Evaluate again"
            )
    if lacking := [key for key in ("about", "results") if not isinstance(found[RESULTS].get(key), dict)]:
        raise ReportError(f"{folder / RESULTS} is damaged: it has no {lacking[0]}")
    if not isinstance(found[RESULTS]["about"].get("encoder", {}), dict):
        raise ReportError(f"{folder / RESULTS} is damaged: about.encoder is no JSON object")
    for task, each in found[RESULTS]["results"].items():
        if not _is_entry(each):
            raise ReportError(f"{folder / RESULTS} is damaged: {task} is not laid out as results are")
    return _write_reports(folder, found[RESULTS], found[PAGE])


def _no_number(constant: str) -> Any:
    raise ValueError(f"{constant} is no number that JSON has")


def _is_entry(found: Any) -> bool:
    """Whether it is an ENTRY, see above."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def metric(value: Any) -> bool:
        ends = value.get("interval") if isinstance(value, dict) else None
        pair = ends is None or (isinstance(ends, list) and len(ends) == 2 and all(map(number, ends)))
        return isinstance(value, dict) and number(value.get("value")) and pair

    def each(key: str, fits: Callable[[Any], bool]) -> bool:
        values = found.get(key, {})
        return isinstance(values, dict) and all(map(fits, values.values()))

    return (
        isinstance(found, dict)
        and "metrics" in found
        and each("metrics", metric)
        and each("baselines", lambda values: isinstance(values, dict) and all(map(number, values.values())))
        and each("chosen", lambda _: True)
        and each("counts", number)
    )


def _write_reports(folder: Path, document: Mapping[str, Any], page: Mapping[str, Any]) -> list[Path]:
    title = f"Evaluation of {document['about'].get('encoder', {}).get('name', 'an encoder')}"
    paths = [folder / "report.md", folder / "report.html"]
    for path, text in zip(paths, (markdown.render(document, title), html.render(document, page, title)), strict=True):
        write_whole(path, text.encode())
    return paths


def read_results(path: Path, about: Mapping[str, Any]) -> Results | None:
    """The results in a file, if they are about exactly this; else None."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        return None
    if found.get("about") != json.loads(json.dumps(about)) or not isinstance(found.get("results"), dict):
        return None
    results: Results = found["results"]
    return results


def table(results: Results) -> str:
    """What matters most of the results with 95 % intervals, beside every baseline, as aligned text."""
    lines: list[tuple[str, ...]] = [HEADER]
    for task, entry in results.items():
        for metric in HEADLINES.get(task.partition("/")[0], ()):
            if metric in entry["metrics"] and "_without_" not in task:
                found = entry["metrics"][metric]
                interval = found["interval"]
                baselines = (entry["baselines"].get(name, {}).get(metric) for name in ("random_init", "raw", "chance"))
                ends = f"{_percent(interval[0])} .. {_percent(interval[1])}" if interval else ""
                lines.append((task, metric, _percent(found["value"]), ends, *map(_percent, baselines)))
    return aligned(lines, left=(0, 1))


def aligned(lines: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """Columns under a header, which is the first line; those of the numbers ``left`` are flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([texts[0], "-" * max(map(len, texts)), *texts[1:]])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"

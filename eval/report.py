"""Results as a file and as a table."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1

Results = dict[str, dict[str, Any]]
"""Task and modality, such as ``linear/image`` -> metric -> value; fractions in 0 .. 1, intervals as pairs."""


def write_results(path: Path, results: Results, about: Mapping[str, Any]) -> None:
    """Write ``{"schema": 1, "about": ..., "results": ...}`` aside, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"schema": SCHEMA, "about": about, "results": results}, indent=2) + "\n")
    partial.replace(path)


def read_results(path: Path, about: Mapping[str, Any]) -> Results | None:
    """The results in a file, if they are about exactly this; else None."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if found.get("schema") != SCHEMA or found.get("about") != json.loads(json.dumps(about)):
        return None
    results: Results = found["results"]
    return results


def table(results: Results) -> str:
    """The results with their 95 % intervals beside every baseline, as aligned text."""
    header = ("task", "metric", "score", "95 % interval", "random encoder", "raw input", "chance")
    lines: list[tuple[str, ...]] = [header]
    for task, metrics in results.items():
        for metric in ("top1", "r1", "r5", "r10"):
            if metric in metrics:
                baselines = [metrics.get(name, {}).get(metric) for name in ("random_init", "raw", "chance")]
                interval = metrics.get("interval")
                lines.append(
                    (
                        task,
                        metric,
                        _percent(metrics[metric]),
                        f"{_percent(interval[0])} .. {_percent(interval[1])}" if interval else "",
                        *(_percent(value) for value in baselines),
                    )
                )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    texts = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"

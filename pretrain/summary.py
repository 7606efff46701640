"""What the closing screen says of a run: warnings in plain words, and its results beside those before."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.report import SCHEMA, Results, table

# RankMe is the number of directions that features use, up to their width: 0 or 1 once they have collapsed. Few classes
# need few directions, so that only a small share is a sign.
MIN_RANK_SHARE = 0.05
# Without this wait the run would be 1 / (1 - 0.3) = 1.4 times as fast. What slow shards and the start of workers cost
# is usually less.
MAX_DATA_WAIT = 0.3
# Of the pulls at the trunk. One with nine times the pull of all others decides where the trunk goes.
MAX_PULL_SHARE = 0.9
# Of the lines. What holds at the end counts: the start has warm-up and compilation, and caches to fill.
LAST_PART = 0.25


def warnings_of(metrics: Sequence[Mapping[str, Any]], probe: Mapping[str, float], dims: Mapping[str, int]) -> list[str]:
    """What may have gone wrong and what to do about it, a sentence or two each.

    Args:
        metrics: the lines of metrics.jsonl.
        probe: values of the newest evaluation. ``rankme/<modality>`` is looked for here, then in the newest line that
            has it; ``broken/<modality>``, the number of outputs that are zero or not finite, is looked for here.
        dims: modality -> the most that its RankMe can be: the width of its features, or the number of samples if fewer.
    """
    return [
        *_collapsed(metrics, probe, dims),
        *_dominated(metrics),
        *_not_finite(metrics),
        *_waiting(metrics),
        *_skipped(metrics),
    ]


def _collapsed(
    metrics: Sequence[Mapping[str, Any]], probe: Mapping[str, float], dims: Mapping[str, int]
) -> Iterator[str]:
    for modality, width in dims.items():
        if broken := probe.get(f"broken/{modality}"):
            yield (
                f"{broken:.0f} outputs for {modality} are zero or not finite: the weights are of no use. Go back to an "
                "earlier checkpoint with a lower train.learning_rate, or train.precision=fp32"
            )
            continue
        name = f"rankme/{modality}"
        ranks = [line[name] for line in (probe, *reversed(metrics)) if line.get(name) is not None]
        if ranks and ranks[0] < MIN_RANK_SHARE * width:
            yield (
                f"{modality} features may have collapsed: they use {ranks[0]:.1f} of {width} directions (RankMe). If "
                "the probe is no better than the random encoder's, try a lower train.learning_rate, a larger "
                "train.batch_size, or a larger weight of objectives.contrastive"
            )


def _dominated(metrics: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    pulls = _last_means(metrics, "trunk_norm/")
    if len(pulls) < 2:
        return
    name = max(pulls, key=pulls.__getitem__)
    share = pulls[name] / (sum(pulls.values()) or 1)
    if share > MAX_PULL_SHARE:
        yield (
            f"{name} decides alone what the trunk learns: it has {share:.0%} of all the losses' pull at it "
            "(trunk_norm/ in metrics.jsonl). Lower the weight of its objective, or raise that of the others"
        )


def _not_finite(metrics: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    lines = [line for line in metrics if line.get("non_finite_steps")]
    if lines:
        steps = sum(line["non_finite_steps"] for line in lines)
        names = dict.fromkeys(name for line in lines for name in line.get("non_finite", ()))
        yield (
            f"{steps} {'step was' if steps == 1 else 'steps were'} skipped, the last about step {lines[-1]['step']}: "
            f"{', '.join(names)} not finite. If it goes on, try a lower train.learning_rate or train.precision=fp32"
        )


def _waiting(metrics: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    wait = _last_means(metrics, "data_wait").get("", 0.0)
    if wait > MAX_DATA_WAIT:
        yield (
            f"training waited for data {wait:.0%} of the time at the end: raise data.workers, or keep the shards on a "
            "faster disk"
        )


def _skipped(metrics: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if skipped := sum(line.get("skipped", 0) for line in metrics):
        yield (
            f"{skipped} {'sample' if skipped == 1 else 'samples'} could not be used and others took their place: "
            "`python -m data validate --decode` says which, and why"
        )


def _last_means(metrics: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, float]:
    """Means of the values whose names begin with ``prefix``, without it, over the last of the lines that have any."""
    lines = [
        {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix) and _number(value)}
        for line in metrics
    ]
    lines = [line for line in lines if line]
    last = lines[-max(1, round(LAST_PART * len(lines))) :]
    seen: dict[str, list[float]] = {}
    for line in last:
        for name, value in line.items():
            seen.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in seen.items()}


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def previous_results(path: Path, about: Mapping[str, Any]) -> Results | None:
    """The results in a file, if they were got from the same data in the same way; the encoder may be another.

    Args:
        path: a results.json.
        about: as ``eval.run.about`` gives it, of the results that they are to be compared with.
    """
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if found.get("schema") != SCHEMA:
        return None
    before, now = ({key: value for key, value in each.items() if key != "encoder"} for each in (found["about"], about))
    if before != json.loads(json.dumps(now)):
        return None
    results: Results = found["results"]
    return results


def results_table(results: Results, previous: Results | None) -> str:
    """``eval.report.table``, with a column for the change since an earlier evaluation of the run, in points.

    Args:
        results: to show.
        previous: those before; None, or nothing in common, adds no column.
    """
    header, rule, *rows = table(results).splitlines()
    changes = [_change(row, results, previous or {}) for row in rows]
    if not any(changes):
        return "\n".join([header, rule, *rows])
    width = max(map(len, ("change", *changes)))
    columns = max(map(len, (header, *rows)))
    lines = [
        f"{row:<{columns}}  {change:>{width}}"
        for row, change in zip((header, *rows), ("change", *changes), strict=True)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _change(row: str, results: Results, previous: Results) -> str:
    """The change of what a row of the table is about; empty where there was nothing before."""
    task, metric = row.split()[:2]
    now, before = (each.get(task, {}).get("metrics", {}).get(metric) for each in (results, previous))
    return "" if now is None or before is None else f"{100 * (now['value'] - before['value']):+.1f}"

"""report.md: the results with their intervals beside every baseline, as tables that GitHub shows."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data.documents import leaves

BASELINES = {"random_init": "random encoder", "raw": "raw input", "majority": "majority", "chance": "chance"}
"""What results.json calls a baseline -> what readers see, from the hardest to the easiest."""

INTRODUCTION = (
    "Shares are in per cent. Intervals are 95 % bootstrap intervals over distinct inputs. A result is called clear of "
    "its baselines where its whole interval lies above all of them; that they are uncertain, too, is not counted in. "
    "A gain is how many points a fusion is ahead of the best single modality at hand, the best on validation samples; "
    "fusing helps or hurts where the whole interval of the gain says so."
)

# Metrics that are shares of 0 .. 1, the more the better, whatever is said around them: top1, r10, shots_5/top1.
_SHARE = re.compile(
    r"(?:^|[^a-z0-9])(?:top\d+|r\d+|mean_per_class|precision|recall|f1|map|auc|accuracy)(?:$|[^a-z0-9])"
)
# Differences and deviations of such shares, in points; of those that can be of either sign it is shown.
_POINTS = re.compile(r"gain|spread_\d+shot")
_SIGNED = ("gain",)


class Row(NamedTuple):
    """One metric of one task.

    Attributes:
        variant: of the task, such as ``image`` of linear/image.
        metric: its name.
        share: whether it is a share of 0 .. 1, the more the better; others stand as points or as plain numbers.
        value: as results.json has it.
        interval: 95 %, or None.
        baselines: key of ``BASELINES`` -> value.
    """

    variant: str
    metric: str
    share: bool
    value: float
    interval: tuple[float, float] | None
    baselines: dict[str, float]

    @property
    def number(self) -> str:
        """The value for readers."""
        return self.text(self.value)

    @property
    def range(self) -> str:
        """The interval for readers."""
        return "" if self.interval is None else f"{self.text(self.interval[0])} to {self.text(self.interval[1])}"

    @property
    def verdict(self) -> str:
        """``yes``, or ``no:`` and the baselines that the interval does not clear; of a gain whether it is one.

        Empty where that is unknown.
        """
        if self.metric == "gain" and self.interval is not None:
            low, high = self.interval
            return "fusing: helps" if low > 0 else "fusing: hurts" if high < 0 else "fusing: unclear"
        if not self.share or self.interval is None or not self.baselines:
            return ""
        low = self.interval[0]
        reached = [BASELINES.get(name, name) for name, value in self.baselines.items() if value >= low]
        return f"no: {', '.join(reached)}" if reached else "yes"

    def text(self, value: float) -> str:
        """A value of this metric for readers."""
        if self.share or _POINTS.fullmatch(self.metric):
            return f"{100 * value:+.1f}" if self.metric in _SIGNED else f"{100 * value:.1f}"
        return f"{value:.4g}"


class Family(NamedTuple):
    """All tasks of a kind, such as linear.

    Attributes:
        rows: in the order of results.json.
        baselines: keys that any row has, in the order of ``BASELINES``, unknown ones last.
        remarks: what was chosen and counted -> the variants for which it was so.
    """

    rows: list[Row]
    baselines: list[str]
    remarks: dict[str, list[str]]


def families(document: Mapping[str, Any]) -> dict[str, Family]:
    """The results of a parsed results.json, schema 2, by the part of the task's name before its ``/``.

    Those with a modality missing at test are families of their own.
    """
    found: dict[str, Family] = {}
    for task, entry in document["results"].items():
        name, _, variant = task.partition("/")
        variant, _, missing = variant.partition("_without_")
        name += f" without {missing}" if missing else ""
        family = found.setdefault(name, Family([], [], {}))
        baselines = dict(sorted(entry.get("baselines", {}).items(), key=_hardest_first))
        for metric, outcome in entry["metrics"].items():
            interval = outcome.get("interval")
            beside = {key: values[metric] for key, values in baselines.items() if metric in values}
            share = _SHARE.search(metric) is not None
            family.rows.append(
                Row(variant, metric, share, outcome["value"], None if interval is None else tuple(interval), beside)
            )
        if remarks := [f"{key}: {value}" for part in ("chosen", "counts") for key, value in texts(entry.get(part, {}))]:
            family.remarks.setdefault(", ".join(remarks), []).append(variant)
    for family in found.values():
        present = {key: None for row in family.rows for key in row.baselines}
        family.baselines.extend(key for key, _ in sorted(present.items(), key=_hardest_first))
    return found


def _hardest_first(baseline: tuple[str, Any]) -> int:
    """Place in ``BASELINES``, behind which come those that it lacks."""
    return [*BASELINES, baseline[0]].index(baseline[0])


def texts(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Dotted keys of nested mappings, and what they hold as text."""
    for key, value in leaves(tree):
        if isinstance(value, list):
            yield key, ", ".join(map(str, value))
        else:
            yield key, f"{value:.4g}" if isinstance(value, float) else str(value)


def render(document: Mapping[str, Any], title: str = "Evaluation report") -> str:
    """A parsed results.json, schema 2, as Markdown."""
    parts = [f"# {escape(title)}", INTRODUCTION]
    for name, family in families(document).items():
        names = [BASELINES.get(key, key) for key in family.baselines]
        header = ("", "metric", "value", "95 % interval", *names, "clear of baselines")
        rows = [
            (
                row.variant,
                row.metric,
                row.number,
                row.range,
                *(row.text(row.baselines[key]) if key in row.baselines else "" for key in family.baselines),
                row.verdict,
            )
            for row in family.rows
        ]
        parts += [f"## {escape(name)}", _table(header, rows)]
        if family.remarks:
            remarks = ((", ".join(variants), text) for text, variants in family.remarks.items())
            parts.append("\n".join(f"- {escape(variants)}: {escape(text)}" for variants, text in remarks))
    about = [f"- {escape(key)}: {escape(value)}" for key, value in texts(document.get("about", {}))]
    if about:
        parts += ["## What was scored", "\n".join(about)]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text that Markdown takes for nothing else, on one line. Within a word an underscore means nothing."""
    return re.sub(r"([\\`*{}\[\]<>#|~&$!]|\b_|_\b)", r"\\\1", " ".join(text.split()))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Numbers, that is all but the first two columns and the last, are aligned right."""
    alignment = ["---", "---", *["--:"] * (len(header) - 3), "---"]
    lines = [alignment, *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [list(header), *lines])

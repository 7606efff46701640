"""The figure of python -m data stats --plot. Needs the extra ``plot``."""

import io
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from data.stats import Quantity, Statistics, combinations, histogram, is_whole, number, quantiles, summary, top_labels
from data.terminal import printable

COLOURS = {"image": "#3b6ea8", "text": "#c2703d", "audio": "#4d8f5b", "metadata": "#8a8a8a", "unread": "#c4b7a6"}
NEUTRAL = "#5b5f73"
_COUNTS = FuncFormatter(lambda value, _: f"{value:,.0f}")
_NUMBERS = FuncFormatter(lambda value, _: number(value))


def draw(found: Statistics) -> bytes:
    """All histograms in one PNG. Nothing of pyplot is touched, so no window and no global state."""
    panels: list[Callable[[Axes], None]] = []
    panels.append(lambda axes: _rows(axes, combinations(found), "modalities that samples have"))
    if found.labels:
        title = f"{printable(found.label)} in .json"
        panels.append(lambda axes: _rows(axes, top_labels(found.labels), title))
    panels.append(lambda axes: _sizes(axes, found))
    same = []
    for quantity, values in found.values.items():
        if min(values) == max(values):
            same.append(f"{quantity.title}: {quantiles(values)}")
        else:
            panels.append(partial(_values, quantity=quantity, values=values))

    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches
    figure = Figure(figsize=(4.6 * across, 3.4 * down + 0.4), dpi=120, layout=layout)
    note = "" if found.looked_at == found.samples else f" ({found.looked_at:,} of them looked into)"
    figure.suptitle("\n".join([summary(found) + note, *([" · ".join(same)] if same else [])]), fontsize=11)
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(down, across, place)
        axes.tick_params(labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        panel(axes)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _rows(axes: Axes, rows: Sequence[tuple[str, int]], title: str) -> None:
    """A horizontal bar of samples per row, the first one on top."""
    small = len(rows) > 12
    bars = axes.barh(range(len(rows)), [count for _, count in rows], color=NEUTRAL, height=0.75)
    axes.bar_label(bars, [f"{count:,}" for _, count in rows], fontsize=7 if small else 9, padding=2)
    # Names come from data: a $ in them begins no formula.
    names = [label for label, _ in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7 if small else 9, parse_math=False)
    axes.set_ylim(max(len(rows), 6) - 0.5, -0.5)  # few bars are no thicker
    axes.set_xlim(0, 1.2 * max(count for _, count in rows))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10), integer=True))
    axes.xaxis.set_major_formatter(_COUNTS)
    axes.set_xlabel("samples")
    axes.set_title(title, fontsize=11, parse_math=False)


def _sizes(axes: Axes, found: Statistics) -> None:
    """The files' sizes, a line per modality."""
    # Empty files have no place on a logarithmic axis: they are drawn as one byte.
    sizes = {kind: np.maximum(members.sizes, 1) for kind, members in found.members.items()}
    low, high = (float(f([f(size) for size in sizes.values()])) for f in (np.min, np.max))
    edges = np.geomspace(low / 1.1, high * 1.1, 50)
    for kind, colour in COLOURS.items():
        if kind in sizes:
            axes.stairs(np.histogram(sizes[kind], edges)[0], edges, color=colour, label=kind, linewidth=1.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.legend(fontsize=8, frameon=False)
    _finish(axes, "sizes of the files", "bytes")


def _values(axes: Axes, quantity: Quantity, values: Sequence[float]) -> None:
    """A histogram. Few different values are named; a long tail has a logarithmic axis."""
    bars = histogram(values, 40)
    colour = COLOURS[quantity.modality]
    if all(bar.low == bar.high for bar in bars):
        places = range(len(bars))
        drawn = axes.bar(places, [bar.files for bar in bars], color=colour, width=0.6)
        axes.bar_label(drawn, [f"{bar.files:,}" for bar in bars], fontsize=8, padding=2)
        axes.set_xticks(places, [number(bar.low) for bar in bars])
        axes.set_xlim(-1, len(bars))
    else:
        edges = np.array([bar.low for bar in bars] + [bars[-1].high])
        steps = np.diff(edges)
        if steps.max() > 1.5 * steps.min():
            axes.set_xscale("log")
            few = edges[-1] < 500 * edges[0]
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        elif is_whole(values):
            edges = edges - 0.5  # the bar of a whole number stands over it
            axes.xaxis.set_major_locator(MaxNLocator("auto", steps=(1, 2, 5, 10), integer=True))
        axes.stairs([bar.files for bar in bars], edges, fill=True, color=colour)
        axes.xaxis.set_major_formatter(_NUMBERS)
        median = float(np.median(values))
        axes.axvline(median, color="black", linewidth=0.8, linestyle="--", label=f"median {number(median)}")
        axes.legend(fontsize=8, frameon=False)
    _finish(axes, quantity.title, quantity.unit or quantity.name)


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(unit)
    axes.set_ylabel("files")
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10), integer=True))
    axes.yaxis.set_major_formatter(_COUNTS)
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)

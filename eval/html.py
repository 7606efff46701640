"""report.html: one page that opens from disk. It needs no network, and its own policy forbids it any."""

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib import resources
from string import Template
from typing import Any

from eval.markdown import BASELINES, INTRODUCTION, Family, Row, families, texts

# Baseline -> its mark beside a bar: height within the bar's 28 pixels, and an outline around (0, 0).
_MARKS = {
    "random_init": (5, "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z"),
    "raw": (11, "M0,-5L5,0L0,5L-5,0Z"),
    "majority": (17, "M-3.5,-3.5h7v7h-7Z"),
    "chance": (23, "M0,-4.5L4.5,3.5L-4.5,3.5Z"),
}
_UNKNOWN_MARK = (14, "M-4,-1h3v-3h2v3h3v2h-3v3h-2v-3h-3Z")


def render(document: Mapping[str, Any], page: Mapping[str, Any], title: str = "Evaluation report") -> str:
    """The whole page.

    Everything that comes from data is escaped; scripts and styles other than the page's own, by their hashes, and
    anything that is not in the file itself are forbidden by a Content-Security-Policy.

    Args:
        document: a parsed results.json, schema 2.
        page: what ``eval.page.make`` returned.
        title: of the page.

    Raises:
        ValueError: ``page`` holds a number that is not finite.
    """
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; media-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_asset("page.html")).substitute(
        policy=policy,
        title=escape(title),
        style=style,
        introduction=escape(INTRODUCTION),
        legend=_legend(document),
        results="\n".join(_family(name, family) for name, family in families(document).items()),
        about="\n".join(
            f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>"
            for key, value in texts(document.get("about", {}))
        ),
        # Within <script> only a < could end the data, or begin a comment.
        data=json.dumps(page, allow_nan=False).replace("<", "\\u003c"),
        script=script,
    )


def _asset(name: str) -> str:
    return resources.files("eval").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """As a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _legend(document: Mapping[str, Any]) -> str:
    """The marks of all baselines that occur."""
    keys = dict.fromkeys(key for family in families(document).values() for key in family.baselines)
    return "".join(
        '<li><svg class="mark" width="14" height="14" viewBox="-7 -7 14 14" aria-hidden="true">'
        f'<path d="{_MARKS.get(key, _UNKNOWN_MARK)[1]}"/></svg>{escape(BASELINES.get(key, key))}</li>'
        for key in keys
    )


def _family(name: str, family: Family) -> str:
    """A table with a bar per row, and remarks."""
    heads = ["metric", "value", "95 % interval", "", *(BASELINES.get(key, key) for key in family.baselines)]
    header = "".join(f'<th scope="col">{escape(head)}</th>' for head in ["", *heads, "clear of baselines"])
    above = ["", *(row.variant for row in family.rows)]
    rows = "\n".join(_row(row, family, row.variant == before) for row, before in zip(family.rows, above, strict=False))
    remarks = "".join(
        f"<li><b>{escape(', '.join(variants))}</b> {escape(text)}</li>" for text, variants in family.remarks.items()
    )
    return (
        f'<h3>{escape(name)}</h3>\n<table class="results"><thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n'
        f"</tbody></table>" + (f'\n<ul class="remarks">{remarks}</ul>' if remarks else "")
    )


def _row(row: Row, family: Family, again: bool) -> str:
    """A row of the table; ``again``: of the same variant as the one above."""
    cells = [
        f"<td>{escape(row.metric)}</td>",
        f'<td class="number value">{row.number}</td>',
        f'<td class="number" data-label="95 % interval">{row.range}</td>',
        f'<td class="bar">{_bar(row)}</td>',
    ]
    for key in family.baselines:
        value = row.text(row.baselines[key]) if key in row.baselines else ""
        cells.append(f'<td class="number" data-label="{escape(BASELINES.get(key, key))}">{value}</td>')
    kind = {"yes": "clear", "fusing: helps": "clear", "fusing: unclear": "open"}.get(row.verdict, "reached")
    label = "" if row.metric == "gain" else "clear of baselines"
    cells.append(f'<td class="{kind}" data-label="{label}">{escape(row.verdict)}</td>')
    head = '<th scope="row" class="again">' if again else '<th scope="row">'
    return f"<tr>{head}{escape(row.variant)}</th>{''.join(cells)}</tr>"


def _bar(row: Row) -> str:
    """A share as a bar over 0 .. 100 % with its interval as a whisker and the baselines' marks."""
    if not row.share:
        return ""
    spoken = f"{row.variant} {row.metric}: {row.number} %"
    spoken += f", interval {row.range}" if row.interval else ""
    spoken += "".join(f", {BASELINES.get(key, key)} {row.text(value)}" for key, value in row.baselines.items())
    parts = [
        '<rect class="track" x="0" y="8" width="100%" height="12"/>',
        *(f'<line class="quarter" x1="{x}%" x2="{x}%" y1="8" y2="20"/>' for x in (25, 50, 75)),
        f'<rect class="fill" x="0" y="8" width="{_percent(row.value)}" height="12"/>',
    ]
    for key, value in row.baselines.items():
        height, outline = _MARKS.get(key, _UNKNOWN_MARK)
        name = escape(f"{BASELINES.get(key, key)} {row.text(value)}")
        mark = f'<path d="{outline}"><title>{name}</title></path>'
        parts.append(f'<svg x="{_percent(value)}" y="{height}" class="mark">{mark}</svg>')
    if row.interval is not None:
        low, high = map(_percent, row.interval)
        parts += [
            f'<line class="whisker" x1="{low}" x2="{high}" y1="14" y2="14"/>',
            *(f'<line class="whisker" x1="{x}" x2="{x}" y1="9" y2="19"/>' for x in (low, high)),
        ]
    return f'<svg role="img" aria-label="{escape(spoken)}" width="100%" height="28">{"".join(parts)}</svg>'


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%"

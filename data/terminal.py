"""Text from data as a terminal may show it, and tables of it."""

import textwrap
from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Rows as aligned columns under the first one; the last column is wrapped, the others are cut in the middle."""
    cleaned = [[printable(cell) for cell in row] for row in rows]
    cleaned = [[*(cut(cell, 36) for cell in row[:-1]), row[-1]] for row in cleaned]
    widths = [max(map(len, column)) for column in zip(*cleaned, strict=True)][:-1]
    room = max(width - sum(widths) - 2 * len(widths), 30)
    lines = []
    for row in cleaned:
        start = "".join(f"{cell:{w}}  " for cell, w in zip(row, widths, strict=False))
        texts = textwrap.wrap(row[-1], room) or [""]
        lines += [start + texts[0], *(" " * len(start) + text for text in texts[1:])]
    return [lines[0], "-" * min(width, max(map(len, lines))), *lines[1:]]


def cut(text: str, length: int) -> str:
    """Text of at most ``length`` letters, its middle left out."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[: length - 3 - half]}...{text[-half:]}"


def printable(text: str) -> str:
    """Text from data that a terminal may show: control characters and broken UTF-8 are escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)

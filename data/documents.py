"""JSON documents, and what is nested in them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.errors import UserError


def read_document(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        FileNotFoundError: it is missing.
        UserError: it holds something else; names the file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, not an object")
    return found


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What nested mappings hold, by dotted keys: ``{"a": {"b": 1}}`` gives ``("a.b", 1)``; lists are leaves."""
    for name, branch in tree.items():
        if isinstance(branch, Mapping):
            yield from leaves(branch, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", branch

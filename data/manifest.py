"""``export.json``: what an export consists of, by which one that is damaged or not whole is known."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import UserError

SCHEMA = 1
MANIFEST = "export.json"


class ManifestError(UserError):
    """An export that is not as it was written; names its folder, and each file."""


def write_manifest(out: Path, about: Mapping[str, Any]) -> None:
    """Size and sha256 of every file, besides what is to be known of them."""
    files = {name: _entry(path) for name, path in _files(out).items()}
    (out / MANIFEST).write_text(json.dumps({"schema": SCHEMA, **about, "files": files}, indent=1) + "\n")


def check(out: Path) -> dict[str, Any]:
    """Whether an export is as it was written.

    Returns:
        what its ``export.json`` says.

    Raises:
        ManifestError: it has none, or files are missing, left over or other ones; names each.
    """
    found = _read(out)
    more = [f"{name}: not of this export" for name in _files(out).keys() - found["files"].keys()]
    _compare(out, found["files"], more)
    return found


def check_folder(folder: Path) -> None:
    """Whether the files that load one of an export's folders are as they were written: not its card, nor folders in it.

    Of a folder that is of no export nothing is known.

    Raises:
        ManifestError: files that were written with it are missing or other ones; names each.
    """
    folder = folder.resolve()
    for out in (folder.parent, folder.parent.parent):  # text/masked_lm lies one deeper
        if (out / MANIFEST).is_file():
            files, part = _read(out)["files"], folder.relative_to(out)
            wanted = {name for name in files if Path(name).parent == part and Path(name).name != "README.md"}
            _compare(out, {name: files[name] for name in wanted})
            return


def added(out: Path) -> set[str]:
    """Files that were put into an export since; none are known where it is damaged."""
    try:
        known: dict[str, Any] = _read(out)["files"]
    except ManifestError:
        return set()
    return _files(out).keys() - known.keys()


def _read(out: Path) -> dict[str, Any]:
    """What ``export.json`` says; raises ManifestError where it says nothing that can be used."""
    path = out / MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ManifestError(f"{out}: no whole export: there is no {MANIFEST}") from error
    except ValueError as error:  # no JSON, no text
        raise ManifestError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("files"), dict):
        raise ManifestError(f"{path}: no description of an export of schema {SCHEMA}, which is what this version reads")
    return found


def _compare(out: Path, written: Mapping[str, Any], problems: Sequence[str] = ()) -> None:
    """Raises ManifestError, with ``problems`` and those of the files that were written."""
    there = _files(out)
    found = [f"{name}: missing" for name in written.keys() - there.keys()]
    found += [
        f"{name}: damaged (it was {json.dumps(entry)})"
        for name, entry in written.items()
        if name in there and _entry(there[name]) != entry
    ]
    if found := [*problems, *found]:
        raise ManifestError(f"{out}: not the export that was written:\n  " + "\n  ".join(sorted(found)))


def _files(out: Path) -> dict[str, Path]:
    """Path within the export -> path; without hidden ones, such as those that downloads from the hub come with."""
    found = {str(path.relative_to(out)): path for path in sorted(out.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if name != MANIFEST and "/." not in f"/{name}"}


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}

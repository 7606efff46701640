"""``export.json``: what an export consists of, by which one that is damaged or not whole is known."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.exports.folders import FOLDERS
from pretrain.exports.subject import ExportError

SCHEMA = 1
MANIFEST = "export.json"
BESIDE = ("README.md", "onnx")  # what else an export may have besides its folders


def write_manifest(out: Path, about: Mapping[str, Any]) -> None:
    """Size and sha256 of every file, besides what is to be known of them."""
    files = {name: _entry(path) for name, path in _files(out).items()}
    (out / MANIFEST).write_text(json.dumps({"schema": SCHEMA, **about, "files": files}, indent=1) + "\n")


def check(out: Path) -> dict[str, Any]:
    """Whether an export is as it was written.

    Returns:
        what its ``export.json`` says.

    Raises:
        ExportError: it has none, or files are missing, left over or other ones; names each.
    """
    found = _read(out)
    more = [f"{name}: not of this export" for name in _files(out).keys() - found["files"].keys()]
    _compare(out, found["files"], more)
    return found


def check_folder(folder: Path) -> None:
    """Whether one of an export's folders is as it was written; of a folder that is of no export, nothing is known.

    Raises:
        ExportError: files that were written with it are missing or other ones; names each.
    """
    folder = folder.resolve()
    for out in (folder.parent, folder.parent.parent):  # text/masked_lm lies one deeper
        if (out / MANIFEST).is_file():
            part = f"{folder.relative_to(out)}/"
            _compare(out, {name: entry for name, entry in _read(out)["files"].items() if name.startswith(part)})
            return


def _read(out: Path) -> dict[str, Any]:
    """What ``export.json`` says; raises ExportError where it says nothing that can be used."""
    path = out / MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ExportError(f"{out}: no whole export: there is no {MANIFEST}") from error
    except ValueError as error:  # no JSON, no text
        raise ExportError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("files"), dict):
        raise ExportError(f"{path}: no description of an export of schema {SCHEMA}, which is what this version reads")
    return found


def _compare(out: Path, written: Mapping[str, Any], problems: Sequence[str] = ()) -> None:
    """Raises ExportError, with ``problems`` and those of the files that were written."""
    there = _files(out)
    found = [f"{name}: missing" for name in written.keys() - there.keys()]
    found += [
        f"{name}: damaged (it was {json.dumps(entry)})"
        for name, entry in written.items()
        if name in there and _entry(there[name]) != entry
    ]
    if found := [*problems, *found]:
        raise ExportError(f"{out}: not the export that was written:\n  " + "\n  ".join(sorted(found)))


def check_replaceable(out: Path) -> None:
    """Refuse to replace what is no export.

    Raises:
        ExportError: the folder is none, can't be given another name, or holds something that is of no export.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ExportError(f"{out} is no folder: choose another one for the export")
    place = out.resolve()
    if place.is_mount() or place == Path.cwd():
        what = "where a disk is mounted" if place.is_mount() else "the folder that this was started in"
        raise ExportError(f"{out} is {what}, and can't be replaced: choose a folder in it")
    names = {path.name for path in out.iterdir()}
    models = {name for name in FOLDERS if {"config.json", "model.safetensors"} <= _names(out / name)}
    odd = names - {name.partition("/")[0] for name in FOLDERS} - {MANIFEST, *BESIDE}
    odd = odd or (set() if models else names)
    odd = odd or _added(out)
    if odd:
        raise ExportError(f"{out} holds files that are no export ({', '.join(sorted(odd)[:3])}): choose another folder")


def _added(out: Path) -> set[str]:
    """Files that were put into an export since, and should not be lost; none are known where it is damaged."""
    try:
        known: dict[str, Any] = _read(out)["files"]
    except ExportError:
        return set()
    return _files(out).keys() - known.keys()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _files(out: Path) -> dict[str, Path]:
    """Path within the export -> path; without hidden ones, such as those that downloads from the hub come with."""
    found = {str(path.relative_to(out)): path for path in sorted(out.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if name != MANIFEST and "/." not in f"/{name}"}


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}

"""``export.json``: what an export consists of, by which one that is damaged or not whole is known."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.exports.folders import FOLDERS
from pretrain.exports.subject import ExportError

SCHEMA = 1
MANIFEST = "export.json"
BESIDE = ("README.md", "onnx")  # what else an export may have besides its folders


def write_manifest(out: Path, about: Mapping[str, Any]) -> None:
    """Size and sha256 of every file, besides what is to be known of them."""
    files = {str(path.relative_to(out)): _entry(path) for path in _files(out)}
    (out / MANIFEST).write_text(json.dumps({"schema": SCHEMA, **about, "files": files}, indent=1) + "\n")


def check(out: Path) -> dict[str, Any]:
    """Whether an export is as it was written.

    Returns:
        what its ``export.json`` says.

    Raises:
        ExportError: it has none, or files are missing, left over or other ones; names each.
    """
    path = out / MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ExportError(f"{out}: no whole export: there is no {MANIFEST}") from error
    except ValueError as error:  # no JSON, no text
        raise ExportError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("files"), dict):
        raise ExportError(f"{path}: no description of an export of schema {SCHEMA}, which is what this version reads")
    there = {str(each.relative_to(out)): each for each in _files(out)}
    problems = [f"{name}: missing" for name in found["files"].keys() - there.keys()]
    problems += [f"{name}: not of this export" for name in there.keys() - found["files"].keys()]
    problems += [
        f"{name}: damaged ({entry['bytes']} bytes, sha256 {entry['sha256'][:16]} were written)"
        for name, entry in found["files"].items()
        if name in there and _entry(there[name]) != entry
    ]
    if problems:
        raise ExportError(f"{out}: not the export that was written:\n  " + "\n  ".join(sorted(problems)))
    return found


def check_replaceable(out: Path) -> None:
    """Refuse to replace what is no export.

    Raises:
        ExportError: the folder is none, or holds something that is neither an export's manifest nor one of its folders.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ExportError(f"{out} is no folder: choose another one for the export")
    names = {path.name for path in out.iterdir()}
    models = {name for name in names if {"config.json", "model.safetensors"} <= _names(out / name)}
    odd = names - {name.partition("/")[0] for name in FOLDERS} - {MANIFEST, *BESIDE}
    odd = odd or (set() if models else names)
    if odd:
        raise ExportError(f"{out} holds files that are no export ({', '.join(sorted(odd)[:3])}): choose another folder")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _files(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob("*") if path.is_file() and path != out / MANIFEST)


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}

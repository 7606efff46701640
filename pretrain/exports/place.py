"""What may stand in an export's place before it is written: an earlier one, and nothing that would be lost."""

from pathlib import Path

from data.manifest import MANIFEST, added
from pretrain.exports.folders import FOLDERS
from pretrain.exports.subject import ExportError

BESIDE = ("README.md", "onnx")  # what else an export may have besides its folders


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
    if place.is_mount() or Path.cwd().is_relative_to(place):
        what = "where a disk is mounted" if place.is_mount() else "the folder that this was started in"
        raise ExportError(f"{out} is {what}, and can't be replaced: choose a folder in it")
    names = {path.name for path in out.iterdir()}
    models = {name for name in FOLDERS if {"config.json", "model.safetensors"} <= _names(out / name)}
    odd = names - {name.partition("/")[0] for name in FOLDERS} - {MANIFEST, *BESIDE}
    odd = odd or (set() if models else names)
    odd = odd or added(out)
    if odd:
        raise ExportError(f"{out} holds files that are no export ({', '.join(sorted(odd)[:3])}): choose another folder")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

"""Arrays on disk that grow by rows; a folder of them is whole or absent.

<cache>/<key>/            head.json, and an .npy file per array
<cache>/.<key>.partial    what is being written; renamed when it is whole, and removed by the next one if it was left
<cache>/.locks            empty files
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor

SCHEMA = 2
_HEAD = "head.json"


class Entry(NamedTuple):
    """A folder that is whole.

    Attributes:
        arrays: name -> array, mapped from disk; what is written to it stays in memory.
        about: what was kept with them.
    """

    arrays: dict[str, Tensor]
    about: dict[str, Any]


class RowWriter:
    """Writes arrays as their rows come; nothing stays in memory."""

    def __init__(self, folder: Path) -> None:
        """Write to a new ``folder``."""
        folder.mkdir(parents=True)
        self.folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._arrays: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write how many rows there are."""
        for name, file in self._files.items():
            with file:
                if kind is None:
                    file.seek(0)
                    self._write_head(name)

    def add(self, name: str, rows: npt.NDArray[Any]) -> None:
        """Append (n, ...).

        Raises:
            ValueError: other rows than before.
        """
        if name not in self._files:
            self._files[name] = (self.folder / f"{name}.npy").open("w+b")
            self._arrays[name] = (rows.dtype, (0, *rows.shape[1:]))
            self._write_head(name)
        dtype, (n, *rest) = self._arrays[name]
        if (rows.dtype, rows.shape[1:]) != (dtype, tuple(rest)):
            raise ValueError(f"{name}: rows of {rows.dtype} {rows.shape[1:]}, those before were {dtype} {tuple(rest)}")
        self._files[name].write(np.ascontiguousarray(rows).data)
        self._arrays[name] = (dtype, (n + len(rows), *rest))

    def _write_head(self, name: str) -> None:
        # numpy leaves room for more digits of the number of rows, so that it can be written over.
        dtype, shape = self._arrays[name]
        head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._files[name], head)


class Cache:
    """A folder of entries. Several processes may use it at once; who writes an entry holds its lock."""

    def __init__(self, folder: Path) -> None:
        (folder / ".locks").mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def lock(self, key: str) -> FileLock:
        """For one process at a time to look for an entry, and to write it."""
        # The substitute where a disk has no locks would outlive a killed process, and all others would wait for ever.
        return FileLock(self.folder / ".locks" / key, fallback_to_soft=False)

    def partial(self, key: str) -> Path:
        """Where to write an entry."""
        return self.folder / f".{key}.partial"

    def open(self, key: str, *, verify: bool = True) -> Entry | None:
        """The entry, or None; one that is damaged is told of and removed.

        Args:
            key: its name.
            verify: whether all bytes are read and compared with what was written.
        """
        folder = self.folder / key
        if not folder.exists():
            return None
        try:
            head = json.loads((folder / _HEAD).read_text())
            if head["schema"] != SCHEMA:
                raise ValueError(f"schema {head['schema']}; this version reads {SCHEMA}")
            if head["sha256"] != _digest(head["files"], head["about"]):
                raise ValueError(f"{_HEAD} changed since")
            if verify and (changed := [name for name, was in head["files"].items() if _stamp(folder / name) != was]):
                raise ValueError(f"{', '.join(changed)} changed since")
            arrays = {
                Path(name).stem: torch.from_numpy(np.load(folder / name, mmap_mode="c", allow_pickle=False))
                for name in head["files"]
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{folder}: damaged, made again: {error}", flush=True)
            if folder.is_dir():
                shutil.rmtree(folder)
            else:
                folder.unlink()
            return None
        return Entry(arrays, head["about"])

    def seal(self, key: str, made: Path, about: Mapping[str, Any]) -> None:
        """Give the arrays in ``made`` their name; ``about`` is kept with them."""
        files = {path.name: _stamp(path) for path in sorted(made.glob("*.npy"))}
        head = {"schema": SCHEMA, "sha256": _digest(files, about), "files": files, "about": about}
        (made / _HEAD).write_text(json.dumps(head, indent=2) + "\n")
        made.rename(self.folder / key)


def interleave(parts: Iterable[tuple[Path, Iterable[tuple[int, str, int]]]], made: Path) -> None:
    """Bring together arrays whose blocks of rows several writers wrote in turn.

    Args:
        parts: of each writer its folder, and (place, name, rows) of each block in the order in which it was written.
        made: new folder for the arrays with their blocks in the order of their places.
    """
    blocks: list[tuple[int, str, npt.NDArray[Any]]] = []
    for folder, written in parts:
        arrays = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in folder.glob("*.npy")}
        done = dict.fromkeys(arrays, 0)
        for place, name, rows in written:
            blocks.append((place, name, arrays[name][done[name] : done[name] + rows]))
            done[name] += rows
    with RowWriter(made) as writer:
        for _, name, rows_there in sorted(blocks, key=lambda block: block[:2]):
            writer.add(name, rows_there)


def _digest(files: Any, about: Any) -> str:
    """Hex sha256 of what the head says."""
    return hashlib.sha256(json.dumps([files, about], sort_keys=True).encode()).hexdigest()


def _stamp(path: Path) -> list[Any]:
    """Size and hex sha256 of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]

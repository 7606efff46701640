"""Lets torchvision be imported where its compiled operators can't be loaded; copied into .venv-bench by peers.py.

torchvision's wheels are built for CUDA, and with torch for CPUs their operators don't load. Importing it needs the
names of two of them, and what is compared here needs none: only its transforms and data sets. So the names are defined
first, and whoever calls such an operator gets torch's error that it is not implemented. Where the operators load,
nothing is done.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

# What torchvision registers shapes for when it is imported, whether or not its operators were loaded.
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
kept: list[object] = []  # a library of operators lives as long as its object; empty: torchvision's own are in use


class DefinesNames(MetaPathFinder):
    """Finds nothing; when torchvision is first looked for, it defines what is missing and steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None: the ordinary finders go on."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            define()
        return None


def define() -> None:
    """Define the operators' names, once, if torchvision is there and its own can't be loaded."""
    found = find_spec("torchvision")
    if kept or found is None or not found.submodule_search_locations:
        return
    import torch

    compiled = next(Path(found.submodule_search_locations[0]).glob("_C*.so"), None)
    try:
        if compiled is not None:
            torch.ops.load_library(str(compiled))  # type: ignore[no-untyped-call]
            return
    except OSError:  # libraries of CUDA are not there
        pass
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in OPERATORS:
        library.define(schema)  # type: ignore[no-untyped-call]
    kept.append(library)


def install() -> None:
    """Called in each process of the environment that has this module, by its .pth file."""
    sys.meta_path.insert(0, DefinesNames())

"""The peers that benchmarks compare with, loaded as their wheels have them; nothing of theirs is in this project."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


class MissingPeerError(RuntimeError):
    """A peer is not installed; says how to install it."""


def open_clip(module: str) -> ModuleType:
    """One module of open_clip, such as ``loss`` or ``model``.

    Its package asks for torchvision, of which there is no build for every machine, and needs it only for readers of
    images and for ResNets. So the modules are loaded without the package's ``__init__``.

    Raises:
        MissingPeerError: open_clip is not installed.
    """
    if "open_clip" not in sys.modules:
        found = importlib.util.find_spec("open_clip")
        if found is None or not found.submodule_search_locations:
            raise MissingPeerError("open_clip is not installed: pip install --no-deps open_clip_torch")
        package = ModuleType("open_clip")
        package.__path__ = [str(Path(location)) for location in found.submodule_search_locations]
        sys.modules["open_clip"] = package
        if importlib.util.find_spec("torchvision") is None:
            _import_utils_without_torchvision()
    return importlib.import_module(f"open_clip.{module}")


def _import_utils_without_torchvision() -> None:
    """``open_clip.utils`` wants one class, to look for it in ResNets."""
    names = ("torchvision", "torchvision.ops", "torchvision.ops.misc")
    for name in names:
        sys.modules[name] = ModuleType(name)
    sys.modules[names[-1]].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})  # type: ignore[attr-defined]
    try:
        importlib.import_module("open_clip.utils")
    finally:
        for name in names:  # or transformers would take torchvision for installed
            del sys.modules[name]

"""The peers that benchmarks compare with: installed, loaded as their wheels have them, or absent with a reason.

    .venv-bench/bin/python benchmarks/peers.py install      # each by itself, into the environment that runs this
    .venv-bench/bin/python benchmarks/peers.py              # which there are; the last line is one JSON object

Nothing of theirs is in this project. Of torchvision, which some of them import, see torchvision_names.py.
"""

import argparse
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

# Distribution -> module that is imported of it.
PEERS = {
    "torchvision": "torchvision",
    "open_clip_torch": "open_clip",
    "webdataset": "webdataset",
    "datasets": "datasets",
    "clip-benchmark": "clip_benchmark",
    "lightly": "lightly",
}
HERE = Path(__file__).resolve().parent
NOTES = Path(sys.prefix) / "peers.json"  # distribution -> why it could not be installed
NAMES = "torchvision_names"


class MissingPeerError(RuntimeError):
    """A peer is not to be had; says why."""


def load(module: str) -> ModuleType:
    """A peer's module, such as ``open_clip`` or ``open_clip_train.data``.

    Raises:
        MissingPeerError: its package is not installed, or can't be imported.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # also of what it imports itself, and of compiled parts
        raise MissingPeerError(f"{module}: {why(module, error)}") from error


def open_clip(module: str) -> ModuleType:
    """One module of open_clip, such as ``loss`` or ``model``.

    Its package imports torchvision, of which there is no build for every machine. Where that is absent, modules are
    loaded without the package's ``__init__``, which is enough for ``loss``.

    Raises:
        MissingPeerError: open_clip is not installed, or the module needs what is not.
    """
    found = importlib.util.find_spec("open_clip")
    if found is None or found.submodule_search_locations is None:
        raise MissingPeerError(f"open_clip: {why('open_clip', ImportError('not installed: make bench installs it'))}")
    if "open_clip" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        package = ModuleType("open_clip")
        package.__path__ = list(found.submodule_search_locations)
        package.__spec__ = found
        sys.modules["open_clip"] = package
    return load(f"open_clip.{module}")


def why(module: str, error: Exception) -> str:
    """Why a module is absent: in pip's words, where its package could not be installed, or else in the import's."""
    noted = json.loads(NOTES.read_text()) if NOTES.exists() else {}
    package = module.partition(".")[0]
    distribution = next((name for name, imported in PEERS.items() if imported == package), package)
    return str(noted.get(distribution) or (str(error).strip() or type(error).__name__).splitlines()[-1])


def status() -> dict[str, str]:
    """Distribution -> its version, or "absent: " and why."""
    found = {}
    for distribution, module in PEERS.items():
        try:
            load(module)
            found[distribution] = version(distribution)
        except MissingPeerError as error:
            found[distribution] = f"absent: {error}"
    names = sys.modules.get(NAMES)
    if names is not None and names.kept:
        found["torchvision"] += ", operators defined by name only: its wheel needs CUDA"
    return found


def install() -> None:
    """Install each line of requirements.txt here; one that can't be had is noted, and stops nothing."""
    site = Path(sysconfig.get_path("purelib"))
    shutil.copy(HERE / f"{NAMES}.py", site)
    (site / f"{NAMES}.pth").write_text(f"import {NAMES}; {NAMES}.install()\n")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(HERE.parent / "constraints.txt")]
    notes = {}
    for line in (HERE / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            ran = subprocess.run([*pip, line], capture_output=True, text=True, check=False)  # noqa: S603 (our own list)
            if ran.returncode:
                said = ran.stderr.splitlines() or [f"pip ended with {ran.returncode}"]
                notes[line.partition("==")[0]] = next((each for each in said if each.startswith("ERROR")), said[-1])
    NOTES.write_text(json.dumps(notes))


def main() -> None:
    """Install if asked to, and say what there is: in a process of its own, which has the new .pth."""
    parser = argparse.ArgumentParser(description="Which peers there are.")
    parser.add_argument("action", nargs="?", choices=("install",), help="install them first")
    if parser.parse_args().action == "install":
        install()
        sys.exit(subprocess.run([sys.executable, __file__], check=False).returncode)  # noqa: S603 (ourselves)
    found = status()
    for name, what in found.items():
        print(f"{name:16} {what}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""What benchmarks share, how they are run by one command, and how README.md gets its tables."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, peers, run, torchvision_names
from benchmarks.run import SCRIPTS, Script, fill

ENVIRONMENT: dict[str, Any] = {
    "machine": {
        "cpu": "A CPU",
        "cores": 4,
        "instructions": ["avx2"],
        "memory_gb": 8,
        "gpus": [],
        "system": "Linux",
        "python": "3.11",
    },
    "versions": {"torch": "2.13.0", "lightly": "absent: no wheel"},
}


def results(text: str, busy: float | None = 0.0) -> dict[str, Any]:
    about = {"command": "python benchmarks/x.py", "date": "2026-01-02", "seconds": 7, "threads": 4}
    return {**about, "busy_before": busy, **ENVIRONMENT, "figures": {}, "text": text}


def test_sides_take_turns_and_warm_up_first() -> None:
    calls = list[str]()
    values = iter(range(100))

    def side(name: str) -> float:
        calls.append(name)
        return float(next(values))

    rounds = measure.in_turn({"a": lambda: side("a"), "b": lambda: side("b")}, rounds=2, warm_up=1)
    assert calls == ["a", "b"] * 3
    assert rounds == [{"a": 2, "b": 3}, {"a": 4, "b": 5}]


def test_ratios_are_of_each_round() -> None:
    """A load that comes in one round slows both sides, and leaves their ratio."""
    rounds: list[dict[str, float]] = [{"a": 2, "b": 1}, {"a": 40, "b": 20}, {"a": 4, "b": 2}]
    assert measure.ratio(rounds, "a", "b") == 2
    assert measure.ratio(rounds, "a", "gone") is None
    assert measure.Spread.of([1, 2, 3, 4, 9]) == (3, 2, 4)
    assert measure.Spread.of([5]) == (5, 5, 5)
    assert measure.Spread(0.0012, 0.001, 0.002).show(1, 1000) == "1.2 (1.0 to 2.0)"


def test_a_table_is_markdown() -> None:
    assert measure.table(["", "ms"], [["ours", "1"]]).splitlines() == [
        "|      | ms  |",
        "| ---- | --- |",
        "| ours | 1   |",
    ]


def sections(*names: str) -> str:
    return "".join(f"# {name}\n<!-- {name}: generated -->\nold\n<!-- {name}: end -->\nprose\n" for name in names)


def test_only_sections_with_results_are_written_anew() -> None:
    readme = fill(sections("loader", "step"), {"step": results("| a |"), "ablation": results("another's")})
    loader, _, step = readme.partition("# step")
    assert loader == sections("loader")
    assert "old" not in step
    assert step.endswith("\n| a |\n<!-- step: end -->\nprose\n")
    for said in ("2026-01-02", "4 threads", "lightly absent: no wheel", "A CPU, 4 cores, avx2, 8 GB"):
        assert said in step
    assert fill(readme, {"step": results("| a |")}) == readme
    with pytest.raises(ValueError, match="loader: generated"):
        fill(sections("step"), {"loader": results("")})


def test_a_busy_machine_is_named() -> None:
    script = Script("x", ())
    assert "busy" not in run.section(script, results("", busy=19))
    assert "busy" in run.section(script, results("", busy=21))
    assert "not noted" in run.section(script, results("", busy=None))


def test_plain_text_is_set_as_such() -> None:
    assert run.section(Script("x", (), markdown=False), results("a  1")).endswith("```text\na  1\n```")


def test_readme_is_what_its_results_say() -> None:
    """Every script has its place in it, and nobody wrote between the markers by hand after results were there."""
    readme = (run.HERE / "README.md").read_text()
    found = {path.stem: json.loads(path.read_text()) for path in (run.HERE / "results").glob("*.json")}
    assert fill(readme, found) == readme
    fill(readme, {script.name: results("") for script in SCRIPTS})


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two scripts, of which one fails."""
    here = tmp_path / "benchmarks"
    here.mkdir()
    (here / "README.md").write_text(sections("good", "bad"))
    say = "import os, sys; print('threads', os.environ['OMP_NUM_THREADS']); print('{\"ratio\": 2}')"
    (here / "good.py").write_text(say)
    (here / "bad.py").write_text(f"{say}; sys.exit('no luck')")
    monkeypatch.setattr(run, "HERE", here)
    monkeypatch.setattr(run, "SCRIPTS", [Script("bad", ()), Script("good", ("--tiny",), threads=3), Script("far", ())])
    monkeypatch.setattr(run, "versions", lambda: {"torch": "2"})
    return here


def test_a_script_that_fails_leaves_what_was_known(house: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--only", "good", "bad"]) == 1
    found = json.loads((house / "results" / "good.json").read_text())
    assert found["figures"] == {"ratio": 2}
    assert found["text"] == "threads 3"
    assert found["command"] == "python benchmarks/good.py"
    assert not (house / "results" / "bad.json").exists()
    readme = (house / "README.md").read_text()
    assert "threads 3" in readme
    assert sections("bad") in readme
    assert "failed: bad" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["--only", "goood"])
    assert "allowed are bad, good, far" in capfd.readouterr().err


def test_a_quick_look_keeps_nothing(house: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--only", "good", "--quick"]) == 0
    assert "good.py --tiny" in capfd.readouterr().out
    assert not (house / "results").exists()
    assert (house / "README.md").read_text() == sections("good", "bad")


def test_what_cant_be_installed_is_noted_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[-1])
        failed = command[-1].startswith("lightly")
        return subprocess.CompletedProcess(command, int(failed), "", "WARNING: x\nERROR: no wheel\n" * failed)

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(peers, "NOTES", tmp_path / "peers.json")
    peers.install()
    assert [line.partition("==")[0] for line in asked] == list(peers.PEERS)
    assert all("==" in line for line in asked)  # pinned
    assert json.loads(peers.NOTES.read_text()) == {"lightly": "ERROR: no wheel"}
    monkeypatch.setitem(sys.modules, "lightly", None)  # as if it weren't there
    with pytest.raises(peers.MissingPeerError, match=r"lightly\.loss: ERROR: no wheel"):
        peers.load("lightly.loss")
    assert peers.status()["lightly"] == "absent: lightly: ERROR: no wheel"
    with pytest.raises(peers.MissingPeerError, match="No module named 'nowhere'"):
        peers.load("nowhere.at_all")


def test_torchvision_without_its_operators_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its wheel for CUDA is with torch for CPUs: a library that can't be loaded, and names that must be there."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "_C.so").write_bytes(b"needs libcudart")
    names = "import torch\nfor name in ('nms', 'qnms'):\n    getattr(torch.ops.torchvision, name).default\n"
    (package / "__init__.py").write_text(names)
    for name in [each for each in sys.modules if each.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    kept = list[Any]()
    monkeypatch.setattr(torchvision_names, "kept", kept)
    torchvision_names.install()
    torchvision_names.install()  # some environments run a .pth file twice
    import torchvision  # type: ignore[import-not-found]

    (library,) = kept
    try:
        assert Path(torchvision.__file__).parent == package
        with pytest.raises(NotImplementedError):
            torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    finally:
        library._destroy()
        del sys.modules["torchvision"]  # not by monkeypatch, which would put it back

"""A run that is killed again and again ends as one that was left alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from safetensors.torch import load_file

from pretrain.checkpoint import load_encoder
from pretrain.config import load_config
from pretrain.engine import pretrain
from tests.tiny import write_recipe

ROOT = Path(__file__).parents[1]
SETTINGS = ["eval.label=null", "trackers.names=[]", "train.pictures=false", "train.log_every=1", "train.save_every=2"]
FILES = ["encoder/model.safetensors", "objectives.safetensors", "optimizer.safetensors", "stream.json", "state.json"]
TIMING = ("samples_per_second", "data_wait", "memory_gb", "resident_gb")
PATIENCE = 120


def start(recipe: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """``pretrain/run.py``; what it says is added to run.log beside the recipe."""
    command = [sys.executable, str(ROOT / "pretrain" / "run.py"), str(recipe), *overrides]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with recipe.with_name("run.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def metrics(out: Path) -> list[dict[str, Any]]:
    """The whole lines, without what differs from run to run."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    read = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: value for name, value in line.items() if not name.startswith(TIMING)} for line in read]


def stamp(path: Path) -> tuple[int, int]:
    """Changes when a file is written; also while it is not there yet."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns


def check_names(checkpoints: Path) -> None:
    """No checkpoint has its name before it is whole, nor after it has begun to be removed."""
    for folder in checkpoints.glob("step-????????"):
        missing = [name for name in FILES if not (folder / name).exists()]
        assert not missing or not folder.exists(), (folder, missing)  # it may have gone between the two looks


def wait_for(moment: str, process: subprocess.Popen[bytes], out: Path, random: Random) -> bool:
    """Until the run is there; False if it ended before."""
    config, lines = out / "config.yaml", out / "metrics.jsonl"
    before, written, more = (stamp(config), stamp(lines), random.randint(1, 4))
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            return False
        check_names(out / "checkpoints")
        begun = stamp(config) != before  # it has read its checkpoint
        if moment == "begun" and begun:
            time.sleep(random.uniform(0, 0.05))
            return True
        if moment == "saving" and begun and list((out / "checkpoints").glob("step-????????.partial")):
            time.sleep(random.uniform(0, 0.03))
            return True
        if moment == "training" and begun and stamp(lines) != written:
            written, more = stamp(lines), more - 1
            if more == 0:
                time.sleep(random.uniform(0, 0.1))
                return True
        time.sleep(0.001)
    process.kill()
    raise TimeoutError(f"{moment}: not reached in {PATIENCE} s; see {out.parent / 'run.log'}")


def kill_and_restart(folder: Path, steps: int, moments: list[str], random: Random) -> None:
    """Kill a run at these moments, start it again each time, and hold its end to that of a run in peace."""
    recipe, out = write_recipe(folder), folder / "run"
    settings = [*SETTINGS, f"train.steps={steps}"]
    for moment in moments:
        process = start(recipe, *settings)
        assert wait_for(moment, process, out, random), (folder / "run.log").read_text()[-3000:]
        process.kill()
        process.wait()
        check_names(out / "checkpoints")
        if (last := out / "checkpoints" / "last").is_symlink():
            load_encoder(last)
            for path in last.glob("*.safetensors"):
                load_file(path)
    process = start(recipe, *settings)
    assert process.wait(PATIENCE) == 0, (folder / "run.log").read_text()[-3000:]

    peaceful = pretrain(load_config(recipe, [*settings, f"out={folder / 'peaceful'}"]))
    killed = out / "checkpoints" / "last"
    assert killed.resolve().name == peaceful.name == f"step-{steps:08d}"
    assert [name for name in FILES if name != "state.json" and not same(killed / name, peaceful / name)] == []
    assert metrics(out) == metrics(folder / "peaceful")
    assert [line["step"] for line in metrics(out)] == list(range(1, steps + 1))
    # The last and the one before; which that is tells the disk: none is begun while another is still being written.
    last_link, before, end = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert (last_link, end) == ("last", f"step-{steps:08d}")
    assert before in {f"step-{step:08d}" for step in range(2, steps, 2)}


def same(a: Path, b: Path) -> bool:
    return a.read_bytes() == b.read_bytes()


def test_a_run_that_is_killed_three_times(tmp_path: Path) -> None:
    kill_and_restart(tmp_path, 20, ["training", "saving", "begun"], Random(0))


@pytest.mark.slow
def test_a_run_that_is_killed_25_times(tmp_path: Path) -> None:
    random = Random(1)
    moments = ["begun", *random.choices(["begun", "saving", "training"], [1, 2, 2], k=24)]
    kill_and_restart(tmp_path, 200, moments, random)

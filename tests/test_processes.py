"""Whole runs in processes of their own: several ranks, signals, kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint import find_last
from tests.samples import free_port
from tests.tiny import STEPS, tiny_trained_state, without_key_biases, write_recipe

ROOT = Path(__file__).parents[1]


def start(ranks: int, recipe: Path, *overrides: str) -> subprocess.Popen[str]:
    """``pretrain/run.py``, in several processes as torchrun starts them, or in one."""
    program = [str(ROOT / "pretrain" / "run.py"), str(recipe), *overrides]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(launcher if ranks > 1 else []), *program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str, str]:
    """Exit code, output, errors; what hangs is killed and fails."""
    try:
        out, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        pytest.fail(f"still there after {timeout} s:\n{out}\n{errors}")
    return process.returncode, out, errors


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str], saved: bool = False) -> None:
    """Until metrics.jsonl has a line of that step or a later one and, if asked for, a checkpoint is there."""
    path, end = out / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # The last line may be written just now.
        reached = any(json.loads(line)["step"] >= step for line in lines if line.endswith("\n"))
        if reached and not (saved and find_last(out / "checkpoints") is None):
            return
        time.sleep(0.05)
    pytest.fail(f"no step {step}{', or no checkpoint,' if saved else ''} in {out}")


def last_rank(launcher: subprocess.Popen[str]) -> psutil.Process:
    """The process of the last rank that torchrun started."""
    environments = {child: child.environ() for child in psutil.Process(launcher.pid).children()}
    ranks = {int(environment["RANK"]): child for child, environment in environments.items() if "RANK" in environment}
    return ranks[max(ranks)]


def test_two_processes_are_one_and_can_be_resumed_as_one(tmp_path: Path) -> None:
    """The same batches, the same masks, the same gradients; what differs is the order of sums."""
    outs = {}
    for ranks in (1, 2):
        (folder := tmp_path / str(ranks)).mkdir()
        outs[ranks] = folder / "run"
        code, out, errors = finish(start(ranks, write_recipe(folder), "eval.label=null", "train.precision=fp32"))
        assert code == 0, errors
        assert out.count("encoder   image, text, audio") == 1  # the first rank speaks
        assert json.loads((outs[ranks] / "env.json").read_text())["processes"] == ranks
    one, other = (metrics(outs[ranks]) for ranks in (1, 2))
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in ("loss", "image_text", "masked_language", "masked_image", "masked_audio", "gradient_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-3), (a["step"], name)
    weights = [tiny_trained_state(outs[ranks] / "checkpoints" / "last") for ranks in (1, 2)]
    for name, tensor in without_key_biases(weights[0]).items():
        torch.testing.assert_close(without_key_biases(weights[1])[name], tensor, rtol=0, atol=3e-4)
    states = [json.loads((outs[n] / "checkpoints" / "last" / "stream.json").read_text()) for n in (1, 2)]
    assert states[0] == states[1]
    more = ["eval.label=null", "train.precision=fp32", f"train.steps={STEPS + 2}"]
    code, out, errors = finish(start(1, tmp_path / "2" / "recipe.yaml", *more))
    assert code == 0, errors
    assert f"resumed from {outs[2]}/checkpoints/step-{STEPS:08d} at step {STEPS}" in out
    assert f"train.steps: {STEPS} then, {STEPS + 2} now" in out


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_a_signal_saves_and_ends_well(tmp_path: Path, ranks: int, number: signal.Signals) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "run"
    settings = ["eval.label=null", "train.steps=100000", "train.save_every=100000", "train.pictures=false"]
    process = start(ranks, recipe, *settings)
    wait_for_step(out, 4, process)
    if ranks == 1:
        process.send_signal(number)
    else:  # one of the ranks gets it, the others learn of it
        last_rank(process).send_signal(number)
    code, shown, errors = finish(process)
    assert code == 0, errors
    checkpoint = find_last(out / "checkpoints")
    assert checkpoint is not None
    assert f"stopped by {number.name}; {checkpoint} is saved" in shown
    assert json.loads((checkpoint / "state.json").read_text())["step"] == metrics(out)[-1]["step"]


def test_a_rank_that_is_killed_takes_the_run_down(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "run"
    process = start(2, recipe, "eval.label=null", "train.steps=100000", "train.save_every=4", "train.pictures=false")
    wait_for_step(out, 8, process, saved=True)
    last_rank(process).kill()
    code, _, errors = finish(process)
    assert code != 0
    assert "SIGKILL" in errors
    checkpoint = find_last(out / "checkpoints")
    assert checkpoint is not None
    load_file(checkpoint / "encoder" / "model.safetensors")


def test_an_error_of_one_rank_is_shown_and_ends_all(tmp_path: Path) -> None:
    code, _, errors = finish(start(2, write_recipe(tmp_path), "train.batch_size=9"))
    assert code != 0
    assert "error: 2 processes can't share" in errors


def test_a_signal_to_all_processes_of_a_run_saves_and_ends_well(tmp_path: Path) -> None:
    """As a cluster sends it: to the workers that read ahead, too."""
    recipe, out = write_recipe(tmp_path), tmp_path / "run"
    program = [sys.executable, str(ROOT / "pretrain" / "run.py"), str(recipe), "eval.label=null", "data.workers=2"]
    settings = ["train.steps=100000", "train.save_every=100000", "train.pictures=false"]
    process = subprocess.Popen(
        [*program, *settings], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for_step(out, 4, process)
    os.killpg(process.pid, signal.SIGTERM)
    code, shown, errors = finish(process)
    assert code == 0, errors
    assert f"stopped by SIGTERM; {find_last(out / 'checkpoints')} is saved" in shown

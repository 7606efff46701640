"""Two machines: network namespaces of this one, joined by a cable that can be cut."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.checkpoint import find_last
from tests.test_processes import finish, metrics, start, wait_for_step
from tests.tiny import write_recipe

ROOT = Path(__file__).parents[1]
MACHINES = ("a", "b")
SETTINGS = ("eval.label=null", "train.save_every=4", "train.pictures=false", "train.timeout=8")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.name != "posix" or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"),
        reason="making network namespaces needs root, ip and unshare",
    ),
]


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def cable() -> Iterator[str]:
    """Namespaces tri-a and tri-b with the addresses 10.77.0.1 and .2; gives the name of b's end of the cable."""
    try:
        for name in MACHINES:
            ip("netns", "add", f"tri-{name}")
            ip("-n", f"tri-{name}", "link", "set", "lo", "up")
        ip("link", "add", "tri0", "netns", "tri-a", "type", "veth", "peer", "name", "tri0", "netns", "tri-b")
        for number, name in enumerate(MACHINES, 1):
            ip("-n", f"tri-{name}", "addr", "add", f"10.77.0.{number}/24", "dev", "tri0")
            ip("-n", f"tri-{name}", "link", "set", "tri0", "up")
        yield "tri0"
    finally:
        for name in MACHINES:
            subprocess.run(["ip", "netns", "del", f"tri-{name}"], check=False, capture_output=True)


def start_on(machine: str, recipe: Path) -> subprocess.Popen[str]:
    """One of the two processes of a run, on a machine of that name."""
    launch = f"-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --node_rank={MACHINES.index(machine)}"
    launch += " --master_addr=10.77.0.1 --master_port=29400"
    program = f"{sys.executable} {launch} {ROOT}/pretrain/run.py {recipe} {' '.join(SETTINGS)} train.steps=100000"
    inside = f"hostname machine-{machine}; exec {program}"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "tri0"}
    command = ["ip", "netns", "exec", f"tri-{machine}", "unshare", "--uts", "sh", "-c", inside]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("watched", MACHINES)
def test_a_machine_that_is_cut_off_is_named_and_the_run_can_go_on(tmp_path: Path, cable: str, watched: str) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "run"
    processes = {name: start_on(name, recipe) for name in MACHINES}
    other = MACHINES[1 - MACHINES.index(watched)]
    try:
        wait_for_step(out, 8, processes[watched], saved=True)
        ip("-n", "tri-b", "link", "set", cable, "down")
        begun = time.monotonic()
        code, _, errors = finish(processes[watched], timeout=90)
        assert code != 0
        assert time.monotonic() - begun < 60
        rank = MACHINES.index(other)
        assert (
            f"error: lost rank {rank} on machine-{other}: it ended, was killed, or its machine can't be reached"
            in errors
        )
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
        subprocess.run(["pkill", "-9", "-f", str(recipe)], check=False)
    checkpoint = find_last(out / "checkpoints")
    assert checkpoint is not None
    step = int(checkpoint.name.removeprefix("step-"))
    code, shown, errors = finish(start(1, recipe, *SETTINGS, f"train.steps={step + 2}"))
    assert code == 0, errors
    assert f"resumed from {checkpoint} at step {step}" in shown
    assert metrics(out)[-1]["step"] == step + 2

import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

from pretrain.config import Config
from pretrain.start import start_accelerator
from tests.tiny import tiny_config

FOLDER = Path(__file__).parents[1] / "docs" / "launch"
FILES = sorted(FOLDER.glob("*.yaml"))


def load(name: str) -> ClusterConfig:
    return load_config_from_file(str(FOLDER / name))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.stem))
def test_accelerate_knows_every_key(path: Path) -> None:
    config = load(path.name)  # refuses unknown keys, but only at the top
    assert config.compute_environment.value == "LOCAL_MACHINE"
    assert config.mixed_precision == "no"  # train.precision chooses
    given = yaml.safe_load(path.read_text())
    assert set(given) <= set(ClusterConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("name", "kind", "processes", "machines", "cpu"),
    [
        ("cpu", DistributedType.NO, 1, 1, True),
        ("gpu_1", DistributedType.NO, 1, 1, False),
        ("gpu_8", DistributedType.MULTI_GPU, 8, 1, False),
        ("nodes_2", DistributedType.MULTI_GPU, 16, 2, False),
        ("fsdp2", DistributedType.FSDP, 8, 1, False),
    ],
)
def test_files_say_what_their_names_say(
    name: str, kind: DistributedType, processes: int, machines: int, cpu: bool
) -> None:
    config = load(f"{name}.yaml")
    assert config.distributed_type == kind
    assert (config.num_processes, config.num_machines, config.use_cpu) == (processes, machines, cpu)
    assert (config.main_process_ip is not None) == (config.main_process_port is not None) == (machines > 1)


def test_no_file_is_without_a_test() -> None:
    assert [path.stem for path in FILES] == ["cpu", "fsdp2", "gpu_1", "gpu_8", "nodes_2"]


@pytest.mark.parametrize(("asked", "mixed"), [("fp32", "no"), ("bf16", "bf16")])
def test_the_recipe_and_not_the_launcher_chooses_the_precision(
    asked: str, mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    config: Config = tiny_config(tmp_path, f"train.precision={asked}")
    assert start_accelerator(config).mixed_precision == mixed


def test_the_readme_names_every_file() -> None:
    readme = (FOLDER / "README.md").read_text()
    for path in FOLDER.iterdir():
        assert path.name == "README.md" or f"docs/launch/{path.name}" in readme, path.name
    for name in re.findall(r"docs/launch/([\w.]+)", readme):
        assert (FOLDER / name).exists(), name


# --- slurm.sh

SRUN = """\
#!/bin/bash
# Two tasks, which get the signals that this process gets; that is all that is needed of Slurm.
while [[ $1 == --* ]]; do shift; done
trap 'kill -USR1 "${tasks[@]}"' USR1
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 SLURM_NNODES=1 "$@" &
    tasks+=($!)
done
worst=0
for task in "${tasks[@]}"; do
    wait "$task"; status=$?
    while kill -0 "$task" 2>/dev/null; do wait "$task"; status=$?; done
    [ "$status" = 0 ] || worst=$status
done
exit "$worst"
"""
SCONTROL = """\
#!/bin/bash
if [ "$1" = requeue ]; then echo "requeued $2" >> requeued; else printf 'node7\\nnode8\\n'; fi
"""
TRAINING = """\
#!/bin/bash
trap 'echo "saved $RANK" >> log; exit 0' USR1
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> log
[ -z "$ENDS_WITH" ] || exit "$ENDS_WITH"
touch "ready-$RANK"
while true; do sleep 0.05; done
"""


def start_job(folder: Path, **environment: str) -> "subprocess.Popen[bytes]":
    """The script as Slurm runs it, with stand-ins for Slurm's commands and for Python."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": TRAINING}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    env: dict[str, Any] = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": f"{folder}/python"}
    env |= {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_CPUS_PER_TASK": "4"}
    env |= {"ENDS_WITH": "", **environment}
    return subprocess.Popen(["bash", str(FOLDER / "slurm.sh"), "my recipe.yaml", "seed=1"], cwd=folder, env=env)


def test_slurm_script_is_bash() -> None:
    path = FOLDER / "slurm.sh"
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert path.stat().st_mode & stat.S_IXUSR
    assert "#SBATCH --signal=B:USR1@120\n" in path.read_text()


def test_out_of_time_all_tasks_save_and_the_job_is_requeued(tmp_path: Path) -> None:
    job = start_job(tmp_path)
    until = time.monotonic() + 30
    while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < until
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0
    lines = sorted((tmp_path / "log").read_text().splitlines())
    arguments = "pretrain/run.py my recipe.yaml seed=1"
    assert lines == [
        f"0 0 2 2 node7 10007 {arguments}",
        f"1 1 2 2 node7 10007 {arguments}",
        "saved 0",
        "saved 1",
    ]
    assert (tmp_path / "requeued").read_text() == "requeued 20007\n"


@pytest.mark.parametrize("status", [0, 2])
def test_a_job_that_ends_by_itself_is_not_requeued(status: int, tmp_path: Path) -> None:
    assert start_job(tmp_path, ENDS_WITH=str(status)).wait(30) == status
    assert not (tmp_path / "requeued").exists()

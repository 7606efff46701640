"""Experiment trackers through Accelerate: which of them, their runs, and what is logged.

Nothing leaves the machine by default: without a choice it is TensorBoard's files, if TensorBoard is installed. A
tracker that is named may go to the network, as its own settings say (``WANDB_MODE=offline`` and the like).
"""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration

from data.documents import leaves
from data.errors import UserError

TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab")
FOLDER = "trackers"


class TrackerError(UserError):
    """A tracker that this machine can't use; says what to install."""


@dataclass
class TrackerConfig:
    """Where metrics go besides metrics.jsonl."""

    names: list[str] | None = None
    """Allowed: tensorboard, wandb, trackio, comet_ml, aim, mlflow, clearml, dvclive, swanlab; [] is none of them. null:
    tensorboard if it is installed."""
    project: str = "triptych"
    """Name that runs are found under; a folder of this name in `out`/trackers for tensorboard."""
    run: str | None = None
    """Name of the run; null takes the name of the folder `out`."""

    def __post_init__(self) -> None:
        for name in self.names or []:
            if name not in TRACKERS:
                near = difflib.get_close_matches(name.lower(), TRACKERS, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"trackers.names: {name!r} is unknown; allowed are {', '.join(TRACKERS)}{hint}")
            if self.names and self.names.count(name) > 1:
                raise ValueError(f"trackers.names: {name} stands there twice")
        # It becomes a folder, which should not be anywhere else.
        if not re.fullmatch(r"[\w-][\w. -]*", self.project):
            raise ValueError(f"trackers.project={self.project!r}: allowed are letters, digits and . _ - and spaces")
        if self.run is not None and not self.run.strip():
            raise ValueError("trackers.run is empty: give a name, or null for the name of `out`")


def choose(config: TrackerConfig) -> list[str]:
    """The trackers to use.

    Raises:
        TrackerError: one that is named but not installed.
    """
    installed = {str(name) for name in get_available_trackers()}
    if config.names is None:
        return ["tensorboard"] if "tensorboard" in installed else []
    if missing := [name for name in config.names if name not in installed]:
        raise TrackerError(
            f"trackers.names: {', '.join(missing)} not installed: pip install {' '.join(missing)}, or leave it out"
        )
    return list(config.names)


def accelerator_arguments(config: TrackerConfig, out: Path) -> dict[str, Any]:
    """What ``Accelerator`` has to be given.

    Args:
        config: the choice of trackers.
        out: the run's folder; its folder ``trackers`` gets what they write to files.

    Raises:
        TrackerError: a tracker that is named but not installed.
    """
    folders = ProjectConfiguration(project_dir=str(out), logging_dir=str(out / FOLDER))
    return {"log_with": choose(config) or None, "project_config": folders}


def start(
    accelerator: Accelerator,
    config: TrackerConfig,
    settings: Mapping[str, Any],
    out: Path,
    step: int = 0,
    ids: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Begin the trackers' runs, or go on with those of a run that is resumed. Call it on every rank.

    Args:
        accelerator: made with `accelerator_arguments`.
        config: the names of project and run.
        settings: the run's whole configuration, as ``asdict`` gives it; stored once, when the run is new.
        out: the run's folder.
        step: how many are done.
        ids: what this function returned before; None for a new run.

    Returns:
        ``run`` and, of trackers that choose their own, name -> id. Keep them with each checkpoint. They are those of
        the main process.
    """
    ids = {"run": uuid4().hex, **(ids or {})}
    arguments = run_arguments(ids, config.run or out.resolve().name, out, step)
    # MLflow refuses settings that change, TensorBoard would show one more run.
    stored = storable(settings) if step == 0 else None
    accelerator.init_trackers(config.project, config=stored, init_kwargs=arguments)
    if accelerator.is_main_process:
        ids |= {each.name: own for each in accelerator.trackers if (own := own_id(each.name, each.tracker)) is not None}
    return ids


def own_id(name: str, run: Any) -> str | None:
    """The id that a tracker chose for its run; None of those that take ours."""
    match name:
        case "aim":
            return str(run.hash)
        case "clearml":
            return str(run.id)
        case "mlflow":
            return str(run.info.run_id)
    return None


def run_arguments(ids: Mapping[str, str], run: str, out: Path, step: int) -> dict[str, dict[str, Any]]:
    """Tracker -> the keyword arguments with which its run begins, or goes on after ``step``.

    Args:
        ids: as `start` returns them; ``run`` is 32 hexadecimal digits.
        run: name of the run.
        out: the run's folder.
        step: how many are done.
    """
    key, resumed = ids["run"], step > 0
    return {
        # Hides what a run wrote after the checkpoint from which it is resumed.
        "tensorboard": {"purge_step": step + 1} if resumed else {},
        "wandb": {"id": key, "name": run, "resume": "allow", "dir": str(out)},
        # Trackio knows runs by their names.
        "trackio": {"name": f"{run}-{key[:8]}", "resume": "allow"},
        "comet_ml": {"experiment_key": key, "mode": "get_or_create"},
        "aim": {"run_hash": ids["aim"]} if "aim" in ids else {},
        "mlflow": {"run_name": run} | ({"run_id": ids["mlflow"]} if "mlflow" in ids else {}),
        # 0: steps count from the run's beginning, not from its last one. False: tasks of the same name are others.
        "clearml": {"task_name": run}
        | (
            {"reuse_last_task_id": ids["clearml"], "continue_last_task": 0}
            if "clearml" in ids
            else {"reuse_last_task_id": False}
        ),
        "dvclive": {"dir": str(out / FOLDER / "dvclive"), "resume": resumed},
        # Its ids have 21 characters.
        "swanlab": {
            "id": key[:21],
            "experiment_name": run,
            "resume": "allow",
            "logdir": str(out / FOLDER / "swanlab"),
        },
    }


def log(accelerator: Accelerator, values: Mapping[str, Any], step: int) -> None:
    """Log the finite numbers among ``values`` under a step."""
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}
    if numbers:
        accelerator.log(numbers, step=step)


def finish(accelerator: Accelerator) -> None:
    """End the trackers' runs; unlike ``Accelerator.end_training``, ranks can still talk to each other after it."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()


def storable(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Settings by their dotted keys; what is no number, truth value or text becomes text."""
    return {
        key: value if isinstance(value, bool | int | float | str) else "null" if value is None else str(value)
        for key, value in leaves(settings)
    }

"""Trackers: which of them, how their runs begin and go on, and what they get."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from omegaconf import OmegaConf

from data.errors import UserError
from pretrain.trackers import (
    TRACKERS,
    TrackerConfig,
    accelerator_arguments,
    choose,
    finish,
    log,
    own_id,
    run_arguments,
    start,
    storable,
)

SETTINGS = {"seed": 0, "data": {"train": {"a": {"shards": ["x", "y"]}}, "cache": None}, "fast": True}


class Fake(GeneralTracker):  # type: ignore[misc]
    """Takes the place of one of Accelerate's."""

    requires_logging_directory = False
    made: "list[Fake]" = []  # noqa: RUF012

    def __init__(self, project: str, **arguments: Any) -> None:
        super().__init__()
        self.project, self.arguments = project, arguments
        self.settings: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.ended = False
        self.made.append(self)

    @property
    def tracker(self) -> Any:
        chosen = self.arguments.get("run_id", "chosen-by-it")
        return SimpleNamespace(info=SimpleNamespace(run_id=chosen))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        assert step is not None
        self.logged.append((values, step))

    def finish(self) -> None:
        self.ended = True


def install(patch: pytest.MonkeyPatch, *names: str) -> None:
    """As if just these were installed."""
    for module in ("accelerate.tracking", "pretrain.trackers"):
        patch.setattr(f"{module}.get_available_trackers", lambda: [LoggerType(name) for name in names])


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    """Weights & Biases and MLflow are installed, and fakes; gives those that were made."""
    install(monkeypatch, "wandb", "mlflow")
    made: list[Fake] = []
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, type(name, (Fake,), {"name": name, "made": made}))
    return made


def accelerator(config: TrackerConfig, out: Path) -> Accelerator:
    return Accelerator(cpu=True, **accelerator_arguments(config, out))


def test_all_that_accelerate_knows_are_allowed() -> None:
    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS) - {"fake"}
    assert TrackerConfig(names=list(TRACKERS)).names == list(TRACKERS)
    documented = OmegaConf.structured(TrackerConfig)  # what recipes are read into
    assert OmegaConf.to_object(OmegaConf.merge(documented, {"names": ["wandb"]})) == TrackerConfig(names=["wandb"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"names": ["tensorbord"]},
            r"trackers.names: 'tensorbord' is unknown; allowed are .*did you mean tensorboard\?",
        ),
        ({"names": ["WandB"]}, r"did you mean wandb\?"),
        ({"names": ["all"]}, "'all' is unknown"),
        ({"names": ["wandb", "wandb"]}, "wandb stands there twice"),
        ({"project": ""}, "trackers.project=''"),
        ({"project": "../elsewhere"}, "trackers.project='../elsewhere'"),
        ({"project": "/tmp"}, "trackers.project='/tmp'"),  # noqa: S108
        ({"run": " "}, "trackers.run is empty"),
    ],
)
def test_settings_that_can_not_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrackerConfig(**changes)


def test_without_a_choice_it_is_tensorboard_alone_if_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "wandb", "tensorboard", "mlflow")
    assert choose(TrackerConfig()) == ["tensorboard"]
    assert choose(TrackerConfig(names=[])) == []
    assert choose(TrackerConfig(names=["mlflow", "wandb"])) == ["mlflow", "wandb"]
    install(monkeypatch, "wandb")
    assert choose(TrackerConfig()) == []


def test_one_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, "tensorboard")
    with pytest.raises(UserError, match=r"trackers.names: wandb, aim not installed: pip install wandb aim"):
        accelerator_arguments(TrackerConfig(names=["wandb", "tensorboard", "aim"]), tmp_path)


@pytest.mark.filterwarnings("error")
def test_no_trackers_are_fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    run = accelerator(TrackerConfig(), tmp_path)
    ids = start(run, TrackerConfig(), SETTINGS, tmp_path)
    log(run, {"loss": 1.0}, 1)
    finish(run)
    assert ids.keys() == {"run"}
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_has_an_id_of_its_own_and_its_settings(fakes: list[Fake], tmp_path: Path) -> None:
    config = TrackerConfig(names=["wandb", "mlflow"], project="birds", run="first")
    out = tmp_path / "run"
    ids = start(accelerator(config, out), config, SETTINGS, out)
    wandb, mlflow = fakes
    assert wandb.arguments == {"id": ids["run"], "name": "first", "resume": "allow", "dir": str(out)}
    assert mlflow.arguments == {"run_name": "first"}
    assert [fake.project for fake in fakes] == ["birds", "birds"]
    flat_settings = {"seed": 0, "data.train.a.shards": "['x', 'y']", "data.cache": "null", "fast": True}
    assert [fake.settings for fake in fakes] == [[flat_settings], [flat_settings]]
    assert len(ids["run"]) == 32  # what comet_ml takes
    assert ids == {"run": ids["run"], "mlflow": "chosen-by-it"}
    assert start(accelerator(config, out), config, SETTINGS, out)["run"] != ids["run"]


def test_a_resumed_run_goes_on_as_the_same(fakes: list[Fake], tmp_path: Path) -> None:
    config = TrackerConfig(names=["wandb", "mlflow"])
    ids = {"run": "a" * 32, "mlflow": "b"}
    out = tmp_path / "some-run"
    assert start(accelerator(config, out), config, SETTINGS, out, 7, ids) == ids
    wandb, mlflow = fakes
    assert (wandb.arguments["id"], wandb.arguments["name"]) == ("a" * 32, "some-run")
    assert mlflow.arguments["run_id"] == "b"
    assert [fake.settings for fake in fakes] == [[], []]
    assert ids == {"run": "a" * 32, "mlflow": "b"}


def test_only_finite_numbers_are_logged(fakes: list[Fake], tmp_path: Path) -> None:
    config = TrackerConfig(names=["wandb", "mlflow"])
    run = accelerator(config, tmp_path)
    start(run, config, {}, tmp_path)
    log(run, {"loss": 1.5, "skipped": 2, "bad": math.nan, "worse": math.inf, "text": "x", "none": None, "list": [1]}, 3)
    log(run, {"bad": math.nan}, 4)
    assert [fake.logged for fake in fakes] == [[({"loss": 1.5, "skipped": 2}, 3)]] * 2
    finish(run)
    assert all(fake.ended for fake in fakes)
    log(run, {"loss": 1.0}, 5)  # nobody listens any more
    assert all(len(fake.logged) == 1 for fake in fakes)


def test_each_tracker_can_go_on_where_it_was(tmp_path: Path) -> None:
    key = "0123456789abcdef" * 2
    new, resumed = (
        run_arguments(ids, "name", tmp_path, step)
        for ids, step in (({"run": key}, 0), ({"run": key, "aim": "x", "clearml": "y", "mlflow": "z"}, 5))
    )
    assert new.keys() == resumed.keys() == set(TRACKERS)
    for same in ("wandb", "trackio", "comet_ml", "swanlab"):  # they take an id of ours, or a name
        assert new[same] == resumed[same]
    assert len(new["swanlab"]["id"]) == 21
    assert (new["tensorboard"], resumed["tensorboard"]) == ({}, {"purge_step": 6})
    assert (new["aim"], resumed["aim"]) == ({}, {"run_hash": "x"})
    assert new["clearml"] == {"task_name": "name", "reuse_last_task_id": False}
    assert resumed["clearml"] == {"task_name": "name", "reuse_last_task_id": "y", "continue_last_task": 0}
    assert (new["dvclive"]["resume"], resumed["dvclive"]["resume"]) == (False, True)


def test_ids_that_trackers_choose() -> None:
    run = SimpleNamespace(hash="a", id="b", info=SimpleNamespace(run_id="c"))
    assert [own_id(name, run) for name in ("aim", "clearml", "mlflow", "wandb")] == ["a", "b", "c", None]


def test_settings_are_flat_and_plain() -> None:
    settings = {"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None, "f": 0.5, "g": {}}
    assert storable(settings) == {"a.b.c": 1, "a.d": "[1, 2]", "e": "null", "f": 0.5}


def test_tensorboard_hides_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = TrackerConfig(names=["tensorboard"], project="birds")
    ids = None
    for first, steps in ((0, range(1, 6)), (3, range(4, 7))):  # cut after step 5, resumed from 3
        run = accelerator(config, tmp_path)
        ids = start(run, config, SETTINGS, tmp_path, first, ids)
        for step in steps:
            log(run, {"loss": 10.0 * first + step}, step)
        finish(run)
    folder = tmp_path / "trackers" / "birds"
    found = events.EventAccumulator(str(folder)).Reload()
    assert [(each.step, each.value) for each in found.Scalars("loss")] == [
        *((step, float(step)) for step in (1, 2, 3)),
        *((step, 30.0 + step) for step in (4, 5, 6)),
    ]
    assert len(list(folder.glob("*/hparams.yml"))) == 1

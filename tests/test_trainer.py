"""What the trainer promises beside the losses: rates, averages, checkpoints, resuming, looks, trackers."""

import concurrent.futures
import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from safetensors.torch import load_file
from torch import Tensor, nn

import pretrain.checkpoint
import pretrain.engine
import pretrain.start
from data.text import load_tokenizer
from eval.monitor import Monitor
from objectives.masked_region import MaskedRegionConfig
from objectives.pretraining import Loss, ObjectivesConfig, Pretraining
from pretrain.checkpoint import RETRIES, CheckpointError, Checkpoints, find_last, load_checkpoint, load_encoder
from pretrain.config import Config, ConfigError, TrainConfig, load_config
from pretrain.engine import Stopped, TrainingError
from pretrain.export import export
from pretrain.model.encoder import Encoder
from pretrain.optimizer import learning_rate, make_optimizer, set_learning_rate
from pretrain.run import rehearsal
from pretrain.start import set_up, share_model
from tests.test_trackers import Fake, install
from tests.tiny import tiny_config, tiny_encoder, tiny_tokenizer

STEPS = 6
QUICK = (f"train.steps={STEPS}", "train.save_every=2", "train.keep=9", "train.pictures=false")
STATE = ("encoder/model.safetensors", "objectives.safetensors", "optimizer.safetensors", "stream.json")


class PowerCutError(Exception):
    """Ends a run where no code expects it."""


def config_of(folder: Path, *overrides: str) -> Config:
    folder.mkdir(exist_ok=True)
    return tiny_config(folder, *QUICK, *overrides)


def train(folder: Path, *overrides: str) -> Path:
    """With a disk that keeps up with steps of milliseconds, so that no checkpoint is left out."""
    save = Checkpoints.save

    def in_time(self: Checkpoints, *arguments: Any, **named: Any) -> bool:
        if self._writing is not None:
            concurrent.futures.wait([self._writing])
        return save(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", in_time)
        return pretrain.engine.pretrain(config_of(folder, *overrides))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def differing(a: Path, b: Path, *more: str) -> list[str]:
    """Which files of two checkpoints are not the same to the bit."""
    return [name for name in (*STATE, *more) if (a / name).read_bytes() != (b / name).read_bytes()]


def each_step(patch: pytest.MonkeyPatch, do: Callable[[Pretraining, int], None]) -> None:
    """Have ``do(model, step)`` called after every step of the optimiser, with steps counted from 1 in each process."""
    after, count = Pretraining.after_step, iter(range(1, 10_000))

    def watched(self: Pretraining, progress: float) -> None:
        after(self, progress)
        do(self, next(count))

    patch.setattr(Pretraining, "after_step", watched)


def cut_at(step: int) -> Callable[[Pretraining, int], None]:
    def cut(_: Pretraining, at: int) -> None:
        if at == step:
            raise PowerCutError

    return cut


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in peace, with checkpoints at 2, 4 and 6. Only read by tests."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


def at(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / f"step-{step:08d}"


# The learning rate


def test_constant_stays_at_the_peak_and_falls_in_a_straight_line() -> None:
    config = TrainConfig(steps=100, warmup=0.1, schedule="constant", cooldown=0.2, learning_rate=2.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[9:80] == [2.0] * 71
    assert rates[80:] == pytest.approx([2.0 * (20 - i) / 21 for i in range(20)])
    assert rates[99] > 0
    assert learning_rate(config, 100) == 0


@pytest.mark.parametrize(
    ("steps", "warmup", "cooldown"),
    [(10, 0.8, 0.8), (10, 1.0, 1.0), (100, 0.7, 0.5), (1, 1.0, 1.0), (1, 0.0, 0.0), (7, 0.0, 1.0), (10, 1.0, 0.0)],
)
def test_warm_up_and_cooldown_may_overlap(steps: int, warmup: float, cooldown: float) -> None:
    config = TrainConfig(steps=steps, warmup=warmup, schedule="constant", cooldown=cooldown, learning_rate=2.0)
    rates = [learning_rate(config, step) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)
    top = rates.index(max(rates))
    assert all(a <= b for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b for a, b in pairwise(rates[top:]))
    # Nowhere does it go further in a step than the two lines do.
    steepest = 2.0 * max(1 / max(1, round(warmup * steps)), 1 / (round(cooldown * steps) + 1))
    assert all(abs(a - b) <= steepest + 1e-12 for a, b in pairwise(rates))


def test_a_cosine_knows_no_cooldown() -> None:
    one, other = (TrainConfig(steps=50, cooldown=share) for share in (0.0, 0.9))
    rates = [[learning_rate(config, step) for step in range(50)] for config in (one, other)]
    assert rates[0] == rates[1]
    assert rates[0][26] == pytest.approx(one.learning_rate * (1 + math.cos(math.pi * 24 / 48)) / 2)


def objectives() -> ObjectivesConfig:
    return ObjectivesConfig(masked_region=MaskedRegionConfig(decoder_width=8, decoder_heads=2))


def test_layers_further_from_the_end_learn_more_slowly() -> None:
    model = Pretraining(tiny_encoder(tiny_tokenizer()), objectives())
    optimizer = make_optimizer(model, TrainConfig(layer_decay=0.5, weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scales.keys() == set(names.values())
    expected = {
        "encoder.tokenizers.": 0.125,
        "encoder.blocks.0.": 0.25,
        "encoder.blocks.1.": 0.5,
        "encoder.norm.": 1.0,
        "encoder.heads.": 1.0,
        "objectives.": 1.0,
    }
    for name, scale in scales.items():
        assert [given for prefix, given in expected.items() if name.startswith(prefix)] == [scale], name
    assert {prefix for prefix in expected for name in scales if name.startswith(prefix)} == expected.keys()

    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    for group in optimizer.param_groups:
        assert {id(p) in matrices for p in group["params"]} == {group["weight_decay"] == 0.3}
        assert group["weight_decay"] in (0.0, 0.3)
    set_learning_rate(optimizer, 0.01)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.005, 0.0025, 0.00125}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # Adam's first step goes as far as the rate
    for name, scale in {"encoder.tokenizers.image.positions": 0.125, "encoder.norm.all.bias": 1.0}.items():
        moved = (before[name] - model.get_parameter(name)).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01 * scale), rtol=1e-3, atol=1e-6)


def test_a_run_uses_schedule_and_layer_decay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[dict[float, float]] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *arguments: Any) -> Any:
        used.append({group["lr_scale"]: group["lr"] for group in self.param_groups})
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    settings = ["train.schedule=constant", "train.cooldown=0.5", "train.layer_decay=0.5", "train.warmup=0.4"]
    train(tmp_path, *settings)
    assert [rates[1.0] for rates in used] == pytest.approx([5e-3 * share for share in (0.5, 1, 1, 0.75, 0.5, 0.25)])
    for rates in used:
        assert rates == pytest.approx({scale: scale * rates[1.0] for scale in (1.0, 0.5, 0.25, 0.125)})


# The average of the weights


class Averaged(NamedTuple):
    folder: Path
    began: dict[str, Tensor]
    weights: list[dict[str, Tensor]]
    looked_at: list[dict[str, Tensor]]

    def by_hand(self, steps: int) -> dict[str, Tensor]:
        average = {name: tensor.double() for name, tensor in self.began.items()}
        for step, weights in enumerate(self.weights[:steps], 1):
            average = averaged_by_hand(average, weights, step)
        return average


def averaged_by_hand(average: dict[str, Tensor], weights: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """Of step 1, 2 and 3 the share that is kept is 1/10, 2/11 and 3/12, then it is ``train.ema``."""
    share = min(0.3, step / (step + 9))
    return {name: share * tensor + (1 - share) * weights[name].double() for name, tensor in average.items()}


def copied(encoder: Encoder) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in encoder.state_dict().items()}


EMA = ("train.ema=0.3", "eval.monitor.every=4", "eval.monitor.max_share=1.0")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Averaged:
    """A run with an average, its weights at each step, and what was looked at after step 4. Only read by tests."""
    found = Averaged(tmp_path_factory.mktemp("averaged"), {}, [], [])
    look = Monitor.look

    def watched(self: Monitor, encoder: Encoder) -> dict[str, float]:
        found.looked_at.append(copied(encoder))
        return look(self, encoder)

    def began(*arguments: Any) -> Any:
        run = set_up(*arguments)
        found.began.update(copied(run.bare.encoder))
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "look", watched)
        patch.setattr(pretrain.engine, "set_up", began)
        each_step(patch, lambda model, _: found.weights.append(copied(model.encoder)))
        train(found.folder, *EMA)
    return found


def test_a_checkpoint_holds_the_average_and_what_is_trained(averaged: Averaged, whole: Path) -> None:
    for step in (2, 4, 6):
        encoder = load_encoder(at(averaged.folder, step)).encoder.state_dict()
        for name, tensor in averaged.by_hand(step).items():
            torch.testing.assert_close(encoder[name].double(), tensor, rtol=1e-5, atol=1e-6)
            assert not torch.equal(encoder[name], averaged.weights[step - 1][name]), name
        trained = load_file(at(averaged.folder, step) / "trained.safetensors")
        assert trained.keys() == encoder.keys()
        assert all(torch.equal(tensor, averaged.weights[step - 1][name]) for name, tensor in trained.items())
    # It changes nothing of what is trained.
    assert differing(at(whole, STEPS), at(averaged.folder, STEPS)) == ["encoder/model.safetensors"]
    weights = load_encoder(at(whole, STEPS)).encoder.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trained.items())
    assert not (at(whole, STEPS) / "trained.safetensors").exists()


def test_looks_and_exports_are_of_the_average(averaged: Averaged, tmp_path: Path) -> None:
    (looked_at,) = averaged.looked_at
    for name, tensor in averaged.by_hand(4).items():
        torch.testing.assert_close(looked_at[name].double(), tensor, rtol=1e-5, atol=1e-6)
    folder = export(*load_encoder(at(averaged.folder, STEPS)), tmp_path / "export", fresh=False)["image"]
    average, name = (
        load_encoder(at(averaged.folder, STEPS)).encoder.state_dict(),
        "blocks.0.feed_forward.all.fc1.weight",
    )
    exported = list(load_file(folder / "model.safetensors").values())
    assert any(torch.equal(each, average[name]) for each in exported)
    assert not any(torch.equal(each, averaged.weights[-1][name]) for each in exported)


def test_average_and_weights_go_on_to_the_bit(
    averaged: Averaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        each_step(patch, cut_at(4))
        with pytest.raises(PowerCutError):
            train(tmp_path, *EMA)
    assert find_last(tmp_path / "run" / "checkpoints") == at(tmp_path, 2)
    train(tmp_path, *EMA)
    assert differing(at(averaged.folder, STEPS), at(tmp_path, STEPS), "trained.safetensors") == []


def test_an_average_can_begin_and_end_on_the_way(averaged: Averaged, whole: Path, tmp_path: Path) -> None:
    """What is trained goes on as it was, whether or not the checkpoint, or the run, has an average."""
    begun = train(tmp_path / "begun", "train.ema=0.3", f"resume={at(whole, 4)}")
    assert (begun / "trained.safetensors").read_bytes() == (at(whole, STEPS) / STATE[0]).read_bytes()
    average = {name: tensor.double() for name, tensor in load_encoder(at(whole, 4)).encoder.state_dict().items()}
    for step, weights in enumerate(averaged.weights[4:], 5):
        average = averaged_by_hand(average, weights, step)
    for name, tensor in load_encoder(begun).encoder.state_dict().items():
        torch.testing.assert_close(tensor.double(), average[name], rtol=1e-5, atol=1e-6)
    ended = train(tmp_path / "ended", f"resume={at(averaged.folder, 4)}")
    assert differing(at(whole, STEPS), ended) == []
    assert not (ended / "trained.safetensors").exists()


# Checkpoints on a thread


class Saved:
    """A model and what saves it, without a run."""

    def __init__(self, folder: Path, keep: int = 9, keep_every: int | None = None) -> None:
        self.folder = folder
        self.tokenizer = tiny_tokenizer()
        self.model = Pretraining(tiny_encoder(self.tokenizer), objectives())
        self.optimizer = make_optimizer(self.model, TrainConfig())
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.counters: dict[str, Any] = {"bad_steps": 1}
        self.stream: dict[str, Any] = {"step": 7}
        self.warned: list[str] = []
        self.checkpoints = Checkpoints(folder, keep, keep_every, self.warned.append)

    def save(self, step: int, wait: bool = True) -> bool:
        model, optimizer = self.model, self.optimizer
        return self.checkpoints.save(
            step, model, optimizer, self.tokenizer, self.stream, {}, self.counters, model.encoder, wait=wait
        )

    def finish(self) -> None:
        """Until nothing is being written, without asking what has become of it."""
        assert self.checkpoints._writing is not None
        concurrent.futures.wait([self.checkpoints._writing])

    def finish_and_look(self) -> CheckpointError | None:
        self.finish()
        return self.checkpoints.look()

    def tensors(self) -> dict[str, Tensor]:
        moments = {
            f"{name}/{what}": value
            for name, parameter in self.model.named_parameters()
            for what, value in self.optimizer.state[parameter].items()
        }
        return {name: value.detach().clone() for name, value in {**self.model.state_dict(), **moments}.items()}

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written until it is set."""
    opened, save = threading.Event(), Encoder.save

    def late(self: Encoder, *arguments: Any) -> None:
        assert opened.wait(30)
        save(self, *arguments)

    monkeypatch.setattr(Encoder, "save", late)
    yield opened
    opened.set()


def test_a_checkpoint_that_is_due_while_another_is_written_is_left_out_and_said(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    each_step(monkeypatch, lambda _, step: gate.set() if step == STEPS else None)
    pretrain.engine.pretrain(config_of(tmp_path, "train.save_every=2"))
    assert sorted(path.name for path in at(tmp_path, 2).parent.iterdir()) == ["last", "step-00000002", "step-00000006"]
    warning = "WARNING step 4: the checkpoint before is still being written, so there is none of this step"
    assert capsys.readouterr().out.count(warning) == 1


def test_saving_waits_for_nothing_but_the_one_before(saved: Saved, gate: threading.Event) -> None:
    saved.save(2)
    assert "step-00000002" not in saved.names()
    threading.Timer(0.3, gate.set).start()
    saved.save(4)
    assert "step-00000002" in saved.names()
    assert saved.checkpoints.wait() == saved.folder / "step-00000004"
    assert saved.names() == ["last", "step-00000002", "step-00000004"]
    assert saved.checkpoints.wait() is None


def test_what_is_saved_is_what_was_there_at_the_call(saved: Saved, gate: threading.Event) -> None:
    expected = saved.tensors()
    saved.save(2)
    saved.checkpoints.copied()
    with torch.no_grad():
        for parameter in saved.model.parameters():
            parameter.add_(1)
    for parameter in saved.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    saved.optimizer.step()
    saved.counters["bad_steps"], saved.stream["step"] = 9, 9
    gate.set()
    checkpoint = saved.checkpoints.wait()
    assert checkpoint is not None
    other = Saved(saved.folder / "other")
    average = tiny_encoder(saved.tokenizer, 5)
    assert load_checkpoint(checkpoint, other.model, other.optimizer, {}, average) == (2, {"bad_steps": 1})
    found = other.tensors()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert all(torch.equal(tensor, expected[f"encoder.{name}"]) for name, tensor in average.state_dict().items())
    assert json.loads((checkpoint / "stream.json").read_text()) == {"step": 7}


def test_weights_wait_for_their_copies_and_buffers_need_not(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = pretrain.checkpoint.copy_all

    def late(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        time.sleep(0.3)  # a step takes less
        copy(pairs)

    monkeypatch.setattr(pretrain.checkpoint, "copy_all", late)
    settings = ("train.ema=0.5", "objectives.masked_region.target=latent", "objectives.masked_region.teacher.layers=1")
    train(tmp_path, *settings)
    monkeypatch.undo()
    train(tmp_path / "at once", *settings)
    assert differing(at(tmp_path, 2), at(tmp_path / "at once", 2), "trained.safetensors") == []

    saved.model.objectives.register_buffer("seen", torch.zeros(1))
    monkeypatch.setattr(pretrain.checkpoint, "copy_all", late)
    saved.save(2)
    saved.model.objectives.get_buffer("seen").add_(1)  # as a pass may
    saved.finish()
    assert load_file(saved.folder / "step-00000002" / "objectives.safetensors")["seen"] == 0


def test_an_ordinary_save_leaves_the_one_before_its_time(saved: Saved, gate: threading.Event) -> None:
    assert saved.save(2, wait=False)
    begun = time.monotonic()
    assert not saved.save(4, wait=False)
    assert saved.checkpoints.look() is None
    assert time.monotonic() - begun < 5  # the gate would be waited for 30 s
    gate.set()
    assert saved.finish_and_look() is None
    assert saved.save(6, wait=False)
    assert saved.checkpoints.wait() == saved.folder / "step-00000006"
    assert saved.names() == ["last", "step-00000002", "step-00000006"]
    assert saved.warned == []


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


def test_a_failed_write_is_told_by_the_next_look_and_once(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.checkpoint.save_file", full)
        saved.save(2, wait=False)
        error = saved.finish_and_look()
        assert "step-00000002 could not be written ([Errno 28] no space left on device); there is none" in str(error)
        assert saved.checkpoints.look() is None
        saved.save(3, wait=False)
        with pytest.raises(CheckpointError, match=r"step-00000003 could not be written"):
            saved.checkpoints.wait()
        assert saved.checkpoints.wait() is None
    assert saved.save(4, wait=False)
    assert saved.checkpoints.wait() == saved.folder / "step-00000004"
    assert (saved.names(), saved.warned) == (["last", "step-00000004"], [])


def test_a_failed_write_that_nobody_looked_at_does_not_stop_the_next(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.checkpoint.save_file", full)
        saved.save(2)
        saved.finish()
    assert saved.save(4)
    assert [message.partition(" could not")[0] for message in saved.warned] == [str(saved.folder / "step-00000002")]
    assert saved.checkpoints.wait() == saved.folder / "step-00000004"


def test_failures_in_a_row_end_the_run(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(step: int) -> CheckpointError | None:
        with monkeypatch.context() as patch:
            patch.setattr("pretrain.checkpoint.save_file", full)
            saved.save(step)
            return saved.finish_and_look()

    for step in range(1, RETRIES):
        assert fail(step) is not None
    saved.save(RETRIES)
    assert saved.finish_and_look() is None  # which ends the row
    for step in range(RETRIES + 1, 2 * RETRIES):
        assert fail(step) is not None
    with pytest.raises(CheckpointError, match=rf"step-{2 * RETRIES:08d} could .* newest one is .*step-{RETRIES:08d}$"):
        fail(2 * RETRIES)
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.checkpoint.save_file", full)
        saved.save(7)
        saved.finish()
        with pytest.raises(CheckpointError, match="step-00000007"):
            saved.save(8, wait=False)
        saved.save(9)
        saved.finish()
    assert saved.save(10, wait=True)  # the last one is tried all the same
    assert saved.checkpoints.wait() == saved.folder / "step-00000010"


def test_the_end_of_the_run_does_not_hide_a_failed_write(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.checkpoint.save_file", full)
    with pytest.raises(PowerCutError) as error, saved.checkpoints:
        saved.save(2)
        raise PowerCutError
    assert len(error.value.__notes__) == 1
    assert "step-00000002 could not be written ([Errno 28]" in error.value.__notes__[0]
    other = Saved(saved.folder / "other")
    with pytest.raises(CheckpointError, match="step-00000004 could not be written"), other.checkpoints:
        other.save(4)
    peaceful = Saved(saved.folder / "peaceful")
    with pytest.raises(PowerCutError) as error, peaceful.checkpoints:
        raise PowerCutError
    assert not hasattr(error.value, "__notes__")


def test_waiting_that_is_interrupted_loses_no_failure(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: concurrent.futures.Future[Path], *_: object) -> None:
        patch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr("pretrain.checkpoint.save_file", full)
    with pytest.raises(KeyboardInterrupt) as error, pytest.MonkeyPatch.context() as patch, saved.checkpoints:
        saved.save(2)
        for method in ("result", "exception"):
            patch.setattr(concurrent.futures.Future, method, interrupted)
        saved.checkpoints.wait()
    assert "step-00000002 could not be written" in error.value.__notes__[0]


def test_a_run_whose_last_checkpoint_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match=r"step-00000006 could not be written \(.*no space"):
        train(tmp_path, "train.save_every=100")


def test_what_was_begun_is_written_whatever_ends_the_run(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(_: Pretraining, step: int) -> None:
        if step == 3:
            assert not at(tmp_path, 2).exists()  # it was begun, and waits for the gate
            threading.Timer(0.3, gate.set).start()
            raise PowerCutError

    each_step(monkeypatch, cut)
    with pytest.raises(PowerCutError):
        train(tmp_path)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["last", "step-00000002"]


def test_a_full_disk_costs_nothing_that_was_there(saved: Saved) -> None:
    saved.save(2)
    first = saved.checkpoints.wait()
    expected = saved.tensors()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # no file may grow beyond so many bytes
    try:
        saved.save(4)
        with pytest.raises(CheckpointError, match=rf"step-00000004 could not .*too large.* newest one is {first}"):
            saved.checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert saved.names() == ["last", "step-00000002"]
    other = Saved(saved.folder / "other")
    load_checkpoint(saved.folder / "last", other.model, other.optimizer, {})
    found = other.tensors()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_milestones_are_kept_beside_the_newest(tmp_path: Path) -> None:
    saved = Saved(tmp_path, keep=2, keep_every=4)
    for step in (2, 4, 6, 8, 10, 14):
        saved.save(step)
    saved.checkpoints.wait()
    assert saved.names() == ["last", *(f"step-{step:08d}" for step in (4, 8, 10, 14))]
    with pytest.raises(ValueError, match=r"train\.keep_every=0"):
        TrainConfig(keep_every=0)


def test_a_checkpoint_that_is_removed_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may be killed at any moment of that."""
    saved = Saved(tmp_path, keep=1)
    saved.save(2)
    saved.checkpoints.wait()

    def interrupted(path: Path, ignore_errors: bool = False) -> None:
        (path / "state.json").unlink(missing_ok=True)
        if not ignore_errors:
            raise OSError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.checkpoint.shutil.rmtree", interrupted)
        saved.save(4)
        assert saved.checkpoints.wait() == tmp_path / "step-00000004"
    assert [message.partition("; ")[0] for message in saved.warned] == [
        f"{tmp_path}/step-00000002.old.partial could not be removed (interrupted)"
    ]
    assert [path for path in tmp_path.glob("step-????????") if not (path / "state.json").exists()] == []
    assert (tmp_path / "last").resolve().name == "step-00000004"
    saved.save(6)
    saved.checkpoints.wait()
    assert saved.names() == ["last", "step-00000006"]


def test_a_second_signal_does_not_end_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, got = Encoder.save, list[int]()

    def told_again(self: Encoder, *arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)  # the main thread has nothing to do meanwhile but to wait
        save(self, *arguments)

    monkeypatch.setattr(Encoder, "save", told_again)
    each_step(monkeypatch, lambda _, step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None)
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        with pytest.raises(Stopped, match=r"stopped by SIGTERM; .*step-00000003 is saved"):
            train(tmp_path, "train.save_every=100")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == []
    load_encoder(at(tmp_path, 3))


# Folders and resuming


def test_a_checkpoint_or_a_run_goes_on_in_another_folder(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path: path.read_bytes() for path in (whole / "run").rglob("*") if path.is_file()}
    one = train(tmp_path / "one", f"resume={at(whole, 4)}", "train.log_every=1")
    shown = capsys.readouterr().out
    assert f"resumed from {at(whole, 4)} at step 4" in shown
    assert "train.log_every: 2 then, 1 now" in shown  # what the other run had
    assert differing(one, at(whole, STEPS)) == []
    assert [line["step"] for line in lines_of(tmp_path / "one")] == [5, 6]

    # Of a run it is the newest.
    other = train(tmp_path / "other", f"resume={whole / 'run'}", "train.steps=8")
    assert f"resumed from {at(whole, STEPS)} at step {STEPS}" in capsys.readouterr().out
    assert other.name == "step-00000008"
    assert {path: path.read_bytes() for path in files} == files
    assert {path for path in (whole / "run").rglob("*") if path.is_file()} == set(files)


def test_there_must_be_something_left_to_do(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pretraining, "forward", lambda *_, **__: pytest.fail("trained beyond the last step"))
    with pytest.raises(ConfigError, match=r"train\.steps=6, but .*step-00000006 has done 6 already"):
        train(tmp_path, f"resume={whole / 'run'}")


def test_a_folder_with_checkpoints_of_its_own_takes_no_others(whole: Path, tmp_path: Path) -> None:
    newest = train(tmp_path, "train.steps=4")
    for path in (whole / "run", at(whole, 2), at(tmp_path, 2)):  # going back would leave later ones in the way
        with pytest.raises(ConfigError, match="holds checkpoints of its own: choose another `out`"):
            train(tmp_path, f"resume={path}")
    assert find_last(tmp_path / "run" / "checkpoints") == newest
    # Its own newest one is what it would go on from anyway.
    assert train(tmp_path, f"resume={tmp_path / 'run'}") == at(tmp_path, STEPS)


@pytest.mark.parametrize("path", ["yes please", "run", "."])
def test_a_path_of_nothing_is_refused(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=rf"^{path}: neither a checkpoint \(it has no state\.json\) nor a run"):
        train(tmp_path, f"resume={path}")


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"no run \(thesis\.tex\): choose another `out`"):
        train(tmp_path)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "thesis.tex"]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # in the very beginning
        patch.setattr(pretrain.start, "to_yaml", cut_short)
        with pytest.raises(PowerCutError):
            train(tmp_path)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "checkpoints", "tokenizer"]
    (tmp_path / "run" / "checkpoints" / "step-00000002.partial").mkdir()
    with monkeypatch.context() as patch:  # between two files
        patch.setattr(pretrain.start, "version", cut_short)
        with pytest.raises(PowerCutError):
            pretrain.engine.pretrain(config_of(tmp_path), given="train: {}\n")
    assert sorted(path.name for path in (tmp_path / "run").iterdir())[2:] == ["config.yaml", "given.yaml", "tokenizer"]
    with monkeypatch.context() as patch:  # and after its first lines
        each_step(patch, cut_at(4))
        with pytest.raises(PowerCutError):
            train(tmp_path, "train.save_every=100")
    assert [line["step"] for line in lines_of(tmp_path)] == [2]
    assert differing(train(tmp_path), at(whole, STEPS)) == []
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4, 6]


def cut_short(*_: object) -> Any:
    raise PowerCutError


def test_what_a_run_was_given_is_kept_and_what_has_changed_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    first = config_of(tmp_path, "train.steps=2")
    pretrain.engine.pretrain(first, given="seed: 0\n")
    assert (out / "given.yaml").read_text() == "seed: 0\n"
    assert load_config(out / "config.yaml") == first
    assert json.loads((out / "env.json").read_text())["packages"]["torch"] == torch.__version__
    tokenizers = [load_tokenizer(folder) for folder in (out / "tokenizer", at(tmp_path, 2) / "encoder" / "tokenizer")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert "then" not in capsys.readouterr().out

    second = config_of(tmp_path, "train.steps=4", "train.learning_rate=1e-3")
    pretrain.engine.pretrain(second, given="seed: 0\ntrain: {steps: 4}\n")
    shown = capsys.readouterr().out
    assert "  train.steps: 2 then, 4 now\n" in shown
    assert "  train.learning_rate: 0.005 then, 0.001 now\n" in shown
    assert shown.count(" then, ") == 2
    assert (out / "given.yaml").read_text() == "seed: 0\ntrain: {steps: 4}\n"
    assert load_config(out / "config.yaml") == second


def test_last_is_the_newest_though_the_run_was_killed_before_it_pointed_there(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "run", tmp_path / "run", symlinks=True)
    last = tmp_path / "run" / "checkpoints" / "last"
    last.unlink()
    last.symlink_to("step-00000004")
    assert train(tmp_path) == at(tmp_path, STEPS)
    assert last.readlink() == Path("step-00000006")


# What goes on beside


def test_looks_have_lines_of_their_own_and_change_nothing(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, "eval.monitor.every=2", "eval.monitor.max_share=1.0")
    assert differing(at(tmp_path, STEPS), at(whole, STEPS)) == []
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 2, 4, 4, 6, 6]
    for trained, looked in zip(lines[::2], lines[1::2], strict=True):
        assert "loss" in trained
        assert "loss" not in looked
        for name in ("image", "text", "audio"):
            assert looked[f"rankme/{name}"] >= 1
            assert 0 <= looked[f"ridge/{name}"] <= 1
            assert f"rankme/{name}" not in trained
    assert len({line["rankme/image"] for line in lines[1::2]}) == 3  # of the weights at that time


def test_looks_that_take_too_long_are_put_off(tmp_path: Path) -> None:
    train(tmp_path, "eval.monitor.every=2", "eval.monitor.max_share=1e-9")
    assert [line["step"] for line in lines_of(tmp_path) if "rankme/image" in line] == [2]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    """Those that were made."""
    install(monkeypatch, "wandb", "mlflow", "tensorboard")
    made: list[Fake] = []
    for name in ("wandb", "mlflow", "tensorboard"):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, type(name, (Fake,), {"name": name, "made": made}))
    return made


def test_trackers_get_what_metrics_get_and_know_a_resumed_run_again(
    fakes: list[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["trackers.names=[wandb,mlflow]", "eval.monitor.every=4", "eval.monitor.max_share=1.0"]
    with monkeypatch.context() as patch:
        each_step(patch, cut_at(5))
        with pytest.raises(PowerCutError):
            train(tmp_path, *settings)
    train(tmp_path, *settings)
    assert [fake.name for fake in fakes] == ["wandb", "mlflow"] * 2
    before, after = fakes[:2], fakes[2:]
    assert len(before[0].arguments["id"]) == 32
    assert before[0].arguments["id"] == after[0].arguments["id"]
    assert "run_id" not in before[1].arguments
    assert after[1].arguments["run_id"] == "chosen-by-it"
    assert [len(fake.settings) for fake in fakes] == [1, 1, 0, 0]
    assert [fake.ended for fake in fakes] == [False, False, True, True]
    assert [[step for _, step in fake.logged] for fake in fakes] == [[2, 4, 4], [2, 4, 4], [6], [6]]
    logged = [values for values, _ in before[0].logged + after[0].logged]
    for values, line in zip(logged, lines_of(tmp_path), strict=True):
        assert values == {name: value for name, value in line.items() if name not in ("step", "skipped_samples")}


def test_no_trackers_are_no_trackers(fakes: list[Fake], tmp_path: Path) -> None:
    train(tmp_path, "trackers.names=[]", "train.steps=1")
    assert fakes == []
    train(tmp_path, "train.steps=2")
    assert [fake.name for fake in fakes] == ["tensorboard"]


def test_global_random_states_do_not_matter(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(_: Pretraining, step: int) -> None:
        torch.rand(step)
        torch.manual_seed(torch.randint(100, ()).item() + step)
        np.random.rand(step)  # noqa: NPY002 (the one that others might draw from)
        random.seed(random.random() + step)

    each_step(monkeypatch, draw)
    assert differing(train(tmp_path), at(whole, STEPS)) == []


def test_micro_batches_divide_what_each_rank_has(tmp_path: Path) -> None:
    config = config_of(tmp_path, "train.accumulate=8")
    one_of_two: Any = SimpleNamespace(
        num_processes=2, process_index=0, is_main_process=True, print=print, wait_for_everyone=lambda: None
    )
    message = r"train\.accumulate=8 does not divide the 4 samples of a step that each of 2 processes has"
    with pytest.raises(ConfigError, match=message):
        set_up(config, None, one_of_two)
    with pytest.raises(ConfigError, match=r"train\.accumulate=3: allowed is a divisor of train\.batch_size=8"):
        config_of(tmp_path, "train.accumulate=3")


def test_bad_steps_before_a_checkpoint_count_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, bad = Pretraining.forward, {2, 5}
    steps = iter([1, 2, 3, 4, 3, 4, 5, 6])  # as they come: killed in the fourth, resumed after the second

    def spoilt(self: Pretraining, *arguments: Any, **named: Any) -> Loss:
        loss = forward(self, *arguments, **named)
        return loss._replace(total=loss.total * math.nan) if next(steps) in bad else loss

    monkeypatch.setattr(Pretraining, "forward", spoilt)
    with monkeypatch.context() as patch:
        each_step(patch, cut_at(4))
        with pytest.raises(PowerCutError):
            train(tmp_path, "train.max_bad_steps=1")
    with pytest.raises(TrainingError, match=r"step 5: .* 2 steps left out so far.* more than train\.max_bad_steps=1"):
        train(tmp_path, "train.max_bad_steps=1")


# Several runs, several ranks


HOLDER = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from pretrain.start import claimed
with claimed(Path(sys.argv[1]), SimpleNamespace(is_main_process=True)):
    if os.fork() == 0:
        time.sleep(60)  # a worker that has not noticed yet
        os._exit(0)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_a_folder_in_which_a_run_is_at_work_is_refused_until_that_ends(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.steps=1")
    command = [sys.executable, "-c", HOLDER, config.out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as holder:
        assert holder.stdout is not None
        number = int(holder.stdout.readline())
        try:
            with pytest.raises(ConfigError, match=rf"work there \(process {number} "):
                pretrain.engine.pretrain(config)
            holder.kill()  # its child lives on
            holder.wait()
            pretrain.engine.pretrain(config)
        finally:
            os.killpg(number, signal.SIGKILL)


def test_a_rehearsal_does_not_stand_in_the_way_of_the_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.steps=1", "eval.label=null")
    pretrain.engine.pretrain(rehearsal(config))
    assert find_last(tmp_path / "run" / "dry_run" / "checkpoints") is not None
    pretrain.engine.pretrain(config)


def test_data_parallelism_leaves_the_places_of_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a device it would move what says which rows are whose there, too."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(pretrain.start, "DistributedDataParallel", lambda _, **given: made.append(given))
    model = Pretraining(tiny_encoder(tiny_tokenizer()), ObjectivesConfig())
    one, two = (cast(Accelerator, SimpleNamespace(num_processes=number)) for number in (1, 2))
    assert share_model(model, one) is model
    share_model(model, two)
    assert len(made) == 1
    assert "device_ids" not in made[0]

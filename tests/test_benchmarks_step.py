"""The benchmarks of a step and of the contrastive loss count and compare what they say."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import loss_memory, step
from benchmarks.peers import MissingPeerError
from benchmarks.step import SIZES, Side, Size
from data.batch import Batch

CPU = torch.device("cpu")
OURS = "ours, contrastive"


def test_products_are_counted_of_both_passes() -> None:
    linear, x = nn.Linear(8, 4, bias=False), torch.randn(3, 8)
    forward, both = step.count(Side(linear, lambda: linear(x).sum(), linear.compile), CPU)
    assert forward == 2 * 3 * 8 * 4
    assert both == 2 * forward  # x needs no gradient
    assert linear.weight.grad is None


def test_half_the_patches_are_less_work_and_the_same_model() -> None:
    size = SIZES["micro"]
    batch = step.pairs(4, size)
    sides = [step.ours(batch, size, step.contrastive_only(keep)) for keep in (1.0, 0.5)]
    (whole, _), (half, _) = (step.count(side, CPU) for side in sides)
    assert 0.5 * whole < half < 0.95 * whole
    weights = [sum(each.numel() for each in side.model.parameters()) for side in sides]
    assert weights[0] == weights[1]


def test_a_step_learns() -> None:
    size = SIZES["micro"]
    torch.manual_seed(0)
    go = step.train_step(step.ours(step.pairs(8, size), size, step.contrastive_only(1.0)), CPU)
    losses = [go().item() for _ in range(8)]
    assert losses[-1] < losses[0]


def test_masked_regions_see_images_alone() -> None:
    size = SIZES["micro"]
    side = step.ours(step.images_of(step.pairs(4, size)), size, step.region_only())
    assert side.model.names == ["masked_image"]


def linear(batch: Batch, _: Size) -> Side:
    """A model that can't be compiled."""

    def refuse() -> None:
        raise MissingPeerError("not to be compiled")

    model, x = nn.Linear(16, 1), torch.zeros(batch.size, 16)
    return Side(model, lambda: model(x).sum(), refuse)


def gone(*_: Any) -> Side:
    raise MissingPeerError("open_clip: no wheel")


def test_sides_take_turns_in_processes_of_their_own_and_an_absent_one_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SIDES", {OURS: linear, "open_clip": gone})
    case = step.measure(4, SIZES["micro"], ["eager", "compiled"], 2, 1e12, CPU, keep=True)
    assert [list(taken) for taken in case.rounds] == [[OURS]] * 2
    assert all(taken[OURS] > 0 for taken in case.rounds)
    assert [line[0] for line in case.lines] == [OURS, OURS, "open_clip"]
    assert "absent: not to be compiled" in case.lines[1]
    assert "absent: open_clip: no wheel" in case.lines[2]
    assert {len(line) for line in case.lines} == {7}
    assert step.ratios(case.rounds)["contrastive_vs_open_clip"] is None
    assert not step._steps  # none of this process


def test_ratios_say_how_much_faster_ours_is() -> None:
    taken = {OURS: 1.0, "ours, contrastive, 50 % of patches": 0.5, "ours, all objectives": 1.5, "open_clip": 2.0}
    found = step.ratios([{**taken, "transformers' CLIP": 4.0, "FLAVA": 6.0}])
    assert found == {
        "contrastive_vs_open_clip": 2,
        "contrastive_keep50_vs_open_clip": 4,
        "contrastive_vs_transformers_clip": 4,
        "contrastive_keep50_vs_transformers_clip": 8,
        "all_time_vs_own_contrastive": 1.5,
        "all_vs_flava": 4,
        "masked_region_vs_lightly_mae": None,
    }


def test_stock_models_have_our_sizes() -> None:
    """Same number of weights in the blocks of the towers."""
    size = SIZES["micro"]
    side = step.stock_clip(step.pairs(2, size), size)
    block = 12 * size.width**2 + 13 * size.width  # attention and feed-forward, with biases and norms
    layers = [module for name, module in side.model.named_modules() if name.rpartition(".")[2] == "layers"]
    assert [sum(each.numel() for each in layer.parameters()) for layer in layers] == [size.depth * block] * 2


@pytest.mark.parametrize("text", ["128", "128x", "ax64"])
def test_a_length_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--lengths", text])
    assert f"{text}: allowed is SIDExTOKENS" in capsys.readouterr().err


def test_what_the_loss_saves_is_as_large_as_its_inputs() -> None:
    n = 256
    saved, grown = loss_memory.memory("ours", n, tile=64)
    assert 2 * 4 * n * loss_memory.WIDTH <= saved < 1.1 * 2 * 4 * n * loss_memory.WIDTH
    assert grown >= 0


def test_losses_without_the_peer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = list[tuple[int, str, int]]()

    def here(world: int, threads: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if function is loss_memory.memory:
            calls.append((world, *arguments[:2]))
        return [function(*arguments)] * world

    def gone() -> Any:
        raise MissingPeerError("open_clip: no wheel")

    monkeypatch.setattr(loss_memory, "in_group", here)
    monkeypatch.setattr(loss_memory, "open_clip_loss", gone)
    loss_memory.main(["--sizes", "64", "128", "--gathered-from", "128", "--worlds", "1", "2", "--rounds", "1"])
    assert calls == [(1, "ours", 64), (1, "ours", 128), (2, "ours", 64)]
    shown = capsys.readouterr().out
    assert "theirs is absent: open_clip: no wheel" in shown
    assert json.loads(shown.splitlines()[-1]) == {}

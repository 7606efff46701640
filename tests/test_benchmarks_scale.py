"""The model of many processes, by hand, and what it is fed with."""

import math

import pytest

from benchmarks import scale
from benchmarks.scale import LINKS, Link, Load, Parts

FREE = Link(math.inf, math.inf)
SLOW = Link(1e9, 1e8)


@pytest.fixture(autouse=True)
def _round_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "REACH", 1.0)
    monkeypatch.setattr(scale, "LATENCY", 0.0)


def test_an_all_reduce_goes_around_machines_with_an_eighth_per_gpu() -> None:
    assert scale.reduce_seconds(8e9, 1, SLOW) == 0
    assert scale.reduce_seconds(8e9, 8, SLOW) == pytest.approx(2 * 7 / 8 * 8)
    assert scale.reduce_seconds(8e9, 32, SLOW) == pytest.approx(2 * 7 / 8 * 8 + 2 * 3 / 4 * 1e9 / 1e8)


def test_every_process_gets_the_embeddings_of_all_others() -> None:
    assert scale.gather_seconds(1e6, 8, SLOW) == pytest.approx(7e6 / 1e9)
    assert scale.gather_seconds(1e6, 16, SLOW) == pytest.approx(15e6 / 1e9 + 1e6 / 1e8)


def test_the_backward_pass_hides_all_but_the_last_bucket() -> None:
    assert scale.exposed(whole=1.0, last=0.2, backward=5.0) == 0.2
    assert scale.exposed(whole=3.0, last=0.2, backward=1.0) == 2.0


def test_where_nothing_costs_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "similarity_seconds", lambda *_: 0.0)
    load = Load(0.1, 10**9, 256, 512, True)
    assert scale.speed_left(load, 512, FREE) == 1
    assert scale.breaks(load, FREE) is None


def test_it_breaks_by_what_takes_the_most() -> None:
    large = Load(0.3, 4 * 10**9, 256, 512, True)
    world, by = scale.breaks(large, LINKS["NVLink, 100 Gb/s per machine"]) or (0, "")
    assert by == "all_reduce"
    assert scale.speed_left(large, world, LINKS["NVLink, 100 Gb/s per machine"]) < scale.LEAST
    smaller = [each for each in scale.WORLDS if each < world]
    assert all(scale.speed_left(large, each, LINKS["NVLink, 100 Gb/s per machine"]) >= scale.LEAST for each in smaller)
    wide = Load(0.01, 10**6, 4096, 4096, True)
    assert (scale.breaks(wide, FREE) or (0, ""))[1] == "similarities"
    assert Parts(1, 2, 3, 2).worst == "embeddings"
    assert Parts(1, 2, 3, 2).total == 8


def test_similarities_grow_with_the_processes() -> None:
    load = Load(0.1, 10**6, 256, 512, True)
    few, many = (scale.predict(load, world, FREE).similarities for world in (9, 17))
    assert many == pytest.approx(2 * few)


def test_a_step_that_was_not_measured_says_so() -> None:
    given = scale.load_of("micro", 64, {"micro": 12.5})
    assert (given.step, given.measured) == (0.0125, True)
    counted = scale.load_of("micro", 64, {})
    assert not counted.measured
    assert scale.load_of("micro", 128, {}).step == pytest.approx(2 * counted.step)
    assert given.gradients == counted.gradients > 0


def test_a_process_alone_trains() -> None:
    trained = scale.train("micro", 4, 2, together=False)
    assert len(trained.seconds) == 2
    assert trained.gradients > 4 * 64 * 8000  # the embeddings of words alone
    assert (trained.reduce, trained.exchange) == (0, 0)


@pytest.mark.slow
def test_two_processes_train_and_are_compared_with_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    figures = scale.measured("micro", 4, steps=2, rounds=1)
    assert list(figures) == ["speedup_at_2", "speedup_at_2_without_sharing_cost", "model_error_at_2"]
    assert "two that train one model" in capsys.readouterr().out

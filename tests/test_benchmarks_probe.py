"""The benchmark of the linear probe: both sides solve the same problem."""

import json

import pytest
import torch

from benchmarks import probe


def test_both_sides_see_the_same_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CLASSES", 8)
    data = probe.synthetic(1000)
    assert data.x.shape == (1000, probe.WIDTH)
    assert data.x.dtype == torch.float32
    parts = probe.split(data, 800)
    assert [len(part.y) for part in parts] == [640, 160, 200]
    assert torch.equal(torch.cat([part.x for part in parts]), data.x)
    scores = [probe.ours(parts), probe.theirs(parts, "float32"), probe.theirs(parts, "float64")]
    assert 0.5 < scores[0] < 1
    assert scores[1:] == pytest.approx([scores[0]] * 2, abs=0.011)


def test_clip_benchmarks_probe_learns_the_same_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("clip_benchmark")
    monkeypatch.setattr(probe, "CLASSES", 8)
    parts = probe.split(probe.synthetic(1000), 800)
    assert probe.clip_benchmarks(parts) == pytest.approx(probe.ours(parts), abs=0.1)


@pytest.mark.slow
def test_the_probe_is_as_good_as_that_of_sklearn_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    probe.main(["--rounds", "1"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"cpu_ratio_vs_sklearn", "cpu_ratio_vs_sklearn_float64", "top1_difference"} <= figures.keys()
    assert figures["top1_difference"] <= 0.3
    assert figures["cpu_ratio_vs_sklearn"] <= 0.6

"""Few-shot probe: against scikit-learn's ridge on the same draws, and what is drawn."""

import math

import pytest
import torch
from sklearn.linear_model import RidgeClassifier

from eval.fewshot import draw, fewshot_probe
from eval.linear import Split
from eval.metrics import bootstrap_interval


def gaussians(rows: int, seed: int, features: int = 20) -> Split:
    """Overlapping classes with ids that are neither contiguous nor positive."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (rows,), generator=generator)
    x = 3 * torch.randn(rows, features, generator=generator) + 5
    x[torch.arange(rows), y] += 6.0
    return Split(x, torch.tensor([40, -7, 1000])[y])


@pytest.mark.parametrize("features", [8, 60])
def test_every_shot_and_seed_is_a_ridge_of_sklearn(features: int) -> None:
    train, test = gaussians(200, 0, features), gaussians(150, 1, features)
    result = fewshot_probe(train, test, shots=(2, 10), seeds=3)
    mean, std = train.x.double().mean(0), train.x.double().std(0, correction=0)
    for count in (2, 10):
        hits = []
        for seed in range(3):
            rows = draw(train.y, count, seed)
            model = RidgeClassifier(alpha=1.0 * len(rows))
            model.fit(((train.x[rows] - mean) / std).numpy(), train.y[rows].numpy())
            predicted = torch.from_numpy(model.predict(((test.x - mean) / std).numpy()))
            hits.append((predicted == test.y).double())
            if (count, seed) == (10, 0):
                assert torch.equal(result.predicted, predicted)
        each = torch.stack(hits)
        metric = result.metrics[f"top1_{count}shot"]
        assert metric.value == pytest.approx(each.mean().item())
        assert metric.interval == pytest.approx(bootstrap_interval(each.mean(0)))
        assert result.metrics[f"spread_{count}shot"].value == pytest.approx(each.mean(1).std().item())
    torch.testing.assert_close(result.correct, each.mean(0))
    assert result.metrics["top1_10shot"].value > result.metrics["top1_2shot"].value > 1 / 3


def test_draws_hold_so_many_of_each_class_and_more_shots_hold_fewer() -> None:
    labels = torch.tensor([7] * 50 + [-2] * 30 + [3] * 4)[
        torch.randperm(84, generator=torch.Generator().manual_seed(0))
    ]
    few, more = draw(labels, 3, 0), draw(labels, 10, 0)
    assert [int((labels[few] == label).sum()) for label in (7, -2, 3)] == [3, 3, 3]
    assert [int((labels[more] == label).sum()) for label in (7, -2, 3)] == [10, 10, 4]
    assert set(few.tolist()) < set(more.tolist())
    assert len(set(more.tolist())) == 24
    assert not torch.equal(draw(labels, 3, 1), few)
    assert torch.equal(draw(labels, 3, 0), few)
    # Of many draws, every row is in some.
    assert len(set(torch.cat([draw(labels, 3, seed) for seed in range(120)]).tolist())) == 84


def test_content_widens_the_interval_and_test_labels_change_only_scores() -> None:
    train, test = gaussians(100, 0), gaussians(40, 1)
    test = Split(test.x.repeat(6, 1), test.y.repeat(6))
    plain = fewshot_probe(train, test, shots=[5])
    grouped = fewshot_probe(train, test, shots=[5], content=torch.arange(40).repeat(6))
    narrow, wide = plain.metrics["top1_5shot"].interval, grouped.metrics["top1_5shot"].interval
    assert narrow is not None
    assert wide is not None
    assert wide[1] - wide[0] > 1.8 * (narrow[1] - narrow[0])
    shuffled = Split(test.x, test.y[torch.randperm(240, generator=torch.Generator().manual_seed(3))])
    again = fewshot_probe(train, shuffled, shots=[5], samples=0)
    assert torch.equal(again.predicted, plain.predicted)
    assert again.metrics["top1_5shot"].interval is None
    assert fewshot_probe(train, test, shots=[5], seeds=1, samples=0).metrics["spread_5shot"].value == 0


def test_what_cannot_be_drawn_is_refused() -> None:
    train, test = gaussians(60, 0), gaussians(40, 1)
    with pytest.raises(ValueError, match=r"^shots must be one or more, .* got \[\] and 5"):
        fewshot_probe(train, test, shots=[])
    with pytest.raises(ValueError, match=r"at least 1, got \[1\] and 0"):
        fewshot_probe(train, test, shots=[1], seeds=0)
    with pytest.raises(ValueError, match="strength must be positive and finite, got nan"):
        fewshot_probe(train, test, strength=math.nan)
    with pytest.raises(ValueError, match=r"^test must hold only classes present in train, got unseen \[3\]"):
        fewshot_probe(train, Split(test.x, test.y.masked_fill(test.y == 40, 3)))
    with pytest.raises(ValueError, match=r"^train must have at least two classes, got only class 4"):
        fewshot_probe(Split(train.x, torch.full((60,), 4)), test)
    with pytest.raises(ValueError, match=r"^train features must be finite"):
        fewshot_probe(Split(train.x * math.nan, train.y), test)

"""Accuracy, bootstrap intervals and baselines against values known in closed form."""

import math

import numpy as np
import pytest
import sklearn.metrics
import torch

from eval.metrics import (
    Metric,
    accuracy,
    bootstrap_interval,
    chance,
    classification,
    majority,
    multilabel,
    percentiles,
    resampled_means,
    resamples,
)


def bernoulli(rows: int, p: float, seed: int = 0) -> torch.Tensor:
    return (torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < p).float()


def test_accuracy_is_the_fraction_equal() -> None:
    assert accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 0])) == 0.75


def test_accuracy_counts_exactly_past_float32() -> None:
    rows = 2**24 + 3
    predicted = torch.zeros(rows, dtype=torch.int8)
    predicted[0] = 1
    assert accuracy(predicted, torch.zeros(rows, dtype=torch.int8)) == (rows - 1) / rows


@pytest.mark.parametrize(("predicted", "labels"), [((3,), (4,)), ((3, 1), (3,)), ((1,), (5,)), ((0,), (0,)), ((), ())])
def test_accuracy_refuses_shapes_that_would_broadcast(predicted: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"of one shape \(N,\) with N >= 1, got"):
        accuracy(torch.zeros(predicted), torch.zeros(labels))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_interval_is_the_normal_one_for_many_rows(p: float) -> None:
    correct = bernoulli(4000, p)
    mean = correct.mean().item()
    half_width = 1.96 * math.sqrt(mean * (1 - mean) / 4000)
    low, high = bootstrap_interval(correct, samples=4000)
    assert low == pytest.approx(mean - half_width, abs=0.08 * half_width)
    assert high == pytest.approx(mean + half_width, abs=0.08 * half_width)


def test_grouped_interval_covers_the_spread_of_groups_not_rows() -> None:
    # 100 clips of 25 windows that are all right or all wrong: 100 observations, not 2500.
    per_group = bernoulli(100, 0.6)
    shuffle = torch.randperm(2500, generator=torch.Generator().manual_seed(1))
    correct = per_group.repeat_interleave(25)[shuffle]
    groups = (torch.arange(100) * 17 - 300).repeat_interleave(25)[shuffle]
    mean = per_group.mean().item()
    half_width = 1.96 * math.sqrt(mean * (1 - mean) / 100)
    low, high = bootstrap_interval(correct, groups=groups, samples=4000)
    assert low == pytest.approx(mean - half_width, abs=0.12 * half_width)
    assert high == pytest.approx(mean + half_width, abs=0.12 * half_width)


def test_groups_weigh_by_their_rows() -> None:
    # 20 groups of 99 rows, all right, and 20 of one row, all wrong: the mean over rows is 0.99, over groups 0.5.
    groups = torch.cat([torch.arange(20).repeat_interleave(99), torch.arange(20, 40)])
    low, high = bootstrap_interval((groups < 20).float(), groups=groups)
    assert 0.95 < low < 0.99 < high < 1


def test_groups_of_one_row_equal_no_groups() -> None:
    correct = bernoulli(200, 0.7)
    assert bootstrap_interval(correct, groups=torch.arange(200)) == bootstrap_interval(correct)


def test_interval_is_fixed_by_its_seed_and_leaves_the_global_generator_alone() -> None:
    correct = bernoulli(301, 0.5)
    state = torch.random.get_rng_state()
    first = bootstrap_interval(correct)
    torch.rand(5)
    assert bootstrap_interval(correct) == first
    assert bootstrap_interval(correct, seed=1) != first
    torch.random.set_rng_state(state)
    bootstrap_interval(correct)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_interval_over_several_batches_draws_every_one_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = bernoulli(500, 0.5)
    mean = correct.mean().item()
    half_width = 1.96 * math.sqrt(mean * (1 - mean) / 500)
    monkeypatch.setattr("eval.metrics._DRAWS_PER_BATCH", 3 * 500)
    low, high = bootstrap_interval(correct, samples=1001)
    assert high - low == pytest.approx(2 * half_width, rel=0.15)


def test_interval_of_booleans_and_of_equal_rows() -> None:
    correct = bernoulli(100, 0.5)
    assert bootstrap_interval(correct.bool()) == bootstrap_interval(correct)
    assert bootstrap_interval(torch.ones(10)) == (1.0, 1.0)


def test_interval_refuses_what_it_cannot_resample() -> None:
    with pytest.raises(ValueError, match=r"^correct must be \(N,\) with N >= 1, got \(0,\)"):
        bootstrap_interval(torch.zeros(0))
    with pytest.raises(ValueError, match=r"^correct must be \(N,\) with N >= 1, got \(2, 2\)"):
        bootstrap_interval(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"^groups must be \(4,\) like correct, got \(3,\)"):
        bootstrap_interval(torch.zeros(4), groups=torch.arange(3))
    with pytest.raises(ValueError, match=r"^groups must hold at least 2 groups, got only group 5"):
        bootstrap_interval(torch.zeros(4), groups=torch.full((4,), 5))
    with pytest.raises(ValueError, match=r"^samples must be at least 1, got 0"):
        bootstrap_interval(torch.zeros(4), samples=0)


def test_chance_is_what_guessing_gives() -> None:
    assert chance(3) == {"top1": 1 / 3, "top5": 1.0, "mean_per_class": 1 / 3, "recall": 1 / 3}
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8000) % 8
    found = classification(torch.rand(8000, 8, generator=generator), labels, torch.arange(8), samples=0)
    for name, value in chance(8).items():
        assert found[name].value == pytest.approx(value, abs=0.015)
    with pytest.raises(ValueError, match="at least one class, got 0"):
        chance(0)


def test_majority_is_chosen_on_train_and_scored_on_test() -> None:
    # Commonest in train is 5; in test it is 2.
    assert majority(torch.tensor([2, 5, 5, 9]), torch.tensor([2, 2, 2, 5]))["top1"] == 0.25
    # Commonest in train of two equals: the lower.
    assert majority(torch.tensor([9, 9, 5, 5]), torch.tensor([5, 9, 9, 9]))["top1"] == 0.25
    with pytest.raises(ValueError, match=r"^train_labels must be one-dimensional with at least one, got \(0,\)"):
        majority(torch.tensor([]), torch.tensor([1]))


def test_majority_has_the_metrics_of_scores_that_are_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.rand(rows, generator=generator).square().mul(9).long() * 7 for rows in (500, 200))
    classes, counts = torch.unique(train, return_counts=True)
    found = classification(counts.expand(200, -1).double(), test, classes, samples=0)
    assert majority(train, test) == {name: metric.value for name, metric in found.items()}
    assert 0 < found["top1"].value < found["top5"].value < 1


def scored(rows: int, classes: int, present: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores with ties, labels of the first ``present`` classes, and ids that are neither contiguous nor positive."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(present, (rows,), generator=generator)
    scores = torch.randn(rows, classes, generator=generator)
    scores[torch.arange(rows), y] += 1.0
    ids = torch.arange(classes) * 7 - 9
    return (scores * 2).round(), ids[y], ids


@pytest.mark.parametrize("present", [9, 6])
def test_macro_metrics_equal_sklearn_over_the_classes_that_occur(present: int) -> None:
    scores, labels, classes = scored(300, 9, present)
    found = classification(scores, labels, classes, samples=0)
    predicted, settings = (
        classes[scores.argmax(1)],
        {"labels": torch.unique(labels), "average": "macro", "zero_division": 0},
    )
    assert found["top1"] == Metric((predicted == labels).double().mean().item())
    for name, function in (
        ("precision", "precision"),
        ("recall", "recall"),
        ("f1", "f1"),
        ("mean_per_class", "recall"),
    ):
        expected = getattr(sklearn.metrics, f"{function}_score")(labels, predicted, **settings)
        assert found[name].value == pytest.approx(expected, abs=1e-12)
    assert found["top1"].value != found["f1"].value


def test_top5_is_its_definition_and_of_equal_scores_the_first_columns_are_in_it() -> None:
    scores, labels, classes = scored(300, 9, 9)
    hits = [label in classes[(-row).argsort(stable=True)[:5]] for row, label in zip(scores, labels, strict=True)]
    assert classification(scores, labels, classes, samples=0)["top5"].value == sum(hits) / 300
    nothing = classification(torch.full((2, 9), -math.inf), classes[:2], classes, samples=0)
    assert nothing["top5"].value == 0
    assert "top5" not in classification(scores[:, :5], classes[labels.clamp(max=4) % 5], classes[:5], samples=0)


def test_a_label_that_is_no_column_is_wrong_and_a_class_of_its_own() -> None:
    classes = torch.tensor([1, 5])
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = classification(scores, torch.tensor([1, 1, 5, 9]), classes, samples=0)
    assert found["top1"].value == 0.75
    assert found["recall"].value == pytest.approx((1 + 1 + 0) / 3)
    assert found["precision"].value == pytest.approx((1 + 0.5 + 0) / 3)


def test_intervals_of_macro_metrics_are_those_of_resampled_rows() -> None:
    scores, labels, classes = scored(200, 6, 6)
    found = classification(scores, labels, classes, samples=400)
    assert found["top1"].interval == bootstrap_interval(classes[scores.argmax(1)] == labels, samples=400)
    draws = torch.randint(200, (400, 200), generator=torch.Generator().manual_seed(0))
    values = [classification(scores[rows], labels[rows], classes, samples=0)["f1"].value for rows in draws]
    assert found["f1"].interval == pytest.approx(np.quantile(values, [0.025, 0.975]))
    twice = torch.arange(200).repeat(2)
    grouped = classification(scores[twice], labels[twice], classes, groups=twice, samples=400)
    for name, metric in grouped.items():
        assert metric.interval == pytest.approx(found[name].interval)
    assert classification(scores, labels, classes, groups=torch.ones(200), samples=400)["f1"].interval is None


@pytest.mark.parametrize("decimals", [0, 3])
def test_map_and_auc_equal_sklearn(decimals: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(150, 7, generator=generator) < 0.2
    labels[:, 5], labels[:, 6] = False, True  # neither has an AUC, the first no precision
    scores = (torch.randn(150, 7, generator=generator) + labels).round(decimals=decimals)
    found = multilabel(scores, labels, samples=300)
    precisions = [sklearn.metrics.average_precision_score(labels[:, i], scores[:, i]) for i in (0, 1, 2, 3, 4, 6)]
    areas = [sklearn.metrics.roc_auc_score(labels[:, i], scores[:, i]) for i in range(5)]
    assert found["map"].value == pytest.approx(np.mean(precisions), abs=1e-12)
    assert found["auc"].value == pytest.approx(np.mean(areas), abs=1e-12)
    draws = torch.randint(150, (300, 150), generator=torch.Generator().manual_seed(0))
    values = [multilabel(scores[rows], labels[rows], samples=0)["map"].value for rows in draws]
    assert found["map"].interval == pytest.approx(np.quantile(values, [0.025, 0.975]))


def naive_multilabel(scores: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """By their definitions, sample by sample."""
    precisions, areas = [], []
    for column, truth in zip(scores.T.tolist(), labels.T.tolist(), strict=True):
        ours = [score for score, has in zip(column, truth, strict=True) if has]
        others = [score for score, has in zip(column, truth, strict=True) if not has]
        if ours:
            terms = [sum(x >= score for x in ours) / sum(x >= score for x in column) for score in ours]
            precisions.append(sum(terms) / len(terms))
        if ours and others:
            wins = [(own > other) + (own == other) / 2 for own in ours for other in others]
            areas.append(sum(wins) / len(wins))
    return sum(precisions) / len(precisions), sum(areas) / len(areas)


@pytest.mark.parametrize("decimals", [0, 4])
def test_map_and_auc_of_resamples_equal_the_naive_ones(decimals: int) -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.rand(40, 5, generator=generator) < torch.tensor([0.05, 0.2, 0.5, 0.9, 1.0])
    scores = (torch.randn(40, 5, generator=generator) + labels).round(decimals=decimals)
    groups = torch.arange(40) // 2
    found = multilabel(scores, labels, groups=groups, samples=60)
    drawn = []
    for weights in resamples(40, groups, 60, seed=0):
        for counts in weights:
            rows = torch.arange(40).repeat_interleave(counts.long())
            drawn.append(naive_multilabel(scores[rows], labels[rows]))
    for i, name in enumerate(("map", "auc")):
        assert found[name].value == pytest.approx(naive_multilabel(scores, labels)[i], abs=1e-12)
        expected = np.quantile([each[i] for each in drawn], [0.025, 0.975])
        assert found[name].interval == pytest.approx(expected, abs=1e-12)


def test_columns_are_resampled_together() -> None:
    values = torch.stack([bernoulli(50, 0.5), bernoulli(50, 0.8, seed=1)], 1).double()
    groups = torch.arange(50) // 5
    means = resampled_means(values, groups, 200, seed=3)
    assert means.shape == (200, 2)
    for column, each in zip(values.T, means.T, strict=True):
        assert percentiles(each) == bootstrap_interval(column, groups=groups, samples=200, seed=3)
    assert torch.equal(
        resampled_means(values[:, :1] - values[:, 1:], groups, 200, 3)[:, 0] > 0, means[:, 0] > means[:, 1]
    )


def test_metrics_refuse_what_they_cannot_score() -> None:
    scores, labels, classes = scored(20, 6, 6)
    with pytest.raises(ValueError, match=r"N >= 1, got \(20, 6\), \(19,\) and \(6,\)"):
        classification(scores, labels[1:], classes)
    with pytest.raises(ValueError, match=r"^groups must be \(20,\) like the labels, got \(3,\)"):
        classification(scores, labels, classes, groups=torch.arange(3))
    with pytest.raises(ValueError, match=r"^samples must be at least 0, got -1"):
        classification(scores, labels, classes, samples=-1)
    with pytest.raises(ValueError, match=r"^multilabel needs scores .* got \(20, 6\) and \(20, 6\) torch.int64"):
        multilabel(scores, labels[:, None].expand(20, 6))
    with pytest.raises(ValueError, match="class that some samples have and others lack, got none"):
        multilabel(scores, torch.zeros(20, 6, dtype=torch.bool))

"""The two probes of the training loop against scikit-learn and naive loops."""

import math
from collections import defaultdict

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge, RidgeClassifier, RidgeClassifierCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from eval.knn import knn, knn_probe
from eval.linear import Split
from eval.metrics import Ranked, bootstrap_interval, ranked
from eval.ridge import DEFAULT_STRENGTHS, ridge_probe


@pytest.fixture(scope="module")
def digits() -> tuple[Split, Split]:
    """200 / 500 digits of 64 pixels, some constant."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(x).float()[order], torch.from_numpy(y).long()[order]
    return Split(x[:200], y[:200]), Split(x[200:700], y[200:700])


def gaussians(rows: int, seed: int, features: int = 20, classes: int = 3) -> Split:
    """Overlapping classes with ids that are neither contiguous nor positive."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (rows,), generator=generator)
    x = torch.randn(rows, features, generator=generator)
    x[torch.arange(rows), y] += 1.0
    return Split(x, torch.tensor([40, -7, 1000])[y])


def naive_knn(train: Split, test: Split, k: int, temperature: float) -> list[int]:
    predicted = []
    for row in test.x.double():
        cosines = [float(row @ other / (row.norm() * other.norm())) for other in train.x.double()]
        votes: defaultdict[int, float] = defaultdict(float)
        for i in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]:
            votes[int(train.y[i])] += math.exp(cosines[i] / temperature)
        predicted.append(max(votes, key=lambda label: votes[label]))
    return predicted


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (9, 0.07), (20, 0.5), (9, 10.0)])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_knn_is_its_definition(k: int, temperature: float, chunk: int) -> None:
    train, test = gaussians(60, 0), gaussians(40, 1)
    expected = naive_knn(train, test, k, temperature)
    result = knn(train, test, k, temperature, chunk)
    assert result.predicted.tolist() == expected
    assert result.top1 == sum(a == b for a, b in zip(expected, test.y.tolist(), strict=True)) / 40
    assert result.k == k


def test_every_k_is_knn_and_the_best_on_val_is_chosen() -> None:
    train, val, test = gaussians(60, 0), gaussians(80, 1), gaussians(90, 2)
    ks = [50, 3, 10, 1, 400]
    result = knn_probe(train, val, test, ks=ks, content=torch.arange(90) // 2, chunk=32)
    on_val = {k: knn(train, val, k).top1 for k in (1, 3, 10, 50)}
    best = max(on_val.values())
    assert result.chosen == {"k": min(k for k in on_val if on_val[k] == best), "val_top1": best}
    assert best > on_val[1]
    for k in on_val:
        expected = naive_knn(train, test, k, 0.07)
        metric = result.metrics[f"top1_k{k}"]
        correct = torch.tensor(expected) == test.y
        assert metric.value == correct.double().mean().item()
        assert metric.interval == bootstrap_interval(correct, groups=torch.arange(90) // 2)
        if k == result.chosen["k"]:
            assert result.predicted.tolist() == expected
            assert result.correct.tolist() == correct.tolist()
            assert result.metrics["top1"] == metric
    assert "top1_k400" not in result.metrics
    assert knn_probe(train, val, test, ks=[400], samples=0).chosen["k"] == 60

    shuffled = Split(test.x, test.y[torch.randperm(90, generator=torch.Generator().manual_seed(3))])
    again = knn_probe(train, val, shuffled, ks=ks, samples=0)
    assert again.chosen == result.chosen
    assert torch.equal(again.predicted, result.predicted)
    assert again.top1 < result.top1


def test_of_equally_good_numbers_of_neighbours_the_smallest_is_chosen() -> None:
    train = gaussians(60, 0)
    apart = Split(train.x + 20 * (train.y[:, None] == torch.tensor([40, -7, 1000]).repeat(7)[:20]), train.y)
    result = knn_probe(apart, apart, apart, ks=[9, 5, 7], samples=0)
    assert result.chosen == {"k": 5, "val_top1": 1.0}


def test_a_class_without_a_vote_is_in_no_top_5() -> None:
    x = torch.eye(8)
    train = Split(x, torch.arange(8))
    found = knn_probe(train, train, Split(x, torch.arange(8).roll(1)), ks=[1], samples=0)
    assert (found.metrics["top1"].value, found.metrics["top5"].value) == (0, 0)


def test_votes_of_many_classes_are_never_held_together(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = (Split(torch.randn(n, 6, generator=generator), torch.arange(n) % 150) for n in (300, 200))
    plain = knn_probe(train, test, test, ks=[1, 7], samples=20)
    assert plain.predicted.tolist() == naive_knn(train, test, int(plain.chosen["k"]), 0.07)

    held = []

    def watched(scores: Tensor, labels: Tensor, classes: Tensor) -> Ranked:
        held.append(scores.numel())
        return ranked(scores, labels, classes)

    monkeypatch.setattr("eval.knn.ranked", watched)
    monkeypatch.setattr("eval.knn._AT_ONCE", 10 * (300 + 150))
    chunked = knn_probe(train, test, test, ks=[1, 7], samples=20)
    assert max(held) == 10 * 150
    assert chunked.metrics == plain.metrics
    assert chunked.chosen == plain.chosen
    assert torch.equal(chunked.predicted, plain.predicted)
    monkeypatch.setattr("eval.knn._AT_ONCE", 1)  # not even one row fits
    assert knn_probe(train, test, test, ks=[1, 7], samples=20).metrics == plain.metrics


def test_weights_and_number_of_neighbours_count() -> None:
    train, test = gaussians(60, 0), gaussians(200, 1)
    found = [knn(train, test, *each).predicted.tolist() for each in ((1, 0.07), (20, 0.07), (20, 10.0))]
    assert found[0] != found[1] != found[2]


@pytest.mark.parametrize("k", [5, 20])
def test_knn_equals_sklearn(digits: tuple[Split, Split], k: int) -> None:
    train, test = digits
    model = KNeighborsClassifier(k, weights=lambda distance: torch.exp(-torch.from_numpy(distance) / 0.07).numpy())
    model.set_params(metric="cosine").fit(train.x.double().numpy(), train.y.numpy())
    expected = torch.from_numpy(model.predict(test.x.double().numpy()))
    assert (knn(train, test, k).predicted == expected).double().mean() >= 0.998


def test_more_neighbours_than_rows_are_all_of_them_and_the_result_says_so() -> None:
    train, test = gaussians(7, 0), gaussians(30, 1)
    capped = knn(train, test)
    assert capped.k == 7
    assert capped.predicted.tolist() == naive_knn(train, test, 7, 0.07)


def test_a_low_temperature_does_not_overflow() -> None:
    train, test = gaussians(60, 0), gaussians(40, 1)
    assert torch.equal(knn(train, test, 20, 1e-5).predicted, knn(train, test, 1).predicted)


def sklearn_ridge(train: Split, strength: float, val: Tensor) -> Tensor:
    scaler = StandardScaler().fit(train.x.double().numpy())
    model = RidgeClassifier(alpha=strength * len(train.y))
    model.fit(scaler.transform(train.x.double().numpy()), train.y.numpy())
    return torch.from_numpy(model.predict(scaler.transform(val.double().numpy())))


@pytest.mark.parametrize("strength", [1e-3, 1e-1, 10.0])
def test_ridge_equals_sklearn(digits: tuple[Split, Split], strength: float) -> None:
    train, val = digits
    result = ridge_probe(train, val, strengths=[strength])
    expected = sklearn_ridge(train, strength, val.x)
    assert torch.equal(result.predicted, expected)
    assert result.top1 == (expected == val.y).double().mean().item()
    assert result.strength == strength


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("features", [5, 100])
def test_ridge_equals_sklearn_where_features_outnumber_rows_too(features: int, classes: int) -> None:
    train, val = (gaussians(40, seed, features, classes) for seed in (0, 1))
    for strength in (1e-4, 1e-2, 1.0):
        result = ridge_probe(train, val, strengths=[strength])
        assert torch.equal(result.predicted, sklearn_ridge(train, strength, val.x))


@pytest.mark.parametrize("features", [10, 80])
def test_the_left_out_error_is_that_of_as_many_fits(features: int) -> None:
    train = gaussians(50, 0, features)
    scaled = torch.from_numpy(StandardScaler().fit_transform(train.x.double().numpy()))
    targets = (train.y[:, None] == torch.unique(train.y)).double()
    for strength in DEFAULT_STRENGTHS:
        total = 0.0
        for i in range(50):
            others = torch.arange(50) != i
            model = Ridge(alpha=strength * 50).fit(scaled[others].numpy(), targets[others].numpy())
            total += ((torch.from_numpy(model.predict(scaled[[i]].numpy())) - targets[i]) ** 2).mean().item()
        assert ridge_probe(train, train, strengths=[strength]).chosen["left_out"] == pytest.approx(total / 50, rel=1e-6)


@pytest.mark.parametrize(("rows", "features", "seed"), [(60, 50, 0), (60, 20, 2), (200, 20, 4), (40, 100, 6)])
def test_the_strength_is_the_one_that_sklearn_chooses_whatever_val_says(rows: int, features: int, seed: int) -> None:
    train, val = gaussians(rows, seed, features), gaussians(300, seed + 1, features)
    scaler = StandardScaler().fit(train.x.double().numpy())
    model = RidgeClassifierCV([strength * rows for strength in DEFAULT_STRENGTHS])
    model.fit(scaler.transform(train.x.double().numpy()), train.y.numpy())
    for strengths in (DEFAULT_STRENGTHS, DEFAULT_STRENGTHS[::-1]):
        swept = ridge_probe(train, val, strengths=strengths)
        assert swept.strength == pytest.approx(model.alpha_ / rows)
        alone = ridge_probe(train, val, strengths=[swept.strength])
        assert torch.equal(swept.predicted, alone.predicted)
    assert min(DEFAULT_STRENGTHS) < swept.strength

    shuffled = Split(val.x, val.y[torch.randperm(300, generator=torch.Generator().manual_seed(3))])
    again = ridge_probe(train, shuffled)
    assert again.strength == swept.strength
    assert again.chosen["left_out"] == pytest.approx(swept.chosen["left_out"])
    assert again.top1 < swept.top1


def test_ridge_has_the_metrics_of_its_predictions_and_intervals_on_demand() -> None:
    train, val = gaussians(60, 0), gaussians(100, 1)
    plain, drawn = ridge_probe(train, val), ridge_probe(train, val, samples=100, content=torch.arange(100) // 4)
    assert plain.metrics["f1"].interval is None
    correct = plain.predicted == val.y
    expected = bootstrap_interval(correct, groups=torch.arange(100) // 4, samples=100)
    assert drawn.metrics["top1"] == (correct.double().mean().item(), expected)
    assert torch.equal(plain.classifier.predict(val.x), plain.predicted)


def test_hardly_any_strength_still_has_an_error() -> None:
    train, val = gaussians(40, 0, 100), gaussians(40, 1, 100)
    result = ridge_probe(train, val, strengths=[1e-30])
    assert result.strength == 1e-30
    assert math.isfinite(result.chosen["left_out"])


def test_scale_offset_and_constant_features_do_not_matter() -> None:
    train, val = gaussians(60, 0), gaussians(60, 1)
    scale = torch.logspace(-6, 6, 20, dtype=torch.float64)
    plain = ridge_probe(train, val)
    scaled = [Split(torch.cat([s.x * scale + 3 * scale, torch.full((60, 1), 0.1)], 1), s.y) for s in (train, val)]
    rescaled = ridge_probe(*scaled)
    assert rescaled.strength == plain.strength
    assert rescaled.chosen["left_out"] == pytest.approx(plain.chosen["left_out"])
    assert torch.equal(rescaled.predicted, plain.predicted)


def test_classes_that_train_lacks_count_as_wrong() -> None:
    train, val = gaussians(60, 0), gaussians(100, 1)
    unseen = Split(val.x, val.y.masked_fill(val.y == 1000, 3))
    for probe in (knn, ridge_probe):
        assert probe(train, unseen).top1 < probe(train, val).top1
        assert 3 not in probe(train, unseen).predicted


GOOD = gaussians(30, 0)
NAN = Split(GOOD.x.clone().index_fill(0, torch.tensor([3]), math.nan), GOOD.y)


@pytest.mark.parametrize(
    ("train", "other", "message"),
    [
        (NAN, GOOD, r"^train features must be finite, got NaN or infinity in 1 of 30"),
        (GOOD, NAN, r"^{} features must be finite, got NaN"),
        (GOOD, Split(GOOD.x[:, :4], GOOD.y), r"^{} must have the 20 features of train, got 4"),
        (GOOD, Split(GOOD.x, GOOD.y[:4]), r"^{} must be x \(N, D\) and y \(N,\), got x \(30, 20\) and y \(4,\)"),
        (Split(GOOD.x[:0], GOOD.y[:0]), GOOD, r"^train must have at least one row"),
        (GOOD, Split(GOOD.x, GOOD.y.float()), r"^{} labels must be integers"),
    ],
)
def test_bad_splits_are_refused_by_name(train: Split, other: Split, message: str) -> None:
    with pytest.raises(ValueError, match=message.format("test")):
        knn(train, other)
    with pytest.raises(ValueError, match=message.format("val")):
        ridge_probe(train, other)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="got k=0 and chunk=256"):
        knn(GOOD, GOOD, 0)
    with pytest.raises(ValueError, match=r"^ks must be one or more, .* got ks=\[\] and chunk=256"):
        knn_probe(GOOD, GOOD, GOOD, ks=[])
    with pytest.raises(ValueError, match=r"^val must have the 20 features of train, got 4"):
        knn_probe(GOOD, Split(GOOD.x[:, :4], GOOD.y), GOOD)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        knn(GOOD, GOOD, temperature=0)
    with pytest.raises(ValueError, match=r"^test must have finite, non-zero rows, got 1 of 30"):
        knn(GOOD, Split(GOOD.x.index_fill(0, torch.tensor([3]), 0), GOOD.y))
    for strengths in ([], [0.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match=r"^strengths must be one or more positive finite numbers, got \["):
            ridge_probe(GOOD, GOOD, strengths=strengths)
    with pytest.raises(ValueError, match=r"^train must have at least two classes, got only class 4"):
        ridge_probe(Split(GOOD.x, torch.full((30,), 4)), GOOD)

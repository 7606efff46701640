"""Linear probe: agreement with scikit-learn, honesty of the protocol, and what it refuses."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from eval import linear
from eval.linear import DEFAULT_STRENGTHS, Classifier, Split, linear_probe
from eval.metrics import bootstrap_interval


@pytest.fixture(scope="module")
def digits() -> tuple[Split, Split, Split]:
    """600 / 300 / 600 digits of 64 pixels, some constant. Train alone is small enough for val to matter."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(x).float()[order], torch.from_numpy(y).long()[order]
    return Split(x[:600], y[:600]), Split(x[600:900], y[600:900]), Split(x[900:1500], y[900:1500])


def gaussians(rows: int, seed: int, features: int = 20) -> Split:
    """Three overlapping classes with ids that are neither contiguous nor positive."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (rows,), generator=generator)
    x = torch.randn(rows, features, generator=generator)
    x[torch.arange(rows), y] += 1.0
    return Split(x, torch.tensor([-7, 40, 1000])[y])


def concatenated(a: Split, b: Split) -> Split:
    return Split(torch.cat([a.x, b.x]), torch.cat([a.y, b.y]))


def reference(fitted: Split, strength: float) -> tuple[StandardScaler, LogisticRegression]:
    """The same problem solved by scikit-learn."""
    scaler = StandardScaler().fit(fitted.x.double().numpy())
    model = LogisticRegression(C=1 / (strength * len(fitted.y)), tol=1e-7, max_iter=5000)
    return scaler, model.fit(scaler.transform(fitted.x.double().numpy()), fitted.y.numpy())


def relative_distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
def test_refit_equals_sklearn_on_train_and_val(digits: tuple[Split, Split, Split], strength: float) -> None:
    train, val, test = digits
    result = linear_probe(train, val, test, strengths=[strength])
    scaler, model = reference(concatenated(train, val), strength)

    expected = torch.from_numpy(model.predict(scaler.transform(test.x.double().numpy())))
    assert (result.predicted == expected).double().mean() >= 0.997
    assert result.top1 == pytest.approx((expected == test.y).double().mean().item(), abs=0.003)
    # The 1.5 between N of train and N of both, in the strength, would move them by 0.08 or more.
    assert relative_distance(result.classifier.weight, torch.from_numpy(model.coef_)) < 0.01
    bias = torch.from_numpy(model.intercept_)
    # The bias is determined only up to a constant over the classes.
    assert relative_distance(result.classifier.bias - result.classifier.bias.mean(), bias - bias.mean()) < 0.02
    torch.testing.assert_close(result.classifier.std, torch.from_numpy(scaler.scale_))
    assert result.classifier.converged


@pytest.mark.parametrize("load", [load_digits, load_wine, load_breast_cancer])
@pytest.mark.parametrize("seed", [0, 1])
def test_sweep_equals_that_of_sklearn(load: Callable[..., Any], seed: int) -> None:
    x, y = (torch.from_numpy(each) for each in load(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:900]
    sizes = [len(order) * 2 // 5, len(order) // 5, len(order) - len(order) * 2 // 5 - len(order) // 5]
    train, val, test = (Split(x[rows], y[rows]) for rows in torch.split(order, sizes))
    result = linear_probe(train, val, test)

    scores = {}
    for strength in DEFAULT_STRENGTHS:
        scaler, model = reference(train, strength)
        scores[strength] = model.score(scaler.transform(val.x.numpy()), val.y.numpy())
    chosen = max(scores, key=lambda strength: (scores[strength], strength))
    assert result.strength == chosen
    assert result.val_top1 == pytest.approx(scores[chosen])
    scaler, model = reference(concatenated(train, val), chosen)
    expected = model.predict(scaler.transform(test.x.numpy()))
    # Test samples are so few that one more or less would be beyond 0.003.
    assert result.top1 == pytest.approx((expected == test.y.numpy()).mean())
    assert result.metrics["f1"].value == pytest.approx(f1_score(test.y.numpy(), expected, average="macro"))


def several(rows: int, seed: int, features: int = 12) -> Split:
    """Four labels, the last of which nobody has, and a fifth that all have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator)
    y = x[:, :3] + 0.7 * torch.randn(rows, 3, generator=generator) > torch.tensor([0.0, 0.5, 1.0])
    return Split(x, torch.cat([y, torch.zeros(rows, 1, dtype=torch.bool), torch.ones(rows, 1, dtype=torch.bool)], 1))


@pytest.mark.parametrize("strength", [1e-3, 1e-1])
def test_several_labels_are_as_many_fits_of_sklearn(strength: float) -> None:
    train, val, test = several(100, 0), several(60, 1), several(300, 2)
    result = linear_probe(train, val, test, strengths=[strength], samples=50)
    both = concatenated(train, val)
    for place in range(3):
        scaler, model = reference(Split(both.x, both.y[:, place].long()), strength)
        expected = model.decision_function(scaler.transform(test.x.double().numpy()))
        scores = result.classifier.scores(test.x)[:, place]
        torch.testing.assert_close(scores, torch.from_numpy(expected), atol=0.01, rtol=0.01)
    assert not result.classifier.weight[3:].any()
    assert result.classifier.bias[3] == -result.classifier.bias[4] == pytest.approx(math.log(0.5 / 160.5))
    assert result.predicted.shape == (300, 5)
    assert result.predicted[:, 4].all()
    torch.testing.assert_close(result.correct, (result.predicted == test.y).double().mean(1))
    assert set(result.metrics) == {"map", "auc"}


def test_several_labels_choose_by_map_on_val_and_never_by_test() -> None:
    train, val, test = several(30, 0), several(60, 1), several(300, 2)
    alone = {s: linear_probe(train, val, test, strengths=[s], samples=0) for s in DEFAULT_STRENGTHS}
    best = max(alone, key=lambda s: (round(alone[s].chosen["val_map"], 9), s))
    swept = linear_probe(train, val, test, samples=0)
    assert swept.strength == best
    shuffled = Split(test.x, test.y[torch.randperm(300, generator=torch.Generator().manual_seed(3))])
    again = linear_probe(train, val, shuffled, samples=0)
    assert again.chosen == swept.chosen
    assert torch.equal(again.predicted, swept.predicted)
    assert again.metrics["map"].value < swept.metrics["map"].value - 0.1


def test_several_labels_that_cannot_be_scored_are_refused() -> None:
    good = several(30, 0)
    empty = Split(good.x, torch.zeros_like(good.y))
    with pytest.raises(ValueError, match=r"^test must have a label that some rows have and others lack, got none"):
        linear_probe(good, good, empty)
    with pytest.raises(ValueError, match=r"^val must have the 5 labels of train, got 4"):
        linear_probe(good, Split(good.x, good.y[:, :4]), good)
    with pytest.raises(ValueError, match=r"^test must be x \(N, D\) and y \(N, C\) bool, got .* y \(30,\)"):
        linear_probe(good, good, GOOD)
    with pytest.raises(ValueError, match=r"^train labels of shape \(N, C\) must be bool, got torch.int64"):
        linear_probe(Split(good.x, good.y.long()), good, good)


def test_more_features_than_rows() -> None:
    train, val, test = gaussians(30, 0, 50), gaussians(10, 1, 50), gaussians(200, 2, 50)
    result = linear_probe(train, val, test, strengths=[1e-2])
    scaler, model = reference(concatenated(train, val), 1e-2)
    expected = torch.from_numpy(model.predict_proba(scaler.transform(test.x.double().numpy())))
    torch.testing.assert_close(result.classifier.scores(test.x).softmax(1), expected, atol=2e-3, rtol=0)


def test_a_weak_penalty_that_is_far_from_zero_is_reached_by_stronger_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(1000) % 100
    hidden = torch.randn(100, 64, generator=generator)[y] + 0.7 * torch.randn(1000, 64, generator=generator)
    mix = torch.randn(64, 128, generator=generator) * torch.arange(1, 65)[:, None] ** -0.5
    x = torch.nn.functional.gelu(hidden @ mix)
    axes, evaluated = linear._axes(x.double()), 0
    call = linear._Objective.__call__

    def counted(self: linear._Objective, weight: Tensor) -> tuple[float, Tensor, Tensor]:
        nonlocal evaluated
        evaluated += 1
        return call(self, weight)

    monkeypatch.setattr(linear._Objective, "__call__", counted)
    direct = linear._fit(axes, y, 1e-5, 5000, None)
    from_zero, evaluated = evaluated, 0
    found = linear._first_fit(axes, y, 1e-5, 5000)
    assert direct.converged
    assert found.converged
    assert evaluated < from_zero
    assert relative_distance(found.weight, direct.weight) < 0.05
    assert torch.equal(found.predict(x), direct.predict(x))


def test_sweep_ends_where_accuracy_has_clearly_fallen(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, fit = [], linear._fit

    def counted(axes: Any, y: Tensor, strength: float, *others: Any) -> Classifier:
        fitted.append(strength)
        return fit(axes, y, strength, *others)

    monkeypatch.setattr(linear, "_fit", counted)
    splits = []
    for seed in range(3):
        x, y = gaussians(2000, seed)
        kept = (y == 40) | (torch.arange(2000) % 2 == 0)  # a class of more rows: a lot of strength predicts it alone
        splits.append(Split(x[kept], y[kept]))
    result = linear_probe(*splits, strengths=[1e-2, 1e1, 1e4, 1e5, 1e6], samples=0)
    assert result.strength == fitted[-1] == 1e-2
    assert fitted[:-1] == [1e-2, 1e1]


def test_content_widens_intervals_and_equal_runs_are_equal() -> None:
    train, val, test = gaussians(60, 0), gaussians(60, 1), gaussians(50, 2)
    test = Split(test.x.repeat(8, 1), test.y.repeat(8))
    plain = linear_probe(train, val, test)
    grouped = linear_probe(train, val, test, content=torch.arange(50).repeat(8))
    again = linear_probe(train, val, test)
    assert torch.equal(again.classifier.weight, plain.classifier.weight)
    for name, metric in plain.metrics.items():
        assert metric == again.metrics[name]
        assert metric.interval is not None
        wide = grouped.metrics[name]
        assert wide.value == metric.value
        assert wide.interval is not None
        assert wide.interval[1] - wide.interval[0] > 2 * (metric.interval[1] - metric.interval[0])


def test_validation_accuracy_is_of_a_fit_on_train_alone(digits: tuple[Split, Split, Split]) -> None:
    train, val, test = digits
    scaler, model = reference(train, 1e-3)
    result = linear_probe(train, val, test, strengths=[1e-3])
    assert result.val_top1 == pytest.approx(model.score(scaler.transform(val.x.numpy()), val.y.numpy()), abs=0.003)
    # A fit that had seen val would do better there than one that had not.
    assert (result.classifier.predict(val.x) == val.y).double().mean() > result.val_top1


def test_sweep_chooses_the_best_strength_of_separate_fits() -> None:
    train, val, test = gaussians(60, 0), gaussians(200, 1), gaussians(200, 2)
    alone = {s: linear_probe(train, val, test, strengths=[s]) for s in DEFAULT_STRENGTHS}
    best = max(result.val_top1 for result in alone.values())
    strongest = max(s for s, result in alone.items() if result.val_top1 == best)
    assert best > alone[min(alone)].val_top1

    # Given in any order.
    swept = linear_probe(train, val, test, strengths=DEFAULT_STRENGTHS[::-1])
    assert (swept.strength, swept.val_top1) == (strongest, best)
    assert torch.equal(swept.predicted, alone[strongest].predicted)
    torch.testing.assert_close(swept.classifier.weight, alone[strongest].classifier.weight, rtol=0, atol=1e-4)


def test_equal_validation_accuracies_choose_the_stronger() -> None:
    y = torch.tensor([0, 1] * 20)
    x = y[:, None] * 10.0 + torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    separable = Split(x, y)
    result = linear_probe(separable, separable, separable, strengths=[1e-3, 1e-1, 1e-2])
    assert result.val_top1 == 1.0
    assert result.strength == 1e-1


def test_test_labels_change_nothing_but_the_score() -> None:
    train, val, test = gaussians(60, 0), gaussians(60, 1), gaussians(300, 2)
    honest = linear_probe(train, val, test)
    shuffled = linear_probe(
        train, val, Split(test.x, test.y[torch.randperm(300, generator=torch.Generator().manual_seed(3))])
    )
    assert shuffled.strength == honest.strength
    assert shuffled.val_top1 == honest.val_top1
    assert torch.equal(shuffled.predicted, honest.predicted)
    for ours, theirs in zip(honest.classifier, shuffled.classifier, strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    assert honest.top1 > 0.5 > shuffled.top1


def test_test_features_do_not_move_the_standardisation() -> None:
    train, val, test = gaussians(60, 0), gaussians(60, 1), gaussians(60, 2)
    shifted = Split(test.x * 100 + 5, test.y)
    result = linear_probe(train, val, shifted, strengths=[1e-2])
    both = torch.cat([train.x, val.x]).double()
    torch.testing.assert_close(result.classifier.mean, both.mean(0))
    torch.testing.assert_close(result.classifier.std, both.std(0, correction=0))


def test_predictions_and_score_are_in_the_given_label_ids() -> None:
    train, val, test = gaussians(100, 0), gaussians(100, 1), gaussians(200, 2)
    result = linear_probe(train, val, test)
    assert result.classifier.classes.tolist() == [-7, 40, 1000]
    assert set(result.predicted.tolist()) == {-7, 40, 1000}
    assert result.top1 == (result.predicted == test.y).double().mean().item()
    assert result.top1 > 0.5
    assert result.metrics["top1"].interval == bootstrap_interval(result.predicted == test.y)


def test_feature_scale_does_not_matter() -> None:
    splits = [gaussians(rows, seed) for seed, rows in enumerate((60, 60, 200))]
    scale = torch.logspace(-6, 6, 20, dtype=torch.float64)
    scaled = [Split(split.x * scale + 3 * scale, split.y) for split in splits]
    plain, rescaled = linear_probe(*splits), linear_probe(*scaled)
    assert rescaled.strength == plain.strength
    assert torch.equal(rescaled.predicted, plain.predicted)


def test_feature_constant_in_the_fit_is_ignored_elsewhere() -> None:
    def constant(rows: int) -> Split:
        return Split(torch.full((rows, 1), 0.1, dtype=torch.float64), torch.tensor([0, 1, 1] * rows)[:rows])

    # Rounding leaves 23 times 0.1 a computed deviation above zero.
    varying = Split(torch.linspace(-1000, 1000, 50)[:, None], torch.ones(50, dtype=torch.int64))
    result = linear_probe(constant(15), constant(8), varying, strengths=[1e-2])
    assert result.classifier.std.tolist() == [1.0]
    assert result.top1 == 1.0


def test_converged_tells_a_finished_fit_from_a_cut_one() -> None:
    splits = [gaussians(60, seed) for seed in range(3)]
    assert linear_probe(*splits, strengths=[1e-4]).classifier.converged
    assert not linear_probe(*splits, strengths=[1e-4], max_iter=3).classifier.converged


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fits_where_the_caller_has_autograd_off(mode: type[torch.no_grad] | type[torch.inference_mode]) -> None:
    outside = linear_probe(*(gaussians(60, seed) for seed in range(3)), strengths=[1e-2])
    with mode():
        inside = linear_probe(*(gaussians(60, seed) for seed in range(3)), strengths=[1e-2])
    assert torch.equal(inside.classifier.weight, outside.classifier.weight)
    assert not inside.classifier.weight.requires_grad


def test_narrow_dtypes_are_widened() -> None:
    splits = [gaussians(60, seed) for seed in range(3)]
    rounded = [Split(split.x.bfloat16(), split.y.int()) for split in splits]
    widened = [Split(split.x.double(), split.y.long()) for split in rounded]
    a, b = linear_probe(*rounded, strengths=[1e-2]), linear_probe(*widened, strengths=[1e-2])
    assert torch.equal(a.classifier.weight, b.classifier.weight)
    assert a.predicted.dtype == b.predicted.dtype == torch.int64


def broken_rows(split: Split) -> Split:
    x = split.x.clone()
    x[3, 0], x[3, 1], x[5, 2] = math.nan, math.inf, -math.inf
    return Split(x, split.y)


GOOD = gaussians(30, 0)


@pytest.mark.parametrize(
    ("position", "split", "message"),
    [
        (0, Split(GOOD.x[:0], GOOD.y[:0]), r"^train must have at least one row .* got x \(0, 20\)"),
        (1, Split(GOOD.x[:0], GOOD.y[:0]), r"^val must have at least one row .* got x \(0, 20\)"),
        (2, Split(GOOD.x[:, :0], GOOD.y), r"^test must have at least one row and one feature, got x \(30, 0\)"),
        (1, Split(GOOD.x[:, :7], GOOD.y), r"^val must have the 20 features of train, got 7"),
        (2, Split(GOOD.x[:, :7], GOOD.y), r"^test must have the 20 features of train, got 7"),
        (0, broken_rows(GOOD), r"^train features must be finite, got NaN or infinity in 2 of 30 rows"),
        (2, broken_rows(GOOD), r"^test features must be finite, got NaN or infinity in 2 of 30 rows"),
        (0, Split(GOOD.x, torch.full((30,), 4)), r"^train must have at least two classes, got only class 4"),
        (1, Split(GOOD.x, torch.full((30,), 4)), r"^val must hold only classes present in train, got unseen \[4\]"),
        (2, Split(GOOD.x, GOOD.y + 1), r"^test must hold only .* got unseen \[-6, 41, 1001\]"),
        (0, Split(GOOD.x, GOOD.y[:9]), r"^train must be x \(N, D\) and y \(N,\), got x \(30, 20\) and y \(9,\)"),
        (2, Split(GOOD.x[None], GOOD.y), r"^test must be x \(N, D\) .* got x \(1, 30, 20\)"),
        (1, Split(GOOD.x, GOOD.y.float()), r"^val labels must be integers, got torch.float32"),
    ],
)
def test_refuses_a_bad_split_by_name(position: int, split: Split, message: str) -> None:
    splits = [GOOD, GOOD, GOOD]
    splits[position] = split
    with pytest.raises(ValueError, match=message):
        linear_probe(*splits)


@pytest.mark.parametrize("strengths", [[], [0.0], [1.0, -1.0], [math.inf], [math.nan]])
def test_refuses_impossible_strengths(strengths: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^strengths must be one or more positive finite numbers, got \["):
        linear_probe(GOOD, GOOD, GOOD, strengths=strengths)


def test_refuses_no_iterations() -> None:
    with pytest.raises(ValueError, match=r"^max_iter must be at least 1, got 0"):
        linear_probe(GOOD, GOOD, GOOD, max_iter=0)


def test_classifier_takes_its_classes_argmax() -> None:
    classifier = Classifier(
        classes=torch.tensor([3, 9]),
        mean=torch.tensor([10.0]),
        std=torch.tensor([2.0]),
        weight=torch.tensor([[1.0], [0.0]]).double(),
        bias=torch.tensor([0.0, 0.6]).double(),
        converged=True,
    )
    # Standardised to 0.5 and 1; class 3 needs more than 0.6.
    assert classifier.predict(torch.tensor([[11.0], [12.0]])).tolist() == [9, 3]

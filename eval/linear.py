"""Linear probe: logistic regression on frozen features, of one label or several per sample."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.metrics import ProbeResult, accuracy, classification, multilabel

DEFAULT_STRENGTHS = tuple(10.0**exponent for exponent in range(-5, 2))
"""One L2 strength per decade, from 1e-5 to 10."""

# A fit has converged when, by its preconditioner's estimate, the objective can fall by this much at most (nats): from
# 20,000 rows on; of a share of them, where it costs little and one row is more, by the square of the share less. At
# 1e-5 the accuracies of the weakest and strongest defaults are up to a point off; near 1e-9 rounding hides the descent.
_TOLERANCE = 2e-6
_LEAST_TOLERANCE = 1e-8
# Evaluations after which a fit from zero is given up for the way by stronger penalties, and the first of these.
_SOON, _STRONG = 80, 0.1
# Pairs of steps and changes of gradient that stand for the Hessian.
_MEMORY = 10
# What the objective may rise by rounding alone, as a share of it.
_ROUNDING = 1e-7
# Probabilities are no less than this one's exponential, 4e-18: their squares would be denormal, which is slow.
_LEAST = -40.0


class Split(NamedTuple):
    """Features and labels of one split.

    Attributes:
        x: (N, D) floating point, any scale.
        y: (N,) integer label ids, any, not only 0..C-1; or (N, C) bool, which of C labels a sample has.
    """

    x: Tensor
    y: Tensor


class Classifier(NamedTuple):
    """Logistic regression on standardised features.

    Attributes:
        classes: (C,) int64 label ids, ascending; with several labels per sample 0..C-1.
        mean: (D,) float64, of the fitted features.
        std: (D,) float64, of the fitted features; 1 where a feature is constant.
        weight: (C, D) float64, for standardised features.
        bias: (C,) float64.
        converged: whether the fit reached its tolerance before its evaluations ran out.
        several: whether a sample can have several labels: a sigmoid per class instead of a softmax over them.
    """

    classes: Tensor
    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    converged: bool
    several: bool = False

    def scores(self, x: Tensor) -> Tensor:
        """Logits (N, C) float64 of features ``x`` (N, D)."""
        return F.linear((x.double() - self.mean) / self.std, self.weight, self.bias)

    def predict(self, x: Tensor) -> Tensor:
        """Label ids (N,), or which labels (N, C) bool, predicted for features ``x`` (N, D)."""
        scores = self.scores(x)
        return scores > 0 if self.several else self.classes[scores.argmax(1)]


class _Axes(NamedTuple):
    """Standardised features in the basis of their principal axes, with a column of ones for the bias.

    There the Hessian is close to diagonal, and the L2 norm of weights is what it was.
    """

    mean: Tensor  # (D,) float64
    std: Tensor  # (D,) float64
    basis: Tensor  # (D, K) float32, K = min(D, N)
    x: Tensor  # (N, K + 1) float32
    variances: Tensor  # (K + 1,) float32, the mean squares of the columns of x


def linear_probe(
    train: Split,
    val: Split,
    test: Split,
    *,
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
    max_iter: int = 1000,
    content: Tensor | None = None,
    samples: int = 1000,
) -> ProbeResult:
    """Metrics on ``test`` of a linear classifier fitted on the frozen features of ``train`` and ``val``.

    Features are standardised by the mean and standard deviation of the rows being fitted. The classifier
    minimises mean cross-entropy + strength / 2 * ||W||^2, the bias unpenalised, by full-batch L-BFGS of at
    most ``max_iter`` evaluations on the device of the features, with products in float32 and sums in float64. Strengths
    are fitted on ``train`` in ascending order, each from the solution before it (the first from zero or, where that
    takes long, by way of stronger ones); the one with the best accuracy on ``val`` is chosen, of equals the strongest.
    The sweep stops where accuracy has fallen from the best by more than 0.05 and by two standard errors. The classifier
    is then refitted on train + val with the chosen strength. ``test`` takes no part in any choice.

    With labels (N, C) bool every class is a binary problem of its own, all with one strength, chosen by mAP. A class
    that all or none of the fitted rows have gets weight 0 and the share of rows that have it for its bias.

    A ``strength`` is scikit-learn's ``LogisticRegression(C=1 / (strength * N))`` for N fitted rows: being on the
    mean, it means the same for train as for train + val. (With two classes scikit-learn penalises the one difference
    of their weights, and so does this.)

    Metrics are those of ``eval.metrics``' ``classification``, or of its ``multilabel``, with intervals from
    ``samples`` resamples by ``content`` (N of test,), ids equal for equal inputs, None to take rows as independent.
    ``chosen`` has ``strength`` and ``val_top1`` or ``val_map``, at that strength when fitted on train alone.

    Source: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision (CLIP),
    section 3.2 and appendix A.3. It differs here in standardising the features and in the grid of strengths.

    Raises:
        ValueError: a split is empty, misshapen, of another width D than train or holds NaN or infinity; its
            labels are neither integers nor bool (N, C), C as in train; train has a single class, or no label that
            some rows have and others lack; val or test has a class that train lacks, or no label to score;
            ``strengths`` is empty or holds one that is not positive and finite; ``max_iter`` is below 1.
    """
    if not strengths or not all(0 < strength < math.inf for strength in strengths):
        raise ValueError(f"strengths must be one or more positive finite numbers, got {list(strengths)}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    several = train.y.ndim == 2
    train, val, test = (
        checked(name, split, several) for name, split in (("train", train), ("val", val), ("test", test))
    )
    check_compatible(train, val=val, test=test)
    by = "map" if several else "top1"

    chosen, chosen_strength, best = None, math.nan, -math.inf
    fallen = max(0.05, 1 / math.sqrt(len(val.y)))  # two standard errors at most
    axes, current = _axes(train.x), None
    for strength in sorted(strengths):
        if current is None:
            current = _first_fit(axes, train.y, strength, max_iter)
        else:
            current = _fit(axes, train.y, strength, max_iter, current)
        if several:
            score = multilabel(current.scores(val.x), val.y, samples=0)["map"].value
        else:
            score = accuracy(current.predict(val.x), val.y)
        if score >= best:
            chosen, chosen_strength, best = current, strength, score
        if score < best - fallen:
            break

    axes = _axes(torch.cat([train.x, val.x]))
    classifier = _fit(axes, torch.cat([train.y, val.y]), chosen_strength, max_iter, chosen)
    scores, predicted = classifier.scores(test.x), classifier.predict(test.x)
    if several:
        metrics = multilabel(scores, test.y, groups=content, samples=samples)
        correct = (predicted == test.y).double().mean(1)
    else:
        metrics = classification(scores, test.y, classifier.classes, groups=content, samples=samples)
        correct = (predicted == test.y).double()
    return ProbeResult(
        metrics=metrics,
        chosen={"strength": chosen_strength, f"val_{by}": best},
        predicted=predicted,
        correct=correct,
        classifier=classifier,
    )


def standardise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of the columns of ``x`` (N, D), the latter 1 where a feature is constant."""
    # Rounding can leave a constant feature a standard deviation of 1e-17, which would blow it up on other rows.
    constant = x.amin(0) == x.amax(0)
    mean = x.mean(0)
    return mean, (x - mean).square_().mean(0).sqrt().masked_fill(constant, 1.0)


def _axes(x: Tensor) -> _Axes:
    """``x`` (N, D) float64 in its principal axes."""
    mean, std = standardise(x)
    scaled = ((x - mean) / std).float()
    # Of more features than rows only the space of the rows matters: the penalty keeps weights in it.
    rows, basis = scaled, None
    if scaled.shape[1] > scaled.shape[0]:
        basis = torch.linalg.qr(scaled.T).Q
        rows = scaled @ basis
    # In float32 LAPACK now and then does not converge where many variances are 0.
    variances, vectors = (each.float() for each in torch.linalg.eigh((rows.T @ rows / len(rows)).double()))
    ones = torch.ones_like(rows[:, :1])
    rotated = torch.cat([rows @ vectors, ones], 1)
    variances = torch.cat([variances.clamp(min=0), ones[0]])
    return _Axes(mean, std, vectors if basis is None else basis @ vectors, rotated, variances)


def _first_fit(axes: _Axes, y: Tensor, strength: float, max_iter: int) -> Classifier:
    """Classifier fitted from zero or, where that takes long, from those of ever weaker penalties, a tenth each time.

    With a weak penalty and classes that a plane tells apart the weights that are sought are far away. Of 2,500 rows,
    192 features and 250 classes at 1e-5, the way from zero takes 1,037 evaluations, that by five penalties 173.
    """
    start = _fit(axes, y, strength, min(max_iter, _SOON), None)
    if start.converged or max_iter <= _SOON:
        return start
    stronger = _STRONG
    while stronger > 2 * strength:  # and not one that differs by rounding
        start = _fit(axes, y, stronger, max_iter, None if stronger == _STRONG else start)
        stronger /= 10
    return _fit(axes, y, strength, max_iter, start)


def _fit(axes: _Axes, y: Tensor, strength: float, max_iter: int, start: Classifier | None) -> Classifier:
    """Classifier fitted from ``start``, of the same classes, or from zero."""
    several = y.ndim == 2
    if several:
        classes = torch.arange(y.shape[1], device=y.device)
        share = y.double().mean(0)
        fixed = (share == 0) | (share == 1)
    else:
        classes, y = torch.unique(y, return_inverse=True)
        fixed = classes.new_zeros(len(classes), dtype=torch.bool)
    objective = _Objective(axes, y, len(classes), strength, fixed)
    weight = axes.x.new_zeros(len(classes), axes.x.shape[1])
    if start is not None:
        weight[:, :-1] = start.weight.float() @ axes.basis
        weight[:, -1] = start.bias
    if several:
        # Half a row is added to either side, so that the bias is finite.
        smoothed = (share * len(y) + 0.5) / (len(y) + 1)
        weight[fixed] = 0
        weight[fixed, -1] = smoothed.logit()[fixed].float()
    weight, converged = _minimise(objective, weight, max_iter)
    solution = (weight[:, :-1] @ axes.basis.T).double()
    return Classifier(classes, axes.mean, axes.std, solution, weight[:, -1].double(), converged, several)


class _Objective:
    """Mean cross-entropy with its penalty, as a function of weights (C, K + 1), the last column being the biases."""

    def __init__(self, axes: _Axes, y: Tensor, classes: int, strength: float, fixed: Tensor) -> None:
        """Of labels ``y``, places (N,) among so many classes or (N, C) bool; ``fixed`` (C,) classes aren't fitted."""
        self.x, self.variances, self.fixed = axes.x, axes.variances, fixed
        self.y = y if y.ndim == 1 else y.float()
        self.rows = torch.arange(len(y), device=y.device)
        # Two classes have one difference of weights, of which each gets half: a quarter of the square, twice.
        twice = y.ndim == 1 and classes == 2
        self.penalty = torch.full_like(self.variances, strength * (2 if twice else 1))
        self.penalty[-1] = 0
        # Written over at every call: fresh memory of this size costs more than the arithmetic.
        self.logits = self.x.new_empty(len(y), classes)

    def __call__(self, weight: Tensor) -> tuple[float, Tensor, Tensor]:
        """Value, gradient (C, K + 1), and the diagonal of the Hessian, nearly, in the same shape."""
        logits = torch.mm(self.x, weight.T, out=self.logits)  # (N, C)
        if self.y.ndim == 1:
            log_p = torch.log_softmax(logits, 1, out=logits)
            loss = -log_p[self.rows, self.y].sum(dtype=torch.float64)
            p = log_p.clamp_(min=_LEAST).exp_()
        else:
            # From the logit z of a label that is y: log(1 + exp(z)) - y z.
            loss = (F.softplus(logits) - logits * self.y).sum(dtype=torch.float64)
            p = logits.clamp_(min=_LEAST).sigmoid_()
        # As if a sample's uncertainty had nothing to do with its features.
        curvature = ((p.sum(0) - torch.linalg.vector_norm(p, dim=0).square()) / len(p)).clamp(min=1e-12)
        if self.y.ndim == 1:
            p[self.rows, self.y] -= 1
        else:
            p -= self.y
        penalised = weight * self.penalty
        gradient = (torch.mm(p.T, self.x) / len(p) + penalised).masked_fill_(self.fixed[:, None], 0.0)
        value = loss / len(p) + (penalised * weight).sum(dtype=torch.float64) / 2
        return value.item(), gradient, curvature[:, None] * self.variances + self.penalty


def _minimise(objective: _Objective, weight: Tensor, max_iter: int) -> tuple[Tensor, bool]:
    """L-BFGS from ``weight``; returns where it ended and whether it converged.

    It is preconditioned with the diagonal of the Hessian and searches along a line by the slope where rounding hides
    the decrease.

    Source: Nocedal & Wright, Numerical Optimization (2nd edition), algorithms 7.4 and 7.5; for the line search Hager &
    Zhang 2005, A New Conjugate Gradient Method with Guaranteed Descent and an Efficient Line Search, section 4.
    """
    tolerance = max(_LEAST_TOLERANCE, _TOLERANCE * min(1, len(objective.x) / 20_000) ** 2)
    value, gradient, diagonal = objective(weight)
    pairs: list[tuple[Tensor, Tensor, float]] = []
    evaluations = 1
    while evaluations <= max_iter:
        if _dot(gradient, gradient / diagonal) / 2 <= tolerance:
            return weight, True
        direction = _direction(gradient, diagonal, pairs)
        slope, length = _dot(direction, gradient), 1.0
        while True:
            there = torch.add(weight, direction, alpha=length)
            value_there, gradient_there, diagonal_there = objective(there)
            evaluations += 1
            slope_there = _dot(direction, gradient_there)
            decreased = value_there <= value + 1e-4 * length * slope
            level = value_there <= value + _ROUNDING * abs(value) and slope_there <= -0.9 * slope
            if decreased or level:
                break
            # To where the slope would be zero if it were linear.
            length *= min(0.5, max(0.1, slope / (slope - slope_there)))
            if length < 1e-8:
                return weight, False
        step, change = there - weight, gradient_there - gradient
        curvature = _dot(step, change)
        if curvature > 0:
            pairs = [*pairs, (step, change, curvature)][-_MEMORY:]
        weight, value, gradient, diagonal = there, value_there, gradient_there, diagonal_there
    return weight, _dot(gradient, gradient / diagonal) / 2 <= tolerance


def _direction(gradient: Tensor, diagonal: Tensor, pairs: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Minus the inverse Hessian, as ``diagonal`` and ``pairs`` have it, times ``gradient``."""
    direction, shares = -gradient, []
    for step, change, curvature in reversed(pairs):
        shares.append(_dot(step, direction) / curvature)
        direction.sub_(change, alpha=shares[-1])
    direction /= diagonal
    if pairs:
        _, change, curvature = pairs[-1]
        direction *= curvature / _dot(change, change / diagonal)
    for (step, change, curvature), share in zip(pairs, reversed(shares), strict=True):
        direction.add_(step, alpha=share - _dot(change, direction) / curvature)
    return direction


def _dot(a: Tensor, b: Tensor) -> float:
    return (a * b).sum(dtype=torch.float64).item()


def checked(name: str, split: Split, several: bool = False) -> Split:
    """``split`` as float64 features and int64 or bool labels, or a ValueError that calls it ``name``."""
    x, y = split
    shape = "(N, C) bool" if several else "(N,)"
    if x.ndim != 2 or y.ndim != 1 + several or len(x) != len(y):
        raise ValueError(f"{name} must be x (N, D) and y {shape}, got x {tuple(x.shape)} and y {tuple(y.shape)}")
    if not x.numel():
        raise ValueError(f"{name} must have at least one row and one feature, got x {tuple(x.shape)}")
    if several and y.dtype != torch.bool:
        raise ValueError(f"{name} labels of shape (N, C) must be bool, got {y.dtype}")
    if not several and (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool):
        raise ValueError(f"{name} labels must be integers, got {y.dtype}")
    broken = int((~x.isfinite().all(1)).sum())
    if broken:
        raise ValueError(f"{name} features must be finite, got NaN or infinity in {broken} of {len(x)} rows")
    return Split(x.detach().double(), y if several else y.long())


def check_compatible(train: Split, **others: Split) -> None:
    """Raise a ValueError unless the others can be predicted by a classifier fitted on ``train``."""
    for name, split in others.items():
        if split.x.shape[1] != train.x.shape[1]:
            raise ValueError(f"{name} must have the {train.x.shape[1]} features of train, got {split.x.shape[1]}")
    if train.y.ndim == 2:
        for name, split in {"train": train, **others}.items():
            if split.y.shape[1] != train.y.shape[1]:
                raise ValueError(f"{name} must have the {train.y.shape[1]} labels of train, got {split.y.shape[1]}")
            if not (split.y.any(0) & ~split.y.all(0)).any():
                raise ValueError(f"{name} must have a label that some rows have and others lack, got none")
        return
    classes = torch.unique(train.y)
    if len(classes) < 2:
        raise ValueError(f"train must have at least two classes, got only class {classes.item()}")
    for name, split in others.items():
        unseen = torch.unique(split.y[~torch.isin(split.y, classes)]).tolist()
        if unseen:
            raise ValueError(f"{name} must hold only classes present in train, got unseen {unseen}")

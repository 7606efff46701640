"""Linear probe: multinomial logistic regression on frozen features."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.metrics import accuracy, bootstrap_interval

DEFAULT_STRENGTHS = tuple(10.0**exponent for exponent in range(-5, 2))
"""One L2 strength per decade, from 1e-5 to 10."""

# Largest absolute gradient at which a fit counts as converged. At 1e-5 the fits of the weakest default
# strengths still depend on where they start, by up to a point of accuracy.
_GRADIENT_TOLERANCE = 1e-6


class Split(NamedTuple):
    """Features and labels of one split.

    Attributes:
        x: (N, D) floating point, any scale.
        y: (N,) integer label ids, any, not only 0..C-1.
    """

    x: Tensor
    y: Tensor


class Classifier(NamedTuple):
    """Softmax regression on standardised features.

    Attributes:
        classes: (C,) int64 label ids, ascending.
        mean: (D,) float64, of the fitted features.
        std: (D,) float64, of the fitted features; 1 where a feature is constant.
        weight: (C, D) float64, for standardised features.
        bias: (C,) float64.
        converged: whether the fit reached a stationary point before its iterations ran out.
    """

    classes: Tensor
    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    converged: bool

    def predict(self, x: Tensor) -> Tensor:
        """Label ids (N,) predicted for features ``x`` (N, D)."""
        logits = F.linear((x.double() - self.mean) / self.std, self.weight, self.bias)
        return self.classes[logits.argmax(1)]


class ProbeResult(NamedTuple):
    """Outcome of ``linear_probe``. Accuracies are fractions in [0, 1].

    Attributes:
        top1: test accuracy of ``classifier``.
        interval: 95 % bootstrap interval of ``top1``, test rows taken as independent.
        strength: the chosen L2 strength.
        val_top1: validation accuracy at ``strength`` when fitted on train alone; the choice was made by it.
        predicted: (N,) int64 label ids predicted for the test split.
        classifier: the one refitted on train + val.
    """

    top1: float
    interval: tuple[float, float]
    strength: float
    val_top1: float
    predicted: Tensor
    classifier: Classifier


# The fit needs autograd; leaving inference mode also undoes a caller's no_grad.
@torch.inference_mode(False)
def linear_probe(
    train: Split,
    val: Split,
    test: Split,
    *,
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
    max_iter: int = 1000,
) -> ProbeResult:
    """Accuracy on ``test`` of a linear classifier fitted on the frozen features of ``train`` and ``val``.

    Features are standardised by the mean and standard deviation of the rows being fitted. The classifier
    minimises mean cross-entropy + strength / 2 * ||W||^2, the bias unpenalised, by full-batch L-BFGS of at
    most ``max_iter`` iterations in float64, on the device of the features. Strengths are fitted on ``train`` in
    ascending order, each from the solution before it; the one with the best accuracy on ``val`` is chosen, of
    equals the strongest; the classifier is then refitted on train + val with that strength. ``test`` takes no
    part in any choice.

    A ``strength`` is scikit-learn's ``LogisticRegression(C=1 / (strength * N))`` for N fitted rows: being on the
    mean, it means the same for train as for train + val.

    For test rows that share sources, pass ``predicted == test.y`` and the source ids to ``bootstrap_interval``.

    Source: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision (CLIP),
    section 3.2 and appendix A.3. It differs here in standardising the features and in the grid of strengths.

    Raises:
        ValueError: a split is empty, misshapen, of another width D than train or holds NaN or infinity; its
            labels are not integers; train has a single class; val or test has a class that train lacks;
            ``strengths`` is empty or holds one that is not positive and finite; ``max_iter`` is below 1.
    """
    if not strengths or not all(0 < strength < math.inf for strength in strengths):
        raise ValueError(f"strengths must be one or more positive finite numbers, got {list(strengths)}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    train, val, test = _checked("train", train), _checked("val", val), _checked("test", test)
    _check_compatible(train, val=val, test=test)

    chosen, chosen_strength, chosen_top1 = None, math.nan, -math.inf
    current = None
    for strength in sorted(strengths):
        current = _fit(train, strength, max_iter, current)
        top1 = accuracy(current.predict(val.x), val.y)
        if top1 >= chosen_top1:
            chosen, chosen_strength, chosen_top1 = current, strength, top1

    both = Split(torch.cat([train.x, val.x]), torch.cat([train.y, val.y]))
    classifier = _fit(both, chosen_strength, max_iter, chosen)
    predicted = classifier.predict(test.x)
    return ProbeResult(
        top1=accuracy(predicted, test.y),
        interval=bootstrap_interval(predicted == test.y),
        strength=chosen_strength,
        val_top1=chosen_top1,
        predicted=predicted,
        classifier=classifier,
    )


def _fit(split: Split, strength: float, max_iter: int, start: Classifier | None) -> Classifier:
    """Classifier fitted on ``split`` from ``start``, or from zero; ``start`` must know the same classes."""
    mean = split.x.mean(0)
    # Rounding can leave a constant feature a standard deviation of 1e-17, which would blow it up on other rows.
    constant = split.x.amin(0) == split.x.amax(0)
    std = split.x.std(0, correction=0).masked_fill(constant, 1.0)
    x = (split.x - mean) / std
    classes, y = torch.unique(split.y, return_inverse=True)
    weight = x.new_zeros(len(classes), x.shape[1]) if start is None else start.weight.clone()
    bias = x.new_zeros(len(classes)) if start is None else start.bias.clone()
    parameters = [weight.requires_grad_(), bias.requires_grad_()]

    # In float64 the line search can follow the objective down to the gradient tolerance, which is then the
    # only criterion of convergence; in float32 rounding stops it two orders of magnitude above.
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=max_iter,
        tolerance_grad=_GRADIENT_TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias), y) + strength / 2 * weight.square().sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    # The last point the line search tried need not be the one it kept, so the gradient is taken anew.
    gradients = torch.autograd.grad(objective(), parameters)
    converged = all(gradient.abs().max().item() <= _GRADIENT_TOLERANCE for gradient in gradients)
    return Classifier(classes, mean, std, weight.detach(), bias.detach(), converged)


def _checked(name: str, split: Split) -> Split:
    """``split`` as float64 features and int64 labels, or a ValueError that calls it ``name``."""
    x, y = split
    if x.ndim != 2 or y.ndim != 1 or len(x) != len(y):
        raise ValueError(f"{name} must be x (N, D) and y (N,), got x {tuple(x.shape)} and y {tuple(y.shape)}")
    if not x.numel():
        raise ValueError(f"{name} must have at least one row and one feature, got x {tuple(x.shape)}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"{name} labels must be integers, got {y.dtype}")
    broken = int((~x.isfinite().all(1)).sum())
    if broken:
        raise ValueError(f"{name} features must be finite, got NaN or infinity in {broken} of {len(x)} rows")
    return Split(x.detach().double(), y.long())


def _check_compatible(train: Split, **others: Split) -> None:
    """Raise a ValueError unless the others can be predicted by a classifier fitted on ``train``."""
    classes = torch.unique(train.y)
    if len(classes) < 2:
        raise ValueError(f"train must have at least two classes, got only class {classes.item()}")
    for name, split in others.items():
        if split.x.shape[1] != train.x.shape[1]:
            raise ValueError(f"{name} must have the {train.x.shape[1]} features of train, got {split.x.shape[1]}")
        unseen = torch.unique(split.y[~torch.isin(split.y, classes)]).tolist()
        if unseen:
            raise ValueError(f"{name} must hold only classes present in train, got unseen {unseen}")

"""Ridge probe: a linear classifier by least squares. All strengths cost one eigendecomposition, so it fits a loop."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.linear import Classifier, Split, checked, standardise
from eval.metrics import ProbeResult, classification

DEFAULT_STRENGTHS = tuple(10.0**exponent for exponent in range(-5, 3))
"""One L2 strength per decade, from 1e-5 to 100."""


def ridge_probe(
    train: Split,
    val: Split,
    *,
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
    content: Tensor | None = None,
    samples: int = 0,
) -> ProbeResult:
    """Metrics on ``val`` of a ridge classifier fitted on the frozen features of ``train``.

    Features are standardised by the mean and standard deviation of ``train``. Per class the classifier minimises the
    mean squared error of a 0/1 target + strength * ||w||^2, the intercept unpenalised, in float64; the class of the
    highest output is predicted. The strength with the lowest leave-one-out error on ``train`` is chosen (the squared
    one: with few rows it chooses better than accuracy does); ``val`` takes no part in the choice. Its rows of a class
    that train lacks count as wrong.

    A ``strength`` is scikit-learn's ``RidgeClassifier(alpha=strength * N)`` for N fitted rows, and the choice that of
    ``RidgeClassifierCV``. The leave-one-out errors are those of N fits, in closed form (Hastie, Tibshirani & Friedman,
    The Elements of Statistical Learning, 2nd edition, equation 7.64), but on features that are standardised once.

    Metrics are those of ``eval.metrics.classification``, with intervals from ``samples`` resamples by ``content``
    (N of val,); none by default, for a training loop. ``chosen`` has ``strength`` and ``left_out``, the mean squared
    error on train at that strength, each row left out once.

    Raises:
        ValueError: a split is empty, misshapen or holds NaN or infinity; its labels are not integers; the two differ
            in width; train has a single class; ``strengths`` is empty or holds one that is not positive and finite.
    """
    if not strengths or not all(0 < strength < math.inf for strength in strengths):
        raise ValueError(f"strengths must be one or more positive finite numbers, got {list(strengths)}")
    train, val = checked("train", train), checked("val", val)
    if val.x.shape[1] != train.x.shape[1]:
        raise ValueError(f"val must have the {train.x.shape[1]} features of train, got {val.x.shape[1]}")
    classes, y = torch.unique(train.y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"train must have at least two classes, got only class {classes.item()}")

    mean, std = standardise(train.x)
    x, n = (train.x - mean) / std, len(train.x)
    targets = F.one_hot(y).double()  # (N, C)
    prior = targets.mean(0)  # the intercepts, features being centred
    # In the basis of the eigenvectors every strength is a division: w = (e + strength)^-1 (X V)^T (Y - prior) / N.
    eigenvalues, vectors = torch.linalg.eigh(x.T @ x / n)  # (D,), (D, D)
    rotated = x @ vectors  # (N, D)
    moments = rotated.T @ (targets - prior) / n  # (D, C)

    chosen, best, lowest = moments, math.nan, math.inf
    for strength in strengths:
        inverse = 1 / (eigenvalues.clamp(min=0) + strength)
        weight = inverse[:, None] * moments
        # How much a row's own target counts in its output; without that its error is this much larger.
        leverage = (1 + rotated.square() @ inverse) / n
        without = (1 - leverage).clamp(min=torch.finfo(torch.float64).eps)  # 0 by rounding, with hardly any strength
        errors = (targets - prior - rotated @ weight) / without[:, None]
        left_out = errors.square().mean().item()
        if left_out < lowest:
            chosen, best, lowest = weight, strength, left_out

    classifier = Classifier(classes, mean, std, (vectors @ chosen).T, prior, converged=True)
    predicted = classifier.predict(val.x)
    return ProbeResult(
        metrics=classification(classifier.scores(val.x), val.y, classes, groups=content, samples=samples),
        chosen={"strength": best, "left_out": lowest},
        predicted=predicted,
        correct=(predicted == val.y).double(),
        classifier=classifier,
    )

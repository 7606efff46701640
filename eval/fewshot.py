"""Few-shot probe: how far a handful of labelled samples per class go, over several draws of them."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.linear import Classifier, Split, check_compatible, checked, standardise
from eval.metrics import Metric, ProbeResult, bootstrap_interval

SHOTS = (1, 5, 10, 25)
STRENGTH = 1.0


def fewshot_probe(
    train: Split,
    test: Split,
    *,
    shots: Sequence[int] = SHOTS,
    seeds: int = 5,
    strength: float = STRENGTH,
    content: Tensor | None = None,
    samples: int = 1000,
) -> ProbeResult:
    """Accuracy on ``test`` of ridge classifiers fitted on so many ``shots`` of each class of ``train``.

    Each of the ``seeds`` draws one order of every class's rows, of which the first 1, 5, ... are the shots: more shots
    hold fewer. A class with fewer rows gives all that it has. The classifier is that of ``ridge_probe`` with a fixed
    ``strength``, there being no validation samples to choose it by; but features are standardised by all rows of
    ``train``, which takes no labels: the deviations of a handful are mostly noise.

    Metrics: ``top1_5shot`` and so on, the mean over seeds; its interval, from ``samples`` resamples by ``content`` (N
    of test,), is that of test samples, not of seeds, which ``spread_5shot``, the standard deviation over seeds (0 with
    one), is about. ``predicted`` is that of the most shots and the first seed, ``correct`` the share of the seeds that
    are right with the most shots.

    Raises:
        ValueError: a split is empty, misshapen or holds NaN or infinity; its labels are not integers; the two differ
            in width; train has a single class, or test one that train lacks; ``shots`` is empty or holds one below 1;
            ``seeds`` is below 1; ``strength`` is not positive and finite.
    """
    if not shots or min(shots) < 1 or seeds < 1:
        raise ValueError(f"shots must be one or more, and they and seeds at least 1, got {list(shots)} and {seeds}")
    if not 0 < strength < math.inf:
        raise ValueError(f"strength must be positive and finite, got {strength}")
    train, test = checked("train", train), checked("test", test)
    check_compatible(train, test=test)
    mean, std = standardise(train.x)
    metrics, predicted = {}, test.y
    correct = torch.zeros(0)
    for count in sorted(set(shots)):
        hits = []
        for seed in range(seeds):
            rows = draw(train.y, count, seed)
            found = fit_ridge(Split(train.x[rows], train.y[rows]), strength, mean, std).predict(test.x)
            predicted = found if seed == 0 else predicted
            hits.append((found == test.y).double())
        each = torch.stack(hits)  # (seeds, N)
        correct = each.mean(0)
        metrics[f"top1_{count}shot"] = Metric(correct.mean().item(), _interval(correct, content, samples))
        metrics[f"spread_{count}shot"] = Metric(each.mean(1).std(correction=min(1, seeds - 1)).item())
    return ProbeResult(metrics=metrics, chosen={}, predicted=predicted, correct=correct)


def draw(labels: Tensor, count: int, seed: int) -> Tensor:
    """Rows, ascending, of at most ``count`` samples of each of ``labels`` (N,); of a higher count the same and more."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    ranked = order[labels[order].argsort(stable=True)]  # by class, each in a random order
    _, sizes = torch.unique(labels, return_counts=True)
    place = torch.arange(len(labels), device=labels.device) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return ranked[place < count].sort().values


def fit_ridge(split: Split, strength: float, mean: Tensor, std: Tensor) -> Classifier:
    """``ridge_probe``'s classifier of one strength, with features standardised by ``mean`` and ``std`` (D,).

    It solves for as many unknowns as ``split``, float64, has rows or features, whichever is less.
    """
    classes, y = torch.unique(split.y, return_inverse=True)
    x, targets = (split.x - mean) / std, F.one_hot(y).double()
    centre, prior = x.mean(0), targets.mean(0)
    x, n = x - centre, len(x)
    if x.shape[1] <= n:
        weight = _solve(x.T @ x / n, strength, x.T @ (targets - prior) / n)
    else:
        weight = x.T @ _solve(x @ x.T / n, strength, targets - prior) / n
    return Classifier(classes, mean, std, weight.T, prior - centre @ weight, converged=True)


def _solve(gram: Tensor, strength: float, right: Tensor) -> Tensor:
    """(gram + strength)^-1 right."""
    gram.diagonal().add_(strength)
    solution: Tensor = torch.cholesky_solve(right, torch.linalg.cholesky(gram))
    return solution


def _interval(correct: Tensor, content: Tensor | None, samples: int) -> tuple[float, float] | None:
    if not samples or (content is not None and len(torch.unique(content)) < 2):
        return None
    return bootstrap_interval(correct, groups=content, samples=samples)

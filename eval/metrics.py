"""Accuracy, its bootstrap interval, and the two baselines an accuracy is read against."""

import torch
from torch import Tensor

# Bounds the index matrix of one batch of resamples at 32 MiB, whatever the size of the test set.
_DRAWS_PER_BATCH = 2**22


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Fraction in [0, 1] of ``predicted`` (N,) that equals ``labels`` (N,).

    Raises:
        ValueError: the two are not one-dimensional, of one length and non-empty.
    """
    if predicted.ndim != 1 or predicted.shape != labels.shape or not len(labels):
        raise ValueError(
            "accuracy needs predicted and labels of one shape (N,) with N >= 1, "
            f"got {tuple(predicted.shape)} and {tuple(labels.shape)}"
        )
    return (predicted == labels).double().mean().item()


def bootstrap_interval(
    correct: Tensor, *, groups: Tensor | None = None, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap 95 % interval of the mean of ``correct`` (N,), as (low, high) in its unit.

    With ``groups`` (N,), integer ids, whole groups are resampled (cluster bootstrap): rows cut from one source,
    such as windows of one clip, are not independent, and resampling them singly gives too narrow an interval.
    The mean stays one over rows, so a larger group weighs more. The same ``seed`` gives the same interval on
    every device. The interval has no width when every row is equal.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), section 13.3; Davison & Hinkley,
    Bootstrap Methods and their Application (1997), section 3.8, for the cluster bootstrap.

    Raises:
        ValueError: ``correct`` is not (N,) with N >= 1, ``groups`` has another shape or holds a single group, or
            ``samples`` is below 1.
    """
    if correct.ndim != 1 or not len(correct):
        raise ValueError(f"correct must be (N,) with N >= 1, got {tuple(correct.shape)}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    totals = correct.detach().double().cpu()
    sizes = torch.ones_like(totals)
    if groups is not None:
        if groups.shape != correct.shape:
            raise ValueError(f"groups must be {tuple(correct.shape)} like correct, got {tuple(groups.shape)}")
        ids, member_of = torch.unique(groups.cpu(), return_inverse=True)
        if len(ids) < 2:
            raise ValueError(f"groups must hold at least 2 groups, got only group {ids.item()}")
        totals = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, member_of, totals)
        sizes = member_of.bincount().double()

    generator = torch.Generator().manual_seed(seed)
    units = len(totals)
    batch = max(1, _DRAWS_PER_BATCH // units)
    means = []
    for start in range(0, samples, batch):
        rows = min(batch, samples - start)
        draws = torch.randint(units, (rows, units), generator=generator)
        means.append(totals[draws].sum(1) / sizes[draws].sum(1))
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def chance(labels: Tensor) -> float:
    """Expected accuracy, in [0, 1], of guessing uniformly among the classes present in ``labels`` (N,).

    Raises:
        ValueError: ``labels`` is empty.
    """
    if not labels.numel():
        raise ValueError("chance needs at least one label, got none")
    return 1 / len(torch.unique(labels))


def majority(train_labels: Tensor, test_labels: Tensor) -> float:
    """Accuracy on ``test_labels`` (M,), in [0, 1], of always predicting the commonest of ``train_labels`` (N,).

    Of equally common labels the lowest is predicted.

    Raises:
        ValueError: either is empty or not one-dimensional.
    """
    if train_labels.ndim != 1 or not len(train_labels):
        raise ValueError(f"train_labels must be (N,) with N >= 1, got {tuple(train_labels.shape)}")
    classes, counts = torch.unique(train_labels, return_counts=True)
    return accuracy(classes[counts.argmax()].expand_as(test_labels), test_labels)

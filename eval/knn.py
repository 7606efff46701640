"""Nearest neighbours: the class that the samples around one vote for. Nothing is fitted."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from eval.linear import Split, _checked
from eval.metrics import accuracy
from eval.zeroshot import unit_rows


class KnnResult(NamedTuple):
    """Outcome of ``knn``.

    Attributes:
        top1: test accuracy, a fraction in [0, 1].
        k: neighbours that voted: those asked for, or all of train where it has fewer.
        predicted: (N,) int64 label ids predicted for the test split.
    """

    top1: float
    k: int
    predicted: Tensor


def knn(train: Split, test: Split, k: int = 20, temperature: float = 0.07, chunk: int = 256) -> KnnResult:
    """Accuracy on ``test`` of the vote of each sample's ``k`` nearest rows of ``train``.

    A neighbour at cosine c votes for its class with exp(c / temperature). Of train rows at the same cosine as the k-th
    any may vote; of classes with equal votes the lowest id wins. A test row of a class that train lacks counts as
    wrong. ``chunk`` test rows are compared at a time, in memory of chunk * (train rows + classes) float64.

    Source: Wu et al. 2018, Unsupervised Feature Learning via Non-Parametric Instance Discrimination, section 3.4.

    Raises:
        ValueError: a split is empty or misshapen, or has rows that are zero, NaN or infinite; its labels are not
            integers; the two differ in width; ``k`` or ``chunk`` is below 1; ``temperature`` is not positive and
            finite.
    """
    if k < 1 or chunk < 1:
        raise ValueError(f"k and chunk must be at least 1, got k={k} and chunk={chunk}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    train, test = _checked("train", train), _checked("test", test)
    if test.x.shape[1] != train.x.shape[1]:
        raise ValueError(f"test must have the {train.x.shape[1]} features of train, got {test.x.shape[1]}")
    k = min(k, len(train.y))
    classes, y = torch.unique(train.y, return_inverse=True)
    train_units, test_units = unit_rows(train.x, "train"), unit_rows(test.x, "test")
    predicted = []
    for units in torch.split(test_units, chunk):
        cosines, neighbours = (units @ train_units.T).topk(k)
        weights = ((cosines - cosines[:, :1]) / temperature).exp()  # a common factor keeps exp from overflowing
        votes = units.new_zeros(len(units), len(classes)).scatter_add_(1, y[neighbours], weights)
        predicted.append(classes[votes.argmax(1)])
    labels = torch.cat(predicted)
    return KnnResult(accuracy(labels, test.y), k, labels)

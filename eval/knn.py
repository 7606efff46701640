"""Nearest neighbours: the class that the samples around one vote for. Nothing is fitted."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eval.linear import Split, checked
from eval.metrics import ProbeResult, Ranked, accuracy, of_ranked, ranked
from eval.zeroshot import unit_rows

NEIGHBOURS = (10, 20, 100, 200)
"""Of Wu et al. 2018 and DINO: how many may vote."""
_AT_ONCE = 2**26
"""Cosines and votes, 512 MB, that are held at a time; of very many training rows or classes fewer rows are compared."""


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
    wrong. At most ``chunk`` test rows are compared at a time, in memory of chunk * (train rows + classes) float64, and
    fewer where that is more than 512 MB.

    Source: Wu et al. 2018, Unsupervised Feature Learning via Non-Parametric Instance Discrimination, section 3.4.

    Raises:
        ValueError: a split is empty or misshapen, or has rows that are zero, NaN or infinite; its labels are not
            integers; the two differ in width; ``k`` or ``chunk`` is below 1; ``temperature`` is not positive and
            finite.
    """
    if k < 1 or chunk < 1:
        raise ValueError(f"k and chunk must be at least 1, got k={k} and chunk={chunk}")
    train, test = checked("train", train), checked("test", test)
    k = min(k, len(train.y))
    predicted = _ranked(train, test, "test", [k], temperature, chunk)[k].top
    return KnnResult(accuracy(predicted, test.y), k, predicted)


def knn_probe(
    train: Split,
    val: Split,
    test: Split,
    *,
    ks: Sequence[int] = NEIGHBOURS,
    temperature: float = 0.07,
    chunk: int = 256,
    content: Tensor | None = None,
    samples: int = 1000,
) -> ProbeResult:
    """``knn`` on ``test`` with every number of neighbours of ``ks``, and with the one that does best on ``val``.

    Rows of ``val`` and ``test`` are compared with those of ``train`` alone, and ``test`` takes no part in the choice;
    of numbers that do equally well on ``val`` the smallest is chosen. Those above the number of train rows are left
    out; where all are, all rows vote. Rows of a class that train lacks count as wrong.

    Metrics are those of ``eval.metrics.classification`` with the chosen k (a class that no neighbour votes for is in
    no top 5), and ``top1_k10`` and so on for every k; intervals from ``samples`` resamples by ``content`` (N of
    test,), ids equal for equal inputs. ``chosen`` has ``k`` and ``val_top1``.

    Source: Wu et al. 2018, as for ``knn``; Caron et al. 2021, Emerging Properties in Self-Supervised Vision
    Transformers (DINO).

    Raises:
        ValueError: as ``knn``; ``ks`` is empty.
    """
    if not ks or min(ks) < 1 or chunk < 1:
        raise ValueError(f"ks must be one or more, and they and chunk at least 1, got ks={list(ks)} and chunk={chunk}")
    train, val, test = checked("train", train), checked("val", val), checked("test", test)
    fitting = sorted({k for k in ks if k <= len(train.y)}) or [len(train.y)]
    on_val = {
        k: accuracy(voted.top, val.y) for k, voted in _ranked(train, val, "val", fitting, temperature, chunk).items()
    }
    best = max(on_val, key=lambda k: (on_val[k], -k))
    on_test = _ranked(train, test, "test", fitting, temperature, chunk)
    classes = len(torch.unique(train.y))
    found = {k: of_ranked(voted, test.y, classes, groups=content, samples=samples) for k, voted in on_test.items()}
    predicted = on_test[best].top
    return ProbeResult(
        metrics={**found[best], **{f"top1_k{k}": metrics["top1"] for k, metrics in found.items()}},
        chosen={"k": best, "val_top1": on_val[best]},
        predicted=predicted,
        correct=(predicted == test.y).double(),
    )


def _ranked(
    train: Split, queries: Split, name: str, ks: Sequence[int], temperature: float, chunk: int
) -> dict[int, Ranked]:
    """For each k, at most the train rows, what comes of the votes for ``queries``, called ``name``.

    The votes of all queries for all classes are never held: of each chunk only its outcome is.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if queries.x.shape[1] != train.x.shape[1]:
        raise ValueError(f"{name} must have the {train.x.shape[1]} features of train, got {queries.x.shape[1]}")
    classes, y = torch.unique(train.y, return_inverse=True)
    train_units, units = unit_rows(train.x, "train"), unit_rows(queries.x, name)
    chunk = max(1, min(chunk, _AT_ONCE // (len(train_units) + len(classes))))
    parts: dict[int, list[Ranked]] = {k: [] for k in ks}
    for some, labels in zip(torch.split(units, chunk), torch.split(queries.y, chunk), strict=True):
        cosines, neighbours = (some @ train_units.T).topk(max(ks))  # nearest first
        weights = ((cosines - cosines[:, :1]) / temperature).exp()  # a common factor keeps exp from overflowing
        for k, found in parts.items():
            votes = units.new_zeros(len(some), len(classes))
            votes.scatter_add_(1, y[neighbours[:, :k]], weights[:, :k])
            votes.masked_fill_(votes == 0, -math.inf)  # without a vote it is in no top 5
            found.append(ranked(votes, labels, classes))
    return {k: Ranked(*(torch.cat(each) for each in zip(*found, strict=True))) for k, found in parts.items()}

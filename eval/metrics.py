"""Metrics of classification with their bootstrap intervals, and the two baselines an accuracy is read against."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Bounds one batch of resamples at 32 MiB of weights, whatever the size of the test set.
_DRAWS_PER_BATCH = 2**22


class Metric(NamedTuple):
    """One number.

    Attributes:
        value: a fraction in [0, 1] where it is a share.
        interval: its 95 % bootstrap interval as (low, high); None where none was asked for or none can be drawn.
    """

    value: float
    interval: tuple[float, float] | None = None


class ProbeResult(NamedTuple):
    """Outcome of a probe, whichever it is.

    Attributes:
        metrics: on the test split, by name.
        chosen: hyper-parameters that validation chose and the validation score that they were chosen by.
        predicted: labels predicted for the test split: (N,) int64 ids, or (N, C) bool where a sample has several.
        correct: (N,) float64, how right each test sample is, for comparisons of two probes sample by sample: 0 or 1,
            or the share of a sample's labels, or of the repetitions of a probe, that are right.
        classifier: what was fitted, where it outlives the probe.
    """

    metrics: dict[str, Metric]
    chosen: dict[str, float]
    predicted: Tensor
    correct: Tensor
    classifier: Any = None

    @property
    def top1(self) -> float:
        """Test accuracy, in [0, 1]."""
        return self.metrics["top1"].value

    @property
    def strength(self) -> float:
        """The chosen L2 strength."""
        return self.chosen["strength"]

    @property
    def val_top1(self) -> float:
        """The validation accuracy by which the choice was made, in [0, 1]."""
        return self.chosen["val_top1"]


class Ranked(NamedTuple):
    """What accuracies need of the scores of N samples, which for many classes need not be kept then.

    Attributes:
        top: (N,) ids, the class of the highest score.
        among5: (N,) float64, whether a sample's own class is among its five highest: 0 or 1.
    """

    top: Tensor
    among5: Tensor


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


def classification(
    scores: Tensor, labels: Tensor, classes: Tensor, *, groups: Tensor | None = None, samples: int = 1000
) -> dict[str, Metric]:
    """Metrics of ``scores`` (N, C), where each sample has one of ``labels`` (N,); ``classes`` (C,), ascending, are the
    columns'.

    ``top1``; ``top5``, left out with five classes or fewer, where it is 1 by definition; ``precision``, ``recall`` and
    ``f1``, unweighted means over classes, and ``mean_per_class`` accuracy, which is ``recall`` under its other name.
    The means are over the classes that occur in ``labels``: one that was only predicted adds no term, but its
    samples miss in the recall of their own. A class that is never predicted has precision and F1 of 0. This is
    scikit-learn's ``average="macro", labels=unique(labels), zero_division=0``. Of equal scores the first column wins,
    and a score of minus infinity is in no top 5. A label that is not among ``classes`` is wrong in everything and is a
    class of its own in the means.

    Intervals are those of ``bootstrap_interval`` with ``groups`` (N,) and ``samples``; a resample's means are over the
    classes that occur in it. None with ``samples=0`` or a single group.

    Raises:
        ValueError: shapes that do not fit or no rows; ``groups`` misshapen; ``samples`` below 0.
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or classes.shape != scores.shape[1:] or not len(scores):
        raise ValueError(
            "classification needs scores (N, C), labels (N,) and classes (C,) with N >= 1, "
            f"got {tuple(scores.shape)}, {tuple(labels.shape)} and {tuple(classes.shape)}"
        )
    found = ranked(scores.detach(), labels.to(scores.device), classes.to(scores.device))
    return of_ranked(found, labels, len(classes), groups=groups, samples=samples)


def ranked(scores: Tensor, labels: Tensor, classes: Tensor) -> Ranked:
    """Of ``scores`` (N, C), on their device, what ``classification`` needs; which see for ties and missing classes."""
    column = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)[:, None]
    own = torch.where(classes[column[:, 0]] == labels, scores.gather(1, column)[:, 0], -torch.inf)[:, None]
    places = torch.arange(len(classes), device=scores.device)
    before = (scores > own) | ((scores == own) & (places < column))
    return Ranked(classes[scores.argmax(1)], ((before.sum(1) < 5) & (own[:, 0] > -torch.inf)).double())


def of_ranked(
    found: Ranked, labels: Tensor, classes: int, *, groups: Tensor | None = None, samples: int = 1000
) -> dict[str, Metric]:
    """``classification`` of scores for so many ``classes`` of which ``ranked`` is at hand; computed on the CPU."""
    top, hit5, labels = found.top.cpu(), found.among5.cpu(), labels.cpu()
    present, truth = torch.unique(labels, return_inverse=True)
    hit = (top == labels).double()
    # Predictions by their place among the present classes; those of other classes go to one place past the end.
    place = torch.searchsorted(present, top).clamp(max=len(present) - 1)
    place = torch.where(present[place] == top, place, len(present))

    def score(weights: Tensor) -> dict[str, Tensor]:  # (B, N) -> (B,) each
        def per_class(index: Tensor, values: Tensor) -> Tensor:
            return values.new_zeros(len(values), len(present) + 1).index_add_(1, index, values)[:, :-1]

        right, total = per_class(truth, weights * hit), weights.sum(1)
        of_class, as_class = per_class(truth, weights), per_class(place, weights)
        count = (of_class > 0).sum(1)
        recall = (right / of_class.clamp(min=1)).sum(1) / count
        precision = (right / as_class.clamp(min=1) * (of_class > 0)).sum(1) / count
        f1 = (2 * right / (of_class + as_class).clamp(min=1) * (of_class > 0)).sum(1) / count
        shares = {"top1": weights @ hit / total, "mean_per_class": recall}
        if classes > 5:
            shares["top5"] = weights @ hit5 / total
        return {**shares, "precision": precision, "recall": recall, "f1": f1}

    return _measured(score, len(labels), groups, samples)


def multilabel(
    scores: Tensor, labels: Tensor, *, groups: Tensor | None = None, samples: int = 1000
) -> dict[str, Metric]:
    """``map`` and ``auc`` of ``scores`` (N, C), where ``labels`` (N, C) bool say which of C classes each sample has.

    ``map`` is the unweighted mean over classes of the average precision, sum of precision times gain of recall over
    the thresholds, without interpolation; ``auc`` that of the area under the ROC curve, ties counting half. Both equal
    scikit-learn's ``average_precision_score`` and ``roc_auc_score`` with ``average="macro"`` over the classes that can
    be scored: those that some sample has, for ``auc`` also some sample lacks. The others are left out of the mean,
    of a resample's too; a resample that has none to score does not count.

    Intervals as in ``classification``.

    Raises:
        ValueError: shapes that do not fit, no rows or labels that are not bool; no class that some samples have and
            others lack; ``groups`` misshapen; ``samples`` below 0.
    """
    if scores.ndim != 2 or labels.shape != scores.shape or not scores.numel() or labels.dtype != torch.bool:
        raise ValueError(
            "multilabel needs scores (N, C) and labels (N, C) bool with N, C >= 1, "
            f"got {tuple(scores.shape)} and {tuple(labels.shape)} {labels.dtype}"
        )
    scores, labels = scores.detach().cpu(), labels.cpu()
    if not (labels.any(0) & ~labels.all(0)).any():
        raise ValueError("multilabel needs a class that some samples have and others lack, got none")
    columns = [_runs(column, truth) for column, truth in zip(scores.T, labels.T, strict=True) if truth.any()]

    def score(weights: Tensor) -> dict[str, Tensor]:
        by_row = weights.T.contiguous()  # (N, B): what is summed of a sample lies together
        precisions, areas = [], []
        for rows, segments, positives, runs in columns:
            count = 1 + int(runs[-1])
            stretches = by_row.new_zeros(2 * count + 1, len(weights)).index_add_(0, segments, by_row[rows])
            own = by_row.new_zeros(count, len(weights)).index_add_(0, runs, by_row[positives])  # (runs, B)
            down, hits = stretches.cumsum(0), own.cumsum(0)
            upto, before = down[1::2], down[:-1:2]  # rows to the end of each run, and to its start
            had, all_rows = hits[-1], down[-1]
            precisions.append((own * hits / upto.clamp(min=1)).sum(0) / had)  # NaN without positives
            # Negatives that rank above a positive, those of its own score by half.
            worse = ((upto - hits) + (before - (hits - own))) / 2
            areas.append(1 - (own * worse).sum(0) / (had * (all_rows - had)))
        return {"map": torch.stack(precisions).nanmean(0), "auc": torch.stack(areas).nanmean(0)}

    return _measured(score, len(labels), groups, samples)


def _runs(scores: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where precision and recall change: the runs of equal ``scores`` (N,) that hold one with ``truth`` (N,) bool.

    They are all that a resample is asked for: sums over the rows of each run, and of each stretch between two.

    Returns:
        rows in the order of scores, highest first; the stretch of each: 2 i + 1 for the i-th run, 2 i before it; rows
        with ``truth`` in that order; and the run of each.
    """
    values, rows = scores.sort(descending=True, stable=True)
    run = torch.unique_consecutive(values, return_inverse=True)[1]
    holds = torch.zeros(int(run[-1]) + 1, dtype=torch.bool)
    holds[run[truth[rows]]] = True
    seen = holds.cumsum(0)  # runs that hold one, down to each
    segments = (2 * seen - holds.long())[run]
    return rows, segments, rows[truth[rows]], seen[run[truth[rows]]] - 1


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
    values = correct.detach().double().cpu()
    if groups is not None:
        if groups.shape != correct.shape:
            raise ValueError(f"groups must be {tuple(correct.shape)} like correct, got {tuple(groups.shape)}")
        if len(torch.unique(groups)) < 2:
            raise ValueError(f"groups must hold at least 2 groups, got only group {groups[0].item()}")
    return percentiles(resampled_means(values[:, None], groups, samples, seed)[:, 0])


def resampled_means(values: Tensor, groups: Tensor | None, samples: int, seed: int) -> Tensor:
    """Means of the columns of ``values`` (N, K), float64 on the CPU, in each resample, the same ones for all columns.

    (samples, K). To draw takes longer than to average: what is drawn once for all is paired, too.
    """
    drawn = resamples(len(values), groups, samples, seed)
    return torch.cat([weights @ values / weights.sum(1, keepdim=True) for weights in drawn])


def _measured(
    score: Callable[[Tensor], dict[str, Tensor]], rows: int, groups: Tensor | None, samples: int
) -> dict[str, Metric]:
    """Each number of ``score``, a function of the rows' weights (B, N), with its interval."""
    if groups is not None and groups.shape != (rows,):
        raise ValueError(f"groups must be ({rows},) like the labels, got {tuple(groups.shape)}")
    if samples < 0:
        raise ValueError(f"samples must be at least 0, got {samples}")
    values = {name: value.item() for name, value in score(torch.ones(1, rows, dtype=torch.float64)).items()}
    if not samples or (groups is not None and len(torch.unique(groups)) < 2):
        return {name: Metric(value) for name, value in values.items()}
    drawn = [score(weights) for weights in resamples(rows, groups, samples, seed=0)]
    return {
        name: Metric(value, percentiles(torch.cat([part[name] for part in drawn]))) for name, value in values.items()
    }


def resamples(rows: int, groups: Tensor | None, samples: int, seed: int) -> Iterator[Tensor]:
    """How often each row occurs in each resample of rows or of whole groups: (b, N) float64, b rows at a time."""
    units, member_of = rows, None
    if groups is not None:
        ids, member_of = torch.unique(groups.cpu(), return_inverse=True)
        units = len(ids)
    generator = torch.Generator().manual_seed(seed)
    batch = max(1, _DRAWS_PER_BATCH // rows)
    for start in range(0, samples, batch):
        draws = torch.randint(units, (min(batch, samples - start), units), generator=generator)
        counts = torch.zeros(draws.shape, dtype=torch.float64)
        counts.scatter_add_(1, draws, torch.ones((), dtype=torch.float64).expand_as(counts))
        yield counts if member_of is None else counts[:, member_of]


def percentiles(values: Tensor) -> tuple[float, float]:
    """2.5 % and 97.5 % quantiles of (B,) values, NaN left out."""
    low, high = values.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def chance(classes: int) -> dict[str, float]:
    """What ``classification`` is expected to give of guessing uniformly among so many ``classes``.

    Precision and F1 have no simple expectation, and are left out.

    Raises:
        ValueError: ``classes`` is below 1.
    """
    if classes < 1:
        raise ValueError(f"chance needs at least one class, got {classes}")
    return {"top1": 1 / classes, "top5": min(1.0, 5 / classes), "mean_per_class": 1 / classes, "recall": 1 / classes}


def majority(train_labels: Tensor, test_labels: Tensor) -> dict[str, float]:
    """``classification`` on ``test_labels`` (M,) of always predicting the commonest of ``train_labels`` (N,).

    Of equally common labels the lowest is predicted. The five commonest are the top 5.

    Raises:
        ValueError: either is empty or not one-dimensional.
    """
    for name, labels in (("train_labels", train_labels), ("test_labels", test_labels)):
        if labels.ndim != 1 or not len(labels):
            raise ValueError(f"{name} must be one-dimensional with at least one, got {tuple(labels.shape)}")
    classes, counts = torch.unique(train_labels, return_counts=True)
    commonest = classes[counts.argsort(descending=True, stable=True)[:5]]
    guessed = Ranked(commonest[:1].repeat(len(test_labels)), torch.isin(test_labels, commonest).double())
    return {name: metric.value for name, metric in of_ranked(guessed, test_labels, len(classes), samples=0).items()}

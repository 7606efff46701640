"""Fusion: do several modalities together say more than the best of them alone? And when one is missing?"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.compare import Difference
from eval.linear import DEFAULT_STRENGTHS, Split, linear_probe, standardise
from eval.metrics import ProbeResult, accuracy, percentiles, resampled_means
from eval.ridge import ridge_probe


class Part(NamedTuple):
    """One modality of one split, for the n samples that have it.

    Attributes:
        features: (n, D), any scale.
        rows: (n,) int64, ascending: a sample's place in the split.
    """

    features: Tensor
    rows: Tensor


class FusionSplit(NamedTuple):
    """One split of N samples.

    Attributes:
        parts: modality -> its features, at least two; the same modalities in all splits.
        labels: (N,) integer label ids, one for each row of the split.
        groups: (N,) int64, equal for samples that are not independent, for intervals; None: all are.
        joint: features of one pass over all modalities together, for encoders that have such a pass.
        joint_without: modality -> features of the joint pass without it. Only those of the test split are used.
    """

    parts: Mapping[str, Part]
    labels: Tensor
    groups: Tensor | None = None
    joint: Part | None = None
    joint_without: Mapping[str, Part] = {}


class Fused(NamedTuple):
    """One method on the test split.

    Attributes:
        top1: accuracy, a fraction in [0, 1].
        interval: its 95 % interval; None with fewer than two groups, or where none was asked for.
        predicted: (n,) int64 label ids, on the CPU.
        gain: how far a fusion is ahead of the best single modality, paired; None for single modalities.
        chosen: what validation chose: ``strength``, ``val_top1`` and ``weights`` (modality -> share), where there is a
            choice.
    """

    top1: float
    interval: tuple[float, float] | None
    predicted: Tensor
    gain: Difference | None
    chosen: dict[str, Any]


class Fusion(NamedTuple):
    """Outcome of ``fuse``; its tensors are on the CPU.

    Attributes:
        methods: modality or fusion -> its outcome, with all modalities at hand.
        missing: modality -> the same where it is missing at test. Gains are over the best single one that remains.
        order: the modalities, the one with the best accuracy on validation first. The best single one is the first of
            them that is at hand.
        skipped: fusion -> why it could not be made; ``joint without M`` likewise.
        rows: (n,) int64, the test rows that took part, ascending.
        labels: (n,) of them.
        groups: (n,) of them: equal for those that are not independent.
        left_out: split -> samples that lack a modality and took no part.
    """

    methods: dict[str, Fused]
    missing: dict[str, dict[str, Fused]]
    order: list[str]
    skipped: dict[str, str]
    rows: Tensor
    labels: Tensor
    groups: Tensor
    left_out: dict[str, int]


class _Complete(NamedTuple):
    """The rows of a split that have everything: modality -> (n, D), and so on."""

    parts: dict[str, Tensor]
    labels: Tensor
    groups: Tensor
    joint: Tensor | None
    joint_without: dict[str, Tensor]
    rows: Tensor
    left_out: int


def concat(parts: Sequence[Tensor]) -> Tensor:
    """All features side by side: M of (n, D) make (n, M * D); widths may differ."""
    return torch.cat(list(parts), dim=1)


def mean(parts: Sequence[Tensor]) -> Tensor:
    """Mean over the modalities, value by value: (n, D)."""
    return torch.stack(list(parts)).mean(0)


def maximum(parts: Sequence[Tensor]) -> Tensor:
    """Largest over the modalities, value by value: (n, D)."""
    return torch.stack(list(parts)).amax(0)


def relu_product(parts: Sequence[Tensor]) -> Tensor:
    """ReLU of the product of two modalities, value by value, for every two side by side: (n, D * M * (M - 1) / 2).

    The diagonal of the bilinear form x y^T: a value is high where both modalities are on the same side of their
    training means, and 0 where they are on opposite sides. A linear classifier of it can weigh agreement, which no
    linear classifier of the features themselves can.
    """
    return torch.cat([F.relu(x * y) for x, y in combinations(parts, 2)], dim=1)


def weighted(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of the modalities, each times its weight: (n, D)."""
    return torch.stack([weight * x for weight, x in zip(weights, parts, strict=True)]).sum(0)


# Fusion of standardised features -> what makes one matrix of them.
FEATURE_FUSIONS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "concat": concat,
    "mean": mean,
    "max": maximum,
    "relu_product": relu_product,
}
ANY_WIDTHS = ("concat",)


def fuse(
    train: FusionSplit,
    val: FusionSplit,
    test: FusionSplit,
    *,
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
    samples: int = 1000,
) -> Fusion:
    """Linear probes of each modality alone and of every fusion of them, on the rows that have all modalities.

    Features of a modality are standardised by its training statistics before they are fused. Each matrix is then
    classified by ``linear_probe``, which chooses one of ``strengths`` on ``val`` and refits on train + val. Of fusions
    only those from a tenth of the weakest one that a modality alone has chosen: weak penalties take most of the time.

    - each modality alone, under its name;
    - ``concat``, ``mean``, ``max``, ``relu_product``: see the functions. All but ``concat`` need equal widths;
    - ``weighted``: the sum with a weight for each modality, of a grid of shares that sum to 1, in tenths with two
      modalities and fifths with more. The weights with which a ridge probe fitted on ``train`` is most accurate on
      ``val`` are chosen, of equals the most even ones;
    - ``probability_mean``: the class of the highest probability, averaged over the modalities' own probes;
    - ``vote``: the class that most of the modalities' own probes predict; of equal ones that of the higher mean
      probability, which decides every disagreement of two modalities;
    - ``joint``: features of the encoder's joint pass, where given.

    With a modality missing at test, nothing is fitted anew: features are fused with its training mean in its place,
    which is 0 once standardised (so a product with it is 0, too); ``probability_mean`` and ``vote`` leave it out;
    ``joint`` takes the features of a joint pass without it, where given.

    ``test`` takes no part in any choice. Intervals, of accuracies and gains, are from the same ``samples`` resamples,
    none with 0. Each holds for itself: of many fusions, one in twenty that don't help may look as if it did, or hurt.

    Raises:
        ValueError: fewer than two modalities, or others in another split; several labels per row; rows that are not
            ascending, or beyond the labels; features that are not (n, D) of one width in all splits; a split without a
            complete row; or what ``linear_probe`` refuses.
    """
    splits = {"train": train, "val": val, "test": test}
    names = list(train.parts)
    if len(names) < 2:
        raise ValueError(f"fusion needs at least two modalities, got {names}")
    has_joint = all(split.joint is not None for split in splits.values())
    complete = {name: _complete(name, split, names, has_joint) for name, split in splits.items()}
    seen, labels = complete["test"], [split.labels for split in complete.values()]
    parts = _standardised(complete.values(), names)  # of train, val and test, each M of (n, D)

    def probe(matrices: Sequence[Tensor], weakest: float = 0.0) -> ProbeResult:
        fitted, held_out, scored = (Split(x, y) for x, y in zip(matrices, labels, strict=True))
        tried = [strength for strength in strengths if strength >= weakest]
        return linear_probe(fitted, held_out, scored, strengths=tried, samples=0)

    singles = {name: probe([split[i] for split in parts]) for i, name in enumerate(names)}
    weakest = min(single.strength for single in singles.values()) / 20  # a tenth, whatever rounding makes of it
    functions, skipped = dict(FEATURE_FUSIONS), dict[str, str]()
    chosen: dict[str, dict[str, Any]] = {}
    widths = [x.shape[1] for x in parts[0]]
    if len(set(widths)) == 1:
        weights = learn_weights(parts[0], parts[1], labels[0], labels[1])
        functions["weighted"] = partial(weighted, weights=weights)
        chosen["weighted"] = {"weights": dict(zip(names, weights, strict=True))}
    else:
        got = ", ".join(f"{name} {width}" for name, width in zip(names, widths, strict=True))
        unequal = [*(name for name in functions if name not in ANY_WIDTHS), "weighted"]
        skipped = dict.fromkeys(unequal, f"needs equal widths, got {got}")
        functions = {name: functions[name] for name in ANY_WIDTHS}
    probes = {name: probe([function(split) for split in parts], weakest) for name, function in functions.items()}
    if has_joint:
        probes["joint"] = probe([split.joint for split in complete.values() if split.joint is not None], weakest)
        without = [name for name in names if name not in seen.joint_without]
        skipped |= {f"joint without {name}": "no features of such a joint pass" for name in without}
    else:
        skipped["joint"] = "no features of a joint pass"
    for name, result in (singles | probes).items():
        chosen[name] = {"strength": result.strength, "val_top1": result.val_top1, **chosen.get(name, {})}

    order = sorted(names, key=lambda name: -singles[name].val_top1)  # stable: of equals the first
    probabilities = [singles[name].classifier.scores(x).softmax(1) for name, x in zip(names, parts[2], strict=True)]
    classes = singles[names[0]].classifier.classes
    predicted: dict[str | None, dict[str, Tensor]] = {}
    for missing in (None, *names):
        there = [i for i, name in enumerate(names) if name != missing]
        found = {names[i]: singles[names[i]].predicted for i in there}
        at_hand = [x if i in there else torch.zeros_like(x) for i, x in enumerate(parts[2])]
        found |= {name: probes[name].classifier.predict(function(at_hand)) for name, function in functions.items()}
        likely = torch.stack([probabilities[i] for i in there])
        found["probability_mean"] = classes[likely.mean(0).argmax(1)]
        found["vote"] = classes[vote(likely)]
        joint = seen.joint if missing is None else seen.joint_without.get(missing)
        if joint is not None:
            found["joint"] = probes["joint"].classifier.predict(joint)
        predicted[missing] = {name: each.cpu() for name, each in found.items()}
    outcomes = _outcomes(predicted, order, seen, chosen, samples)
    return Fusion(
        methods=outcomes.pop(None),
        missing={name: outcomes[name] for name in names},
        order=order,
        skipped=skipped,
        rows=seen.rows.cpu(),
        labels=seen.labels.cpu(),
        groups=seen.groups.cpu(),
        left_out={name: split.left_out for name, split in complete.items()},
    )


def learn_weights(
    train: Sequence[Tensor], val: Sequence[Tensor], train_labels: Tensor, val_labels: Tensor
) -> tuple[float, ...]:
    """Shares of M modalities, summing to 1, whose ``weighted`` features a ridge probe reads best.

    ``train`` and ``val`` are M standardised matrices (n, D) each. The probe is fitted on train and scored on val; of
    equal scores the most even shares are taken. For the shares tried, see ``fuse``.
    """
    steps = 10 if len(train) == 2 else 5
    best: tuple[float, float] | None = None
    chosen: tuple[float, ...] = ()
    for counts in product(range(steps + 1), repeat=len(train)):
        if sum(counts) != steps:
            continue
        shares = tuple(count / steps for count in counts)
        splits = (Split(weighted(parts, shares), y) for parts, y in ((train, train_labels), (val, val_labels)))
        score = (ridge_probe(*splits).top1, -float(sum(count**2 for count in counts)))
        if best is None or score > best:
            best, chosen = score, shares
    return chosen


def vote(probabilities: Tensor) -> Tensor:
    """Class index (n,) that most of M voters prefer, from their ``probabilities`` (M, n, C).

    Of classes with equal votes, the one with the highest mean probability wins.
    """
    votes = F.one_hot(probabilities.argmax(2), probabilities.shape[2]).sum(0)
    # A mean probability is at most 1: halved, it decides between equal votes and nothing else.
    return (votes + probabilities.mean(0) / 2).argmax(1)


def _outcomes(
    predicted: Mapping[str | None, Mapping[str, Tensor]],
    order: Sequence[str],
    seen: _Complete,
    chosen: dict[str, Any],
    samples: int,
) -> dict[str | None, dict[str, Fused]]:
    """What is missing -> method -> its predictions (n,) scored, fusions beside the first of ``order`` that is there."""
    labels, groups = seen.labels.cpu(), seen.groups.cpu()
    columns: dict[tuple[str | None, str, bool], Tensor] = {}  # (.., False): right or not; (.., True): less the best's
    for missing, found in predicted.items():
        right = {name: (each == labels).double() for name, each in found.items()}
        best = right[next(name for name in order if name != missing)]
        columns |= {(missing, name, False): each for name, each in right.items()}
        columns |= {(missing, name, True): each - best for name, each in right.items() if name not in order}
    drawn: dict[tuple[str | None, str, bool], Tensor] = {}
    if samples and len(torch.unique(groups)) > 1:
        means = resampled_means(torch.stack([*columns.values()], 1), groups, samples, seed=0)
        drawn = dict(zip(columns, means.T, strict=True))

    def gain(missing: str | None, name: str) -> Difference | None:
        key = (missing, name, True)
        if key not in columns:
            return None
        value = columns[key].mean().item()
        return Difference.of(value, drawn[key]) if key in drawn else Difference(value, None, None)

    return {
        missing: {
            name: Fused(
                top1=accuracy(each, labels),
                interval=percentiles(drawn[missing, name, False]) if drawn else None,
                predicted=each,
                gain=gain(missing, name),
                chosen=chosen.get(name, {}),
            )
            for name, each in found.items()
        }
        for missing, found in predicted.items()
    }


def _complete(split: str, given: FusionSplit, names: Sequence[str], has_joint: bool) -> _Complete:
    """The rows that all modalities and joint passes have."""
    if sorted(given.parts) != sorted(names):
        raise ValueError(f"{split} must have the modalities of train, {sorted(names)}, got {sorted(given.parts)}")
    if given.labels.ndim != 1:
        raise ValueError(f"labels of {split} must be (N,), one per row, got {tuple(given.labels.shape)}")
    everything = {name: given.parts[name] for name in names}
    if given.joint is not None and has_joint:
        everything["joint"] = given.joint
        if split == "test":
            everything |= {f"joint without {name}": part for name, part in given.joint_without.items()}
    for name, (features, rows) in everything.items():
        if features.ndim != 2 or rows.shape != features.shape[:1]:
            raise ValueError(
                f"{name} of {split} must be features (n, D) and rows (n,), "
                f"got {tuple(features.shape)} and {tuple(rows.shape)}"
            )
        if len(rows) and (int(rows[0]) < 0 or int(rows[-1]) >= len(given.labels) or not (rows.diff() > 0).all()):
            raise ValueError(f"rows of {name} of {split} must ascend within 0..{len(given.labels) - 1}, one per label")
    occurring = torch.unique(torch.cat([part.rows for part in everything.values()]))
    rows = occurring
    for part in everything.values():
        rows = rows[torch.isin(rows, part.rows)]
    if not len(rows):
        raise ValueError(f"{split} has no sample with all of {', '.join(everything)}")
    found = {name: features[torch.isin(its, rows)] for name, (features, its) in everything.items()}
    return _Complete(
        parts={name: found[name] for name in names},
        labels=given.labels[rows],
        groups=rows if given.groups is None else given.groups[rows],
        joint=found.get("joint"),
        joint_without={n: found[f"joint without {n}"] for n in names if f"joint without {n}" in found},
        rows=rows,
        left_out=len(occurring) - len(rows),
    )


def _standardised(splits: Iterable[_Complete], names: Sequence[str]) -> list[list[Tensor]]:
    """Per split the modalities' features (n, D) in float64, by the statistics of the first split, which is train."""
    splits = list(splits)
    found: list[list[Tensor]] = [[] for _ in splits]
    for name in names:
        widths = [split.parts[name].shape[1] for split in splits]
        if len(set(widths)) > 1:
            raise ValueError(f"{name} must have one width in train, val and test, got {widths}")
        centre, spread = standardise(splits[0].parts[name].double())
        for split, parts in zip(splits, found, strict=True):
            parts.append((split.parts[name].double() - centre) / spread)
    return found

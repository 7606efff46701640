"""The samples of each split and their labels; a validation split cut from the training one, where there is none."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.source import Source
from eval.tasks import EvalConfig, EvaluationError

MOST_COLUMNS = 100_000
FOLDS = 10
"""Of which one serves for validation."""


def read_labels(splits: Mapping[str, Source], config: EvalConfig) -> dict[str, Tensor]:
    """The labels of every split, in the order of the shards: (N,) int64, or (N, C) bool where they are lists.

    Raises:
        SampleError: a sample without a label.
        EvaluationError: labels that are of several kinds, or outside ``config.classes``.
    """
    if config.label is None:
        raise EvaluationError("eval.label is null: there is nothing to score against")
    labels = {name: source.labels(config.label) for name, source in splits.items()}
    ids, _ = label_ids(labels, config.classes)
    return ids


def label_ids(labels: Mapping[str, list[Any]], classes: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Labels as tensors, and the classes' names: numbers stay, names become their place in ``classes``.

    Without ``classes`` names are in sorted order. Lists of names or numbers become (N, C) bool.

    Raises:
        EvaluationError: labels that are neither, or outside ``classes``.
    """
    everything = [label for split in labels.values() for label in split]
    if everything and all(isinstance(label, list) for label in everything):
        flat = {split: [each for label in values for each in label] for split, values in labels.items()}
        if any(isinstance(each, list) for values in flat.values() for each in values):
            raise EvaluationError("labels must be numbers, names or lists of them, got lists within lists")
        found, names = label_ids(flat, classes)
        count = len(names) or 1 + max((int(ids.max()) for ids in found.values() if len(ids)), default=0)
        if count > MOST_COLUMNS or any(len(ids) and int(ids.min()) < 0 for ids in found.values()):
            raise EvaluationError(f"labels in lists must be names, or numbers of 0 or more and below {MOST_COLUMNS}")
        hot = {}
        for split, values in labels.items():
            rows = torch.arange(len(values)).repeat_interleave(torch.tensor([len(label) for label in values]).long())
            hot[split] = torch.zeros(len(values), count, dtype=torch.bool)
            hot[split][rows, found[split]] = True
        return hot, names
    if all(type(label) is int for label in everything):  # a bool is an int, too
        outside = sorted({label for label in everything if classes and not 0 <= label < len(classes)})
        if outside:
            raise EvaluationError(f"labels {outside[:5]} are outside the {len(classes)} names of eval.classes")
        if any(not -(2**63) <= label < 2**63 for label in everything):
            raise EvaluationError("labels must be numbers of 64 bits, or names")
        return {split: torch.tensor(values, dtype=torch.int64) for split, values in labels.items()}, list(classes)
    if not all(isinstance(label, str) for label in everything):
        kinds = sorted({type(label).__name__ for label in everything})
        raise EvaluationError(
            f"labels must be all whole numbers, all names or all lists of them, got {', '.join(kinds)}"
        )
    names = list(classes) or sorted(set(everything))
    unknown = sorted(set(everything) - set(names))
    if unknown:
        raise EvaluationError(f"labels {unknown[:5]} are not among eval.classes: {', '.join(names)}")
    places = {name: place for place, name in enumerate(names)}
    return {
        split: torch.tensor([places[v] for v in values], dtype=torch.int64) for split, values in labels.items()
    }, names


def hold_out(labels: Tensor, groups: Sequence[Any] | None = None) -> Tensor:
    """(N,) bool, a tenth of the samples for validation, always the same ones.

    Args:
        labels: (N,) int64, of which every class gives its tenth as far as it can and keeps a sample, or (N, C) bool.
        groups: of every sample; those of one group stay together. None: each is its own.

    Raises:
        EvaluationError: fewer than ten samples or groups.
    """
    names = None if groups is None else [str(group) for group in groups]
    units = len(labels) if names is None else len(set(names))
    if units < FOLDS:
        what = "samples" if groups is None else "groups"
        raise EvaluationError(f"a validation split is to be cut from {units} {what}: name one with --val")
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold  # takes seconds

    plain = labels.ndim > 1 or int(torch.unique(labels, return_counts=True)[1].max()) < FOLDS
    folds: Any = KFold if plain else StratifiedKFold
    if groups is not None:
        folds = GroupKFold if plain else StratifiedGroupKFold
    folds = folds(FOLDS) if folds is GroupKFold else folds(FOLDS, shuffle=True, random_state=0)
    numbers = None if names is None else np.unique(names, return_inverse=True)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some classes have fewer than ten samples
        _, rows = next(folds.split(np.zeros(len(labels)), None if plain else labels.numpy(), numbers))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.from_numpy(rows)] = True
    if labels.ndim == 1:  # what is rare stays in train, with the groups that it is in
        rare = torch.isin(labels, labels[~chosen], invert=True)
        if numbers is not None:
            rare = torch.isin(torch.from_numpy(numbers), torch.from_numpy(numbers)[rare])
        chosen &= ~rare
    return chosen

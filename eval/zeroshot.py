"""Zero-shot classification: the class whose prompts lie nearest to a sample, by cosine."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.errors import UserError
from eval.metrics import Metric, classification


class Prompts(NamedTuple):
    """What a prompt file says.

    Attributes:
        templates: at least one, each with one {} for the class's name.
        classes: names in the order of the label numbers; None where the file leaves them to the caller.
    """

    templates: list[str]
    classes: list[str] | None


class ZeroShot(NamedTuple):
    """Outcome of ``score_zero_shot``.

    Attributes:
        metrics: those of ``eval.metrics.classification``: ``top1``, ``top5`` with more than five classes, and so on.
        predicted: (N,) int64, the nearest class.
        correct: (N,) float64, whether it is the right one: 0 or 1.
        confusion: (C, C) int64, samples of class i (row) that were taken for class j (column).
    """

    metrics: dict[str, Metric]
    predicted: Tensor
    correct: Tensor
    confusion: Tensor


def read_prompts(path: Path) -> Prompts:
    """Templates, and class names where the file has them.

    A file named ``*.json`` holds a list of templates, or ``{"templates": [...], "classes": [...]}`` with ``classes``
    optional. Any other file is text in UTF-8: a template per line; empty lines and lines that begin with # are skipped.

    Raises:
        UserError: what the file holds is neither; there is no template; a template does not hold {} once; class names
            are empty or occur twice.
        OSError: the file can't be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() != ".json":
            lines = [line.strip() for line in text.splitlines()]
            found: Any = {"templates": [line for line in lines if line and not line.startswith("#")]}
        else:
            found = json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if isinstance(found, list):
        found = {"templates": found}
    if not isinstance(found, dict) or "templates" not in found:
        raise UserError(f'{path}: must be a list of templates, or {{"templates": [...], "classes": [...]}}')
    unknown = sorted(found.keys() - {"templates", "classes"})
    if unknown:
        raise UserError(f"{path}: unknown key {unknown[0]!r}; allowed are templates and classes")
    for key, values in found.items():
        if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
            raise UserError(f"{path}: {key} must be a list of non-empty strings, got {json.dumps(values)[:80]}")
    check_templates(found["templates"], f"{path}: templates")
    classes: list[str] | None = found.get("classes")
    if classes is not None and len(classes) < 2:
        raise UserError(f"{path}: classes must hold at least two names, got {classes}")
    twice = [name for name, count in Counter(classes or ()).items() if count > 1]
    if twice:
        raise UserError(f"{path}: classes must differ, got {twice[0]!r} more than once")
    return Prompts(found["templates"], classes)


def check_templates(templates: Sequence[str], where: str) -> None:
    """Raise a UserError that begins with ``where`` unless there are templates and each holds {} once."""
    if not templates:
        raise UserError(f"{where}: must hold at least one template, got none")
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"{where}: {template!r} must hold {{}} once, for the class's name")


def unit_rows(embeddings: Tensor, name: str) -> Tensor:
    """Rows of ``embeddings`` (N, D) scaled to unit length, in float64.

    Raises:
        ValueError: ``embeddings``, called ``name`` in the message, is not (N, D) with N, D >= 1, or has rows
            without a direction: zero, NaN or infinite.
    """
    if embeddings.ndim != 2 or not embeddings.numel():
        raise ValueError(f"{name} must be (N, D) with N, D >= 1, got {tuple(embeddings.shape)}")
    directed = embeddings.isfinite().all(1) & embeddings.ne(0).any(1)
    if not directed.all():
        raise ValueError(
            f"{name} must have finite, non-zero rows, got {int((~directed).sum())} of {len(embeddings)} "
            "that are zero, NaN or infinite"
        )
    embeddings = embeddings.double()
    lengths: Tensor = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
    return embeddings / lengths


def class_embeddings(prompts: Sequence[Tensor]) -> Tensor:
    """One unit vector per class, (C, D) float64, from the prompt embeddings (T, D) of each of C classes.

    The prompts of a class are normalised, averaged and normalised again, so that every prompt has one vote
    whatever its length; T may differ between classes.

    Source: Radford et al. 2021 (CLIP), section 3.1.4, prompt ensembling in embedding space.

    Raises:
        ValueError: there are no classes, the classes differ in D, or a class is not (T, D) with T >= 1 and
            finite, non-zero rows whose mean is not zero.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one class, got none")
    units = [unit_rows(embeddings, f"prompts of class {index}") for index, embeddings in enumerate(prompts)]
    widths = {unit.shape[1] for unit in units}
    if len(widths) > 1:
        raise ValueError(f"prompts must have one width D in all classes, got {sorted(widths)}")
    return unit_rows(torch.stack([unit.mean(0) for unit in units]), "mean prompts of the classes")


def zero_shot(embeddings: Tensor, classes: Tensor) -> Tensor:
    """Index (N,) into ``classes`` (C, D) of the class nearest to each of ``embeddings`` (N, D) by cosine.

    Of classes at one cosine (to 1e-12) the lowest index is taken.

    Source: Radford et al. 2021 (CLIP), section 3.1.2.

    Raises:
        ValueError: the two differ in D, or either is not two-dimensional with finite, non-zero rows.
    """
    return _cosines(embeddings, classes).argmax(1)


def score_zero_shot(
    embeddings: Tensor, classes: Tensor, labels: Tensor, *, content: Tensor | None = None, samples: int = 1000
) -> ZeroShot:
    """How often ``zero_shot`` finds ``labels`` (N,) of ``embeddings`` (N, D), of any modality, in ``classes`` (C, D).

    Of classes at one cosine (to 1e-12) the lowest index ranks first, for top 5, too: classes that can't be told apart
    are not all right. Intervals are from ``samples`` resamples by ``content`` (N,), ids equal for equal inputs; None to
    take rows as independent.

    Raises:
        ValueError: as ``zero_shot``; or the labels are not (N,) integers in 0..C-1.
    """
    cosines = _cosines(embeddings, classes)
    count = len(classes)
    if labels.shape != cosines.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be ({len(cosines)},) integers, got {tuple(labels.shape)} {labels.dtype}")
    labels = labels.long().to(cosines.device)
    outside = torch.unique(labels[(labels < 0) | (labels >= count)]).tolist()
    if outside:
        raise ValueError(f"labels must be in 0..{count - 1}, got {outside[:5]}")
    order = cosines.argsort(dim=1, descending=True, stable=True)
    places = order.argsort(1)  # of every class in the order of nearness, from 0
    predicted = order[:, 0]
    ids = torch.arange(count, device=cosines.device)
    return ZeroShot(
        metrics=classification(-places, labels, ids, groups=content, samples=samples),
        predicted=predicted,
        correct=(predicted == labels).double(),
        confusion=(labels * count + predicted).bincount(minlength=count * count).view(count, count),
    )


def _cosines(embeddings: Tensor, classes: Tensor) -> Tensor:
    """(N, C) float64. A matrix product may give equal rows cosines that differ in their last bits: they are rounded."""
    samples, targets = unit_rows(embeddings, "embeddings"), unit_rows(classes, "classes")
    if samples.shape[1] != targets.shape[1]:
        raise ValueError(f"embeddings and classes must have one width D, got {samples.shape[1]} and {targets.shape[1]}")
    return (samples @ targets.T).round(decimals=12)

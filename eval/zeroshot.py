"""Zero-shot classification: the class whose prompts lie nearest to a sample, by cosine."""

from collections.abc import Sequence

import torch
from torch import Tensor


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

    Source: Radford et al. 2021 (CLIP), section 3.1.2.

    Raises:
        ValueError: the two differ in D, or either is not two-dimensional with finite, non-zero rows.
    """
    samples, targets = unit_rows(embeddings, "embeddings"), unit_rows(classes, "classes")
    if samples.shape[1] != targets.shape[1]:
        raise ValueError(f"embeddings and classes must have one width D, got {samples.shape[1]} and {targets.shape[1]}")
    return (samples @ targets.T).argmax(1)

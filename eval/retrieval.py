"""Retrieval by class: does a query find a gallery item of its class among its nearest?"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eval.zeroshot import unit_rows


def retrieval(
    queries: Tensor,
    gallery: Tensor,
    query_labels: Tensor,
    gallery_labels: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 256,
) -> dict[int, float]:
    """R@k for each k of ``ks``: the fraction in [0, 1] of queries with a hit among their k nearest.

    ``queries`` (Nq, D) are ranked against ``gallery`` (Ng, D) by cosine; a hit is an item whose label in
    ``gallery_labels`` (Ng,) equals the query's in ``query_labels`` (Nq,). Items of equal cosine (to 1e-12) rank by
    index, lower first. ``chunk`` queries are ranked at a time, in memory of chunk * Ng float64; it does not
    change the result.

    Raises:
        ValueError: embeddings are not two-dimensional of one D with finite, non-zero rows; labels do not match
            them; a query's label is absent from the gallery; a k is not in 1..Ng; ``chunk`` is below 1.
    """
    query_units, gallery_units = unit_rows(queries, "queries"), unit_rows(gallery, "gallery")
    if query_units.shape[1] != gallery_units.shape[1]:
        raise ValueError(
            f"queries and gallery must have one width D, got {query_units.shape[1]} and {gallery_units.shape[1]}"
        )
    for name, labels, units in (
        ("query_labels", query_labels, query_units),
        ("gallery_labels", gallery_labels, gallery_units),
    ):
        if labels.shape != units.shape[:1]:
            raise ValueError(f"{name} must be ({len(units)},), got {tuple(labels.shape)}")
    _check_answerable(query_labels, gallery_labels, ks)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")

    index = torch.arange(len(gallery_units), device=gallery_units.device)
    ranks = []
    for units, labels in zip(torch.split(query_units, chunk), torch.split(query_labels, chunk), strict=True):
        # A matrix product may give equal rows cosines that differ in their last bits, as its blocks fall.
        cosines = (units @ gallery_units.T).round(decimals=12)
        relevant = labels[:, None] == gallery_labels
        # R@k asks only where the first relevant item ranks, which counting answers without a sort.
        best = cosines.masked_fill(~relevant, -math.inf).amax(1, keepdim=True)
        first = (relevant & (cosines == best)).int().argmax(1, keepdim=True)
        ranks.append(((cosines > best) | ((cosines == best) & (index < first))).sum(1))
    rank = torch.cat(ranks)
    return {k: (rank < k).double().mean().item() for k in ks}


def retrieval_chance(query_labels: Tensor, gallery_labels: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Exact expectation of ``retrieval`` under a uniformly random ranking, for each k of ``ks``, in [0, 1].

    Of N gallery items, n of the query's class, k drawn without replacement all miss with the hypergeometric
    probability C(N - n, k) / C(N, k); the hit rate is averaged over ``query_labels`` (Nq,).

    Raises:
        ValueError: a query's label is absent from ``gallery_labels`` (Ng,), there are no queries, or a k is not
            in 1..Ng.
    """
    _check_answerable(query_labels, gallery_labels, ks)
    size = len(gallery_labels)
    classes, queries_per_class = torch.unique(query_labels, return_counts=True)
    weighted = [
        (count, int((gallery_labels == label).sum()))
        for label, count in zip(classes.tolist(), queries_per_class.tolist(), strict=True)
    ]
    return {
        k: sum(count * (1 - math.comb(size - relevant, k) / math.comb(size, k)) for count, relevant in weighted)
        / len(query_labels)
        for k in ks
    }


def _check_answerable(query_labels: Tensor, gallery_labels: Tensor, ks: Sequence[int]) -> None:
    """Raise a ValueError unless every query has an item to find and every k fits the gallery."""
    if query_labels.ndim != 1 or gallery_labels.ndim != 1 or not len(query_labels):
        raise ValueError(
            "query_labels must be (Nq,) with Nq >= 1 and gallery_labels (Ng,), "
            f"got {tuple(query_labels.shape)} and {tuple(gallery_labels.shape)}"
        )
    absent = torch.unique(query_labels[~torch.isin(query_labels, gallery_labels)]).tolist()
    if absent:
        raise ValueError(f"every query label must occur in gallery_labels, got absent {absent}")
    if not ks or not all(1 <= k <= len(gallery_labels) for k in ks):
        raise ValueError(f"ks must be one or more of 1..{len(gallery_labels)}, got {list(ks)}")

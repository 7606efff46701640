"""Retrieval: does a query find what belongs to it among its nearest? By true pairs or by class."""

import math
import statistics
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from eval.metrics import Metric, percentiles, resampled_means
from eval.zeroshot import unit_rows

RETRIEVED = (1, 5, 10)


class Positives(NamedTuple):
    """What each query is to find: the gallery items whose id is linked to the query's.

    Attributes:
        queries: (Nq,) int64 ids from 0.
        gallery: (Ng,) int64 ids from 0, numbered for themselves.
        links: (P, 2) int64, an id of ``queries`` and one of ``gallery``; each link once, ascending.
    """

    queries: Tensor
    gallery: Tensor
    links: Tensor

    def mask(self, start: int, stop: int) -> Tensor:
        """(stop - start, Ng) bool: which items the queries from ``start`` to ``stop`` are to find."""
        ids = self.queries[start:stop]
        first = self.links[:, 0].contiguous()
        low, high = torch.searchsorted(first, ids), torch.searchsorted(first, ids, right=True)
        # The links of query i are low[i] .. high[i] - 1: all of them, one after another.
        counts = high - low
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(counts)
        places = torch.arange(len(rows), device=ids.device) + (high - counts.cumsum(0)).repeat_interleave(counts)
        linked = torch.zeros(len(ids), int(self.gallery.max()) + 1, dtype=torch.bool, device=ids.device)
        linked[rows, self.links[places, 1]] = True
        return linked[:, self.gallery]

    def counts(self) -> Tensor:
        """(Nq,) int64: how many items each query is to find."""
        query_ids, gallery_ids = self.links.unbind(1)
        items = self.gallery.bincount()
        per_id = self.queries.new_zeros(int(self.queries.max()) + 1)
        return per_id.index_add_(0, query_ids, items[gallery_ids])[self.queries]


class Retrieved(NamedTuple):
    """Outcome of ``retrieve``.

    Attributes:
        ranks: (Nq,) int64, the place of the nearest item that belongs to each query, from 1.
        recall: k -> R@k, the share in [0, 1] of queries with such an item among their k nearest.
        median_rank: median of ``ranks``; between the two middle ones if their number is even.
    """

    ranks: Tensor
    recall: dict[int, float]
    median_rank: float


def class_positives(query_labels: Tensor, gallery_labels: Tensor) -> Positives:
    """A query of ``query_labels`` (Nq,) is to find any item of its label in ``gallery_labels`` (Ng,).

    Labels may be any integer ids: of classes, or of groups of samples that belong together.

    Raises:
        ValueError: either is not one-dimensional; there are no queries; a query's label is absent from the gallery.
    """
    if query_labels.ndim != 1 or gallery_labels.ndim != 1 or not len(query_labels):
        raise ValueError(
            "query_labels must be (Nq,) with Nq >= 1 and gallery_labels (Ng,), "
            f"got {tuple(query_labels.shape)} and {tuple(gallery_labels.shape)}"
        )
    absent = torch.unique(query_labels[~torch.isin(query_labels, gallery_labels)]).tolist()
    if absent:
        raise ValueError(f"every query label must occur in gallery_labels, got absent {absent}")
    labels, ids = torch.unique(torch.cat([query_labels, gallery_labels]), return_inverse=True)
    queries, gallery = ids.split([len(query_labels), len(gallery_labels)])
    present = torch.arange(len(labels), device=ids.device)[torch.isin(labels, query_labels)]
    return Positives(queries, gallery, present[:, None].expand(-1, 2))


def pair_positives(query_content: Tensor, gallery_content: Tensor) -> Positives:
    """Of n true pairs, query i is to find item i, and whatever can't be told from an item that is a pair of it.

    The arguments, both (n,), hold equal integers for equal inputs. A picture that stands in five pairs is to find any
    of their five captions; a caption that occurs again elsewhere is right there, too.

    Raises:
        ValueError: the two are not of one shape (n,) with n >= 1.
    """
    if query_content.ndim != 1 or query_content.shape != gallery_content.shape or not len(query_content):
        raise ValueError(
            "query_content and gallery_content must have one shape (n,) with n >= 1, "
            f"got {tuple(query_content.shape)} and {tuple(gallery_content.shape)}"
        )
    queries, gallery = (torch.unique(side, return_inverse=True)[1] for side in (query_content, gallery_content))
    return Positives(queries, gallery, torch.unique(torch.stack([queries, gallery], 1), dim=0))


def listed_positives(positives: Sequence[Iterable[int]], gallery: int) -> Positives:
    """Query i is to find any of the items ``positives[i]``, places in a gallery of ``gallery`` items.

    Raises:
        ValueError: there are no queries; a query has no item, or one outside 0..gallery-1.
    """
    if not positives:
        raise ValueError("positives must name the items of at least one query, got none")
    links = []
    for query, items in enumerate(positives):
        places = sorted(set(items))
        if not places or not 0 <= places[0] <= places[-1] < gallery:
            raise ValueError(f"positives of query {query} must be one or more of 0..{gallery - 1}, got {places}")
        links += [(query, place) for place in places]
    return Positives(torch.arange(len(positives)), torch.arange(gallery), torch.tensor(links))


def retrieve(
    queries: Tensor, gallery: Tensor, positives: Positives, ks: Sequence[int] = RETRIEVED, chunk: int = 256
) -> Retrieved:
    """Rank ``gallery`` (Ng, D) by cosine for each of ``queries`` (Nq, D): where is the first that belongs to it?

    Items of equal cosine (to 1e-12) rank by index, lower first. ``chunk`` queries are ranked at a time, in memory of
    chunk * Ng float64; it does not change the result.

    Raises:
        ValueError: embeddings are not two-dimensional of one D with finite, non-zero rows; ``positives`` does not
            match them; a k is not in 1..Ng; ``chunk`` is below 1.
    """
    query_units, gallery_units = unit_rows(queries, "queries"), unit_rows(gallery, "gallery")
    if query_units.shape[1] != gallery_units.shape[1]:
        raise ValueError(
            f"queries and gallery must have one width D, got {query_units.shape[1]} and {gallery_units.shape[1]}"
        )
    if (len(positives.queries), len(positives.gallery)) != (len(query_units), len(gallery_units)):
        raise ValueError(
            f"positives must be of {len(query_units)} queries and {len(gallery_units)} items, "
            f"got {len(positives.queries)} and {len(positives.gallery)}"
        )
    _check_ks(ks, len(gallery_units))
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")

    index = torch.arange(len(gallery_units), device=gallery_units.device)
    parts = []
    for start in range(0, len(query_units), chunk):
        units = query_units[start : start + chunk]
        # A matrix product may give equal rows cosines that differ in their last bits, as its blocks fall.
        cosines = (units @ gallery_units.T).round(decimals=12)
        relevant = positives.mask(start, start + len(units)).to(cosines.device)
        # Only the first relevant item's place is asked for, which counting answers without a sort.
        best = cosines.masked_fill(~relevant, -math.inf).amax(1, keepdim=True)
        first = (relevant & (cosines == best)).int().argmax(1, keepdim=True)
        parts.append(1 + ((cosines > best) | ((cosines == best) & (index < first))).sum(1))
    ranks = torch.cat(parts)
    recall = {k: (ranks <= k).double().mean().item() for k in ks}
    return Retrieved(ranks, recall, float(statistics.median(ranks.tolist())))


def chance_recall(positives: Positives, ks: Sequence[int] = RETRIEVED) -> dict[int, float]:
    """Exact expectation of R@k, in [0, 1], under a uniformly random ranking, for each k of ``ks``.

    Of N gallery items, n of which belong to the query, k drawn without replacement all miss with the hypergeometric
    probability C(N - n, k) / C(N, k); the hit rate is averaged over the queries.

    Raises:
        ValueError: a k is not in 1..Ng.
    """
    size = len(positives.gallery)
    _check_ks(ks, size)
    weighted = [values.tolist() for values in torch.unique(positives.counts(), return_counts=True)]
    return {
        k: sum(queries * _hit(size, relevant, k) for relevant, queries in zip(*weighted, strict=True))
        / len(positives.queries)
        for k in ks
    }


def chance_median_rank(positives: Positives) -> int:
    """Median of the ranks under a uniformly random ranking: the lowest k whose R@k is expected to reach 1/2."""
    ks = range(1, len(positives.gallery) + 1)
    return ks[bisect_left(ks, 0.5, key=lambda k: chance_recall(positives, (k,))[k])]


def retrieval(
    queries: Tensor,
    gallery: Tensor,
    query_labels: Tensor,
    gallery_labels: Tensor,
    ks: Sequence[int] = RETRIEVED,
    chunk: int = 256,
) -> dict[int, float]:
    """R@k by label: ``retrieve`` with ``class_positives``, which see for arguments and errors."""
    return retrieve(queries, gallery, class_positives(query_labels, gallery_labels), ks, chunk).recall


def retrieval_chance(query_labels: Tensor, gallery_labels: Tensor, ks: Sequence[int] = RETRIEVED) -> dict[int, float]:
    """``chance_recall`` of ``class_positives``, which see for arguments and errors."""
    return chance_recall(class_positives(query_labels, gallery_labels), ks)


class Side(NamedTuple):
    """One modality of one split, for the n samples that have it.

    Attributes:
        embeddings: (n, D), of a space that the modalities share.
        rows: (n,) int64, ascending: a sample's place in its split, by which modalities are paired.
        content: (n,) int64, equal for equal inputs.
        labels: (n,) int64, what "labels" goes by: classes, or groups of samples that belong together.
    """

    embeddings: Tensor
    rows: Tensor
    content: Tensor
    labels: Tensor


class Direction(NamedTuple):
    """From one modality to another.

    Attributes:
        metrics: ``r1`` and so on, with intervals over queries of different content, and ``median_rank`` without one.
        chance: the same of a random ranking.
        ranks: (Nq,) int64, as in ``Retrieved``.
        rows: (Nq,) int64, the rows of the queries, ascending.
        content: (Nq,) int64, of the queries.
        gallery: number of items that were ranked.
        left_out: samples that are no queries: by pairs, without the other modality; by labels, of a label that no item
            of the other has.
    """

    metrics: dict[str, Metric]
    chance: dict[str, float]
    ranks: Tensor
    rows: Tensor
    content: Tensor
    gallery: int
    left_out: int


def every_direction(
    sides: Mapping[str, Side],
    by: Literal["pairs", "labels"],
    ks: Sequence[int] = RETRIEVED,
    chunk: int = 256,
    samples: int = 1000,
) -> dict[str, Direction]:
    """Retrieval between all modalities, both ways, as ``A_to_B``; without those that no query could answer.

    By ``pairs``, queries and gallery are the samples that have both modalities, and a query is to find its own sample's
    other side (see ``pair_positives``). By ``labels``, they are all samples of either modality, and a query is to
    find any item of its label. A k beyond the gallery is left out. Intervals are from ``samples`` resamples,
    none with 0.

    Raises:
        ValueError: as ``retrieve``, beginning with the direction.
    """
    found = {}
    for a, b in permutations(sides, 2):
        x, y = sides[a], sides[b]
        if by == "pairs":
            answerable, in_both = torch.isin(x.rows, y.rows), torch.isin(y.rows, x.rows)
            y = Side(*(values[in_both] for values in y))
        else:
            answerable = torch.isin(x.labels, y.labels)
        queries = Side(*(values[answerable] for values in x))
        if not len(queries.rows):
            continue
        try:
            if by == "pairs":
                positives = pair_positives(queries.content, y.content)
            else:
                positives = class_positives(queries.labels, y.labels)
            fitting = [k for k in ks if k <= len(y.rows)]
            result = retrieve(queries.embeddings, y.embeddings, positives, fitting, chunk)
        except ValueError as error:
            raise ValueError(f"{a}_to_{b}: {error}") from error
        expected = chance_recall(positives, fitting)
        found[f"{a}_to_{b}"] = Direction(
            metrics=_metrics(result, queries.content, samples),
            chance={**{f"r{k}": expected[k] for k in fitting}, "median_rank": float(chance_median_rank(positives))},
            ranks=result.ranks,
            rows=queries.rows,
            content=queries.content,
            gallery=len(y.rows),
            left_out=len(x.rows) - len(queries.rows),
        )
    return found


def _metrics(result: Retrieved, content: Tensor, samples: int) -> dict[str, Metric]:
    metrics = {f"r{k}": Metric(share) for k, share in result.recall.items()}
    if metrics and samples and len(torch.unique(content)) > 1:
        found = torch.stack([result.ranks <= k for k in result.recall], 1).double().cpu()
        means = resampled_means(found, content, samples, seed=0)
        metrics = {
            name: Metric(share, percentiles(each))
            for (name, (share, _)), each in zip(metrics.items(), means.T, strict=True)
        }
    return {**metrics, "median_rank": Metric(result.median_rank)}


def _hit(size: int, relevant: int, k: int) -> float:
    """Probability that of ``size`` items, ``k`` drawn at random hold one of the ``relevant``."""
    fewer, more = sorted((relevant, k))  # the two are interchangeable, and the binomials smaller so
    return 1 - math.comb(size - more, fewer) / math.comb(size, fewer)


def _check_ks(ks: Sequence[int], size: int) -> None:
    """Raise a ValueError unless every k fits the gallery."""
    if not ks or not all(1 <= k <= size for k in ks):
        raise ValueError(f"ks must be one or more of 1..{size}, got {list(ks)}")

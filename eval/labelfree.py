"""How features spread, without labels: effective rank, alignment, uniformity and the gap between two modalities."""

import math

import torch
from torch import Tensor

from eval.zeroshot import unit_rows

# Added to every share of the spectrum, as in the paper, so that a share of 0 has a logarithm.
_EPSILON = 1e-7
# Rows that differ by less than this share of their size differ by the rounding of float32 sums.
_ROUNDING = 1e-5


def rankme(x: Tensor, centred: bool = True) -> float:
    """RankMe: how many directions features ``x`` (N, D) use, from 1 to min(N, D).

    The exponential of the entropy of the singular values, each as a share of their sum plus 1e-7. Falling over a run,
    it shows that features collapse. It can't exceed N: compare only values of one N.

    Source: Garrido et al. 2023, RankMe, section 3. The paper takes ``x`` as it is, which ``centred=False`` does. To
    subtract the mean row first is our choice: an offset that all rows share is one large singular value, which hides
    the others, and no probe reads it. Rows that are all equal (but for rounding) have no direction then: 0.

    Raises:
        ValueError: ``x`` is not (N, D) with N >= 2 and D >= 1, or holds NaN or infinity.
    """
    if x.ndim != 2 or len(x) < 2 or not x.numel():
        raise ValueError(f"x must be (N, D) with N >= 2 and D >= 1, got {tuple(x.shape)}")
    broken = int((~x.isfinite().all(1)).sum())
    if broken:
        raise ValueError(f"x must be finite, got NaN or infinity in {broken} of {len(x)} rows")
    x = x.detach().double()
    size = x.abs().amax()
    if centred:
        x = x - x.mean(0)
    if x.abs().amax() <= (_ROUNDING * size if centred else 0):
        return 0.0  # the spectrum of rounding errors is flat, which would look like the best of features
    singular = torch.linalg.svdvals(x)
    shares = singular / singular.sum() + _EPSILON
    return torch.exp(-(shares * shares.log()).sum()).item()


def alignment(a: Tensor, b: Tensor) -> float:
    """Mean squared distance of the pairs ``a[i]``, ``b[i]``, both (N, D), as unit vectors: 0 (equal) to 4 (opposed).

    Source: Wang & Isola 2020, Understanding Contrastive Representation Learning, section 4.1, with exponent 2.

    Raises:
        ValueError: the two are not of one shape (N, D) with N, D >= 1, or have rows that are zero, NaN or infinite.
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape (N, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    return (unit_rows(a, "a") - unit_rows(b, "b")).square().sum(1).mean().item()


def uniformity(x: Tensor, chunk: int = 1024) -> float:
    """How evenly ``x`` (N, D) lies on the sphere: the log of the mean of exp(-2 d^2) over pairs at distance d.

    0 where all rows point one way; lower is more even, about -4 + 8 / D for independent directions in D dimensions.
    ``chunk`` rows are compared at a time, in memory of chunk * N float64; it does not change the result.

    Source: Wang & Isola 2020, section 4.1, with t = 2.

    Raises:
        ValueError: ``x`` is not (N, D) with N >= 2 and D >= 1, or has rows that are zero, NaN or infinite; ``chunk``
            is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    units = unit_rows(x.detach(), "x")
    n = len(units)
    if n < 2:
        raise ValueError(f"x must have at least 2 rows, got {n}")
    total = torch.zeros((), dtype=torch.float64, device=units.device)
    for start in range(0, n, chunk):
        part = units[start : start + chunk]
        potentials = (4 * (part @ units.T - 1)).exp()  # d^2 = 2 - 2 cos
        potentials.diagonal(start).zero_()  # no row is a pair with itself
        total += potentials.sum()
    return (total / (n * (n - 1))).log().item()


def dimension_spread(x: Tensor) -> float:
    """Mean over dimensions of the standard deviation of the unit vectors of ``x`` (N, D), times the root of D.

    1 where all directions are equally likely, 0 where all rows point one way.

    Source: Chen & He 2021, Exploring Simple Siamese Representation Learning, section 4.1.

    Raises:
        ValueError: ``x`` is not two-dimensional with finite, non-zero rows.
    """
    units = unit_rows(x.detach(), "x")
    spread: float = units.std(0, correction=0).mean().item() * math.sqrt(units.shape[1])
    return spread


def modality_gap(a: Tensor, b: Tensor) -> float:
    """Distance, 0 to 2, between the mean unit vectors of ``a`` (Na, D) and of ``b`` (Nb, D).

    Source: Liang et al. 2022, Mind the Gap.

    Raises:
        ValueError: the two differ in D, or either is not two-dimensional with finite, non-zero rows.
    """
    a_units, b_units = unit_rows(a, "a"), unit_rows(b, "b")
    if a_units.shape[1] != b_units.shape[1]:
        raise ValueError(f"a and b must have one width D, got {a_units.shape[1]} and {b_units.shape[1]}")
    return float(torch.linalg.vector_norm(a_units.mean(0) - b_units.mean(0)))

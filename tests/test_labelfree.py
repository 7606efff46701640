"""Label-free measures against their definitions, known values and the collapses that they are there to show."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.labelfree import alignment, modality_gap, rankme, uniformity


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_rankme(x: Tensor) -> float:
    singular = np.linalg.svd(x.double().numpy(), compute_uv=False)
    shares = [value / sum(singular) + 1e-7 for value in singular]
    return math.exp(-sum(share * math.log(share) for share in shares))


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (20, 20)])
def test_rankme_is_its_definition(shape: tuple[int, int]) -> None:
    x = normal(*shape) * torch.logspace(0, -3, shape[1]) + 2
    assert rankme(x, centred=False) == pytest.approx(naive_rankme(x), rel=1e-9)
    assert rankme(x) == pytest.approx(naive_rankme(x - x.double().mean(0)), rel=1e-9)


def test_rankme_counts_directions_of_equal_strength() -> None:
    # Orthonormal columns that sum to 0: centring changes nothing.
    basis = torch.linalg.qr(normal(100, 6).double() - normal(100, 6).double().mean(0))[0]
    directions = torch.linalg.qr(normal(10, 6, seed=1).double())[0]
    for rank in (1, 2, 6):
        x = basis[:, :rank] @ directions[:, :rank].T
        assert rankme(x) == pytest.approx(rank, rel=1e-3)
        assert rankme(1e-3 * x) == pytest.approx(rankme(x), rel=1e-9)


def test_centring_takes_away_what_all_rows_share() -> None:
    x = normal(200, 16)
    offset = 1000 * normal(16, seed=1)
    assert rankme(x + offset) == pytest.approx(rankme(x), rel=1e-3)
    assert rankme(x + offset, centred=False) < 1.3 < 12 < rankme(x)


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_rows_equal_but_for_rounding_have_no_rank(noise: float) -> None:
    x = normal(1, 32).expand(100, 32) * (1 + noise * normal(100, 32, seed=1))
    assert rankme(x) == 0.0
    assert rankme(x, centred=False) == pytest.approx(1, abs=1e-2)
    assert rankme(torch.zeros(100, 32)) == rankme(torch.zeros(100, 32), centred=False) == 0.0


def unit(row: Tensor) -> list[float]:
    length = math.sqrt(math.fsum(value * value for value in row.tolist()))
    return [value / length for value in row.tolist()]


def squared(a: Tensor, b: Tensor) -> float:
    return math.fsum((p - q) ** 2 for p, q in zip(unit(a), unit(b), strict=True))


def test_alignment_is_its_definition() -> None:
    a, b = 5 * normal(12, 7), 0.1 * normal(12, 7, seed=1)
    expected = math.fsum(squared(p, q) for p, q in zip(a, b, strict=True)) / 12
    assert alignment(a, b) == pytest.approx(expected, rel=1e-9)
    assert alignment(a, 3 * a) == pytest.approx(0, abs=1e-12)
    assert alignment(a, -a) == pytest.approx(4)


@pytest.mark.parametrize("chunk", [1, 5, 12, 1024])
def test_uniformity_is_its_definition(chunk: int) -> None:
    x = normal(12, 3) * torch.logspace(-2, 2, 12)[:, None]
    pairs = [math.exp(-2 * squared(x[i], x[j])) for i in range(12) for j in range(12) if i != j]
    assert uniformity(x, chunk) == pytest.approx(math.log(math.fsum(pairs) / len(pairs)), rel=1e-9)


def test_uniformity_of_known_arrangements() -> None:
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-12)
    assert uniformity(torch.tensor([[1.0, 0], [-3, 0]])) == pytest.approx(-8)
    assert uniformity(normal(3000, 64)) == pytest.approx(-4 + 8 / 64, abs=0.01)


def test_modality_gap_is_the_distance_of_centroids() -> None:
    a, b = torch.tensor([[2.0, 0], [0, 5]]), torch.tensor([[-1.0, 0], [0, -7], [0, -1], [-9, 0]])
    assert modality_gap(a, b) == pytest.approx(math.sqrt(2))
    assert modality_gap(a, 10 * a) == pytest.approx(0, abs=1e-12)
    assert modality_gap(a[:1], b[:1]) == pytest.approx(2)


def test_arguments_that_have_no_answer_are_named() -> None:
    good, nan, zero = normal(4, 3), normal(4, 3), normal(4, 3)
    nan[1, 2], zero[2] = math.nan, 0
    for x in (good[0], good[:1], good[:, :0], good[None]):
        with pytest.raises(ValueError, match=r"^x must be \(N, D\) with N >= 2"):
            rankme(x)
    with pytest.raises(ValueError, match=r"^x must be finite, got NaN or infinity in 1 of 4 rows"):
        rankme(nan)
    with pytest.raises(ValueError, match=r"^x must have finite, non-zero rows, got 1 of 4"):
        uniformity(zero)
    with pytest.raises(ValueError, match=r"^x must have at least 2 rows, got 1"):
        uniformity(good[:1])
    with pytest.raises(ValueError, match=r"^chunk must be at least 1, got 0"):
        uniformity(good, 0)
    with pytest.raises(ValueError, match=r"^a and b must have one shape \(N, D\), got \(4, 3\) and \(3, 3\)"):
        alignment(good, good[:3])
    with pytest.raises(ValueError, match=r"^b must have finite"):
        alignment(good, nan)
    with pytest.raises(ValueError, match=r"^a and b must have one width D, got 3 and 2"):
        modality_gap(good, good[:, :2])
    with pytest.raises(ValueError, match=r"^a must be \(N, D\)"):
        modality_gap(good[:0], good)

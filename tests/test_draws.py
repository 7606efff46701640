from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch

import data.draws
from data.draws import normal_quantiles, normals, uniform, uniforms

CONSECUTIVE = torch.arange(-500, 500)
SCATTERED = torch.randint(-(2**63), 2**63 - 1, (1000,), generator=torch.Generator().manual_seed(0))
MASK = 2**64 - 1


def splitmix64(state: int) -> Iterator[int]:
    """As its authors publish it, in unbounded integers."""
    while True:
        state = state + 0x9E3779B97F4A7C15 & MASK
        z = state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        yield z ^ z >> 31


def test_hashes_are_splitmix64s() -> None:
    known = splitmix64(1234567)
    assert [next(known) for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for seed, purpose in ((0, 0), (5, 3), (-7, 1), (2**63 - 1, 4), (-(2**63), 0)):
        start = splitmix64(seed + (purpose - 1) * 0x9E3779B97F4A7C15)
        expected = splitmix64(next(start))
        got = data.draws._hashes(torch.tensor([seed]), purpose, 5)[0].tolist()
        assert [value & MASK for value in got] == [next(expected) for _ in range(5)]


def test_one_number_without_torch_is_the_first_of_many() -> None:
    seeds = [0, 1, 2**62 + 12345, 2**63 - 1]
    for purpose in (0, 1, 6):
        expected = uniforms(torch.tensor(seeds), purpose, 3)[:, 0].tolist()
        assert [uniform(seed, purpose) for seed in seeds] == expected


def test_seeds_are_left_as_they_are() -> None:
    seeds = CONSECUTIVE.clone()
    uniforms(seeds, 1, 3)
    assert torch.equal(seeds, CONSECUTIVE)


def test_numbers_depend_on_seed_purpose_and_place_alone() -> None:
    table = normal_quantiles()
    for draw in (uniforms, partial(normals, quantiles=table)):
        together = draw(SCATTERED, 2, 9)
        for row in (0, 3, 999):
            assert torch.equal(draw(SCATTERED[row : row + 1], 2, 9)[0], together[row])
            assert torch.equal(draw(SCATTERED[row : row + 1], 2, 6)[0], together[row, :6])
        assert torch.equal(draw(SCATTERED.flip(0), 2, 9).flip(0), together)
        assert not (draw(SCATTERED, 3, 9) == together).all(1).any()


def evenly_spread(x: torch.Tensor) -> None:
    """Kolmogorov and Smirnov's distance from a uniform distribution, which chance exceeds once in 10,000 times."""
    x = x.flatten().sort().values.double()
    expected = (torch.arange(len(x)) + 0.5) / len(x)
    assert (x - expected).abs().max() < 2.23 / np.sqrt(len(x))


def independent(x: torch.Tensor, y: torch.Tensor) -> None:
    """Their correlation is what chance gives: five standard errors."""
    correlation = np.corrcoef(x.flatten().numpy(), y.flatten().numpy())[0, 1]
    assert abs(correlation) < 5 / np.sqrt(x.numel())


@pytest.mark.parametrize("seeds", [CONSECUTIVE, SCATTERED, CONSECUTIVE * 2**32], ids=["near", "far", "high bits"])
def test_uniforms_are_uniform_and_independent(seeds: torch.Tensor) -> None:
    x = uniforms(seeds, 1, 1000)
    assert x.dtype == torch.float64
    assert 0 <= x.min() < 1e-5
    assert 1 - 1e-5 < x.max() < 1
    assert abs(x.mean() - 1 / 2) < 5 * np.sqrt(1 / 12 / x.numel())
    assert abs(x.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / x.numel())
    for values in (x.flatten(), x[:, 0], x[0]):
        evenly_spread(values)
    # Each sample's and each place's mean scatters as means of independent numbers do.
    for means in (x.mean(0), x.mean(1)):
        assert (means - 0.5).abs().max() < 5.5 * np.sqrt(1 / 12 / 1000)
    independent(x[1:], x[:-1])
    independent(x[:, 1:], x[:, :-1])
    independent(x, uniforms(seeds, 2, 1000))
    independent(x, uniforms(seeds, 0, 1000))
    assert len(np.unique(x.numpy())) == x.numel()


def test_normals_are_normal_and_independent() -> None:
    table = normal_quantiles()
    x = normals(CONSECUTIVE, 3, 1000, table)
    assert (x.dtype, x.shape) == (torch.float32, (1000, 1000))
    assert abs(x.mean()) < 5 / 1000
    assert abs(x.var() - 1) < 5 * np.sqrt(2) / 1000
    evenly_spread(torch.special.ndtr(x.double()))
    evenly_spread(torch.special.ndtr(x[7].double()))
    assert 4 < x.max() < 4.5
    assert -4.5 < x.min() < -4
    for lag in range(1, 6):  # four come from one hash
        independent(x[:, lag:], x[:, :-lag])
    independent(x[1:], x[:-1])
    independent(x, normals(CONSECUTIVE, 4, 1000, table))
    assert normals(CONSECUTIVE, 3, 3, table).shape == (1000, 3)

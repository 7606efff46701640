"""Random numbers that are a pure function of a sample's seed, on any device and in any batch.

Augmentation runs on whole batches, but what happens to a sample must not hang on its neighbours, its row or the size
of the batch, or a run could not be resumed with other ones. torch's generators count the numbers drawn so far; here
number ``i`` of a sample is a hash of (its seed, what it is for, ``i``).

The hash is splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): a counter in
steps of 2^64 / golden ratio, then Stafford's variant 13 of MurmurHash3's finaliser. It takes integer operations only,
which are the same to the bit everywhere.
"""

import zlib

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the bits of a 64-bit unsigned number; products of int64 wrap around like unsigned ones."""
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)  # odd, so that the counter comes to every number before one returns
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def uniforms(seeds: Tensor, purpose: int, count: int) -> Tensor:
    """Independent numbers in [0, 1).

    Args:
        seeds: (n,) int64, one per sample; neighbouring seeds give unrelated numbers.
        purpose: what the numbers are for; each purpose has its own.
        count: how many per sample.

    Returns:
        (n, count) float64, multiples of 2^-53, on the device of ``seeds``.
    """
    numbers: Tensor = _shifted(_hashes(seeds, purpose, count), 11).double() * 2**-53
    return numbers


def uniform(seed: int, purpose: int) -> float:
    """The first of ``uniforms``, for one seed and without torch, which would take longer than all else."""
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * (_FIRST & mask) & mask
        z = (z ^ z >> 27) * (_SECOND & mask) & mask
        return z ^ z >> 31

    return (mix(mix(seed + purpose * _GOLDEN & mask) + _GOLDEN & mask) >> 11) * 2.0**-53


def fork(seeds: Tensor, purpose: str) -> Tensor:
    """Other seeds (n,) made of these, the same for the same purpose and unrelated to those of any other."""
    return _mix(_mix(seeds.clone()) + _signed(zlib.crc32(purpose.encode()) * _GOLDEN % 2**64))


def normals(seeds: Tensor, purpose: int, count: int, quantiles: Tensor) -> Tensor:
    """Independent numbers from a standard normal distribution.

    They are looked up, four for each 64-bit hash, which is twice as fast as computing logarithms and cosines, and the
    same to the bit on every device.

    Args:
        seeds: (n,) int64, one per sample.
        purpose: what the numbers are for.
        count: how many per sample.
        quantiles: ``normal_quantiles()``, on the device of ``seeds``.

    Returns:
        (n, count) float32.
    """
    places = _hashes(seeds, purpose, -(-count // 4)).view(torch.int16).int() + 2**15
    return quantiles.index_select(0, places.flatten()).view(places.shape)[:, :count]


def normal_quantiles() -> Tensor:
    """(65536,) float32: the middle of each of as many equally likely parts of a standard normal distribution."""
    quantiles: Tensor = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16)
    return quantiles.float()


def _hashes(seeds: Tensor, purpose: int, count: int) -> Tensor:
    """(n, count) int64, all bits random."""
    counters = torch.arange(1, count + 1, device=seeds.device) * _GOLDEN
    return _mix(_mix(seeds + _signed(purpose * _GOLDEN % 2**64))[:, None] + counters)


def _mix(z: Tensor) -> Tensor:
    """A permutation of the int64 in which each bit depends on all; overwrites ``z``."""
    z ^= _shifted(z, 30)
    z *= _FIRST
    z ^= _shifted(z, 27)
    z *= _SECOND
    z ^= _shifted(z, 31)
    return z


def _shifted(z: Tensor, bits: int) -> Tensor:
    """``z`` to the right by ``bits``, zeros moving in: torch's own shift copies the sign."""
    return (z >> bits).bitwise_and_(2 ** (64 - bits) - 1)

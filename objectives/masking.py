"""Which positions are hidden. Masks (what an objective hides) and validity (what is padding) never mix here."""

from typing import NamedTuple

import torch
from torch import Tensor


class PatchSplit(NamedTuple):
    """A random split of the patches of n samples.

    Attributes:
        visible: (n, K) int64, the patches that the encoder sees.
        hidden: (n, P - K) int64, the rest.
    """

    visible: Tensor
    hidden: Tensor


def split_patches(n: int, num_patches: int, keep: float, generator: torch.Generator) -> PatchSplit:
    """Keep a random share of the patches, at least one, independently per sample (MAE, He et al. 2022, section 3)."""
    kept = max(1, round(keep * num_patches))
    order = torch.rand(n, num_patches, generator=generator, device=generator.device).argsort(dim=1)
    return PatchSplit(order[:, :kept], order[:, kept:])


class MaskedText(NamedTuple):
    """Text with tokens hidden.

    Attributes:
        ids: (n, L) int64, the corrupted input.
        chosen: (n, L) bool, the positions to predict.
    """

    ids: Tensor
    chosen: Tensor


def mask_tokens(ids: Tensor, ordinary: Tensor, mask_id: int, rate: float, generator: torch.Generator) -> MaskedText:
    """Choose a share of the ordinary tokens; of these 80 % become [MASK], 10 % a random token, 10 % stay.

    BERT (Devlin et al. 2019, section 3.1).

    Args:
        ids: (n, L) int64.
        ordinary: (V,) bool, True for ids that are no special tokens. Only these are chosen, and random
            replacements are drawn from them. Padding is a special token.
        mask_id: id of [MASK].
        rate: the share to choose, 0 .. 1.
        generator: random state, on the device of ``ids``.
    """
    draw = torch.rand(ids.shape, generator=generator, device=ids.device)
    chosen = ordinary[ids] & (draw < rate)
    # The same draw decides what a chosen token becomes: below `rate` it is uniform.
    to_mask = chosen & (draw < 0.8 * rate)
    to_random = chosen & ~to_mask & (draw < 0.9 * rate)
    candidates = ordinary.nonzero()[:, 0]
    picks = torch.randint(len(candidates), ids.shape, generator=generator, device=ids.device)
    corrupted = ids.masked_fill(to_mask, mask_id)
    return MaskedText(torch.where(to_random, candidates[picks], corrupted), chosen)

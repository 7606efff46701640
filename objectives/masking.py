"""Which positions are hidden. Masks (what an objective hides) and validity (what is padding) never mix here."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from data.draws import uniforms

# Modality made of patches -> how its patches may be hidden; the first is the default.
MASKS = {"image": ("random", "block"), "audio": ("random", "block", "time", "frequency", "time_frequency")}
MAX_ASPECT = 10 / 3  # of blocks (BEiT, Bao et al. 2022, algorithm 1)


class PatchSplit(NamedTuple):
    """A random split of the patches of n samples.

    Attributes:
        visible: (n, K) int64, the patches that the encoder sees, in random order.
        hidden: (n, P - K) int64, the rest, in random order: its first columns are a random part of it.
    """

    visible: Tensor
    hidden: Tensor


def split_patches(seeds: Tensor, grid: tuple[int, int], keep: float, kind: str = "random") -> PatchSplit:
    """Keep a share of the patches, at least one, independently per sample.

    Args:
        seeds: (n,) int64, one per sample, on which alone its split depends; the split is on their device.
        grid: rows and columns of patches; patches count row by row.
        keep: the share to keep; equally many in every sample.
        kind: which patches are hidden. random: any (MAE, He et al. 2022, section 3); block: those of a rectangle;
            time, frequency and time_frequency: whole columns, rows, or both of them (of a spectrogram; the last one
            in part, where the share asks for that).
    """
    num_patches = grid[0] * grid[1]
    kept = max(1, round(keep * num_patches))
    order = uniforms(seeds, 0, num_patches)
    if kind != "random" and kept < num_patches:
        rank = _RANKS[kind](seeds, grid, num_patches - kept).flatten(1)
        hidden = rank.argsort(dim=1)[:, : num_patches - kept]
        order = order.scatter_add(1, hidden, torch.ones_like(order))  # behind all others
    order = order.argsort(dim=1)
    return PatchSplit(order[:, :kept], order[:, kept:])


def keep_tokens(seeds: Tensor, valid: Tensor, most: int) -> Tensor:
    """At most so many tokens of each text, the first one among them; the others at random (FLIP, Li et al. 2023).

    Args:
        seeds: (n,) int64, one per text; what is kept depends on it and on the text's own length alone.
        valid: (n, L) bool, False for padding.
        most: how many to keep, 1 .. L. A text that has no more keeps them all.

    Returns:
        (n, most) int64, ascending; places of padding where a text has fewer tokens.
    """
    order = uniforms(seeds, 0, valid.shape[1]).masked_fill(~valid, 2)
    order[:, 0] = -1
    return order.argsort(dim=1)[:, :most].sort(dim=1).values


def _block(seeds: Tensor, grid: tuple[int, int], hidden: int) -> Tensor:
    """(n, rows, columns): distance from the centre of a random rectangle of ``hidden`` patches, in its sides.

    The nearest ones are then a rectangle of random place and shape, with a part of a line at one side.
    """
    rows, columns = grid
    aspect, y, x = uniforms(seeds, 1, 3).T[..., None, None]
    # Uniform in the logarithm, as far as such a rectangle has room.
    height = (hidden * MAX_ASPECT ** (2 * aspect - 1)).sqrt().clamp(hidden / columns, rows)
    width = hidden / height
    # Where there is no room to move, a nudge decides which of two opposite sides is the nearer one.
    down = torch.arange(rows, device=seeds.device)[:, None] + 0.5 - height / 2 - y * (rows - height + 1e-4)
    across = torch.arange(columns, device=seeds.device) + 0.5 - width / 2 - x * (columns - width + 1e-4)
    down, across = (down / height).abs(), (across / width).abs()
    # Within a line all are equally far; the part of it that is taken is the one nearest to its middle.
    return torch.maximum(down, across) + 1e-9 * torch.minimum(down, across)


def _lines(*axes: int) -> Callable[[Tensor, tuple[int, int], int], Tensor]:
    """Whole lines along one or several axes of the grid, in random order; within a line patches are in random order."""

    def rank(seeds: Tensor, grid: tuple[int, int], hidden: int) -> Tensor:
        n = len(seeds)
        lines = uniforms(seeds, 1, sum(grid[axis] for axis in axes))
        parts = torch.split(lines.argsort(dim=1).argsort(dim=1), [grid[axis] for axis in axes], dim=1)
        places = [part.unsqueeze(2 - axis).expand(n, *grid) for axis, part in zip(axes, parts, strict=True)]
        first = torch.stack(places).amin(dim=0)  # a patch goes with the first of its lines
        return first + uniforms(seeds, 2, grid[0] * grid[1]).view(n, *grid)

    return rank


# (seeds, grid, how many to hide) -> (n, rows, columns): the patches of lowest rank are hidden.
_RANKS: dict[str, Callable[[Tensor, tuple[int, int], int], Tensor]] = {
    "block": _block,
    "time": _lines(1),
    "frequency": _lines(0),
    "time_frequency": _lines(0, 1),
}


class MaskedText(NamedTuple):
    """Text with tokens hidden.

    Attributes:
        ids: (n, L) int64, the corrupted input.
        chosen: (n, L) bool, the positions to predict.
    """

    ids: Tensor
    chosen: Tensor


def mask_tokens(
    ids: Tensor,
    seeds: Tensor,
    ordinary: Tensor,
    mask_id: int,
    rate: float,
    continues: Tensor | None = None,
) -> MaskedText:
    """Choose a share of the ordinary tokens; of these 80 % become [MASK], 10 % a random token, 10 % stay.

    BERT (Devlin et al. 2019, section 3.1).

    Args:
        ids: (n, L) int64.
        seeds: (n,) int64, one per text; what happens to a token depends on it and on the token's place alone, not on
            how much padding follows.
        ordinary: (V,) bool, True for ids that are no special tokens. Only these are chosen, and random
            replacements are drawn from them. Padding is a special token.
        mask_id: id of [MASK].
        rate: the share to choose, 0 .. 1.
        continues: (V,) bool, True for ids that go on with the word of the token before them: the tokens of a word
            then have one fate, so that none of them tells the others. None: each token has its own.
    """
    draw = uniforms(seeds, 0, ids.shape[1])
    if continues is not None:
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        draw = draw.gather(1, places.masked_fill(continues[ids], 0).cummax(dim=1).values)  # of the word's first token
    chosen = ordinary[ids] & (draw < rate)
    # The same draw decides what a chosen token becomes: below `rate` it is uniform.
    to_mask = chosen & (draw < 0.8 * rate)
    to_random = chosen & ~to_mask & (draw < 0.9 * rate)
    candidates = ordinary.nonzero()[:, 0]
    picks = (uniforms(seeds, 1, ids.shape[1]) * len(candidates)).long()
    corrupted = ids.masked_fill(to_mask, mask_id)
    return MaskedText(torch.where(to_random, candidates[picks], corrupted), chosen)

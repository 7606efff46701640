"""What objectives read: the outcome of one step's passes through the encoder."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from data.batch import Field
from objectives.masking import PatchSplit
from pretrain.model.encoder import Encoder


class JointInput(NamedTuple):
    """What a joint pass is about to see: n samples that have the same modalities, and what is hidden of them.

    Attributes:
        inputs: modality -> the whole, uncorrupted input of n samples.
        splits: modality -> which patches are visible and which hidden, for modalities made of patches.
        ids: (n, L) int64, the text that the encoder sees; None without text.
        chosen: (n, L) bool, the text tokens to predict; None without text, and where nobody predicts any.
    """

    inputs: dict[str, Field]
    splits: dict[str, PatchSplit]
    ids: Tensor | None = None
    chosen: Tensor | None = None


class JointPass(NamedTuple):
    """One joint pass.

    Attributes:
        inputs: as in ``JointInput``, like ``splits`` and ``chosen``.
        states: modality -> (n, N, D), the encoder's states of what it saw.
        splits: see there.
        chosen: see there.
    """

    inputs: dict[str, Field]
    states: dict[str, Tensor]
    splits: dict[str, PatchSplit]
    chosen: Tensor | None


class Passes(NamedTuple):
    """All passes of a step.

    Attributes:
        encoder: the encoder that made them.
        embeddings: modality -> embeddings (n, E) of the unimodal pass, with their rows; not normalised.
        joint: joint passes, one per set of modalities that a sample has and an objective learns from.
        groups: (size,) int64 or None, as in ``Batch``.
        counts: term -> scalar by which to divide a sum to get the term, of terms that an objective counts.
    """

    encoder: Encoder
    embeddings: dict[str, Field]
    joint: list[JointPass]
    groups: Tensor | None = None
    counts: Mapping[str, Tensor] = MappingProxyType({})


def at_least_float32(x: Tensor) -> Tensor:
    """What autocast made in 16 bits, for a loss that needs more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

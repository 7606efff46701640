"""What objectives read: the outcome of one step's passes through the encoder."""

from typing import NamedTuple

from torch import Tensor

from data.batch import Field
from objectives.masking import PatchSplit
from pretrain.model.encoder import Encoder


class JointPass(NamedTuple):
    """One joint pass: n samples that have the same modalities, parts of which were hidden.

    Attributes:
        inputs: modality -> the whole, uncorrupted input of n samples.
        states: modality -> (n, N, D), the encoder's states of what it saw.
        splits: modality -> which patches were visible and which hidden, for modalities made of patches.
        chosen: (n, L) bool, the text tokens to predict; None without text.
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
        joint: joint passes, one per set of modalities that occurs in the batch.
        groups: (size,) int64 or None, as in ``Batch``.
    """

    encoder: Encoder
    embeddings: dict[str, Field]
    joint: list[JointPass]
    groups: Tensor | None = None

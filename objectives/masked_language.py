"""Masked-language modelling, conditioned on whatever else the joint pass saw."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives.passes import JointInput, Passes, at_least_float32
from pretrain.model.encoder import Encoder
from pretrain.model.layers import LAYER_NORM_EPS, init_weights


@dataclass
class MaskedLanguageConfig:
    """Predict hidden tokens."""

    weight: float = 0.5
    """Weight of the term; 0 switches the objective off."""
    weight_end: float | None = None
    """Weight at the end of training, to which it goes in a straight line; null keeps it as it is."""
    rate: float = 0.15
    """Share of tokens to predict where the joint pass has text alone."""
    rate_paired: float = 0.5
    """Share of tokens to predict where it has image or audio too, which then have to help."""
    whole_words: bool = False
    """Choose all tokens of a word together, so that the end of a word does not tell its beginning."""

    def __post_init__(self) -> None:
        for name in ("rate", "rate_paired"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"objectives.masked_language.{name}={getattr(self, name)}: allowed is above 0 and at most 1"
                )


class MaskedLanguage(nn.Module):
    """RoBERTa's language-model head: dense, GELU, LayerNorm, and the input embedding as output matrix."""

    reads = "joint"
    names = ("masked_language",)

    @staticmethod
    def learns_from(modalities: Collection[str]) -> bool:
        """It predicts text."""
        return "text" in modalities

    def __init__(self, config: MaskedLanguageConfig, encoder: Encoder) -> None:
        super().__init__()
        width = encoder.config.width
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(encoder.vocabulary.size))
        self.apply(init_weights)

    def counts(self, joint: Sequence[JointInput]) -> dict[str, Tensor | int]:
        """How many tokens a rank is about to predict."""
        return {"masked_language": sum(each.chosen.sum() for each in joint if each.chosen is not None)}

    def forward(self, passes: Passes) -> dict[str, Tensor]:
        """``masked_language``: mean cross-entropy over the chosen tokens, in nats; absent without text."""
        states, targets = [], []
        for joint in passes.joint:
            if joint.chosen is not None:
                states.append(joint.states["text"][joint.chosen])
                targets.append(joint.inputs["text"].x[joint.chosen])
        if not states:
            return {}
        # Only chosen positions go through the vocabulary.
        hidden = self.norm(F.gelu(self.dense(torch.cat(states))))
        embedding = passes.encoder.get_parameter("tokenizers.text.embed.weight")
        logits = at_least_float32(F.linear(hidden, embedding, self.bias))
        target = torch.cat(targets)
        total = F.cross_entropy(logits, target, reduction="sum")
        return {"masked_language": total / passes.counts["masked_language"].to(total.dtype)}

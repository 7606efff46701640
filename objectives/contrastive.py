"""Contrastive loss over every pair of modalities."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives.passes import Passes
from pretrain.model.encoder import Encoder

MAX_LOG_SCALE = math.log(100)


@dataclass
class ContrastiveConfig:
    """InfoNCE between the embeddings of every two modalities of a sample."""

    weight: float = 1.0
    """Weight of each pair's term; 0 switches the objective off."""
    temperature: float = 0.07
    """Temperature at the start; each pair learns its own."""

    def __post_init__(self) -> None:
        if not 1 / 100 <= self.temperature < math.inf:
            raise ValueError(f"objectives.contrastive.temperature={self.temperature}: allowed is 0.01 or more")


class Contrastive(nn.Module):
    """Symmetric InfoNCE with a learned scale per pair, clamped at 100 (CLIP, Radford et al. 2021, section 2.5)."""

    reads = "embeddings"

    @staticmethod
    def learns_from(modalities: Collection[str]) -> bool:
        """It compares two modalities."""
        return len(modalities) >= 2

    def __init__(self, config: ContrastiveConfig, encoder: Encoder) -> None:
        super().__init__()
        start = math.log(1 / config.temperature)
        self.log_scale = nn.ParameterDict(
            {f"{a}_{b}": torch.tensor(start) for a, b in combinations(encoder.views.used, 2)}
        )

    def forward(self, passes: Passes) -> dict[str, Tensor]:
        """A term for every pair that at least two samples have."""
        terms = {}
        for (name_a, a), (name_b, b) in combinations(passes.embeddings.items(), 2):
            # Rows ascend, so what both have comes out aligned.
            x = a.select(torch.isin(a.rows, b.rows).nonzero()[:, 0]).x
            y = b.select(torch.isin(b.rows, a.rows).nonzero()[:, 0]).x
            if len(x) >= 2:
                log_scale = self.log_scale[f"{name_a}_{name_b}"]
                with torch.no_grad():  # the parameter itself, as CLIP: it keeps its gradient and can come down again
                    log_scale.clamp_(max=MAX_LOG_SCALE)
                terms[f"{name_a}_{name_b}"] = info_nce(x, y, log_scale)
        return terms


def info_nce(x: Tensor, y: Tensor, log_scale: Tensor) -> Tensor:
    """Mean of both directions' cross-entropy, row i of x belonging to row i of y.

    Args:
        x: (n, E), of any norm.
        y: (n, E), of any norm.
        log_scale: scalar, the logarithm of the factor on the cosines.
    """
    # Cosines times a scale up to 100 need float32: bf16 has 3 digits.
    x, y = F.normalize(x.float(), dim=-1), F.normalize(y.float(), dim=-1)
    with torch.autocast(x.device.type, enabled=False):
        logits = log_scale.exp() * x @ y.T  # (n, n)
    targets = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

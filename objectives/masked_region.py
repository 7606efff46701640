"""Masked-region modelling: predict hidden patches of images and spectrograms from the visible ones."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from objectives.masking import PatchSplit
from objectives.passes import Passes
from pretrain.model.encoder import Encoder
from pretrain.model.layers import LAYER_NORM_EPS, Block, gather_tokens, init_weights
from pretrain.model.tokenizers import TOKENIZERS, PatchTokenizer


@dataclass
class MaskedRegionConfig:
    """Predict hidden patches."""

    weight: float = 1.0
    """Weight of each modality's term; 0 switches the objective off."""
    decoder_width: int = 128
    """Width of the decoder."""
    decoder_depth: int = 1
    """Number of the decoder's Transformer blocks."""
    decoder_heads: int = 4
    """Attention heads of the decoder; they divide its width."""

    def __post_init__(self) -> None:
        for name in ("decoder_width", "decoder_depth", "decoder_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"objectives.masked_region.{name}={getattr(self, name)}: allowed is 1 or more")
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"objectives.masked_region.decoder_heads={self.decoder_heads}: "
                f"it must divide decoder_width={self.decoder_width}"
            )


class MaskedRegion(nn.Module):
    """A light decoder per modality made of patches (MAE, He et al. 2022, section 3)."""

    reads = "joint"

    @staticmethod
    def learns_from(modalities: Collection[str]) -> bool:
        """It predicts what is made of patches."""
        return any(issubclass(TOKENIZERS[name], PatchTokenizer) for name in modalities)

    def __init__(self, config: MaskedRegionConfig, encoder: Encoder) -> None:
        super().__init__()
        self.decoders = nn.ModuleDict(
            {
                name: RegionDecoder(config, encoder.config.width, tokenizer)
                for name, tokenizer in encoder.tokenizers.items()
                if isinstance(tokenizer, PatchTokenizer)
            }
        )
        self.apply(init_weights)

    def forward(self, passes: Passes) -> dict[str, Tensor]:
        """``masked_image``, ``masked_audio``: mean squared error over hidden patches; absent where none is hidden."""
        terms = {}
        for name, decoder in self.decoders.items():
            errors = []
            for joint in passes.joint:
                if name in joint.splits and joint.splits[name].hidden.numel():
                    split = joint.splits[name]
                    target = gather_tokens(passes.encoder.patches(name, joint.inputs[name].x), split.hidden)
                    predicted = decoder(joint.states[name], split)
                    errors.append((predicted.float() - normalise_patches(target)).square().mean(dim=-1).flatten())
            if errors:
                terms[f"masked_{name}"] = torch.cat(errors).mean()
        return terms


class RegionDecoder(nn.Module):
    """Visible states and mask tokens -> the hidden patches' values."""

    def __init__(self, config: MaskedRegionConfig, width: int, tokenizer: PatchTokenizer) -> None:
        super().__init__()
        self.prefix_tokens = tokenizer.prefix_tokens
        self.embed = nn.Linear(width, config.decoder_width)
        self.mask = nn.Parameter(torch.zeros(config.decoder_width))
        self.positions = nn.Parameter(torch.zeros(tokenizer.num_patches, config.decoder_width))
        self.blocks = nn.ModuleList(
            Block(config.decoder_width, config.decoder_heads, mlp_ratio=4.0) for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(config.decoder_width, eps=LAYER_NORM_EPS)
        self.predict = nn.Linear(config.decoder_width, tokenizer.patch_dim)
        nn.init.normal_(self.mask, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, states: Tensor, split: PatchSplit) -> Tensor:
        """States (n, prefix + K, D) of the visible patches -> (n, P - K, patch_dim), the hidden ones in order."""
        positions = self.positions.expand(len(states), -1, -1)
        prefix, visible = self.embed(states).split([self.prefix_tokens, split.visible.shape[1]], dim=1)
        visible = visible + gather_tokens(positions, split.visible)
        hidden = self.mask + gather_tokens(positions, split.hidden)
        x = torch.cat([prefix, visible, hidden], dim=1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.predict(self.norm(x[:, -split.hidden.shape[1] :]))
        return out


def normalise_patches(patches: Tensor) -> Tensor:
    """(n, P, patch_dim) to mean 0 and variance 1 per patch (MAE, section 4, "reconstruction target")."""
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()

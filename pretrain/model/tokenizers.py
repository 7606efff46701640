"""One tokenizer per modality: inputs -> tokens (n, N, D). A modality is a class here and a line in ``TOKENIZERS``."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from data.batch import Field
from data.errors import UserError
from data.transforms import AudioView, ImageView, TextView
from pretrain.model.layers import LAYER_NORM_EPS, gather_tokens

# Name -> shape, after ViT (Dosovitskiy et al. 2021, table 1; Touvron et al. 2021, table 1) but for the smallest.
PRESETS: dict[str, dict[str, int]] = {
    "micro": {"width": 128, "depth": 6, "heads": 4, "image_patch": 8, "audio_patch": 16},
    "tiny": {"width": 192, "depth": 12, "heads": 3, "image_patch": 16, "audio_patch": 16},
    "small": {"width": 384, "depth": 12, "heads": 6, "image_patch": 16, "audio_patch": 16},
    "base": {"width": 768, "depth": 12, "heads": 12, "image_patch": 16, "audio_patch": 16},
    "large": {"width": 1024, "depth": 24, "heads": 16, "image_patch": 16, "audio_patch": 16},
}


@dataclass
class ModelConfig:
    """Shape of the encoder."""

    preset: str | None = None
    """Sets width, depth, heads and patches, which may still be given; allowed: micro, tiny, small, base, large (as
    ViT-Ti/16, S/16, B/16, L/16), or null."""
    width: int = 384
    """Width D of the tokens."""
    depth: int = 12
    """Number of Transformer blocks."""
    heads: int = 6
    """Attention heads; they divide the width."""
    mlp_ratio: float = 4.0
    """Width of the feed-forward layer, in widths."""
    embed_dim: int = 256
    """Width of the space in which modalities are compared."""
    image_patch: int = 16
    """Side of an image patch in pixels; it divides the image's size."""
    audio_patch: int = 16
    """Side of a spectrogram patch in mel bins and frames; it divides both."""
    sharing: str = "all"
    """Which weights of the Transformer blocks the modalities share. all: every one; ffn: those of attention, and each
    has its own feed-forward layers; none: each has its own of everything, and attends to the tokens of all."""

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"model.preset={self.preset}: allowed are {', '.join(PRESETS)}, or null")
        for name in ("width", "depth", "heads", "embed_dim", "image_patch", "audio_patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: allowed is 1 or more")
        if not self.width * self.mlp_ratio >= 1:
            raise ValueError(f"model.mlp_ratio={self.mlp_ratio}: allowed is above 0, and 1 / model.width or more")
        if self.width % self.heads:
            raise ValueError(f"model.heads={self.heads}: it must divide model.width={self.width}")
        if self.sharing not in ("all", "ffn", "none"):
            raise ValueError(f"model.sharing={self.sharing}: allowed are all, ffn, none")


class Vocabulary(NamedTuple):
    """What the model must know of the text tokenizer.

    Attributes:
        size: number of ids.
        pad_id: id of the padding token.
        mask_id: id of the token that hides others.
        special_ids: all ids that stand for no text, padding and mask included.
    """

    size: int
    pad_id: int
    mask_id: int
    special_ids: tuple[int, ...]


class Tokens(NamedTuple):
    """Input of the trunk.

    Attributes:
        x: (n, N, D).
        valid: (n, N) bool, False for padding; None where nothing is padded.
    """

    x: Tensor
    valid: Tensor | None = None


class PatchTokenizer(nn.Module):
    """Non-overlapping square patches of a (C, height, width) input, after learned prefix tokens.

    Patches run row by row. Only the patches that are kept are embedded, so hidden ones cost nothing.
    """

    prefix_tokens: ClassVar[int]
    input_shape: tuple[int, ...]
    """Shape of one sample's input."""

    def __init__(self, width: int, channels: int, grid: tuple[int, int], patch: int) -> None:
        super().__init__()
        self.grid, self.patch = grid, patch
        self.num_patches = grid[0] * grid[1]
        self.patch_dim = channels * patch**2
        self.embed = nn.Linear(self.patch_dim, width)
        self.prefix = nn.Parameter(torch.zeros(self.prefix_tokens, width))
        self.positions = nn.Parameter(torch.zeros(self.prefix_tokens + self.num_patches, width))
        nn.init.normal_(self.prefix, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def patchify(self, x: Tensor) -> Tensor:
        """(n, C, height, width) -> (n, P, C * patch * patch)."""
        return rearrange(x, "n c (gh p) (gw q) -> n (gh gw) (c p q)", p=self.patch, q=self.patch)

    def forward(self, field: Field, keep: Tensor | None = None) -> Tokens:
        """Tokens of all patches, or of the patches at ``keep`` (n, K), behind the prefix tokens."""
        patches = self.patchify(field.x)
        positions = self.positions[self.prefix_tokens :].expand(len(patches), -1, -1)
        if keep is not None:
            patches, positions = gather_tokens(patches, keep), gather_tokens(positions, keep)
        prefix = (self.prefix + self.positions[: self.prefix_tokens]).expand(len(patches), -1, -1)
        return Tokens(torch.cat([prefix, self.embed(patches) + positions], dim=1))


class ImageTokenizer(PatchTokenizer):
    """One class token, then square patches (ViT, Dosovitskiy et al. 2021, section 3.1)."""

    prefix_tokens = 1

    def __init__(self, config: ModelConfig, view: ImageView, _: Vocabulary) -> None:
        if view.size % config.image_patch:
            raise UserError(f"model.image_patch={config.image_patch}: it must divide data.views.image.size={view.size}")
        side = view.size // config.image_patch
        super().__init__(config.width, 3, (side, side), config.image_patch)
        self.input_shape = (3, view.size, view.size)


class AudioTokenizer(PatchTokenizer):
    """Two prefix tokens, then patches of a spectrogram without overlap, low frequencies first.

    AST (Gong et al. 2021, section 2.1) with stride = patch.
    """

    prefix_tokens = 2

    def __init__(self, config: ModelConfig, view: AudioView, _: Vocabulary) -> None:
        for name in ("mels", "frames"):
            if (size := getattr(view, name)) % config.audio_patch:
                raise UserError(
                    f"model.audio_patch={config.audio_patch}: it must divide data.views.audio.{name}={size}"
                )
        grid = (view.mels // config.audio_patch, view.frames // config.audio_patch)
        super().__init__(config.width, 1, grid, config.audio_patch)
        self.input_shape = (view.frames, view.mels)

    def patchify(self, x: Tensor) -> Tensor:
        """(n, frames, mels) -> (n, P, patch * patch); the patch grid is mels x frames."""
        return super().patchify(x.transpose(1, 2)[:, None])


class TextTokenizer(nn.Module):
    """Token and position embeddings behind a LayerNorm; positions count from ``pad_id + 1`` as in RoBERTa."""

    prefix_tokens = 0

    def __init__(self, config: ModelConfig, view: TextView, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.pad_id, self.max_tokens = vocabulary.pad_id, view.max_tokens
        self.embed = nn.Embedding(vocabulary.size, config.width)
        self.positions = nn.Embedding(view.max_tokens + vocabulary.pad_id + 1, config.width)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def forward(self, field: Field, keep: Tensor | None = None) -> Tokens:
        """(n, L) ids -> (n, L, D); or (n, K, D), of the tokens at ``keep`` (n, K), the first of which is 0."""
        valid = torch.ones_like(field.x, dtype=torch.bool) if field.valid is None else field.valid
        ids, positions, seen = field.x, valid.cumsum(dim=1) * valid + self.pad_id, field.valid
        if keep is not None:
            ids, positions = ids.gather(1, keep), positions.gather(1, keep)
            seen = None if seen is None else seen.gather(1, keep)
        return Tokens(self.norm(self.embed(ids) + self.positions(positions)), seen)


TOKENIZERS: dict[str, Any] = {"image": ImageTokenizer, "text": TextTokenizer, "audio": AudioTokenizer}

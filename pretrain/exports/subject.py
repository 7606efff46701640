"""What is exported: an encoder, its tokenizer and what the objectives learned beside it."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.errors import UserError
from data.transforms import HOP, SAMPLE_RATE
from objectives.contrastive import MAX_LOG_SCALE
from pretrain.initial import resize_grid
from pretrain.model.encoder import Encoder

FRAMES_PER_SECOND = SAMPLE_RATE / HOP


class ExportError(UserError):
    """An export that can't be made, or does not give the encoder's features; names the folder and what is wrong."""


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Attributes:
        encoder: on the CPU, in evaluation mode; its numbers are those that ``dtype`` can hold.
        tokenizer: of the texts.
        objectives: what the objectives learned, by the names of a checkpoint's objectives.safetensors.
        dtype: in which weights are saved.
    """

    encoder: Encoder
    tokenizer: PreTrainedTokenizerBase
    objectives: Mapping[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def modalities(self) -> list[str]:
        """In the order of the views."""
        return list(self.encoder.views.used)

    @property
    def contrasted(self) -> bool:
        """Whether the projections were trained: without a contrastive loss they are as random as they began."""
        return self._learned("contrastive.")

    @property
    def reads_masked(self) -> bool:
        """Whether there is a trained language-model head."""
        return self._learned("masked_language.")

    @property
    def pairs(self) -> list[str]:
        """Names of the pairs of modalities that were contrasted, such as ``image_text``."""
        return ["_".join(pair) for pair in combinations(self.modalities, 2)] if self.contrasted else []

    def log_scale(self, pair: str) -> Tensor:
        """Logarithm of the learned scale of a pair's cosines, as the loss uses it: scalar."""
        return self.objectives[f"contrastive.log_scale.{pair}"].reshape(()).clamp(max=MAX_LOG_SCALE)

    def bias(self, pair: str) -> Tensor | None:
        """The learned bias of a pair, which only the sigmoid loss has: scalar."""
        bias = self.objectives.get(f"contrastive.bias.{pair}")
        return None if bias is None else bias.reshape(())

    def _learned(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.objectives)


def rounded(subject: Subject, dtype: torch.dtype) -> Subject:
    """The same with every number as ``dtype`` holds it, still in float32: what is saved then loses nothing."""
    if dtype == torch.float32:
        return replace(subject, dtype=dtype)
    objectives = {
        name: value.to(dtype).float() if value.is_floating_point() else value
        for name, value in subject.objectives.items()
    }
    return replace(
        subject, encoder=copy.deepcopy(subject.encoder).to(dtype).float(), objectives=objectives, dtype=dtype
    )


def resized(encoder: Encoder, image_size: int | None = None, audio_seconds: float | None = None) -> Encoder:
    """The same encoder for inputs of another size.

    Positions of an image are interpolated (bicubic, Dosovitskiy et al. 2021, section 3.2); those of a spectrogram are
    cut where it gets shorter, as if the rest were hidden, and stretched where it gets longer.

    Args:
        encoder: on the CPU.
        image_size: side in pixels, a multiple of the patch.
        audio_seconds: length of the sounds; rounded up to whole patches.

    Raises:
        ExportError: a modality that the encoder lacks, or a size that patches don't divide.
    """
    views, config = encoder.views, encoder.config
    if image_size is not None:
        if views.image is None:
            raise ExportError("--image-size: the encoder has no images")
        if image_size < 1 or image_size % config.image_patch:
            raise ExportError(
                f"--image-size {image_size}: allowed are multiples of model.image_patch={config.image_patch}"
            )
        views = replace(views, image=replace(views.image, size=image_size, load=None))
    if audio_seconds is not None:
        if views.audio is None:
            raise ExportError("--audio-seconds: the encoder has no sounds")
        if not 0 < audio_seconds < math.inf:
            raise ExportError(f"--audio-seconds {audio_seconds}: allowed is above 0")
        # Rounded first: 0.16 s are 16 frames and not 16.000000000000004.
        patches = max(1, math.ceil(round(audio_seconds * FRAMES_PER_SECOND, 6) / config.audio_patch))
        # The mask is training's, and may not be longer than the view.
        views = replace(views, audio=replace(views.audio, frames=patches * config.audio_patch, time_mask=0))
    if views == encoder.views:
        return encoder
    made = Encoder(config, views, encoder.vocabulary)
    weights = dict(encoder.state_dict())
    for modality in ("image", "audio"):
        if modality in views.used:
            tokenizers = encoder.tokenizers[modality], made.tokenizers[modality]
            weights[f"tokenizers.{modality}.positions"] = _positions(*tokenizers, cut=modality == "audio")
    made.load_state_dict(weights)
    return made.eval()


def _positions(before: Any, after: Any, cut: bool) -> Tensor:
    """Positions (prefix + P, D) of one tokenizer of patches for the grid of another, whose last columns may be cut."""
    prefix, patches = before.positions.detach().split([before.prefix_tokens, before.num_patches])
    grid = patches.view(*before.grid, -1)
    if cut:  # the columns of a spectrogram are time
        grid = grid[:, : after.grid[1]]
    return torch.cat([prefix, resize_grid(grid, after.grid).flatten(0, 1)])

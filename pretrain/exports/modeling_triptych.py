# Copyright the Triptych authors
# SPDX-License-Identifier: Apache-2.0
"""Triptych: one pre-LN Transformer for images, texts and sounds, alone or as one sequence.

This file is all the code that an export's joint model needs, besides torch and transformers. It reads from top to
bottom: config, tokens, blocks, heads, model. Shapes: n samples, N tokens, D width, H heads, E embedding width.

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    model.get_text_features(input_ids, attention_mask)                # (n, E), comparable with the other modalities'
    model(pixel_values=..., input_ids=..., attention_mask=...)        # states of a joint pass
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput  # type: ignore[attr-defined]

MODALITIES = ("image", "text", "audio")


class TriptychConfig(PretrainedConfig):
    """Shape of the encoder, and sizes of its inputs."""

    model_type = "triptych"

    def __init__(
        self,
        modalities: list[str] | tuple[str, ...] = MODALITIES,
        hidden_size: int = 384,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        intermediate_size: int = 1536,
        layer_norm_eps: float = 1e-6,
        projection_dim: int = 256,
        sharing: str = "all",
        pairs: list[str] | tuple[str, ...] = (),
        sigmoid: bool = False,
        image_size: int = 224,
        image_patch: int = 16,
        vocab_size: int = 1000,
        max_tokens: int = 64,
        pad_token_id: int = 1,
        audio_frames: int = 1024,
        audio_mels: int = 128,
        audio_patch: int = 16,
        **kwargs: Any,
    ) -> None:
        """Sizes.

        Args:
            modalities: that the model reads, of image, text and audio.
            hidden_size: width D of the tokens.
            num_hidden_layers: number of blocks.
            num_attention_heads: H.
            intermediate_size: width of the feed-forward layers.
            layer_norm_eps: of every LayerNorm.
            projection_dim: width E of the embeddings.
            sharing: which weights the modalities share: all; ffn: those of attention alone; none.
            pairs: of modalities that were trained to be compared, such as image_text.
            sigmoid: whether each pair has a bias besides its scale.
            image_size: side in pixels.
            image_patch: side of an image's patches.
            vocab_size: number of token ids.
            max_tokens: longest text.
            pad_token_id: id of the padding.
            audio_frames: length of the spectrograms, in steps of 10 ms.
            audio_mels: number of their mel bins.
            audio_patch: side of their patches.
            kwargs: what every config has.
        """
        self.modalities, self.sharing, self.pairs, self.sigmoid = list(modalities), sharing, list(pairs), sigmoid
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.intermediate_size = num_attention_heads, intermediate_size
        self.layer_norm_eps, self.projection_dim = layer_norm_eps, projection_dim
        self.image_size, self.image_patch = image_size, image_patch
        self.vocab_size, self.max_tokens = vocab_size, max_tokens
        self.audio_frames, self.audio_mels, self.audio_patch = audio_frames, audio_mels, audio_patch
        self.pad_token_id = pad_token_id
        super().__init__(**{"pad_token_id": pad_token_id, **kwargs})


@dataclass
class TriptychOutput(ModelOutput):
    """Of a joint pass over some of the modalities, in the order image, text, audio.

    Attributes:
        last_hidden_state: (n, N, D), the tokens of all of them.
        image_features: (n, D), what the image's class token has become; None without images.
        text_features: (n, D), likewise: tanh(dense(first token)).
        audio_features: (n, D), likewise: the mean of the two prefix tokens.
    """

    last_hidden_state: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    audio_features: Tensor | None = None


class PatchTokens(nn.Module):
    """Square patches of (n, C, height, width), row by row, behind learned prefix tokens."""

    def __init__(self, width: int, channels: int, height: int, breadth: int, patch: int, prefix: int) -> None:
        super().__init__()
        patches = (height // patch) * (breadth // patch)
        self.patch = patch
        self.embed = nn.Linear(channels * patch**2, width)
        self.prefix = nn.Parameter(torch.zeros(prefix, width))
        self.positions = nn.Parameter(torch.zeros(prefix + patches, width))

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, height, width) -> (n, prefix + P, D)."""
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)  # (n, P, C * patch * patch)
        prefix = self.prefix.expand(x.shape[0], -1, -1)  # len(x) would be a constant in graphs
        return torch.cat([prefix, self.embed(patches)], dim=1) + self.positions


class TextTokens(nn.Module):
    """Token and position embeddings behind a LayerNorm; positions count from pad_token_id + 1."""

    def __init__(self, config: TriptychConfig) -> None:
        super().__init__()
        self.pad_id = int(config.pad_token_id or 0)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_tokens + self.pad_id + 1, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Ids (n, L), and which are no padding (n, L) -> (n, L, D)."""
        positions = valid.cumsum(dim=1) * valid + self.pad_id
        out: Tensor = self.norm(self.embed(ids) + self.positions(positions))
        return out


class Attention(nn.Module):
    """Weights of self-attention behind a LayerNorm."""

    def __init__(self, config: TriptychConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def project(self, x: Tensor) -> Tensor:
        """(n, N, D) -> (n, N, 3 D)."""
        out: Tensor = self.qkv(self.norm(x))
        return out


class FeedForward(nn.Module):
    """Two linear layers behind a LayerNorm."""

    def __init__(self, config: TriptychConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(n, N, D) -> (n, N, D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return out


class Block(nn.Module):
    """Attention over all tokens, and a feed-forward layer; each modality through weights of its own, or all share."""

    def __init__(self, config: TriptychConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        own = config.modalities
        self.attention = nn.ModuleDict(
            {key: Attention(config) for key in (own if config.sharing == "none" else ["all"])}
        )
        self.feed_forward = nn.ModuleDict(
            {key: FeedForward(config) for key in (["all"] if config.sharing == "all" else own)}
        )

    def forward(self, x: Tensor, mask: Tensor | None, lengths: dict[str, int]) -> Tensor:
        """(n, N, D), with how many of the N tokens each modality has -> (n, N, D)."""
        qkv = apart(self.attention, "project", x, lengths)
        n, tokens, _ = x.shape
        q, k, v = qkv.view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (n, H, N, D / H)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(n, tokens, -1)
        x = x + apart(self.attention, "out", attended, lengths)
        return x + apart(self.feed_forward, "forward", x, lengths)


def apart(modules: nn.ModuleDict, method: str, x: Tensor, lengths: dict[str, int]) -> Tensor:
    """Tokens (n, N, D) through the weights that all share, or those of each modality through its own."""
    if "all" in modules:
        shared: Tensor = getattr(modules["all"], method)(x)
        return shared
    parts = zip(lengths, torch.split(x, list(lengths.values()), dim=1), strict=True)
    return torch.cat([getattr(modules[name], method)(part) for name, part in parts], dim=1)


class ImageHead(nn.Module):
    """The class token, and its projection."""

    def __init__(self, config: TriptychConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(config.hidden_size, config.projection_dim)

    def pool(self, states: Tensor) -> Tensor:
        """(n, N, D) -> (n, D)."""
        return states[:, 0]

    def forward(self, pooled: Tensor) -> Tensor:
        """(n, D) -> (n, E)."""
        out: Tensor = self.projection(pooled)
        return out


class TextHead(nn.Module):
    """tanh(dense(first token)), and its projection."""

    def __init__(self, config: TriptychConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def pool(self, states: Tensor) -> Tensor:
        """(n, N, D) -> (n, D)."""
        return torch.tanh(self.dense(states[:, 0]))

    def forward(self, pooled: Tensor) -> Tensor:
        """(n, D) -> (n, E)."""
        out: Tensor = self.projection(pooled)
        return out


class AudioHead(nn.Module):
    """The mean of the two prefix tokens, and LayerNorm with a projection."""

    def __init__(self, config: TriptychConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim)

    def pool(self, states: Tensor) -> Tensor:
        """(n, N, D) -> (n, D)."""
        return (states[:, 0] + states[:, 1]) / 2

    def forward(self, pooled: Tensor) -> Tensor:
        """(n, D) -> (n, E)."""
        out: Tensor = self.projection(self.norm(pooled))
        return out


HEADS: dict[str, Any] = {"image": ImageHead, "text": TextHead, "audio": AudioHead}


class TriptychModel(PreTrainedModel):
    """The encoder: tokens per modality, a trunk, and pooling and projection per modality."""

    config_class = TriptychConfig
    config: TriptychConfig

    def __init__(self, config: TriptychConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        tokenizers: dict[str, nn.Module] = {}
        if "image" in config.modalities:
            size = config.image_size
            tokenizers["image"] = PatchTokens(width, 3, size, size, config.image_patch, prefix=1)
        if "text" in config.modalities:
            tokenizers["text"] = TextTokens(config)
        if "audio" in config.modalities:  # low frequencies first
            mels, frames = config.audio_mels, config.audio_frames
            tokenizers["audio"] = PatchTokens(width, 1, mels, frames, config.audio_patch, prefix=2)
        self.tokenizers = nn.ModuleDict(tokenizers)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        keys = config.modalities if config.sharing == "none" else ["all"]
        self.norm = nn.ModuleDict({key: nn.LayerNorm(width, eps=config.layer_norm_eps) for key in keys})
        self.heads = nn.ModuleDict({name: HEADS[name](config) for name in config.modalities})
        self.log_scale = nn.ParameterDict({pair: nn.Parameter(torch.zeros(())) for pair in config.pairs})
        biases = config.pairs if config.sigmoid else []
        self.bias = nn.ParameterDict({pair: nn.Parameter(torch.zeros(())) for pair in biases})
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> TriptychOutput:
        """Attend over all that is given as one sequence.

        Args:
            pixel_values: images (n, 3, size, size) in [-1, 1].
            input_ids: texts (n, L).
            attention_mask: (n, L), 0 for padding; None: nothing is padded.
            input_values: spectrograms (n, frames, mels) of the exported feature extractor.
            return_dict: for callers that pass it; the outcome always has names.
        """
        streams: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        if pixel_values is not None:
            streams["image"] = self.tokenizers["image"](pixel_values)
        if input_ids is not None:
            valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            streams["text"] = self.tokenizers["text"](input_ids, valid.bool())
            if attention_mask is not None:
                masks["text"] = valid.bool()
        if input_values is not None:
            streams["audio"] = self.tokenizers["audio"](input_values.transpose(1, 2)[:, None])
        if not streams:
            raise ValueError("give at least one of pixel_values, input_ids, input_values")
        lengths = {name: tokens.shape[1] for name, tokens in streams.items()}
        mask = None
        if masks:  # (n, 1, 1, N), True where there is something to attend to
            every = [masks.get(name, tokens.new_ones(tokens.shape[:2]).bool()) for name, tokens in streams.items()]
            mask = torch.cat(every, dim=1)[:, None, None]
        x = torch.cat(list(streams.values()), dim=1)
        for block in self.blocks:
            x = block(x, mask, lengths)
        x = apart(self.norm, "forward", x, lengths)
        parts = dict(zip(lengths, torch.split(x, list(lengths.values()), dim=1), strict=True))
        heads: Any = self.heads
        pooled = {f"{name}_features": heads[name].pool(states) for name, states in parts.items()}
        return TriptychOutput(last_hidden_state=x, **pooled)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Embeddings (n, E) of images alone, not normalised."""
        return self._embed("image", self(pixel_values=pixel_values).image_features)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embeddings (n, E) of texts alone, not normalised."""
        return self._embed("text", self(input_ids=input_ids, attention_mask=attention_mask).text_features)

    def get_audio_features(self, input_values: Tensor) -> Tensor:
        """Embeddings (n, E) of sounds alone, not normalised."""
        return self._embed("audio", self(input_values=input_values).audio_features)

    def similarity(self, pair: str, one: Tensor, other: Tensor) -> Tensor:
        """Logits (n, m) of embeddings (n, E) and (m, E): scaled cosines, as they were trained.

        Args:
            pair: of config.pairs, such as image_text.
            one: embeddings of its first modality.
            other: of its second.
        """
        if pair not in self.config.pairs:
            raise ValueError(f"{pair} was not trained to be compared; trained were: {', '.join(self.config.pairs)}")
        logits: Tensor = self.log_scale[pair].exp() * F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).T
        return logits + self.bias[pair] if pair in self.bias else logits

    def _embed(self, modality: str, features: Tensor) -> Tensor:
        if not self.config.pairs:
            raise ValueError("this encoder was trained without contrast: its embeddings mean nothing; use the features")
        out: Tensor = self.heads[modality](features)
        return out

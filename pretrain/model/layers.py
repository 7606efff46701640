"""The pre-LN Transformer block. Shapes: n samples, N tokens, D width, H heads."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6
LONGEST_PLAIN = 1024  # tokens
ALL = "all"  # the key of weights that all modalities share


def attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    """Softmax attention over all tokens that are valid.

    Args:
        q: (n, H, N, D / H), like ``k`` and ``v``.
        k: the keys.
        v: the values.
        valid: (n, N) bool, False for tokens that nothing may attend to; None where all are valid.

    Returns:
        (n, H, N, D / H).
    """
    attended = None if valid is None else valid[:, None, None, :]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= LONGEST_PLAIN:
        # With matrix units for bf16, the CPU's fused kernel is 6-9 times slower than the plain product in the backward
        # pass at 17-65 tokens, and still 1.5 times at 577; in fp32 there is no difference up to 257 tokens. But the
        # plain product keeps H x N x N weights for that pass: with 12 heads 25 MB per sample and layer at 1,024 tokens.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if attended is not None:
            scores = scores.masked_fill(~attended, float("-inf"))
        weighted: Tensor = scores.softmax(dim=-1) @ v
        return weighted
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attended)


class Attention(nn.Module):
    """Weights of multi-head self-attention (Vaswani et al. 2017, section 3.2) behind a LayerNorm, with biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def project(self, x: Tensor) -> Tensor:
        """(n, N, D) -> queries, keys and values (n, N, 3 D)."""
        projected: Tensor = self.qkv(self.norm(x))
        return projected


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, behind a LayerNorm."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, N, D) -> (n, N, D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return out


class Block(nn.Module):
    """Attention over all tokens and a feed-forward layer, each beside a residual path.

    Weights have the key ALL where all tokens share them, or one key for each modality that has its own.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        attention_keys: Sequence[str] = (ALL,),
        feed_forward_keys: Sequence[str] = (ALL,),
    ) -> None:
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict({key: Attention(width, heads) for key in attention_keys})
        self.feed_forward = nn.ModuleDict({key: FeedForward(width, mlp_ratio) for key in feed_forward_keys})

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        lengths: Mapping[str, int] | None = None,
        first: int | None = None,
    ) -> Tensor:
        """(n, N, D) -> (n, N, D).

        Args:
            x: tokens, those of each modality together.
            valid: (n, N) as in ``attention``.
            lengths: modality -> how many of the N tokens are its, in their order; not needed where all share weights.
            first: of tokens of one modality, so many first ones are wanted; they attend to all. None: all are.
        """
        qkv = apart(self.attention, "project", x, lengths)
        # In three parts before anything else: their gradients then come together in one copy.
        q, k, v = (rearrange(part, "n N (H d) -> n H N d", H=self.heads) for part in qkv.chunk(3, dim=-1))
        if first is not None:
            x, q, lengths = x[:, :first], q[:, :, :first], lengths and dict.fromkeys(lengths, first)
        attended = rearrange(attention(q, k, v, valid), "n H N d -> n N (H d)")
        x = x + apart(self.attention, "out", attended, lengths)
        return x + apart(self.feed_forward, "forward", x, lengths)


def weights_of(modules: nn.ModuleDict, modality: str) -> Any:
    """The weights that the modality uses: those that all share, or its own."""
    return modules[ALL if ALL in modules else modality]


def apart(modules: nn.ModuleDict, method: str, x: Tensor, lengths: Mapping[str, int] | None) -> Tensor:
    """Tokens (n, N, D) through the weights that all share, or those of each modality through its own."""
    if ALL in modules:
        shared: Tensor = getattr(modules[ALL], method)(x)
        return shared
    if lengths is None:
        raise ValueError(f"weights of {', '.join(modules)}: needs to know which tokens are whose")
    parts = zip(lengths, torch.split(x, list(lengths.values()), dim=1), strict=True)
    return torch.cat([getattr(modules[modality], method)(part) for modality, part in parts], dim=1)


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linear layers, as MAE (He et al. 2022); normal(0, 0.02) embeddings; zero biases.

    At width 128 linear layers from normal(0, 0.02) are several times too small and learn several times slower.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Of (n, N, D) the tokens at (n, K) -> (n, K, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

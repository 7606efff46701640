"""The pre-LN Transformer block. Shapes: n samples, N tokens, D width, H heads."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6


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
    mask = None if valid is None else valid[:, None, None, :]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The CPU's fused kernel is 6-9 times slower than the plain product in the bf16 backward pass at 17-65
        # tokens, and still 1.5 times at 577; in fp32 there is no difference up to 257 tokens.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weighted: Tensor = scores.softmax(dim=-1) @ v
        return weighted
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2) with biases, one matrix for q, k and v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """(n, N, D) -> (n, N, D); ``valid`` (n, N) as in ``attention``."""
        q, k, v = rearrange(self.qkv(x), "n N (three H d) -> three n H N d", three=3, H=self.heads)
        out: Tensor = self.out(rearrange(attention(q, k, v, valid), "n H N d -> n N (H d)"))
        return out


class Block(nn.Module):
    """Attention and a GELU feed-forward layer, each behind a LayerNorm and beside a residual path."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(width, int(width * mlp_ratio))
        self.fc2 = nn.Linear(int(width * mlp_ratio), width)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(n, N, D) -> (n, N, D); ``valid`` (n, N) as in ``attention``."""
        x = x + self.attention(self.norm1(x), valid)
        hidden: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + hidden


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

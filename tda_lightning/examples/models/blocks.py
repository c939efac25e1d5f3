"""Pre-norm transformer blocks, shared by the decoder and the encoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and a feed-forward layer, each normalised before and added after.

    Takes hidden states [batch, position, width] and ``unseen``, true where a position (the last
    axis but one) does not see another (the last axis); it broadcasts to [batch, head, position,
    position].

    Args:
        width: of the residual stream.
        heads: attention heads.
        dropout: after attention and feed-forward.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, hidden: Tensor, unseen: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.norm1(hidden), unseen)
        return hidden + self.feed_forward(self.norm2(hidden))


class Attention(nn.Module):
    """Multi-head attention of the positions of a sequence to each other."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}.")
        self.heads = heads
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        self.attention_dropout = nn.Dropout(dropout)
        self.output_dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, unseen: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        query, key, value = self.project_in(hidden).view(shape).permute(2, 0, 3, 1, 4)
        # Written out: the fused kernels have no second derivative, which Hessian-vector products
        # need.
        weights = query @ key.transpose(-2, -1) / (width // self.heads) ** 0.5
        weights = F.softmax(weights.masked_fill(unseen, float("-inf")), dim=-1)
        mixed = self.attention_dropout(weights) @ value
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        return self.output_dropout(self.project_out(mixed))

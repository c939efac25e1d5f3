"""A small decoder-only transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tda_lightning.examples.models.blocks import Block


class GPT(nn.Module):
    """Token and position embeddings, pre-norm blocks, a head over the vocabulary.

    Takes token numbers [batch, position] and gives logits [batch, position, token]. The layout is
    that of GPT-2 (Radford et al., 2019).

    Args:
        vocabulary_size: number of tokens.
        context: longest sequence.
        width: of the residual stream.
        depth: number of blocks.
        heads: attention heads in a block.
        dropout: after embeddings, attention and feed-forward.
        tied: the head shares the token embedding's weights.
    """

    def __init__(
        self,
        vocabulary_size: int,
        context: int,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary_size, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(
                f"Sequences of {length} tokens are longer than the model's context of "
                f"{self.context}."
            )
        positions = torch.arange(length, device=tokens.device)
        hidden = self.dropout(self.tokens(tokens) + self.positions(positions.expand_as(tokens)))
        future = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        for block in self.blocks:
            hidden = block(hidden, future)
        return self.head(self.norm(hidden))

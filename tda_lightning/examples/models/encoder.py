"""A small transformer encoder that classifies a sentence or a pair of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tda_lightning.examples.models.blocks import Block


class Encoder(nn.Module):
    """Token, position and kind embeddings, pre-norm blocks, mean pooling, a linear head.

    Takes token numbers [batch, position] and gives logits [batch, class]. Padding is seen by no
    position and left out of the mean, so it changes nothing. Every row needs a token besides.

    The kind of a position is one of four: before the first separator or from it on, and whether
    its token occurs on the other side too, the exact-match feature of Chen et al. (2017, "Reading
    Wikipedia to Answer Open-Domain Questions", sec. 3.2). Attention learns to compare words from
    far more pairs than a model trained from scratch on a processor sees.

    Args:
        vocabulary_size: number of tokens.
        context: longest sequence.
        outputs: classes.
        width: of the residual stream.
        depth: number of blocks.
        heads: attention heads in a block.
        dropout: after embeddings, attention and feed-forward.
        padding: the token that fills a sequence up.
        separator: the token between the sentences of a pair.
    """

    def __init__(
        self,
        vocabulary_size: int,
        context: int,
        outputs: int,
        width: int = 32,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        padding: int = 0,
        separator: int = 2,
    ) -> None:
        super().__init__()
        self.context = context
        self.padding = padding
        self.separator = separator
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Embedding(context, width)
        self.kinds = nn.Embedding(4, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        for embedding in (self.tokens, self.positions, self.kinds):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(
                f"Sequences of {length} tokens are longer than the model's context of "
                f"{self.context}."
            )
        padded = tokens == self.padding
        positions = torch.arange(length, device=tokens.device).expand_as(tokens)
        kinds = kinds_of(tokens, self.separator)
        hidden = self.tokens(tokens) + self.positions(positions) + self.kinds(kinds)
        hidden = self.dropout(hidden)
        for block in self.blocks:
            hidden = block(hidden, padded[:, None, None, :])
        counted = (~padded).unsqueeze(2).to(hidden.dtype)
        return self.head((self.norm(hidden) * counted).sum(1) / counted.sum(1))


def kinds_of(tokens: Tensor, separator: int) -> Tensor:
    """Side of the first separator (0 or 2), plus 1 where the token is on both sides.

    Both are int64 [batch, position].

    Example:
        >>> kinds_of(torch.tensor([[5, 6, 7, 2, 6, 5, 8, 0]]), separator=2)
        tensor([[1, 1, 0, 2, 3, 3, 2, 2]])
    """
    second = (tokens == separator).cumsum(1) > 0
    across = second.unsqueeze(2) != second.unsqueeze(1)
    same = tokens.unsqueeze(2) == tokens.unsqueeze(1)
    return 2 * second.long() + (same & across).any(2).long()

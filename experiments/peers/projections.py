"""What a random projection loses: TRAK's scores with three kinds of directions against all of them.

python -m experiments.peers.projections
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

NUM_TRAIN, NUM_QUERY, SEEDS = 1500, 100, 6
DIMENSIONS = (64, 128, 256, 512)
Factors = list[tuple[Tensor, Tensor]]  # inputs and output gradients of every layer
Projected = tuple[Tensor, Tensor]  # of training examples and queries


def trained() -> tuple[nn.Sequential, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """An MLP 64-24-10 after eight epochs, with training examples and queries."""
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels))
    inputs, labels = torch.tensor(pixels / 16.0).float()[order], torch.tensor(digits)[order]
    module = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    for _ in range(8):
        for rows in torch.randperm(NUM_TRAIN).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    query = slice(NUM_TRAIN, NUM_TRAIN + NUM_QUERY)
    train = (inputs[:NUM_TRAIN], labels[:NUM_TRAIN])
    return module, train, (inputs[query], labels[query])


def factors(module: nn.Sequential, data: tuple[Tensor, Tensor]) -> tuple[Factors, Tensor]:
    """Of the gradients of the log-odds, which are outer products; and 1 - p, [batch]."""
    inputs, labels = data
    first, _, second = module
    hidden = first(inputs)
    logits = second(hidden.relu()).detach().requires_grad_()
    correct = nn.functional.one_hot(labels, 10).bool()
    margins = logits.masked_select(correct) - logits.masked_fill(correct, -torch.inf).logsumexp(1)
    (upper,) = torch.autograd.grad(margins.sum(), logits)
    lower = (upper @ second.weight) * (hidden > 0)
    ones = torch.ones(len(inputs), 1)
    sides = [
        (torch.cat([inputs, ones], 1), lower),
        (torch.cat([hidden.relu(), ones], 1), upper),
    ]
    return [(a.detach().double(), b.detach().double()) for a, b in sides], torch.sigmoid(
        -margins.detach().double()
    )


def dense(sides: Factors) -> Tensor:
    """The gradients themselves, [batch, parameters]."""
    return torch.cat([(b[:, :, None] * a[:, None, :]).flatten(1) for a, b in sides], dim=1)


def normal(both: Sequence[Factors], dimension: int, seed: int) -> Projected:
    """A dense normal matrix."""
    generator = torch.Generator().manual_seed(seed)
    train, query = (dense(sides) for sides in both)
    matrix = torch.randn(train.shape[1], dimension, generator=generator).double()
    return train @ matrix, query @ matrix


def outer(both: Sequence[Factors], dimension: int, seed: int) -> Projected:
    """An outer product of normal vectors in every layer for each direction: ours."""
    generator = torch.Generator().manual_seed(seed)
    projected = [torch.zeros(()), torch.zeros(())]
    for layer, (inputs, outputs) in enumerate(both[0]):
        right, left = (
            torch.randn(side.shape[1], dimension, generator=generator).double()
            for side in (inputs, outputs)
        )
        for place, sides in enumerate(both):
            a, b = sides[layer]
            projected[place] = projected[place] + (a @ right) * (b @ left)
    return projected[0], projected[1]


def kronecker(both: Sequence[Factors], dimension: int, seed: int) -> Projected:
    """All products of a few normal vectors for each side of a layer; each layer has half of the
    directions."""
    generator = torch.Generator().manual_seed(seed)
    width = int((dimension / 2) ** 0.5)
    projected: list[list[Tensor]] = [[], []]
    for layer, (inputs, outputs) in enumerate(both[0]):
        rows = min(width, outputs.shape[1])
        columns = min(width if rows == width else 2 * width, inputs.shape[1])
        right = torch.randn(inputs.shape[1], columns, generator=generator).double()
        left = torch.randn(outputs.shape[1], rows, generator=generator).double()
        for place, sides in enumerate(both):
            a, b = sides[layer]
            projected[place].append(((b @ left)[:, :, None] * (a @ right)[:, None, :]).flatten(1))
    return torch.cat(projected[0], 1), torch.cat(projected[1], 1)


def trak(projected: Projected, slopes: Tensor, damping: float = 0.0) -> Tensor:
    """Scores [query, train]."""
    train, query = projected
    moments = train.T @ train
    moments.diagonal().add_(damping * moments.diagonal().mean())
    return (query @ torch.linalg.solve(moments, train.T)) * slopes


def correlation(first: Tensor, second: Tensor) -> float:
    """Mean over queries."""
    pairs = zip(first, second, strict=True)
    return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean())


KINDS: dict[str, Callable[[Sequence[Factors], int, int], Projected]] = {
    "dense normal": normal,
    "ours": outer,
    "Kronecker": kronecker,
}


def main() -> None:
    torch.set_num_threads(1)
    module, train, query = trained()
    (train_sides, slopes), (query_sides, _) = factors(module, train), factors(module, query)
    both = (train_sides, query_sides)
    whole = trak((dense(train_sides), dense(query_sides)), slopes, damping=0.01)
    print(f"| K | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|", sep="\n")
    for dimension in DIMENSIONS:
        cells = []
        for project in KINDS.values():
            scores = [trak(project(both, dimension, seed), slopes) for seed in range(SEEDS)]
            alone = sum(correlation(own, whole) for own in scores) / SEEDS
            mean = correlation(torch.stack(scores).mean(0), whole)
            pairs = list(zip(scores, scores[1:], strict=False))
            seeds = sum(correlation(*pair) for pair in pairs) / len(pairs)
            cells.append(f"{alone:.3f} / {mean:.3f}, seeds {seeds:.3f}")
        print(f"| {dimension} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

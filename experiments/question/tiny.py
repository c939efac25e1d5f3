"""Tiny problems under AdamW, many runs at once, and the derivative of a run: slow and obvious.

A run is a row of every tensor: its weights are one flat vector, and the models below multiply in
batches over runs. Nothing here is shared with the library, so it also serves as a check on it.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tda_lightning.examples.data import MNISTData

BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.01  # torch.optim.AdamW's own


@dataclass(frozen=True)
class Problem:
    """Data, a model and how it is trained.

    Attributes:
        inputs: [train, ...], then those of the queries.
        targets: the same.
        shapes: of the weights, by name.
        losses: (weights by name with a leading axis of runs, inputs [run, batch, ...],
            targets [run, batch, ...]) -> losses [run, batch].
        rate: of AdamW, constant.
    """

    inputs: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]
    shapes: dict[str, tuple[int, ...]]
    losses: Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]
    batch_size: int
    epochs: int
    rate: float

    @property
    def num_train(self) -> int:
        return len(self.inputs[0])


class State(NamedTuple):
    """Weights and both moments, each [run, weight]."""

    weights: Tensor
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Runs:
    """What is trained side by side.

    Attributes:
        seeds: of initial weights and order of batches, one for each run.
        weights: of the examples, float64 [run, train].
        removed: the order goes through the examples of weight 1 only, in fewer steps.
        spread: times sum_n g_n^2 / B^2 is added to the square of the gradient. With w (1 - w) the
            second moment is what it would be, on average, if the examples were in their batches
            with probability w.
        held: the derivative takes what ``spread`` adds as given.
        signs: the sum in ``spread`` is estimated by the mean square of so many sums with random
            signs; held. 0: from the gradients of single examples.
        speeds: multiples of the rate, one for each run; (): 1.
        blind: coordinates whose second moment is still 0 pass no derivative on.
    """

    seeds: Sequence[int]
    weights: Tensor
    removed: bool = False
    spread: float = 0.0
    held: bool = False
    signs: int = 0
    speeds: Sequence[float] = ()
    blind: bool = True


def orders(problem: Problem, runs: Runs) -> Tensor:
    """Which examples each step sees: int64 [run, step, batch]."""
    found = []
    for seed, weights in zip(runs.seeds, runs.weights, strict=True):
        generator = torch.Generator().manual_seed(1000 + seed)
        pool = weights.nonzero()[:, 0] if runs.removed else torch.arange(problem.num_train)
        epochs = [
            pool[torch.randperm(len(pool), generator=generator)] for _ in range(problem.epochs)
        ]
        found.append(torch.stack([epoch.view(-1, problem.batch_size) for epoch in epochs]))
    return torch.stack(found).flatten(1, 2)


def initial(problem: Problem, seeds: Sequence[int], dtype: torch.dtype) -> State:
    """Uniform within 1/sqrt(inputs), as torch.nn.Linear; vectors start at 0, or 1 for scales."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for name, shape in problem.shapes.items():
            bound = 1 / sqrt(shape[0])
            draw = (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * bound
            if len(shape) == 1:
                draw = torch.full(shape, float(name.endswith("scale")), dtype=torch.float64)
            parts.append(draw.flatten())
        rows.append(torch.cat(parts))
    weights = torch.stack(rows).to(dtype)
    return State(weights, torch.zeros_like(weights), torch.zeros_like(weights))


def named(problem: Problem, weights: Tensor) -> dict[str, Tensor]:
    """The flat weights [run, weight] by name, [run, ...]."""
    sizes = [prod(shape) for shape in problem.shapes.values()]
    return {
        name: part.unflatten(1, shape)
        for (name, shape), part in zip(
            problem.shapes.items(), weights.split(sizes, dim=1), strict=True
        )
    }


def step(
    problem: Problem,
    runs: Runs,
    state: State,
    chosen: Tensor,
    shares: Tensor,
    t: int,
    graph: bool = True,
) -> State:
    """Step ``t`` (from 1) of AdamW on the examples ``chosen``, [run, batch], of those shares."""
    inputs, targets = problem.inputs[0][chosen], problem.targets[0][chosen]
    weights, size = state.weights, problem.batch_size
    loss = (shares * problem.losses(named(problem, weights), inputs, targets)).sum() / size
    (gradient,) = torch.autograd.grad(loss, weights, create_graph=graph)
    first = BETAS[0] * state.first + (1 - BETAS[0]) * gradient
    square = gradient.square()
    if runs.spread and runs.signs:
        sums = [
            signed_sum(problem, weights, inputs, targets, 1000 * t + number)
            for number in range(runs.signs)
        ]
        square = square + runs.spread * torch.stack(sums).square().mean(0) / size**2
    elif runs.spread:
        own = per_example(problem, weights, inputs, targets, graph and not runs.held)
        square = square + runs.spread * own.square().sum(1) / size**2
    second = BETAS[1] * state.second + (1 - BETAS[1]) * square
    moved = second > 0
    root = (torch.where(moved, second, 1.0) / (1 - BETAS[1] ** t)).sqrt()
    if runs.blind:
        change = torch.where(moved, first / (root + EPS), 0.0)
    else:
        change = first / (torch.where(moved, root, 0.0) + EPS)
    speeds = torch.tensor(runs.speeds or [1.0] * len(weights), dtype=weights.dtype)
    rate = problem.rate * speeds[:, None]
    kept = weights * (1 - rate * DECAY)
    return State(kept - rate / (1 - BETAS[0] ** t) * change, first, second)


def signed_sum(
    problem: Problem, weights: Tensor, inputs: Tensor, targets: Tensor, seed: int
) -> Tensor:
    """Sum of the examples' gradients with random signs, [run, weight], outside of any graph."""
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(2, inputs.shape[:2], generator=generator) - 1
    weights = weights.detach().requires_grad_()
    with torch.enable_grad():
        losses = problem.losses(named(problem, weights), inputs, targets)
        (found,) = torch.autograd.grad((signs.to(losses.dtype) * losses).sum(), weights)
    return found


def per_example(
    problem: Problem, weights: Tensor, inputs: Tensor, targets: Tensor, graph: bool
) -> Tensor:
    """Gradients of single examples, [run, batch, weight]: each example as a run of its own."""
    runs, batch = inputs.shape[:2]
    if not graph:
        weights = weights.detach().requires_grad_()
    copies = weights[:, None].expand(runs, batch, weights.shape[1]).flatten(0, 1)
    losses = problem.losses(
        named(problem, copies), inputs.flatten(0, 1)[:, None], targets.flatten(0, 1)[:, None]
    )
    (gradients,) = torch.autograd.grad(losses.sum(), copies, create_graph=graph)
    return gradients.unflatten(0, (runs, batch))


def train(problem: Problem, runs: Runs, dtype: torch.dtype, keep: bool = False) -> list[State]:
    """The last state; with ``keep`` the states before each step too."""
    problem = cast(problem, dtype)
    state, order = initial(problem, runs.seeds, dtype), orders(problem, runs)
    states = []
    for t in range(order.shape[1]):
        if keep:
            states.append(state)
        shares = runs.weights.to(dtype).gather(1, order[:, t])
        started = State(state.weights.requires_grad_(), state.first, state.second)
        ended = step(problem, runs, started, order[:, t], shares, t + 1, graph=False)
        state = State(*(part.detach() for part in ended))
    return [*states, state]


def measure(problem: Problem, weights: Tensor) -> Tensor:
    """Losses of the queries, [run, query]."""
    problem = cast(problem, weights.dtype)
    inputs, targets = (
        part[1].expand(len(weights), *part[1].shape) for part in (problem.inputs, problem.targets)
    )
    return problem.losses(named(problem, weights), inputs, targets)


def scores(problem: Problem, runs: Runs) -> Tensor:
    """Minus the derivative of each query's loss by the examples' weights: [run, query, train].

    The chain rule, step by step from the end; each step is differentiated by autograd.
    """
    problem = cast(problem, torch.float64)
    *states, last = train(problem, runs, torch.float64, keep=True)
    order, weights = orders(problem, runs), last.weights.requires_grad_()
    measured = measure(problem, weights)
    queries = measured.shape[1]
    # [query, run, weight]; runs do not meet, so a sum over them has the gradient of each.
    start = torch.stack(
        [
            torch.autograd.grad(measured[:, q].sum(), weights, retain_graph=True)[0]
            for q in range(queries)
        ]
    )
    adjoint = [start, torch.zeros_like(start), torch.zeros_like(start)]
    found = torch.zeros(queries, len(runs.weights), problem.num_train, dtype=torch.float64)
    for t in reversed(range(order.shape[1])):
        shares = runs.weights.gather(1, order[:, t]).requires_grad_()
        before = State(*(part.detach().requires_grad_() for part in states[t]))
        after = step(problem, runs, before, order[:, t], shares, t + 1)
        *adjoint, by_share = torch.autograd.grad(
            after, (*before, shares), adjoint, is_grads_batched=True
        )
        found.scatter_add_(2, order[:, t].expand(queries, -1, -1), -by_share)
    return found.transpose(0, 1)


def cast(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same with data of real numbers in another precision."""

    def change(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return tuple(part.to(dtype) if part.is_floating_point() else part for part in pair)  # type: ignore[return-value]

    fields = {**vars(problem), "inputs": change(problem.inputs), "targets": change(problem.targets)}
    return Problem(**fields)


def concrete(root: Path) -> Problem:
    """Strength of concrete, standardised; a tanh network 8-32-32-1 and squared errors."""
    rows = np.loadtxt(root / "uci_concrete" / "concrete.csv", delimiter=",", skiprows=1)
    rows = rows[np.random.default_rng(0).permutation(len(rows))[:370]]
    rows = torch.from_numpy((rows - rows[:320].mean(0)) / rows[:320].std(0))

    def losses(w: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = torch.tanh(inputs @ w["in"] + w["in_bias"][:, None])
        hidden = torch.tanh(hidden @ w["hidden"] + w["hidden_bias"][:, None])
        out = (hidden @ w["out"])[..., 0] + w["out_bias"]
        return (out - targets).square()

    shapes = {"in": (8, 32), "in_bias": (32,), "hidden": (32, 32), "hidden_bias": (32,)}
    shapes |= {"out": (32, 1), "out_bias": (1,)}
    inputs, targets = rows[:, :-1], rows[:, -1]
    pairs = (inputs[:320], inputs[320:]), (targets[:320], targets[320:])
    return Problem(*pairs, shapes, losses, batch_size=16, epochs=15, rate=3e-3)


def mnist(root: Path) -> Problem:
    """Digits of 14 x 14 pixels; a ReLU network 196-32-32-10."""
    splits = MNISTData(root=str(root)).read()
    inputs, targets = [], []
    for seed, (split, count) in enumerate(zip(splits, (640, 40), strict=True)):
        chosen = np.random.default_rng(seed).permutation(len(split.labels))[:count]
        pixels = torch.from_numpy(split.images[chosen]).double()[:, None] / 255
        inputs.append((F.avg_pool2d(pixels, 2).flatten(1) - 0.13) / 0.31)
        targets.append(torch.from_numpy(split.labels[chosen]).long())

    def losses(w: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = torch.relu(inputs @ w["in"] + w["in_bias"][:, None])
        hidden = torch.relu(hidden @ w["hidden"] + w["hidden_bias"][:, None])
        return cross_entropy(hidden @ w["out"] + w["out_bias"][:, None], targets)

    shapes = {"in": (196, 32), "in_bias": (32,), "hidden": (32, 32), "hidden_bias": (32,)}
    shapes |= {"out": (32, 10), "out_bias": (10,)}
    pairs = (inputs[0], inputs[1]), (targets[0], targets[1])
    return Problem(*pairs, shapes, losses, batch_size=32, epochs=10, rate=3e-3)


def transformer(root: Path) -> Problem:
    """Running text of 128 different words in pieces of 16; one layer of width 32, two heads."""
    length, words, width, heads = 16, 128, 32, 2
    pieces = []
    for name, count in (("valid", 320), ("test", 16)):
        with gzip.open(root / "wikitext2" / f"wiki.{name}.tokens.gz", "rt") as lines:
            text = " <eos> ".join(line.strip() for line in lines).split()
        if name == "valid":
            common, counts = np.unique(np.array(text), return_counts=True)
            known = {
                w: i for i, w in enumerate(common[np.argsort(-counts, kind="stable")][: words - 1])
            }
        ids = torch.tensor([known.get(word, words - 1) for word in text])
        rows = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)
        chosen = np.random.default_rng(0).permutation(len(rows))[:count]
        pieces.append(rows[torch.from_numpy(chosen)])
    future = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)

    def normal(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * scale[:, None, None] + bias[:, None, None]

    def losses(w: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        runs, batch = inputs.shape[:2]

        def linear(x: Tensor, name: str) -> Tensor:
            flat = x.flatten(1, 2) @ w[name] + w[f"{name}_bias"][:, None]
            return flat.unflatten(1, (batch, length))

        # An embedding as a product with indicators: no kernel for indices is differentiated twice.
        indicators = F.one_hot(inputs, words).to(w["embed"].dtype).flatten(1, 2)
        x = (indicators @ w["embed"]).unflatten(1, (batch, length)) + w["place"][:, None]
        normed = normal(x, w["one_scale"], w["one_bias"])
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(2, 3)
            for part in linear(normed, "attend").chunk(3, dim=-1)
        )
        looked = (q @ k.transpose(-1, -2)) / sqrt(width // heads) + future.to(x.dtype)
        mixed = (looked.softmax(-1) @ v).transpose(2, 3).flatten(-2)
        x = x + linear(mixed, "mix")
        normed = normal(x, w["two_scale"], w["two_bias"])
        x = x + linear(F.gelu(linear(normed, "wide"), approximate="tanh"), "narrow")
        out = linear(normal(x, w["three_scale"], w["three_bias"]), "out")
        return (
            cross_entropy(out.flatten(1, 2), targets.flatten(1, 2))
            .view(runs, batch, length)
            .mean(-1)
        )

    shapes: dict[str, tuple[int, ...]] = {"embed": (words, width), "place": (length, width)}
    for name in ("one", "two", "three"):
        shapes |= {f"{name}_scale": (width,), f"{name}_bias": (width,)}
    layers = {"attend": 3 * width, "mix": width, "wide": 2 * width}
    for name, outputs in layers.items():
        shapes |= {name: (width, outputs), f"{name}_bias": (outputs,)}
    shapes |= {"narrow": (2 * width, width), "narrow_bias": (width,)}
    shapes |= {"out": (width, words), "out_bias": (words,)}
    pairs = [(p[:, :-1], p[:, 1:]) for p in pieces]
    inputs, targets = zip(*pairs, strict=True)
    return Problem(inputs, targets, shapes, losses, batch_size=16, epochs=6, rate=3e-3)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[run, row, class] and [run, row] -> [run, row]."""
    indicators = F.one_hot(targets, logits.shape[-1]).to(logits.dtype)
    return logits.logsumexp(-1) - (logits * indicators).sum(-1)


PROBLEMS = {"concrete": concrete, "mnist": mnist, "transformer": transformer}

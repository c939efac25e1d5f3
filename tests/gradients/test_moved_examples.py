"""Models that sort, pick, pack or route examples, of which the first batch shows nothing.

The oracle is plain autograd on every example alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from tda_lightning.gradients import GradientEngine
from tda_lightning.gradients.moments import FULL

Batch = tuple[Tensor, Tensor]  # inputs [batch, time, 4] and lengths [batch]
TIME = 4


def parts(**modules: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    module = nn.Module()
    for name, part in modules.items():
        module.add_module(name, part)
    return module.double()


def batch_of(lengths: list[int], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(len(lengths), TIME, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.tensor(lengths)


def mask_of(lengths: Tensor) -> Tensor:
    return torch.arange(TIME) < lengths[:, None]


def summed(rows: Tensor, owner: Tensor, batch: int) -> Tensor:
    """A loss of each row, summed by example."""
    losses = rows.square().sum(-1)
    return losses.new_zeros(batch).index_add(0, owner, losses)


def flattened(m: nn.Module, batch: Batch) -> Tensor:
    """Only real tokens go through the layers."""
    inputs, lengths = batch
    mask = mask_of(lengths)
    owner = torch.arange(len(lengths))[:, None].expand_as(mask)[mask]
    return summed(m.g(m.norm(m.f(inputs[mask]).tanh())), owner, len(lengths))


def flattened_tokens(m: nn.Module, batch: Batch) -> Tensor:
    inputs, lengths = batch
    mask = mask_of(lengths)
    owner = torch.arange(len(lengths))[:, None].expand_as(mask)[mask]
    words = inputs[..., 0].abs().mul(3).long().clamp(max=6)
    return summed(m.f(m.embed(words[mask])).tanh(), owner, len(lengths))


def flattened_images(m: nn.Module, batch: Batch) -> Tensor:
    """A convolution sees real rows alone, as images."""
    inputs, lengths = batch
    mask = mask_of(lengths)
    owner = torch.arange(len(lengths))[:, None].expand_as(mask)[mask]
    return summed(m.group(m.conv(inputs[mask][:, None])).tanh().flatten(1), owner, len(lengths))


def sorted_inside(m: nn.Module, batch: Batch) -> Tensor:
    inputs, lengths = batch
    order = lengths.sort(descending=True, stable=True).indices
    hidden = (m.f(inputs[order]).tanh() * mask_of(lengths[order])[..., None]).sum(1)
    return m.g(hidden[order.argsort()]).square().sum(1)


def sorted_in_python(m: nn.Module, batch: Batch) -> Tensor:
    inputs, lengths = batch
    order = sorted(range(len(inputs)), key=lengths.tolist().__getitem__)
    rows = inputs.unbind(0)
    hidden = m.f(torch.stack([rows[i] for i in order])).tanh().sum(1)
    back = torch.empty_like(hidden)
    back[order] = hidden
    return m.g(back).square().sum(1)


def shuffled(m: nn.Module, batch: Batch) -> Tensor:
    """Python's own random order, by numbers, with nothing read from a tensor."""
    inputs, _ = batch
    order = list(range(len(inputs)))
    random.shuffle(order)
    hidden = m.f(torch.cat([inputs[i : i + 1] for i in order])).tanh().sum(1)
    return m.g(torch.stack([hidden[order.index(i)] for i in range(len(order))])).square().sum(1)


def experts(m: nn.Module, batch: Batch) -> Tensor:
    """Each example goes to one expert; some expert may get none, or all."""
    inputs, lengths = batch
    pooled, out = inputs.sum(1), inputs.new_zeros(len(inputs), 3)
    for number, expert in enumerate((m.a, m.b)):
        mine = (lengths % 2 == number).nonzero().squeeze(1)
        out = out.index_add(0, mine, expert(pooled[mine]).tanh())
    return m.head(out).square().sum(1)


def dispatched(m: nn.Module, batch: Batch) -> Tensor:
    """The same by products with one-hot matrices, as mixtures of experts do it."""
    inputs, lengths = batch
    slot = lengths.argsort(stable=True).argsort()
    places = F.one_hot(slot, len(inputs)).double()  # [example, slot]
    hidden = m.f(torch.einsum("es,ed->sd", places, inputs.sum(1))).tanh()
    return m.g(torch.einsum("es,sd->ed", places, hidden)).square().sum(1)


def permuted_by_a_matrix(m: nn.Module, batch: Batch) -> Tensor:
    inputs, lengths = batch
    first = torch.arange(len(inputs))[:, None]
    places = (first == lengths.argsort(stable=True)[:, None].T).double()  # [example, slot]
    return m.g(places @ m.f(places.T @ inputs[:, 0]).tanh()).square().sum(1)


def last_tokens(m: nn.Module, batch: Batch) -> Tensor:
    inputs, lengths = batch
    hidden = m.f(inputs).tanh()[torch.arange(len(inputs)), lengths - 1]
    return m.g(hidden).square().sum(1)


def top_tokens(m: nn.Module, batch: Batch) -> Tensor:
    """The two largest tokens of each example, all in one axis, best first."""
    inputs, _ = batch
    best = inputs.norm(dim=2).topk(2).indices  # [batch, 2]
    chosen = inputs.gather(1, best[..., None].expand(-1, -1, 4)).transpose(0, 1).flatten(0, 1)
    rows = m.g(m.f(chosen).tanh())
    return summed(rows, torch.arange(len(inputs)).repeat(2), len(inputs))


def one_by_one(m: nn.Module, batch: Batch) -> Tensor:
    """A loop over examples of different lengths: no axis of any layer's output is the batch's."""
    return torch.stack(
        [
            m.g(m.f(inputs[:length]).tanh()).square().sum()
            for inputs, length in zip(batch[0], batch[1].tolist(), strict=True)
        ]
    )


def without_axis(m: nn.Module, batch: Batch) -> Tensor:
    return torch.stack([m.g(m.f(row.sum(0)).tanh()).square().sum() for row in batch[0]])


def packed_by_the_model(m: nn.Module, batch: Batch) -> Tensor:
    """Layers on the data of a packed sequence, whose rows are ordered by time and length."""
    inputs, lengths = batch
    packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
    hidden = packed._replace(data=m.f(packed.data).tanh())
    padded, _ = pad_packed_sequence(hidden, batch_first=True)
    return m.g(padded.sum(1)).square().sum(1)


def time_first_sorted(m: nn.Module, batch: Batch) -> Tensor:
    inputs, lengths = batch
    order = lengths.argsort(stable=True)
    hidden = m.f(inputs[order].transpose(0, 1)).tanh().sum(0)
    return m.g(hidden[order.argsort()]).square().sum(1)


def deduplicated(m: nn.Module, batch: Batch) -> Tensor:
    """Examples of the same length share the row of a table, which a layer has seen once."""
    inputs, lengths = batch
    unique, inverse = lengths.unique(return_inverse=True)
    table = m.g(F.one_hot(unique, 5).double()[:, :4].contiguous().expand(-1, 4) @ m.mix)
    return (m.f(inputs.sum(1)).tanh() * table[inverse]).square().sum(1)


def linear_pair(width: int = 3) -> Callable[[], nn.Module]:
    return lambda: parts(f=nn.Linear(4, width), g=nn.Linear(width, 2))


def _deduplicated() -> nn.Module:
    module = parts(f=nn.Linear(4, 3), g=nn.Linear(4, 3))
    module.register_buffer("mix", torch.randn(4, 4, dtype=torch.float64))
    return module


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Batch], Tensor]]] = {
    "flattened": (
        lambda: parts(f=nn.Linear(4, 3), norm=nn.LayerNorm(3), g=nn.Linear(3, 2)),
        flattened,
    ),
    "flattened tokens": (
        lambda: parts(embed=nn.Embedding(7, 3, padding_idx=1), f=nn.Linear(3, 2)),
        flattened_tokens,
    ),
    "flattened images": (
        lambda: parts(conv=nn.Conv1d(1, 4, 3, padding=1), group=nn.GroupNorm(2, 4)),
        flattened_images,
    ),
    "sorted": (linear_pair(), sorted_inside),
    "sorted in Python": (linear_pair(), sorted_in_python),
    "shuffled": (linear_pair(), shuffled),
    "experts": (
        lambda: parts(a=nn.Linear(4, 3), b=nn.Linear(4, 3), head=nn.Linear(3, 2)),
        experts,
    ),
    "dispatched": (linear_pair(), dispatched),
    "permuted": (linear_pair(), permuted_by_a_matrix),
    "last tokens": (linear_pair(), last_tokens),
    "top tokens": (linear_pair(), top_tokens),
    "one by one": (linear_pair(), one_by_one),
    "without axis": (linear_pair(), without_axis),
    "packed": (linear_pair(), packed_by_the_model),
    "time first": (linear_pair(), time_first_sorted),
    "deduplicated": (_deduplicated, deduplicated),
}
LENGTHS = ([3, 1, 4, 2], [2, 2, 4, 4, 1, 3], [1, 1, 1], [4, 3, 2, 1], [2], [3, 3, 1, 1])


def dense(engine: GradientEngine, loss, batch: object, count: int) -> dict[str, Tensor]:
    found = engine.gradients(lambda m, b, e: loss(m, b), batch, torch.arange(count)).blocks
    tensors: dict[str, Tensor] = {}
    for block in engine.blocks:
        tensors |= block.tensors(found[block.name].dense(slice(None)))
    return tensors


def alone(module: nn.Module, loss, singles: list[object]) -> dict[str, Tensor]:
    names, values = zip(*module.named_parameters(), strict=True)
    rows = [
        torch.autograd.grad(loss(module, single).sum(), values, materialize_grads=True)
        for single in singles
    ]
    return {
        n: torch.stack(column) for n, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, truth in expected.items():
        error = float((found[name] - truth).abs().max())
        assert error <= 1e-10 * float(truth.abs().max()) + 1e-14, (name, error)


@pytest.mark.filterwarnings("ignore:Per-example gradients of", "ignore:In some batches")
@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_found_wherever_the_model_puts_them(kind: str) -> None:
    build, loss = KINDS[kind]
    module = build()
    engine = GradientEngine(module, [name for name, _ in module.named_parameters()])
    first = batch_of([2] * 6, seed=0)  # nothing to see in it
    engine.discover(lambda m, b, e: loss(m, b), first, torch.arange(6))
    for seed, lengths in enumerate(LENGTHS):
        batch = batch_of(lengths, seed)
        singles = [(batch[0][n : n + 1], batch[1][n : n + 1]) for n in range(len(lengths))]
        found = dense(engine, loss, batch, len(lengths))
        require_equal(found, alone(module, loss, singles))


def cut_by_collate(m: nn.Module, batch: tuple[list[Tensor], list[int]]) -> Tensor:
    """The batch is a list of tensors of different lengths."""
    sequences, _ = batch
    owner = torch.cat([torch.full((len(x),), n) for n, x in enumerate(sequences)])
    return summed(m.g(m.f(torch.cat(sequences)).tanh()), owner, len(sequences))


def padded_by_the_model(m: nn.Module, batch: tuple[list[Tensor], list[int]]) -> Tensor:
    sequences, _ = batch
    padded = pad_sequence(sequences[::-1], batch_first=True)
    hidden = (m.f(padded).tanh() * padded.any(2, keepdim=True)).sum(1).flip(0)
    return m.g(hidden).square().sum(1)


def ordered_by_the_batch(m: nn.Module, batch: tuple[list[Tensor], list[int]]) -> Tensor:
    """The order is in numbers of the batch, not in a tensor."""
    sequences, order = batch
    inverse = sorted(range(len(order)), key=order.__getitem__)
    ranked = [inverse.index(i) for i in range(len(order))]
    hidden = m.f(torch.stack([sequences[i].sum(0) for i in inverse])).tanh().split(1)
    return m.g(torch.cat([hidden[i] for i in ranked])).square().sum(1)


@pytest.mark.parametrize("loss", [cut_by_collate, padded_by_the_model, ordered_by_the_batch])
def test_examples_are_found_in_lists_of_unequal_tensors(loss) -> None:
    module = linear_pair()()
    engine = GradientEngine(module, [name for name, _ in module.named_parameters()])

    def listed(lengths: list[int], seed: int) -> tuple[list[Tensor], list[int]]:
        inputs, _ = batch_of(lengths, seed)
        return [x[:length] for x, length in zip(inputs, lengths, strict=True)], [*lengths]

    first = listed([2] * 6, 0)
    engine.discover(lambda m, b, e: loss(m, b), first, torch.arange(6))
    assert engine.generic == []
    for seed, lengths in enumerate(LENGTHS):
        batch = listed(lengths, seed)
        singles = [([x], [1]) for x in batch[0]]
        require_equal(dense(engine, loss, batch, len(lengths)), alone(module, loss, singles))


def test_a_loop_over_examples_needs_no_second_run() -> None:
    """Rows of single calls are put together: factored, and without torch.func."""
    build, loss = KINDS["one by one"]
    module = build()
    engine = GradientEngine(module, [name for name, _ in module.named_parameters()])
    engine.discover(lambda m, b, e: loss(m, b), batch_of([2] * 6, 0), torch.arange(6))
    assert engine.generic == [] and engine.notes == []


def positions_of_its_length(m: nn.Module, batch: Batch) -> Tensor:
    """In one batch as many positions as examples go through the layer, shared by all."""
    inputs, lengths = batch
    if int(lengths[0]) == TIME:
        return (inputs * m.f(torch.eye(4, dtype=torch.float64))).square().sum((1, 2))
    return m.f(inputs).square().sum((1, 2))


@pytest.mark.filterwarnings("ignore:Per-example gradients of")
def test_a_batch_whose_examples_share_rows_is_taken_one_by_one_with_a_note() -> None:
    module = parts(f=nn.Linear(4, 4))
    engine = GradientEngine(module, ["f.weight", "f.bias"])
    loss = positions_of_its_length
    engine.discover(lambda m, b, e: loss(m, b), batch_of([2] * 6, 0), torch.arange(6))
    batch = batch_of([4] * 4, 1)
    singles = [(batch[0][n : n + 1], batch[1][n : n + 1]) for n in range(4)]
    with pytest.warns(UserWarning, match=r"f\.bias, f\.weight.*example by example"):
        found = dense(engine, loss, batch, 4)
    require_equal(found, alone(module, loss, singles))
    assert len(engine.notes) == 1


def test_an_ordinary_model_is_observed_once() -> None:
    """Batches whose layouts are certain by shape cost no further backward pass."""
    module = parts(f=nn.Linear(4, 3), g=nn.Linear(3, 2))
    engine = GradientEngine(module, [name for name, _ in module.named_parameters()])
    loss = lambda m, b: m.g(m.f(b[0]).tanh()).square().sum((1, 2))  # noqa: E731
    engine.discover(lambda m, b, e: loss(m, b), batch_of([2] * 6, 0), torch.arange(6))
    passes: list[int] = []
    batch = batch_of([2] * 9, 1)
    backward = torch.autograd.grad

    def counted(*args, **kwargs):
        passes.append(1)
        return backward(*args, **kwargs)

    torch.autograd.grad = counted
    try:
        engine.gradients(lambda m, b, e: loss(m, b), batch, torch.arange(9))
    finally:
        torch.autograd.grad = backward
    assert len(passes) == 1


def in_single(m: nn.Module, batch: Batch) -> Tensor:
    """A norm that is computed in float32 whatever the module is in, as language models do it."""
    inputs, lengths = batch
    order = lengths.argsort(stable=True)
    hidden = m.f(inputs[order].sum(1))
    normed = F.layer_norm(hidden.float(), [3]).to(hidden.dtype)
    return m.g(normed)[order.argsort()].square().sum(1)


def test_rounding_in_a_coarser_precision_is_not_taken_for_shared_rows() -> None:
    module = linear_pair()()
    engine = GradientEngine(module, [name for name, _ in module.named_parameters()])
    first = batch_of([2, 1, 3, 2, 4, 2], seed=0)
    engine.discover(lambda m, b, e: in_single(m, b), first, torch.arange(6))
    assert engine.generic == []
    batch = batch_of([3, 1, 4, 2], seed=1)
    found = dense(engine, in_single, batch, 4)
    assert engine.notes == []
    singles = [(batch[0][n : n + 1], batch[1][n : n + 1]) for n in range(4)]
    for name, truth in alone(module, in_single, singles).items():
        assert float((found[name] - truth).abs().max()) < 1e-5 * float(truth.abs().max())


def _covariances(module: nn.Module, loss, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    engine = GradientEngine(module, [name for name, _ in module.named_parameters()])
    engine.discover(lambda m, b, e: loss(m, b), batch_of([2] * 6, 0), torch.arange(6))
    count = len(batch[1])
    found = engine.gradients(lambda m, b, e: loss(m, b), batch, torch.arange(count))
    return found.blocks["f"].covariances((FULL, FULL))


def test_covariances_are_over_the_rows_that_are_there() -> None:
    """Of examples with different numbers of rows: no filled-up row counts, no dead row is lost."""

    def rectified(m: nn.Module, batch: Batch) -> Tensor:
        inputs, lengths = batch
        mask = mask_of(lengths)
        owner = torch.arange(len(lengths))[:, None].expand_as(mask)[mask]
        return summed(m.g(m.f(inputs[mask]).relu()), owner, len(lengths))

    module, batch = linear_pair()(), batch_of([3, 1, 4, 2], seed=1)
    _, right, count = _covariances(module, rectified, batch)
    rows = batch[0][mask_of(batch[1])]
    extended = F.pad(rows, (0, 1), value=1.0)
    torch.testing.assert_close(right[0], extended.T @ extended)
    assert float(count) == len(rows) == 10


def test_covariances_of_sorted_examples_are_those_of_the_same_model_unsorted() -> None:
    def unsorted(m: nn.Module, batch: Batch) -> Tensor:
        inputs, lengths = batch
        hidden = (m.f(inputs).tanh() * mask_of(lengths)[..., None]).sum(1)
        return m.g(hidden).square().sum(1)

    module, batch = linear_pair()(), batch_of([3, 1, 4, 2], seed=1)
    found = _covariances(module, sorted_inside, batch)
    for value, other in zip(found, _covariances(module, unsorted, batch), strict=True):
        torch.testing.assert_close(value, other)

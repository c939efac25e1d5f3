"""Cutting a batch gives what its loader makes of one example, up to padding."""

from __future__ import annotations

import types
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.utils.data import DataLoader

from tda_lightning.runtime.layouts import CannotCut, cut, learned, misfit
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.origins import inherit, origin_of
from tda_lightning.runtime.structures import mapped, moved, parts, same
from tda_lightning.tasks.batches import apart, num_examples, take

Pair = namedtuple("Pair", "a b")


@dataclass
class Record:
    a: Any
    b: Any


class Thing:
    def __init__(self, a: Any, b: Any) -> None:
        self.a, self.b = a, b


def rows(n: list[int]) -> Tensor:
    """Two numbers for each example."""
    return torch.tensor([[k, k * k] for k in n], dtype=torch.float64)


def long(n: list[int], **how: Any) -> Tensor:
    parts = [torch.full((1 + k % 4, 2), float(k)) for k in n]
    return pad_sequence(parts, padding_value=-1.0, **how)


LEAVES: dict[str, Callable[[list[int]], Any]] = {
    "rows": rows,
    "columns": lambda n: rows(n).T,
    "numbers": lambda n: torch.tensor(n),
    "array": lambda n: rows(n).numpy(),
    "padded": lambda n: long(n, batch_first=True),
    "time first": long,
    "table": lambda n: torch.arange(5),
    "square": lambda n: torch.eye(3),
    "places": lambda n: torch.arange(long(n).shape[0]),
    "strings": lambda n: [f"{k}" for k in n],
    "unequal": lambda n: [torch.full((1 + k % 3,), float(k)) for k in n],
    "objects": lambda n: tuple({"k": torch.tensor(k), "name": str(k)} for k in n),
    "packed": lambda n: pack_sequence(
        [torch.full((1 + k % 4, 2), float(k)) for k in n], enforce_sorted=False
    ),
    "how many": len,
    "how many, tensor": lambda n: torch.tensor(len(n)),
    "constant": lambda n: 3,
    "nothing": lambda n: None,
    "sparse": lambda n: rows(n).to_sparse(),
}
CONTAINERS: dict[str, Callable[[Any, Any], Any]] = {
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "pair": Pair,
    "dict": lambda a, b: {"a": a, "b": b},
    "ordered": lambda a, b: OrderedDict(a=a, b=b),
    "user": lambda a, b: UserDict(a=a, b=b),
    "record": Record,
    "thing": Thing,
}
FORMS = st.recursive(
    st.sampled_from(sorted(LEAVES)),
    lambda inner: st.tuples(st.sampled_from(sorted(CONTAINERS)), inner, inner),
    max_leaves=5,
)


def build(form: Any, n: list[int]) -> Any:
    if isinstance(form, str):
        return LEAVES[form](n)
    kind, a, b = form
    return CONTAINERS[kind](build(a, n), build(b, n))


def begins(padded: Any, one: Any) -> bool:
    """Whether it is the batch of one, and behind that padding at most."""
    if isinstance(padded, Tensor) and padded.layout == torch.strided:
        kept = padded[tuple(slice(0, size) for size in one.shape)]
        return torch.equal(kept, one)
    inside, there = parts(padded), parts(one)
    if inside is None or there is None:
        return same(padded, one)
    return inside.keys() == there.keys() and all(begins(inside[k], there[k]) for k in inside)


@settings(deadline=None, max_examples=60)
@given(FORMS, st.integers(2, 6))
def test_a_cut_is_the_batch_of_one(form: Any, count: int) -> None:
    examples = [7 * k % 11 for k in range(1, count + 1)]
    batch, alone = build(form, examples), [build(form, [k]) for k in examples]
    rule = learned(batch, alone)
    assert rule.whole
    for position, one in enumerate(alone):
        assert misfit(rule, batch, position, one) is None
        again = cut(rule, batch, position, count)
        assert type(again) is type(batch) and begins(again, one)


def test_what_is_no_layout_is_none() -> None:
    examples = [1, 2, 3]
    for build_batch in (
        lambda n: torch.cat([torch.full((k,), k) for k in n]),
        lambda n: types.MappingProxyType({k: torch.tensor(k) for k in n}),
        lambda n: {f"example {k}": torch.tensor(k) for k in n},
        lambda n: object(),
        lambda n: torch.nested.as_nested_tensor([torch.ones(k) for k in n]),
    ):
        rule = learned(build_batch(examples), [build_batch([k]) for k in examples])
        assert not rule.whole
    whole = learned(rows(examples), [rows([k]) for k in examples])
    with pytest.raises(CannotCut, match="laid out otherwise"):
        cut(whole, rows([1, 2]), 0, 3)


class Items:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return index


class Silent:
    """A batch without parts that can be seen."""

    __slots__ = ("__weakref__", "rows")

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows


def test_a_batch_remembers_its_examples() -> None:
    module = nn.Linear(2, 2)
    loader = DataLoader(Items(), 4, collate_fn=lambda n: {"x": rows(n), "t": torch.arange(4)})
    source = ExampleSource.of(loader, 4, "training")
    batch = source.batch([1, 3, 5, 7], module)
    assert num_examples(batch) == 4
    assert same(take(batch, 2, 4), {"x": rows([5]), "t": torch.arange(4)})
    slices, axes, single = apart(batch, 4)
    assert axes == [0, None] and same(single([slices[0][2], slices[1]]), take(batch, 2, 4))
    # A batch that was changed is another one, unless it is said to be the same.
    other = {"x": batch["x"] * 2, "t": batch["t"]}
    assert origin_of(other) is None and len(take(other, 2, 4)["t"]) == 1
    inherit(batch, other)
    assert len(take(other, 2, 4)["t"]) == 4

    closed = ExampleSource.of(
        DataLoader(Items(), 4, collate_fn=lambda n: Silent(rows(n))), 4, "training"
    )
    batch = closed.batch([1, 3, 5, 7], module)
    assert torch.equal(take(batch, 2, 4).rows, rows([5])) and num_examples(batch) == 4
    del closed
    with pytest.raises(CannotCut, match="gone"):
        take(batch, 2, 4)


def test_batches_that_are_cut_short_are_refused() -> None:
    """To the shortest example: what is left of one depends on the others."""
    loader = DataLoader(
        Items(), 4, collate_fn=lambda n: torch.stack([torch.ones(4)[: 1 + min(n) % 4] for _ in n])
    )
    with pytest.raises(ValueError, match="the batch depends on all its examples"):
        ExampleSource.of(loader, 4, "training").checked(nn.Linear(2, 2))


def whole_batches_only(n: list[int]) -> Tensor:
    assert len(n) > 1
    return rows(n)


def test_what_fits_by_chance_does_not_count() -> None:
    """Joined sequences, of which some batches look like rows or like a table of everybody's."""

    def joined(n: list[int]) -> dict[str, Tensor]:
        owner = torch.cat([torch.full((1 + k % 2,), place) for place, k in enumerate(n)])
        return {"x": torch.cat([torch.full((k % 3,), k) for k in n]), "owner": owner}

    module = nn.Linear(2, 2)
    source = ExampleSource.of(DataLoader(Items(), 2, collate_fn=joined), 2, "training")
    assert source.checked(module).notes == ()
    for indices in ([0, 2], [1, 3], [4, 6], [0, 1, 4]):
        batch = source.batch(indices, module)
        for position, index in enumerate(indices):
            assert same(take(batch, position, len(indices)), joined([index]))


def test_a_loader_that_makes_no_single_examples_is_noted() -> None:
    loader = DataLoader(Items(), 4, collate_fn=whole_batches_only)
    source = ExampleSource.of(loader, 4, "training").checked(nn.Linear(2, 2))
    assert ["could not be read by themselves" in note for note in source.notes] == [True]


def test_batches_are_moved_by_their_parts() -> None:
    meta = torch.device("meta")
    batch = Record(UserDict(x=torch.ones(2)), [np.ones(2), (torch.ones(1), "a")])
    there = moved(batch, meta)
    assert there.a["x"].device == meta and there.b[1][0].device == meta
    assert batch.a["x"].device.type == "cpu" and there.b[0] is batch.b[0]
    doubled = mapped(lambda part: part.double(), batch)
    assert doubled.a["x"].dtype == torch.float64 and type(doubled.a) is UserDict

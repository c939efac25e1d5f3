"""The gradient engine against a loop over examples, on every way a parameter can enter a loss."""

from __future__ import annotations

import copy
import dataclasses
import gc
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tda_lightning.gradients import GradientEngine
from tda_lightning.gradients.capture import Capture
from tda_lightning.records.errors import EngineError, NonFiniteError
from tda_lightning.tasks import TrainingStepTask
from tests import oracles
from tests.cases import CASES, Case
from tests.cases.case import Function, normal, parameter

BOUND = 1e-9


def engine_of(case: Case, module: nn.Module | None = None) -> GradientEngine:
    module = case.build() if module is None else module
    return GradientEngine(module, [n for n, p in module.named_parameters() if p.requires_grad])


def with_examples(loss):
    """The engine's losses also take the examples' indices."""
    return lambda module, batch, examples: loss(module, batch)


def dense(engine: GradientEngine, loss, batch, first: int = 0) -> dict[str, Tensor]:
    """Per-example gradients by parameter, as plain tensors."""
    examples = torch.arange(len(batch[0])) + first
    found = engine.gradients(with_examples(loss), batch, examples)
    tensors: dict[str, Tensor] = {}
    for block in engine.blocks:
        tensors |= block.tensors(found.blocks[block.name].dense(slice(None)))
    return tensors


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor], scale=None) -> None:
    """Each example's gradient of each parameter, relative to the largest one of the parameter."""
    assert set(found) == set(expected)
    for name, truth in expected.items():
        assert found[name].shape == truth.shape, name
        error = (found[name] - truth).reshape(len(truth), -1).norm(dim=1).max()
        largest = truth.reshape(len(truth), -1).norm(dim=1).max()
        # A gradient that is zero in exact arithmetic is compared with the other parameters'.
        whole = max(float(g.reshape(len(g), -1).norm(dim=1).max()) for g in expected.values())
        assert error <= BOUND * max(float(largest), 1e-3 * whole), (name, float(error))


def squared_outputs(module: nn.Module, batch) -> Tensor:
    """A measurement that is not the loss: it reads no target."""
    return module(batch[0]).square().reshape(len(batch[0]), -1).sum(1) / 7


@pytest.mark.filterwarnings("ignore:Per-example gradients of")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_those_of_a_loop_over_examples(case: Case) -> None:
    """On the first batch, one of another size and order, one example, and for a measurement."""
    engine = engine_of(case)
    module, first = engine.module, case.batch()
    try:
        engine.discover(with_examples(case.loss), first, torch.arange(case.size))
        batches = [first]
        if case.size > 1:
            order = torch.randperm(case.size, generator=torch.Generator().manual_seed(3))
            batches.append(oracles.take(first, order))
        batches += [case.batch(size, seed=size) for size in (5, 1)]
        pairs = [(case.loss, batch) for batch in batches]
        for loss, batch in [*pairs, (squared_outputs, first)]:
            expected = oracles.per_example_gradients(module, loss, batch)
            require_equal(dense(engine, loss, batch), expected)
    except EngineError as error:
        assert case.may_refuse, error
        assert any(name in str(error) for name in engine.names), error


def test_several_batches_follow_one_discovery() -> None:
    """The usual loop: equal batches and a smaller last one; a training batch seen first."""
    case = next(case for case in CASES if case.name == "transformer/language_model")
    engine = engine_of(case)
    engine.discover(with_examples(case.loss), case.batch(6), torch.arange(6))
    data = case.batch(9, seed=5)
    expected = oracles.per_example_gradients(engine.module, case.loss, data)
    parts = [
        dense(engine, case.loss, oracles.take(data, range(start, min(start + 4, 9))), start)
        for start in range(0, 9, 4)
    ]
    require_equal({n: torch.cat([part[n] for part in parts]) for n in expected}, expected)


def test_a_batch_is_let_go_without_the_garbage_collector() -> None:
    """What watches the forward pass holds the inputs of all layers: in a cycle of references they
    would pile up over batches."""
    case = CASES[0]
    engine = engine_of(case)
    engine.discover(with_examples(case.loss), case.batch(6), torch.arange(6))
    gc.collect()
    gc.disable()
    try:
        dense(engine, case.loss, case.batch(6, 1))
        left = [value for value in gc.get_objects() if isinstance(value, Capture)]
    finally:
        gc.enable()
    assert not left


def test_several_losses_share_one_forward_pass() -> None:
    case = next(case for case in CASES if case.name == "shared/blocks")
    engine, batch = engine_of(case), case.batch()
    engine.discover(with_examples(case.loss), batch, torch.arange(case.size))
    calls: list[int] = []

    def losses(module, batch, examples):
        calls.append(len(examples))
        outputs = module(batch[0])
        return (outputs[:, column] for column in range(outputs.shape[1]))

    found = list(engine.each_gradient(losses, batch, torch.arange(case.size)))
    assert calls == [case.size]
    for column, gradients in enumerate(found):
        expected = oracles.per_example_gradients(
            engine.module, lambda m, b, c=column: m(b[0])[:, c], batch
        )
        tensors: dict[str, Tensor] = {}
        for block in engine.blocks:
            tensors |= block.tensors(gradients.blocks[block.name].dense(slice(None)))
        require_equal(tensors, expected)


# What a watcher of layers gets wrong where only the first batch looks ordinary.


def _both_layouts(module: nn.Module, inputs: Tensor) -> Tensor:
    first = module.f(inputs).tanh()
    return first + module.f(first.transpose(0, 1)).tanh().transpose(0, 1)


def _sorted(module: nn.Module, inputs: Tensor) -> Tensor:
    """Examples in the order of their first feature, as code for packed sequences does it."""
    order = inputs[:, 0].argsort()
    return module.f(inputs[order]).tanh()[order.argsort()]


def _gathered(module: nn.Module, inputs: Tensor) -> Tensor:
    """An expert that sees only some examples: all of them in the first batch."""
    chosen = inputs[:, 0] > 0
    out = inputs.clone()
    out[chosen] = module.f(inputs[chosen]).tanh()
    return out


class _Hidden(torch.autograd.Function):
    """A product that no function mode sees."""

    @staticmethod
    def forward(context, inputs, weight):
        context.save_for_backward(inputs, weight)
        return inputs @ weight

    @staticmethod
    def backward(context, gradient):
        inputs, weight = context.saved_tensors
        return gradient @ weight.T, inputs.T @ gradient


def _custom(module: nn.Module, inputs: Tensor) -> Tensor:
    return _Hidden.apply(module.f(inputs).tanh(), module.weight) + inputs @ module.weight


ODD = {
    "both layouts": Case(
        "odd/both", lambda: Function(_both_layouts, f=nn.Linear(3, 3)), normal(4, 3), size=4
    ),
    "sorted": Case("odd/sorted", lambda: Function(_sorted, f=nn.Linear(3, 3)), normal(3), size=5),
    "custom function": Case(
        "odd/custom",
        lambda: Function(_custom, f=nn.Linear(3, 3), weight=parameter(3, 3)),
        normal(3),
        size=5,
    ),
}


@pytest.mark.filterwarnings("ignore:Per-example gradients of")
@pytest.mark.parametrize("name", ODD)
def test_what_only_looks_ordinary_is_still_exact(name) -> None:
    case = ODD[name]
    engine, first = engine_of(case), case.batch()
    order = first[0].flatten(1)[:, 0].argsort()
    first = oracles.take(first, order)
    engine.discover(with_examples(case.loss), first, order)
    for batch in (first, case.batch(4, seed=3), case.batch(7, seed=4)):
        expected = oracles.per_example_gradients(engine.module, case.loss, batch)
        require_equal(dense(engine, case.loss, batch), expected)


def test_a_layer_that_later_sees_only_some_examples_is_refused_by_name() -> None:
    case = Case("odd/gathered", lambda: Function(_gathered, f=nn.Linear(3, 3)), normal(3), size=6)
    engine, (inputs, targets) = engine_of(case), case.batch()
    engine.discover(with_examples(case.loss), (inputs.abs(), targets), torch.arange(6))
    for positive in (2, 3, 4):
        part = inputs.abs()
        part[positive:, 0] *= -1
        try:
            found = dense(engine, case.loss, (part, targets))
        except EngineError as error:
            assert "f.bias" in str(error) and "not laid out by example" in str(error)
        else:
            truth = oracles.per_example_gradients(engine.module, case.loss, (part, targets))
            require_equal(found, truth)


def test_a_frozen_embedding_with_max_norm_is_looked_up_as_the_model_does() -> None:
    layers = nn.Sequential(nn.Embedding(6, 3, max_norm=0.5), nn.Linear(3, 2)).double()
    layers[0].requires_grad_(False)
    engine = GradientEngine(layers, ["1.weight", "1.bias"])
    engine.discover(with_examples(squared_outputs), (torch.arange(3),), torch.arange(3))
    unseen = (torch.arange(3, 6),)  # a look-up rescales its rows of the table
    expected = oracles.per_example_gradients(copy.deepcopy(layers), squared_outputs, unseen)
    require_equal(dense(engine, squared_outputs, unseen), expected)


def test_a_linear_layer_whose_weight_is_stored_transposed() -> None:
    """As GPT-2 has it: one matrix with the bias as its last column, like any linear layer."""
    case = next(case for case in CASES if case.name == "bare/conv1d")
    engine, batch = engine_of(case), case.batch()
    engine.discover(with_examples(case.loss), batch, torch.arange(case.size))
    assert engine.generic == []
    (block,) = (b for b in engine.blocks if "weight" in b.parameters)
    assert block.parameters == ("weight", "bias") and block.shape == (1, 4, 4)
    tensors = {name: p.detach() for name, p in engine.module.named_parameters()}
    matrix = block.matrix(tensors)
    assert torch.equal(matrix[0], torch.cat([tensors["weight"].T, tensors["bias"][:, None]], 1))
    for name, tensor in block.tensors(matrix).items():
        assert torch.equal(tensor, tensors[name])
    both = next(case for case in CASES if case.name == "bare/product_both_ways")
    engine = engine_of(both)
    engine.discover(with_examples(both.loss), both.batch(), torch.arange(both.size))
    assert engine.generic == ["weight"]


@pytest.mark.parametrize(
    ("name", "generic"),
    [
        ("bare/transposed", []),
        ("bare/stored_transposed", []),
        ("bare/one_and_scale", []),
        ("bare/one_and_scale_elsewhere", ["scale"]),
    ],
)
def test_views_of_parameters_are_followed_to_their_use(name: str, generic: list[str]) -> None:
    """Falcon's linear layers are ``x @ weight.T``, Gemma's norms end in ``x * (1 + weight)``."""
    case = next(case for case in CASES if case.name == name)
    engine, batch = engine_of(case), case.batch()
    engine.discover(with_examples(case.loss), batch, torch.arange(case.size))
    assert engine.generic == generic


POSITIONS = {
    "arange": lambda m, x: m.head((m.embed(x) + m.positions(torch.arange(5))).tanh()),
    "one row": lambda m, x: m.head((m.embed(x) + m.positions(torch.arange(5)[None])).tanh()),
    "from the left": lambda m, x: m.head((m.positions(torch.arange(5))[None] + m.embed(x)).tanh()),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_that_are_asked_once_for_all_examples(name: str) -> None:
    build = lambda: Function(  # noqa: E731
        POSITIONS[name], embed=nn.Linear(3, 4), positions=nn.Embedding(7, 4), head=nn.Linear(4, 2)
    )
    case = Case("positions", build, normal(5, 3))
    engine, batch = engine_of(case), case.batch()
    engine.discover(with_examples(case.loss), batch, torch.arange(case.size))
    assert engine.generic == []
    expected = oracles.per_example_gradients(engine.module, case.loss, batch)
    require_equal(dense(engine, case.loss, batch), expected)


TOKENS = {
    "expand": lambda m, x: m.mix(torch.cat([m.token.expand(len(x), -1, -1), m.embed(x)], 1)),
    "repeat": lambda m, x: m.mix(torch.cat([m.token.repeat(len(x), 1, 1), m.embed(x)], 1)),
    "broadcast": lambda m, x: m.mix(
        torch.cat([torch.broadcast_to(m.token[0, 0] * 0 + m.token, (len(x), 1, 4)), m.embed(x)], 1)
    ),
}


@pytest.mark.parametrize("name", TOKENS)
def test_a_class_token_is_repeated_for_every_example(name: str) -> None:
    build = lambda: Function(  # noqa: E731
        lambda m, x: TOKENS[name](m, x).tanh(),
        token=parameter(1, 1, 4),
        embed=nn.Linear(3, 4),
        mix=nn.Linear(4, 2),
    )
    case = Case("token", build, normal(5, 3))
    engine, batch = engine_of(case), case.batch()
    engine.discover(with_examples(case.loss), batch, torch.arange(case.size))
    assert (engine.generic == []) == (name != "broadcast")
    expected = oracles.per_example_gradients(engine.module, case.loss, batch)
    require_equal(dense(engine, case.loss, batch), expected)


def test_positions_that_are_used_elsewhere_too_have_no_native_form() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        own = m.positions(torch.arange(5))
        return m.head((m.embed(x) + own).tanh()) * own.square().sum()

    build = lambda: Function(  # noqa: E731
        run, embed=nn.Linear(3, 4), positions=nn.Embedding(7, 4), head=nn.Linear(4, 2)
    )
    case = Case("positions", build, normal(5, 3))
    engine, batch = engine_of(case), case.batch()
    engine.discover(with_examples(case.loss), batch, torch.arange(case.size))
    assert engine.generic == ["positions.weight"]
    expected = oracles.per_example_gradients(engine.module, case.loss, batch)
    require_equal(dense(engine, case.loss, batch), expected)


def test_checkpointed_layers_are_seen() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(checkpoint(m.body, m.stem(x), use_reentrant=False))

    body = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    build = lambda: Function(run, stem=nn.Linear(3, 4), body=body, head=nn.Linear(4, 2))  # noqa: E731
    case = Case("checkpointed", build, normal(3))
    engine, batch = engine_of(case), case.batch()
    engine.discover(with_examples(case.loss), batch, torch.arange(case.size))
    assert engine.generic == []
    expected = oracles.per_example_gradients(engine.module, case.loss, batch)
    require_equal(dense(engine, case.loss, batch), expected)


def _contrast(module: nn.Module, batch, examples) -> Tensor:
    features = module(batch[0])
    return (features @ features.T).logsumexp(1)


@pytest.mark.filterwarnings("ignore:Per-example gradients of")
@pytest.mark.parametrize("name", ["batch norm", "batch norm of vectors", "contrast"])
def test_examples_that_influence_one_another_are_refused_by_name(name) -> None:
    if name == "contrast":
        module, inputs, loss = nn.Linear(3, 2).double(), torch.randn(5, 3).double(), _contrast
        named = "weight"
    elif name == "batch norm":
        module = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)).double().train()
        inputs, named = torch.randn(5, 2, 4).double(), "0.weight"
        loss = lambda m, b, e: m(b[0]).square().flatten(1).sum(1)  # noqa: E731
    else:
        module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh()).double().train()
        inputs, named = torch.randn(5, 2).double(), "0.weight"
        loss = lambda m, b, e: m(b[0])[:, :2].sum(1)  # noqa: E731
    engine = GradientEngine(module, [name for name, _ in module.named_parameters()])
    with pytest.raises(EngineError, match="influence one another") as raised:
        engine.discover(loss, (inputs,), torch.arange(5))
    assert named in str(raised.value)


def test_a_loss_that_uses_no_parameter_is_refused() -> None:
    module = nn.Linear(3, 2).double()
    engine = GradientEngine(module, ["weight", "bias"])
    with pytest.raises(EngineError, match="depends on no trained parameter"):
        engine.discover(lambda m, b, e: b.sum(1), torch.randn(4, 3).double(), torch.arange(4))


def test_losses_must_be_one_finite_number_per_example() -> None:
    case = CASES[0]
    engine, batch = engine_of(case), case.batch()
    engine.discover(with_examples(case.loss), batch, torch.arange(case.size))
    with pytest.raises(ValueError, match="expected one loss per example"):
        engine.gradients(lambda m, b, e: case.loss(m, b).mean(), batch, torch.arange(case.size))
    batch[0][1] = float("nan")
    with pytest.raises(NonFiniteError, match="loss of example 7 is nan"):
        engine.gradients(with_examples(case.loss), batch, torch.arange(6, 6 + case.size))


def test_the_module_is_left_as_it_was() -> None:
    case = next(case for case in CASES if case.name == "adapted/frozen_head")
    engine, batch = engine_of(case), case.batch()
    module = engine.module
    before = {name: (p.requires_grad, p.clone()) for name, p in module.named_parameters()}
    engine.discover(with_examples(case.loss), batch, torch.arange(case.size))
    engine.gradients(with_examples(case.loss), batch, torch.arange(case.size))
    for name, value in module.named_parameters():
        assert value.requires_grad == before[name][0]
        assert torch.equal(value, before[name][1])
        assert value.grad is None


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8), nn.LayerNorm(8), nn.GroupNorm(2, 8)])
def test_norms_are_watched_without_another_rounding(norm) -> None:
    """Another rounding turns gradients at the kinks of what follows (a ReLU, a maximum)."""
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(8) + 0.1)
    inputs, seen = torch.randn(50, 8), []

    def loss(module, batch, examples):
        seen.append(module(batch))
        return seen[-1].sum(1)

    norm.eval()
    engine = GradientEngine(norm, ["weight", "bias"])
    engine.discover(loss, inputs, torch.arange(50))
    plain = norm(inputs)
    assert len(seen) > 2
    assert all(torch.equal(output, plain) for output in (seen[0], seen[1]))


class _AtAKink(nn.Module):
    """Another gradient in the first place of a batch, where float32 rounds so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("limit", torch.tensor(0.0))

    def forward(self, inputs: Tensor) -> Tensor:
        turned = torch.zeros(len(inputs), 1)
        turned[0] = 0.1 if inputs.dtype == torch.float32 else 0.0
        return self.layer(inputs) * (1 + turned) + self.limit


def test_rounding_at_a_kink_is_not_taken_for_examples_that_influence_one_another() -> None:
    module, inputs = _AtAKink(), torch.randn(5, 3)
    before = {name: (id(t), t.clone()) for name, t in module.state_dict(keep_vars=True).items()}
    engine = GradientEngine(module, ["layer.weight", "layer.bias"])
    engine.discover(lambda m, b, e: m(b).square().sum(1), inputs, torch.arange(5))
    assert engine.generic == []
    for name, tensor in module.state_dict(keep_vars=True).items():
        assert (id(tensor), tensor.dtype) == (before[name][0], torch.float32)
        assert torch.equal(tensor, before[name][1])


def test_float32_is_close_to_float64() -> None:
    """Single precision loses digits, not terms."""
    for name in ("conv/network", "transformer/encoder_batch_first", "lstm/classifier"):
        case = next(case for case in CASES if case.name == name)
        module = case.build().float()
        inputs, targets = case.batch(4)
        batch = (inputs.float() if inputs.is_floating_point() else inputs, targets)
        if targets.is_floating_point():
            batch = (batch[0], targets.float())
        exact = oracles.per_example_gradients(case.build(), case.loss, (inputs, targets))
        engine = engine_of(dataclasses.replace(case), module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.discover(with_examples(case.loss), batch, torch.arange(4))
        for key, found in dense(engine, case.loss, batch).items():
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), exact[key], rtol=1e-3, atol=1e-4)


def test_a_penalty_on_a_weight_keeps_its_fast_form() -> None:
    """It uses the weight once more, and is in no example's loss."""

    class Decayed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = F.mse_loss(self.net(batch[0]), batch[1])
            return loss + 0.1 * self.net.weight.square().sum() + self.net.bias.abs().sum()

    torch.manual_seed(0)
    module, task = Decayed().double(), TrainingStepTask()
    batch = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    task.prepare(module, batch)
    engine = GradientEngine(module, ["net.weight", "net.bias"])

    def loss(m: nn.Module, b: Any, e: Tensor) -> Tensor:
        return task.train_loss(m, b)

    engine.discover(loss, batch, torch.arange(5))
    assert engine.generic == []
    found = engine.gradients(loss, batch, torch.arange(5)).blocks["net"].dense(slice(None))
    for n in range(5):
        own = F.mse_loss(module.net(batch[0][n]), batch[1][n])
        weight, bias = torch.autograd.grad(own, [module.net.weight, module.net.bias])
        torch.testing.assert_close(found[n, 0], torch.cat([weight, bias[:, None]], 1))

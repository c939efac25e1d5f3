"""Products with the Gauss-Newton matrix and the Hessian, against dense matrices made by loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tda_lightning.curvature.products import PRODUCTS, WAYS, Products, as_rows
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.tasks import AttributionTask, TrainingStepTask
from tests.cases import CASES
from tests.cases.case import Case, Function, normal
from tests.cases.tasks import EXAMPLES, STEPS, TASKS, built, one, outer_sum, task_case
from tests.solving import case_context, context_of, dense_curvature, in_rows

BOUND = 1e-10
# One of each kind of operation and of each way around what torch cannot do; the others are slow.
QUICK = (
    "mlp/classification",
    "conv/network",
    "conv/2d_groups",
    "embedding/padding_index",
    "embedding/negative_padding_index",
    "norm/batch_2d",
    "attention/cross",
    "transformer/encoder",
    "transformer/language_model",
    "lstm/classifier",
    "gru/packed",
    "tied/embedding_and_head",
    "tied/autoencoder",
    "adapted/weight_norm",
    "trap/inplace_residual",
    "trap/detached_branch",
    "trap/layer_unused",
    "trap/activation_checkpointing",
)
QUICKLY = [
    case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow)
    for case in CASES
    if case.name != "embedding/bag"  # refused, see below
]


def vectors_of(context, count=3):
    size = sum(block.size for block in context.blocks)
    own = torch.Generator().manual_seed(5)
    return torch.randn(count, size, generator=own, dtype=torch.float64)


def relative(found, expected):
    scale = expected.norm()
    return float((found - expected).norm() / scale) if scale > 0 else float(found.norm())


@pytest.mark.filterwarnings("ignore:Per-example gradients of")
@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("case", QUICKLY, ids=lambda case: case.name)
def test_products_are_those_of_the_dense_matrix(case: Case, kind: str) -> None:
    context, data = case_context(case)
    matrix = dense_curvature(context, case, data, kind)
    vectors = vectors_of(context)
    products = Products(kind, context)
    assert relative(products.over_training_set(vectors), vectors @ matrix) < BOUND
    assert products.counted == len(vectors)


@pytest.mark.filterwarnings("ignore:Per-example gradients of")
@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("name", [n for n in QUICK if n != "trap/activation_checkpointing"])
def test_every_way_gives_the_same(name: str, kind: str) -> None:
    case = next(case for case in CASES if case.name == name)
    context, _ = case_context(case)
    vectors = vectors_of(context)
    found = []
    for way in range(len(WAYS)):
        products = Products(kind, context)
        products._way = way
        found.append(products.over_training_set(vectors))
        assert products._way >= way
    assert relative(found[1], found[0]) < BOUND
    assert relative(found[2], found[0]) < BOUND


def test_forward_mode_serves_ordinary_models_and_the_rest_is_told() -> None:
    ways = {}
    for name in ("conv/network", "transformer/encoder", "lstm/classifier", "gru/packed"):
        case = next(case for case in CASES if case.name == name)
        context, _ = case_context(case)
        products = Products("hessian", context)
        products.over_training_set(vectors_of(context, 2))
        ways[name] = products.way
    assert ways.pop("gru/packed") == WAYS[2]
    assert set(ways.values()) == {WAYS[0]}


def test_some_examples_and_many_vectors() -> None:
    case = next(case for case in CASES if case.name == "conv/network")
    context, data = case_context(case, examples=7, size=3)
    some = [5, 0, 1, 6]
    part = tuple(tensor[some] for tensor in data)
    matrix = dense_curvature(context, case, part, "gauss_newton")
    vectors = vectors_of(context, 19)  # more than go together
    products = Products("gauss_newton", context)
    assert relative(products.over(vectors, some), vectors @ matrix) < BOUND
    assert products.counted == pytest.approx(19 * 4 / 7)


@pytest.mark.parametrize("name", ["conv/network", "conv/2d_groups", "tied/embedding_and_head"])
def test_blocks_alone(name: str) -> None:
    """Each part of a vector meets its own block of the matrix, in every way."""
    case = next(case for case in CASES if case.name == name)
    context, data = case_context(case)
    number = torch.cat([torch.full((b.size,), k) for k, b in enumerate(context.blocks)])
    matrix = dense_curvature(context, case, data, "gauss_newton")
    matrix = matrix * (number[:, None] == number)
    vectors = vectors_of(context)
    for way in range(len(WAYS)):
        products = Products("gauss_newton", context, by_block=True)
        products._way = way
        assert relative(products.over_training_set(vectors), vectors @ matrix) < BOUND
        assert products._way == way and products.counted == len(vectors)


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("margin",)])
def test_gauss_newton_of_every_task(name: str) -> None:
    task, module, batch = task_case(name)
    context = _batch_context(module, task, batch)
    matrix = sum(outer_sum(task, module, batch, index) for index in range(EXAMPLES))
    vectors = vectors_of(context)
    found = Products("gauss_newton", context).of_batch(vectors, batch, torch.arange(EXAMPLES))
    assert relative(found, vectors @ in_rows(context, matrix)) < BOUND


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("name", [name for name in STEPS if name != "two losses"])
def test_curvature_of_a_training_step(name: str, kind: str) -> None:
    """The mean of the examples' losses has the curvature of the step's own loss."""
    module, batch = built(name)
    task = TrainingStepTask()
    task.training_batch_size = EXAMPLES
    context = _batch_context(module, task, batch)
    if kind == "hessian":

        def loss(*values):
            named = dict(zip(context.engine.names, values, strict=True))
            return torch.func.functional_call(_Stepping(module), _prefixed(named), (batch,))

        values = tuple(module.get_parameter(name).detach() for name in context.engine.names)
        rows = torch.autograd.functional.hessian(loss, values)
        sizes = [value.numel() for value in values]
        matrix = torch.cat(
            [
                torch.cat([p.reshape(m, n) for p, n in zip(row, sizes, strict=True)], 1)
                for row, m in zip(rows, sizes, strict=True)
            ]
        )
    else:
        matrix = sum(outer_sum(task, module, batch, i) for i in range(EXAMPLES)) / EXAMPLES
    vectors = vectors_of(context)
    found = Products(kind, context).of_batch(vectors, batch, torch.arange(EXAMPLES)) / EXAMPLES
    assert relative(found, vectors @ in_rows(context, matrix)) < BOUND


class _Stepping(nn.Module):
    """The loss of a training step as a forward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch):
        loss = self.module.training_step(batch, 0)
        return loss["loss"] if isinstance(loss, dict) else loss


def _prefixed(named):
    return {f"module.{name}": value for name, value in named.items()}


class _Batch(torch.utils.data.Dataset):
    """The examples of a batch of any form."""

    def __init__(self, batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int):
        return torch.utils._pytree.tree_map(lambda t: t[0], one(self.batch, index))


def _batch_context(module, task, batch):
    return context_of(module, task, _Batch(batch), EXAMPLES)


def test_embedding_bag_is_refused() -> None:
    case = next(case for case in CASES if case.name == "embedding/bag")
    context, _ = case_context(case)
    for kind in PRODUCTS:
        with pytest.raises(UnsupportedTrainingError, match="_embedding_bag_backward.*solver=None"):
            Products(kind, context).over_training_set(vectors_of(context))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        ctx.save_for_backward(values)
        return values**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 3 * gradient * ctx.saved_tensors[0] ** 2


def test_a_function_without_second_derivative_is_refused() -> None:
    layers = {"first": nn.Linear(3, 3), "second": nn.Linear(3, 2)}
    case = Case(
        "once",
        lambda: Function(lambda m, x: m.second(_Once.apply(m.first(x))), **layers),
        normal(3),
    )
    context, _ = case_context(case)
    with pytest.raises(UnsupportedTrainingError, match="once_differentiable"):
        Products("hessian", context).over_training_set(vectors_of(context))


class _Wrong(torch.autograd.Function):
    """Its forward-mode derivative is not that of its backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values):
        return values**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient * ctx.saved_tensors[0] ** 2

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * tangent * ctx.saved_tensors[0] ** 2


def test_a_forward_mode_that_contradicts_the_backward_pass_is_left() -> None:
    layers = {"first": nn.Linear(3, 3), "second": nn.Linear(3, 2)}
    case = Case(
        "wrong",
        lambda: Function(lambda m, x: m.second(_Wrong.apply(m.first(x))), **layers),
        normal(3),
    )
    context, data = case_context(case)
    vectors = vectors_of(context)
    for kind in PRODUCTS:
        products = Products(kind, context)
        found = products.over_training_set(vectors)
        assert products.way == WAYS[2]
        assert relative(found, vectors @ dense_curvature(context, case, data, kind)) < BOUND


class _Poisson(AttributionTask):
    def train_loss(self, module, batch):
        rates = module(batch[0]).sum(1)
        return rates.exp() - batch[1][:, 0] * rates


def test_a_loss_that_is_no_standard_one_has_a_gauss_newton_matrix() -> None:
    """J^T H J with H = exp(rate) for each example, in the sum of its outputs."""
    case = next(case for case in CASES if case.name == "mlp/regression")
    module, batch = case.build(), case.batch(6)
    context = context_of(module, _Poisson(), torch.utils.data.TensorDataset(*batch), 4)
    vectors = vectors_of(context)
    assert Products("hessian", context).over_training_set(vectors).isfinite().all()
    rates = module(batch[0]).sum(1)
    parameters = [module.get_parameter(name) for name in context.engine.names]
    rows = [torch.autograd.grad(rate, parameters, retain_graph=True) for rate in rates]
    jacobian = torch.stack(
        [as_rows(context.blocks, dict(zip(context.engine.names, row, strict=True))) for row in rows]
    )
    wanted = vectors @ jacobian.T @ (rates.detach().exp()[:, None] * jacobian) / 6
    found = Products("gauss_newton", context).over_training_set(vectors)
    assert relative(found, wanted) < BOUND


def test_products_leave_model_and_generators_as_they_were() -> None:
    case = next(case for case in CASES if case.name == "trap/dropout_in_eval")
    context, _ = case_context(case)
    before = torch.get_rng_state()
    required = [p.requires_grad for p in context.module.parameters()]
    for kind in PRODUCTS:
        Products(kind, context).over_training_set(vectors_of(context))
    assert torch.equal(torch.get_rng_state(), before)
    assert [p.requires_grad for p in context.module.parameters()] == required
    assert all(p.grad is None for p in context.module.parameters())


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="'fisher': expected one of gauss_newton, hessian"):
        Products("fisher", None)  # type: ignore[arg-type]

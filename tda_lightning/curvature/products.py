r"""Products of vectors with the curvature of the mean training loss, without a matrix.

With :math:`l_n` the loss of example n as trained, of outputs :math:`o_n(\theta)`:

============ =====================================================================================
gauss_newton :math:`G v = \frac1N \sum_n J_n^\top \nabla_o^2 l_n J_n v`: J v is a derivative in
             forward mode, J^T one backward pass. Exact, no labels are sampled
hessian      :math:`H v = \frac1N \sum_n \nabla_\theta^2 l_n v`: forward mode over the gradient
             (Pearlmutter 1994, "Fast exact multiplication by the Hessian")
============ =====================================================================================

Several vectors share what does not depend on them (vmap over the forward mode). Where vmap cannot
take a model, vectors go one by one. Where an operation has no forward-mode derivative, both
products are derivatives of a backward pass: H v that of <gradient, v>, and J v that of <J^T u, v>
with respect to u. Fused attention is replaced by its definition throughout, and fused recurrent
layers by their steps: they have such derivatives.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from tda_lightning.gradients import Block
from tda_lightning.gradients.capture import Capture
from tda_lightning.gradients.functional import (
    Lossy,
    ends_early,
    parameters_frozen,
    plain_recurrence,
)
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.session.session import Session, Span
from tda_lightning.tasks import seeded_examples
from tda_lightning.tasks.gauss_newton import require_losses

PRODUCTS = ("gauss_newton", "hessian")
WAYS = (
    "forward mode, several vectors at once",
    "forward mode, vector by vector",
    "derivatives of the backward pass, vector by vector",
)
_PREFIX = "module."  # of a parameter's name within Lossy
_TOGETHER = {"cpu": 8}  # vectors; an accelerator takes _MANY
_MANY = 32

Parameters = dict[str, Tensor]


def check_product(kind: str) -> None:
    """Refuse an unknown kind of product."""
    if kind not in PRODUCTS:
        raise ValueError(f"Unknown curvature {kind!r}: expected one of {', '.join(PRODUCTS)}.")


def as_rows(blocks: Sequence[Block], tensors: Mapping[str, Tensor]) -> Tensor:
    """Tensors of the parameters' shapes with any leading axes as one row each, block by block:
    [..., parameters]."""
    return torch.cat([block.matrix(tensors).flatten(-3) for block in blocks], dim=-1)


def as_matrices(blocks: Sequence[Block], rows: Tensor) -> dict[str, Tensor]:
    """[..., parameters] -> [..., groups, rows, columns] by block."""
    parts = rows.split([block.size for block in blocks], dim=-1)
    return {b.name: part.unflatten(-1, b.shape) for b, part in zip(blocks, parts, strict=True)}


def as_tensors(blocks: Sequence[Block], rows: Tensor) -> dict[str, Tensor]:
    """The inverse of :func:`as_rows`."""
    matrices = as_matrices(blocks, rows)
    return {n: t for b in blocks for n, t in b.tensors(matrices[b.name]).items()}


class Products:
    """Multiplies vectors with the curvature of the training loss at the weights in place.

    Vectors are rows over all trained parameters, [vector, parameters], in the order of
    ``session.blocks``.

    Args:
        kind: one of ``PRODUCTS``.
        session: model, task and training set.
        by_block: keep the blocks on the matrix's diagonal only (the layers), and multiply each
            part of a vector with its own. Every block takes a derivative of its own, of what
            follows it in the model.
        used: the steps whose use of examples weighs them in the means (docs/methods.md, "Uneven
            use"); None: evenly. It may be changed between products.

    Attributes:
        way: which of ``WAYS`` the model takes, from its first product on.
        counted: products so far, in units of one vector and the whole training set.
    """

    def __init__(
        self, kind: str, session: Session, *, by_block: bool = False, used: Span | None = None
    ) -> None:
        check_product(kind)
        if session.engine.masked:
            raise UnsupportedTrainingError(
                f"Hooks hold some entries of {', '.join(session.engine.masked)} fixed, of which "
                "products with the curvature know nothing. Use a curvature that is made of "
                "gradients (EK-FAC, K-FAC, diagonal), or freeze whole parameters."
            )
        self.kind, self.session, self.by_block, self.used = kind, session, by_block, used
        self.counted = 0.0
        self._way = 0
        self._checked = False
        self._together = _TOGETHER.get(session.device.type, _MANY)

    @property
    def way(self) -> str:
        """How products are computed, in words."""
        return WAYS[self._way]

    def over_training_set(self, vectors: Tensor) -> Tensor:
        """The product with the mean over the training set; each process adds its share of it.

        All processes must ask for it, with the same vectors.
        """
        session = self.session
        total = torch.zeros_like(vectors)
        for batch in session.walk("products with the curvature"):
            total += self.of_batch(vectors, batch.data, batch.examples)
        self.counted += len(vectors)
        return session.reduce(total) / session.num_train

    def over(self, vectors: Tensor, examples: Sequence[int]) -> Tensor:
        """The product with the mean over some training examples, the same in every process."""
        size = self.session.batch_size
        parts = [examples[start : start + size] for start in range(0, len(examples), size)]
        total = torch.zeros_like(vectors)
        for batch, indices in self.session.batches(parts):
            total += self.of_batch(vectors, batch, indices)
        self.counted += len(vectors) * len(examples) / self.session.num_train
        return total / len(examples)

    def of_batch(self, vectors: Tensor, batch: object, examples: Tensor) -> Tensor:
        """The product with the weighted sum over the examples of a batch.

        Raises:
            ValueError: the Gauss-Newton matrix of the task is unknown.
            UnsupportedTrainingError: an operation has no second derivative.
        """
        session = self.session
        weights = session.curvature_weights(examples, self.used)
        groups: list[Sequence[str]] = [session.engine.names]
        if self.by_block:
            groups = [block.parameters for block in session.blocks]
        named = dict(session.module.named_parameters())
        calls = []
        for group in groups:
            values = {name: named[name].detach() for name in group}
            calls.append(_BatchCurvature(session, self.kind, values, batch, examples, weights))
        if not self._checked:
            self._check(calls)
        products = [self._rows(calls, vectors) for _ in session.losses.each_draw()]
        return torch.stack(products).mean(0) if len(products) > 1 else products[0]

    def _check(self, calls: Sequence[_BatchCurvature]) -> None:
        """Leave the forward mode where it does not fit the backward pass: the matrix would not be
        symmetric (an operation whose two derivatives are not of the same function)."""
        self._checked = True
        session = self.session
        size = sum(block.size for block in session.blocks)
        own = torch.Generator().manual_seed(0)
        pair = torch.randn(2, size, generator=own).to(session.device, session.dtype)
        left, right = self._rows(calls, pair).double()
        u, v = pair.double()
        scale = left.norm() * v.norm() + right.norm() * u.norm()
        if (left @ v - right @ u).abs() > torch.finfo(session.dtype).eps ** 0.5 * scale:
            self._way = len(WAYS) - 1

    def _rows(self, calls: Sequence[_BatchCurvature], vectors: Tensor) -> Tensor:
        """Rows of the products of each group of parameters with its own curvature."""
        tensors = as_tensors(self.session.blocks, vectors)
        products: Parameters = {}
        for one in calls:
            directions = {name: tensors[name].to(value) for name, value in one.values.items()}
            products |= self._in_parts(one, directions)
        return as_rows(self.session.blocks, products).to(vectors)

    def _in_parts(self, calls: _BatchCurvature, directions: Parameters) -> Parameters:
        """As many vectors at once as fit, in the way that the model can take."""
        count = len(next(iter(directions.values())))
        parts: list[Parameters] = []
        while (start := sum(len(next(iter(p.values()))) for p in parts)) < count:
            some = {n: d[start : start + self._together] for n, d in directions.items()}
            try:
                parts.append(calls.products(some, self._way))
            except torch.OutOfMemoryError:
                if self._together == 1:
                    raise
                self._together //= 2
            except ValueError:
                raise  # of the task or the data, in every way
            except Exception as error:  # whatever stops one way, the next may go
                if self._way == len(WAYS) - 1:
                    raise _without_derivative(error) from error
                self._way += 1
        return {name: torch.cat([part[name] for part in parts]) for name in directions}


class _BatchCurvature:
    """Products with the curvature of the summed losses of one batch, as tensors by name."""

    def __init__(
        self,
        session: Session,
        kind: str,
        values: Parameters,
        batch: object,
        examples: Tensor,
        weights: Tensor | None,
    ) -> None:
        self.session, self.kind, self.values = session, kind, values
        self.batch, self.examples, self.weights = batch, examples, weights

    def products(self, directions: Parameters, way: int) -> Parameters:
        """[vector, *shape] by parameter."""
        if self.kind == "gauss_newton":
            return self._gauss_newton(directions, way)
        if way == len(WAYS) - 1:
            return self._double_backward(directions)

        def product(direction: Parameters) -> Parameters:
            gradient = torch.func.grad(lambda p: self._run(p, self._losses).sum())
            along: Parameters = torch.func.jvp(gradient, (self.values,), (direction,))[1]
            return along

        with _second_order(self.session.module):
            products: Parameters = self._each(product, directions, way)
        return products

    def _gauss_newton(self, directions: Parameters, way: int) -> Parameters:
        leaves = {name: v.clone().requires_grad_() for name, v in self.values.items()}
        with _second_order(self.session.module):
            found, _ = self._run(leaves, lambda m, b, _: require_losses(self.session.task, m, b))
        if self.weights is not None:
            found = [item.times(self.weights) for item in found]
        outputs = [item.outputs for item in found]
        if way == len(WAYS) - 1:
            tangents = _transposed_twice(outputs, leaves, directions)
        else:
            numbers = [item.number for item in found]

            def forwards(direction: Parameters) -> list[Tensor]:
                along: list[Tensor] = torch.func.jvp(
                    lambda p: self._outputs(p, numbers), (self.values,), (direction,)
                )[1]
                return along

            with _second_order(self.session.module):
                tangents = self._each(forwards, directions, way)
        curved = [i.curved(t).detach() for i, t in zip(found, tangents, strict=True)]
        return _backwards(outputs, leaves, curved, together=way == 0)

    def _outputs(self, parameters: Parameters, numbers: Sequence[int]) -> list[Tensor]:
        outputs = self._run(parameters, lambda m, b, _: self.session.task.curved_outputs(m, b))
        return [outputs[number] for number in numbers]

    def _double_backward(self, directions: Parameters) -> Parameters:
        leaves = {name: v.clone().requires_grad_() for name, v in self.values.items()}
        inputs = list(leaves.values())
        with _second_order(self.session.module):
            total = self._run(leaves, self._losses).sum()
        gradient = torch.autograd.grad(total, inputs, create_graph=True, materialize_grads=True)
        _require_differentiable(gradient)
        return _backwards(
            [g for g in gradient if g.requires_grad],
            leaves,
            [
                directions[name].to(g)
                for name, g in zip(leaves, gradient, strict=True)
                if g.requires_grad
            ],
            together=False,
        )

    def _each(self, function: Callable[[Parameters], Any], directions: Parameters, way: int) -> Any:
        """``function`` of every direction, stacked."""
        if way == 0:
            with warnings.catch_warnings():
                # Operations without a batching rule are looped over: slower, and the same.
                warnings.filterwarnings("ignore", message=".*batching rule.*")
                return torch.func.vmap(function, randomness="same")(directions)
        count = len(next(iter(directions.values())))
        found = [function({n: d[k] for n, d in directions.items()}) for k in range(count)]
        return torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *found)

    @property
    def _losses(self) -> Callable[..., Tensor]:
        weights = 1.0 if self.weights is None else self.weights
        return lambda m, b, _: self.session.task.train_loss(m, b) * weights

    def _run(self, parameters: Parameters, function: Callable[..., Any]) -> Any:
        """``function(module, batch, examples)`` with other parameters in the module."""
        lossy = Lossy(self.session.module, function)
        named = {_PREFIX + name: value for name, value in parameters.items()}
        # Capture takes fused layers apart.
        with seeded_examples(0, self.examples), _PaddingHeld(), Capture({}):
            return torch.func.functional_call(lossy, named, (self.batch, self.examples))


class _PaddingHeld(TorchFunctionMode):
    """The row of an embedding at ``padding_idx`` as a constant: its gradient is 0 by definition, of
    which the forward mode knows nothing."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is F.embedding:
            bound = inspect.signature(func).bind(*args, **kwargs)
            given = bound.arguments
            if (row := given.pop("padding_idx", None)) is not None:
                weight = given["weight"]
                held = torch.arange(len(weight), device=weight.device) == row % len(weight)
                given["weight"] = torch.where(held[:, None], weight.detach(), weight)
            return func(**given)
        return func(*args, **kwargs)


@contextmanager
def _second_order(module: torch.nn.Module) -> Iterator[None]:
    """Kernels that can be differentiated again, and the same random numbers every time."""
    with ExitStack() as stack:
        stack.enter_context(parameters_frozen(module))
        stack.enter_context(plain_recurrence(module))
        # The fused attention kernels have no second derivative; their definition has.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(unchanged_randomness())
        stack.enter_context(torch.enable_grad())
        yield


def _transposed_twice(
    outputs: Sequence[Tensor], leaves: Parameters, directions: Parameters
) -> list[Tensor]:
    """J v without a forward mode: J^T u is linear in u, and the gradient of <J^T u, v> is J v."""
    dummies = [torch.zeros_like(output, requires_grad=True) for output in outputs]
    transposed = torch.autograd.grad(
        outputs, list(leaves.values()), dummies, create_graph=True, materialize_grads=True
    )
    _require_differentiable(transposed)
    tracked = [
        (product, directions[name])
        for name, product in zip(leaves, transposed, strict=True)
        if product.requires_grad
    ]
    found = [
        torch.autograd.grad(
            [product for product, _ in tracked],
            dummies,
            [direction[k].to(product) for product, direction in tracked],
            retain_graph=True,
            materialize_grads=True,
        )
        for k in range(len(next(iter(directions.values()))))
    ]
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def _backwards(
    outputs: Sequence[Tensor], leaves: Parameters, cotangents: Sequence[Tensor], *, together: bool
) -> Parameters:
    """Vector-Jacobian products [vector, *shape] for several cotangents [vector, *output]."""
    inputs = list(leaves.values())
    count = len(cotangents[0]) if cotangents else 0
    options: dict[str, bool] = {"retain_graph": True, "allow_unused": True}
    if together and count > 1:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*batching rule.*")
            found = torch.autograd.grad(
                outputs, inputs, cotangents, is_grads_batched=True, **options
            )
        return {
            name: leaf.new_zeros(count, *leaf.shape) if product is None else product.detach()
            for (name, leaf), product in zip(leaves.items(), found, strict=True)
        }
    rows: dict[str, list[Tensor]] = {name: [] for name in leaves}
    for k in range(count):
        single = torch.autograd.grad(outputs, inputs, [c[k] for c in cotangents], **options)
        for (name, leaf), product in zip(leaves.items(), single, strict=True):
            rows[name].append(torch.zeros_like(leaf) if product is None else product.detach())
    return {name: torch.stack(parts) for name, parts in rows.items()}


def _require_differentiable(gradient: Sequence[Tensor]) -> None:
    if ends_early(gradient):
        raise _without_derivative(
            RuntimeError("the backward pass of a Function is marked as once_differentiable.")
        )


def _without_derivative(error: Exception) -> Exception:
    """The error to raise: ours, where an operation has no (second) derivative."""
    text = str(error)
    if "derivative" not in text and "differentiable" not in text:
        return error
    return UnsupportedTrainingError(
        "Products with the curvature differentiate the training loss twice, and an operation in it "
        f"cannot be: {text.splitlines()[0][:300]} Write it with operations that can, or use a "
        "curvature that needs first derivatives only: an influence function's solver=None, "
        "SOURCE's curvature='ekfac'."
    )

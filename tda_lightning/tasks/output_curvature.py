r"""The Gauss-Newton matrix of any loss: the second derivative of each example's loss in the outputs
of the network, taken by differentiating it twice.

The outputs :math:`o_n` are what modules with parameters returned last on the way to the loss: the
result of ``forward``, or logits, a mean and a variance, a latent. The graph of the step is run
again from there, so that derivatives are partial: of a variational auto-encoder, the loss in the
reconstruction, and in mean and variance where these enter the loss themselves.

:math:`H_n = \nabla^2_{o_n} l_n` is kept as a diagonal where it is one, else as a whole. Where it
has negative eigenvalues (a focal loss, a robust loss far out) there is no Gauss-Newton matrix in
the strict sense; :math:`|H_n|` takes its place, as in the saddle-free Newton method (Dauphin et al.
2014, 1406.2572, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from tda_lightning.tasks.example_seeds import random_signs
from tda_lightning.tasks.step_graph import Node, call_again

Form: TypeAlias = Literal["diagonal", "full"]
Losses: TypeAlias = Callable[[Node], Tensor]  # the losses [batch] from the node of the loss

WIDEST = 128  # outputs of an example of which the whole matrix is kept
_NEGATIVE = 1e-6  # relative to the largest eigenvalue: less is rounding


class UnknownOutputsError(ValueError):
    """The second derivative of a loss in the network's outputs cannot be had."""


@dataclass(frozen=True)
class OutputLoss:
    """The losses of a batch as functions of the network's outputs.

    Attributes:
        outputs: of each example in a row, with their graph, [batch, outputs].
        number: place among the losses of the task.
        example: the only one that it is of, where examples are run one by one.
        roots: S_n with S_n S_n^T = |H_n|: [batch, outputs] for a diagonal, else [batch, outputs,
            outputs].
    """

    outputs: Tensor
    roots: Tensor
    number: int = 0
    example: int | None = None

    def times(self, factors: Tensor) -> OutputLoss:
        """The loss of each example times its factor, [batch], which is not negative."""
        if self.example is not None:
            factors = factors[self.example : self.example + 1]
        shape = (-1,) + (1,) * (self.roots.dim() - 1)
        return replace(self, roots=self.roots * factors.to(self.roots).sqrt().view(shape))

    def sampled(self, batch: int, stream: int) -> Tensor:
        """A random linear loss whose gradient in the outputs has |H_n| as its second moment."""
        signs = random_signs(batch, 1, self.outputs.shape[1], stream, self.outputs.device)
        signs = signs.squeeze(1).to(self.roots)
        if self.roots.dim() == 2:
            return (self.roots * signs * self.outputs).sum(1)
        return (torch.einsum("nij,nj->ni", self.roots, signs) * self.outputs).sum(1)

    def factors(self, batch: int) -> Iterator[Tensor]:
        """Losses [batch] whose outer products of gradients sum to the matrix."""
        for column in range(self.outputs.shape[1]):
            if self.roots.dim() == 2:
                yield self.roots[:, column] * self.outputs[:, column]
            else:
                yield (self.roots[:, :, column] * self.outputs).sum(1)

    def curved(self, tangents: Tensor) -> Tensor:
        """|H_n| times ``tangents`` [..., batch, outputs]."""
        if self.roots.dim() == 2:
            return self.roots.square() * tangents
        inner = torch.einsum("nij,...ni->...nj", self.roots, tangents)
        return torch.einsum("nij,...nj->...ni", self.roots, inner)


@dataclass(frozen=True)
class OutputCurvature:
    """|H_n| of the examples of a batch, and whether it has negative eigenvalues."""

    loss: OutputLoss
    indefinite: bool
    form: Form


def output_nodes(total: Node, batch: int, marked: Sequence[Tensor] = ()) -> list[Node]:
    """The outputs of the network that a loss is made of: on each way back from the loss the first
    that a module with parameters returned, or that is ``marked``.

    Raises:
        UnknownOutputsError: a way leads to data or to parameters past all modules.
    """
    outputs: dict[int, Node] = {}
    pending, seen = [total], set()
    while pending:
        node = pending.pop()
        if id(node) in seen or not (node.of_data and node.value.is_floating_point()):
            continue
        seen.add(id(node))
        rows = node.value.shape[0] if node.value.dim() else 0
        if rows and rows % batch == 0 and _is_output(node, marked):
            outputs[node.order] = node
        elif node.func is None:
            if node.value.requires_grad:
                raise UnknownOutputsError("an operation behind the loss is none that torch shows")
        else:
            if node.func is torch.autograd.grad:
                raise UnknownOutputsError(
                    "the loss contains a gradient of the network (torch.autograd.grad), which is "
                    "no function of its outputs"
                )
            if any(_is_weight(other) for other in node.inputs) and rows:
                raise UnknownOutputsError(
                    f"{node.name} uses a parameter outside of any module. Say which tensors are "
                    "the outputs of the network (AttributionTask.outputs)"
                )
            pending += node.inputs
    if not outputs:
        raise UnknownOutputsError("no module returned anything that the loss depends on")
    return [outputs[order] for order in sorted(outputs)]


def _is_output(node: Node, marked: Sequence[Tensor]) -> bool:
    if not marked:
        return node.of_module is not None
    value = node.value.detach()
    return any(value.shape == other.shape and torch.equal(value, other) for other in marked)


def _is_weight(node: Node) -> bool:
    """A matrix of parameters, rather than a learned number or a vector of them."""
    return node.func is None and not node.of_data and node.value.dim() > 1


def _same(nodes: Sequence[Node]) -> list[list[Node]]:
    """Outputs in groups: what a module returned several times for the same input is one output."""
    groups: list[list[Node]] = []
    for node in nodes:
        for group in groups:
            first = group[0]
            alike = first.of_module is node.of_module and first.value.shape == node.value.shape
            if alike and _readable(node.value) and torch.equal(first.value, node.value):
                group.append(node)
                break
        else:
            groups.append([node])
    return groups


def output_rows(total: Node, batch: int, marked: Sequence[Tensor] = ()) -> Tensor:
    """The outputs of each example in a row: [batch, outputs]."""
    return _rows(_same(output_nodes(total, batch, marked)), batch)


def _rows(groups: Sequence[Sequence[Node]], batch: int) -> Tensor:
    return torch.cat([group[0].value.reshape(batch, -1) for group in groups], 1)


def curvature_of_outputs(
    total: Node,
    losses: Losses,
    batch: int,
    form: Form | None = None,
    marked: Sequence[Tensor] = (),
) -> OutputCurvature:
    """|H_n| of each example.

    Args:
        total: the loss, with its graph.
        losses: reads the losses of the examples off the graph.
        batch: number of examples.
        form: as another batch had it; None: find out.
        marked: outputs of the network; none: those of modules.
    """
    groups = _same(output_nodes(total, batch, marked))
    outputs = _rows(groups, batch)
    widths = [group[0].value.numel() // batch for group in groups]

    def summed(flat: Tensor) -> Tensor:
        parts = flat.split(widths, 1)
        values = {
            id(node): part.reshape(node.value.shape)
            for group, part in zip(groups, parts, strict=True)
            for node in group
        }
        return losses(_run_again(total, values)).sum()

    point = outputs.detach()
    gradient = torch.func.grad(summed)

    def product(direction: Tensor) -> Tensor:
        # Of a symmetric matrix, backward over backward: not every loss has a forward mode.
        try:
            with torch._C.DisableTorchFunction():  # nothing of the user's that a mode should see
                return torch.func.vjp(gradient, point)[1](direction)[0].detach()  # type: ignore[no-any-return]
        except RuntimeError as error:
            if "derivative" not in str(error):
                raise
            raise UnknownOutputsError(
                f"the loss has no second derivative ({str(error).splitlines()[0][:200]})"
            ) from error

    width = point.shape[1]
    if form != "full" and _readable(point):  # in every batch: a diagonal may be one by chance
        form = _form(product, point)
    if form is None:
        form = "full"  # nothing can be read inside a transform
    if form == "diagonal":
        diagonal = product(torch.ones_like(point))
        largest = diagonal.abs().max()
        negative = bool((diagonal < -_NEGATIVE * largest).any()) if _readable(diagonal) else False
        return OutputCurvature(OutputLoss(outputs, diagonal.abs().sqrt()), negative, form)
    directions = torch.eye(width, dtype=point.dtype, device=point.device)
    columns = torch.stack([product(row.expand_as(point)) for row in directions], -1)
    columns = (columns + columns.mT) / 2
    values, vectors = torch.linalg.eigh(
        columns if columns.dtype == torch.float64 else columns.float()
    )
    negative = False
    if _readable(values):
        negative = bool((values < -_NEGATIVE * values.abs().max()).any())
    roots = (vectors * values.abs().sqrt()[:, None, :]).to(point)
    return OutputCurvature(OutputLoss(outputs, roots), negative, form)


def _form(product: Callable[[Tensor], Tensor], point: Tensor) -> Form:
    diagonal = product(torch.ones_like(point))
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(2, point.shape, generator=generator) * 2 - 1).to(point)
    tolerance = torch.finfo(point.dtype).eps ** 0.6
    if bool(((product(signs) - diagonal * signs).abs() <= tolerance * diagonal.abs().max()).all()):
        return "diagonal"
    if point.shape[1] > WIDEST:
        raise UnknownOutputsError(
            f"an example has {point.shape[1]} outputs, and the second derivative of its loss in "
            f"them is no diagonal (a whole matrix is kept up to {WIDEST})"
        )
    return "full"


def _run_again(node: Node, values: Mapping[int, Tensor]) -> Node:
    """The graph from some nodes on, with other values of these."""
    done: dict[int, Node] = {}

    def again(old: Node) -> Node:
        if id(old) in values:
            # Its name remains: terms of the loss are known by it.
            return Node(old.name, None, (), {}, values[id(old)], None, True, old.order)
        if id(old) in done:
            return done[id(old)]
        new = old
        floating = old.value.is_floating_point()
        if old.func is not None and old.of_data and floating and not old.constant:
            inputs = [again(other) for other in old.inputs]
            if any(a is not b for a, b in zip(inputs, old.inputs, strict=True)):
                value = call_again(old, {n: i.value for n, i in enumerate(inputs)})
                new = old.with_inputs(inputs, value)
        done[id(old)] = new
        return new

    return again(node)


def _readable(tensor: Tensor) -> bool:
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)

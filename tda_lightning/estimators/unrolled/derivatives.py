r"""First and second derivatives of one batch's loss, as far as the adjoints ask for them.

With weights w on the examples the batch's loss is :math:`L(\theta, w)`, at w = 1 (in a what-if
run, at its weights) the loss as trained. The gradient of :math:`\langle \nabla_\theta L, u
\rangle` with respect to :math:`\theta` is the Hessian-vector product H u, and with respect to
:math:`w_n` it is what example n's part of the gradient has in common with u. So one double backward
gives both, for many u at once (vmap over the backward pass).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from tda_lightning.estimators.unrolled.batch_statistics import Use, watched
from tda_lightning.gradients.functional import TwiceDifferentiable, ends_early
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.replay.run import Draws, Replay
from tda_lightning.runtime.checkpointing import without_recomputation
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.tasks import AttributionTask, restarted_by, seeded_examples

Parameters = Mapping[str, Tensor]
_CACHE = 1 << 20  # bytes


@dataclass
class BatchDerivatives:
    """The graph of one batch's gradient.

    Attributes:
        loss: of the batch, as trained.
        parameters: by name, those that the loss depends on.
        fixed: tensors that the loss depends on and an earlier stage of training moved, by name.
        gradient: of the loss divided by the accumulation, with its graph, in the same order.
        weights: [batch], or [batch, position]: those that the run was trained with, in the graph.
        alternatives: zeros, in the graph, that weigh the losses of other examples or labels.
        uses: of layers with running statistics.
    """

    loss: float
    parameters: Parameters
    fixed: Parameters
    gradient: Sequence[Tensor]
    weights: Tensor
    alternatives: Tensor
    uses: Sequence[Use]

    def products(
        self, u: Mapping[str, Tensor], c: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """H u, and <gradient of each example's part, u>, for several u.

        Args:
            u: [query, *shape] by parameter; of one that is missing, zero.
            c: adjoints of the running statistics after the batch, [query, features]; they are
                changed to those before it.

        Returns:
            H u plus what comes through the statistics, by parameter and by fixed tensor (the
            derivative of <gradient, u> by it); for the examples [query, batch] or [query, batch,
            position]; for the alternatives [query, alternative].
        """
        names = list(self.parameters)
        outputs = list(self.gradient)
        directions = [u[name].to(g) for name, g in zip(names, self.gradient, strict=True)]
        for use in reversed(self.uses):
            for name, statistic in use.statistics.items():
                outputs.append(statistic)
                directions.append((use.momentum * c[name]).to(statistic))
                c[name].mul_(1 - use.momentum)
        tracked = [i for i, output in enumerate(outputs) if output.requires_grad]
        moved = {**self.parameters, **self.fixed}
        inputs = [*moved.values(), self.weights, self.alternatives]
        found = _vector_jacobian(
            [outputs[i] for i in tracked], inputs, [directions[i] for i in tracked]
        )
        queries = len(directions[0])
        *hessian, parts, alternatives = [
            value.new_zeros(queries, *value.shape) if product is None else product
            for value, product in zip(inputs, found, strict=True)
        ]
        return dict(zip(moved, hessian, strict=True)), parts, alternatives


def batch_derivatives(
    replay: Replay,
    task: AttributionTask,
    parameters: Parameters,
    fixed: Parameters,
    layers: Mapping[str, _BatchNorm],
    batch: object,
    examples: Tensor,
    draws: Draws | None,
    accumulation: int,
    variants: Sequence[tuple[object, Sequence[int]]],
    by_position: bool,
) -> BatchDerivatives:
    """The graph of a batch's gradient at the weights in place.

    Args:
        parameters: that the gradient is taken by, by name.
        fixed: other tensors that require gradients, by which it is differentiated too.
        layers: with running statistics that move.
        draws: where the random generators were before the forward pass.
        variants: the batch with other examples or labels at some positions, and these.
        by_position: weigh single terms of the examples' losses.

    Raises:
        UnsupportedTrainingError: an operation has no second derivative.
    """

    def run(changed: object) -> tuple[Tensor, Tensor]:
        again = None
        if draws is not None:
            again = draws.forward.restore
            again()
        noise = seeded_examples(0, examples, own_noise=False)
        with noise, restarted_by(again), TwiceDifferentiable():
            return task.batch_loss(replay.module, changed, by_position)

    versions = {name: parameter._version for name, parameter in parameters.items()}
    try:
        # The fused attention kernels have no second derivative; their definition has. What is
        # computed again in a backward pass would be computed without it.
        exact = sdpa_kernel(SDPBackend.MATH), without_recomputation()
        with torch.enable_grad(), exact[0], exact[1], unchanged_randomness():
            with watched(layers) as uses:
                total, parts = run(batch)
            weights = _trained_weights(replay, examples, parts).requires_grad_()
            # At weights of 1 this adds nothing to the loss or to its Hessian.
            total = total + ((weights - 1) * parts).sum()
            objective = total / accumulation
            others = [run(variant)[1][list(positions)] for variant, positions in variants]
            count = sum(len(losses) for losses in others)
            alternatives = parts.new_zeros(count, requires_grad=True)
            if others:
                objective = objective + (alternatives * torch.cat(others)).sum() / accumulation
            gradient = torch.autograd.grad(
                objective, list(parameters.values()), create_graph=True, allow_unused=True
            )
    except RuntimeError as error:
        raise _without_derivative(error) from error
    for name, parameter in parameters.items():
        if parameter._version != versions[name]:
            raise UnsupportedTrainingError(
                f"The training step rewrites parameter {name} in its forward pass (a projection, a "
                "constraint), which exact unrolling does not differentiate. Constrain the weights "
                "by a parametrization, or use Source(order='recorded')."
            )
    if ends_early(gradient):
        raise _without_derivative(
            RuntimeError("the backward pass of a Function is marked as once_differentiable.")
        )
    used = {
        name: g for name, g in zip(parameters, gradient, strict=True) if g is not None and g.numel()
    }
    return BatchDerivatives(
        float(total.detach()),
        {name: parameters[name] for name in used},
        fixed,
        list(used.values()),
        weights,
        alternatives,
        uses,
    )


def _trained_weights(replay: Replay, examples: Tensor, parts: Tensor) -> Tensor:
    """What each of ``parts``, [batch] or [batch, position], was multiplied by in training."""
    weights, ones = replay.trajectory.data_weights, torch.ones_like(parts)
    if weights is None:
        return ones
    own = weights[examples.cpu()].to(ones)
    return ones * own.view(-1, *[1] * (parts.dim() - 1))


def queries_at_once(device: torch.device, room: int, activations: int) -> int:
    """How many directions to go back with together.

    On a CPU as many as keep their activations in its caches: more are slower, one by one is as
    fast as any (measured on networks of 0.1 to 1 million weights). An accelerator takes what fits.

    Args:
        room: bytes on an accelerator.
        activations: bytes that the graph of one gradient holds.
    """
    if device.type == "cpu":
        return max(1, _CACHE // max(activations, 1))
    return max(1, room // (4 * max(activations, 1)))


@contextmanager
def activations_counted(parameters: Iterable[Tensor]) -> Iterator[list[int]]:
    """Sizes in bytes of what graphs that are built here save, parameters left out."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in known:
            known.add(place)
            sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield sizes


def _vector_jacobian(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], directions: Sequence[Tensor]
) -> list[Tensor | None]:
    """Vector-Jacobian products for several directions: [direction, *shape of the input]."""
    if not outputs:
        return [None] * len(inputs)
    options: dict[str, bool] = {"retain_graph": True, "allow_unused": True}
    if len(directions[0]) > 1:
        try:
            with warnings.catch_warnings():
                # Operations without a batching rule are looped over: slower, and the same.
                warnings.filterwarnings("ignore", message=".*batching rule.*")
                return list(
                    torch.autograd.grad(
                        outputs, inputs, directions, is_grads_batched=True, **options
                    )
                )
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # Some rules of torch for several directions are wrong (GroupNorm's): one by one.
    found = []
    for single in zip(*directions, strict=True):
        try:
            found.append(torch.autograd.grad(outputs, inputs, single, **options))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise _without_derivative(error) from error
    return [
        None if products[0] is None else torch.stack(products)
        for products in zip(*found, strict=True)
    ]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a graph did not fit into memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _without_derivative(error: RuntimeError) -> Exception:
    """The error to raise: ours, where an operation has no (second) derivative."""
    text = str(error)
    if "derivative" not in text and "differentiable" not in text:
        return error
    return UnsupportedTrainingError(
        "Exact unrolling differentiates the training loss twice, and an operation in it cannot be: "
        f"{text.splitlines()[0][:300]} Write it with operations that can, or use "
        "Source(order='recorded'), which needs first derivatives only."
    )

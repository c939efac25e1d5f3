"""EK-FAC and K-FAC by loops over examples (George et al. 2018, 1806.03884)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda_lightning.records.trajectory import Checkpoint
from tests.oracles.gradients import with_state

# Loss (scalar) of example n under its sampled label.
ExampleLoss = Callable[[nn.Module, int], Tensor]
SideBasis = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class KroneckerBlock:
    """Curvature of one layer (of one group of a grouped convolution), weight and bias joint.

    Attributes:
        coordinates: place of each entry of [weight | bias] among all parameters, [out, in (+ 1)].
        inputs: A = mean over examples and positions of a a^T, a with a 1 appended for the bias.
        outputs: G = mean over examples of the sum over positions of b b^T. (The two scales matter
            to K-FAC, where A x G then is the mean of the positions' products; the eigenvectors and
            so EK-FAC do not see them.)
        input_vectors, output_vectors: eigenvectors of A and G, in columns.
        eigenvalues: EK-FAC's E[(U_G^T D U_A)^2], [out, in (+ 1)].
        kfac_eigenvalues: products of the eigenvalues of G and A, [out, in (+ 1)].
    """

    coordinates: Tensor
    inputs: Tensor
    outputs: Tensor
    input_vectors: Tensor
    output_vectors: Tensor
    eigenvalues: Tensor
    kfac_eigenvalues: Tensor

    def dense(self, kfac: bool = False) -> Tensor:
        """The block as a matrix over the row-major entries of ``coordinates``."""
        vectors = torch.kron(self.output_vectors.contiguous(), self.input_vectors.contiguous())
        values = self.kfac_eigenvalues if kfac else self.eigenvalues
        return vectors @ torch.diag(values.reshape(-1)) @ vectors.T


def layer_coordinates(module: nn.Module, layer: str, names: Sequence[str]) -> list[Tensor]:
    """Where a layer's [weight | bias] lies in the flat parameter vector: [out, in (+ 1)] per group.

    A convolution's weight is flattened to [out, channels * kernel].
    """
    parameters, offsets, start = dict(module.named_parameters()), {}, 0
    for name in names:
        offsets[name] = start
        start += parameters[name].numel()
    weight_name, bias_name = (f"{layer}.{part}".lstrip(".") for part in ("weight", "bias"))
    weight = parameters[weight_name]
    places = torch.arange(weight.numel()).reshape(len(weight), -1) + offsets[weight_name]
    if bias_name in offsets:
        bias = torch.arange(len(weight)) + offsets[bias_name]
        places = torch.cat([places, bias[:, None]], 1)
    return list(places.chunk(getattr(module.get_submodule(layer), "groups", 1)))


def layer_positions(
    module: nn.Module, layer: str, loss: Callable[[nn.Module], Tensor], bias: bool
) -> list[tuple[Tensor, Tensor]]:
    """Inputs a [positions, in (+ 1)] and output gradients b [positions, out], one pair per group.

    All calls of the layer in one forward pass of one example are joined.
    """
    target = module.get_submodule(layer)
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
        seen.append((args[0].detach().clone(), output))
        return output.clone()  # what follows may write into it in place

    handle = target.register_forward_hook(keep)
    try:
        value = loss(module)
    finally:
        handle.remove()
    gradients = torch.autograd.grad(value, [output for _, output in seen])
    groups = getattr(target, "groups", 1)
    pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(groups)]
    for (inputs, _), gradient in zip(seen, gradients, strict=True):
        for number, pair in enumerate(_positions(target, inputs, gradient)):
            pairs[number].append(pair)
    joined = []
    for group in pairs:
        inputs = torch.cat([a for a, _ in group])
        if bias:
            inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], 1)
        joined.append((inputs, torch.cat([b for _, b in group])))
    return joined


def _positions(layer: nn.Module, inputs: Tensor, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
    if isinstance(layer, nn.Linear):
        return [(inputs.reshape(-1, inputs.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))]
    padding: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            padding += [total // 2, total - total // 2]
        else:
            width = 0 if layer.padding == "valid" else layer.padding[axis]
            padding += [width, width]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, padding, mode=mode)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
    pairs = []
    for part, outputs in zip(
        padded.chunk(layer.groups, 1), gradient.chunk(layer.groups, 1), strict=True
    ):
        # Kernels that each pick out one entry of the window: an unfold in any dimension.
        size = part.shape[1] * torch.Size(layer.kernel_size).numel()
        pick = torch.eye(size, dtype=part.dtype).reshape(size, part.shape[1], *layer.kernel_size)
        windows = convolve(part, pick, stride=layer.stride, dilation=layer.dilation)
        pairs.append(
            (
                windows.movedim(1, -1).reshape(-1, size),
                outputs.movedim(1, -1).reshape(-1, outputs.shape[1]),
            )
        )
    return pairs


def kronecker_blocks(
    module: nn.Module,
    layer: str,
    example_loss: ExampleLoss,
    count: int,
    names: Sequence[str],
    states: Sequence[Checkpoint] | None = None,
    scale: Tensor | None = None,
    basis: SideBasis = torch.linalg.eigh,
) -> list[KroneckerBlock]:
    """EK-FAC of one Linear or convolution layer, one block per convolution group.

    Args:
        example_loss: loss of example n with the label sampled for it.
        count: number of examples.
        names: order of all parameters.
        states: checkpoints whose examples are pooled; the module as it stands if None.
        scale: h [all parameters] to precondition the gradients by (Adam's P^(1/2)). There are no
            inputs and output gradients of h * D, so A and G are then those of the scaled D
            itself, E[D^T D] and E[D D^T].
        basis: eigenvalues and orthonormal columns of a side's second moments, by group.
    """
    places = layer_coordinates(module, layer, names)
    bias = f"{layer}.bias".lstrip(".") in names
    modules = [module] if states is None else [with_state(module, state) for state in states]
    sides, each = [], []
    for number, coordinates in enumerate(places):
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        gradients: list[Tensor] = []
        for state in modules:
            for example in range(count):
                gradient = _flat_gradient(state, example_loss, example, names)[coordinates]
                if scale is None:
                    a, b = layer_positions(
                        state, layer, lambda m, n=example: example_loss(m, n), bias
                    )[number]
                    inputs.append(sum(torch.outer(row, row) for row in a) / len(a))
                    outputs.append(sum(torch.outer(row, row) for row in b))
                else:
                    gradient = gradient * scale[coordinates]
                    inputs.append(gradient.T @ gradient)
                    outputs.append(gradient @ gradient.T)
                gradients.append(gradient)
        sides.append((torch.stack(inputs).mean(0), torch.stack(outputs).mean(0)))
        each.append(gradients)
    of_inputs = basis(torch.stack([first for first, _ in sides]))
    of_outputs = basis(torch.stack([second for _, second in sides]))
    blocks = []
    for number, coordinates in enumerate(places):
        first, second = sides[number]
        input_values, input_vectors = (part[number] for part in of_inputs)
        output_values, output_vectors = (part[number] for part in of_outputs)
        eigenvalues = torch.stack(
            [(output_vectors.T @ gradient @ input_vectors) ** 2 for gradient in each[number]]
        ).mean(0)
        blocks.append(
            KroneckerBlock(
                coordinates,
                first,
                second,
                input_vectors,
                output_vectors,
                eigenvalues,
                torch.outer(output_values, input_values),
            )
        )
    return blocks


def _flat_gradient(
    module: nn.Module, example_loss: ExampleLoss, example: int, names: Sequence[str]
) -> Tensor:
    parameters = dict(module.named_parameters())
    parts = torch.autograd.grad(
        example_loss(module, example),
        [parameters[name] for name in names],
        allow_unused=True,
        materialize_grads=True,
    )
    return torch.cat([part.reshape(-1) for part in parts])


def embed_blocks(
    blocks: Sequence[KroneckerBlock],
    size: int,
    dense: Sequence[tuple[Tensor, Tensor]] = (),
    kfac: bool = False,
) -> Tensor:
    """One matrix over all parameters from layer blocks, zero between them.

    Args:
        dense: further blocks as (flat coordinates [d], matrix [d, d]), as norms have.
    """
    total = torch.zeros(size, size, dtype=torch.float64)
    pairs = [(block.coordinates.reshape(-1), block.dense(kfac)) for block in blocks]
    for places, matrix in [*pairs, *dense]:
        total[places[:, None], places[None, :]] += matrix
    return total

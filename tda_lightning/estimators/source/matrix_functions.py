r"""What a segment does to vectors, from products with its curvature alone.

:math:`F(M) v` and :math:`S(M) v` of ``spectral.py`` by Lanczos's iteration: with V an orthonormal
basis of the Krylov space of v and M, and :math:`T = V^\top M V` tridiagonal,
:math:`f(M) v \approx |v| V f(T) e_1` (Saad 1992).

The error is bounded, not only estimated. With :math:`\beta` the next off-diagonal element and
:math:`e_k` the last unit vector,

.. math::
    e^{-\tau M} v - |v| V e^{-\tau T} e_1
    = -|v| \beta \int_0^\tau e^{-(\tau - s) M}\, v_{k+1}\, (e_k^\top e^{-s T} e_1)\, ds

M is positive semi-definite, so that the first exponential lengthens nothing; and the last factor
keeps its sign, because -T has the signs of a Metzler matrix after every other vector is negated.
The error of S is thus at most :math:`|v| \beta\, |e_k^\top F(T) e_1|`, the estimate of Saad, and
that of :math:`F(M) v = \int_0^\tau e^{-s M} v\, ds` at most :math:`|v| \beta\, |e_k^\top
(\int_0^\tau F_s\, ds)(T)\, e_1|`. Rounding of the products comes on top.

References:
    | Analysis of Some Krylov Subspace Approximations to the Matrix Exponential Operator (Saad,
      1992), sec. 4 and 5; https://doi.org/10.1137/0729014
    | Stability of the Lanczos Method for Matrix Function Approximation (Musco, Musco & Sidford,
      2018); https://arxiv.org/abs/1708.07788
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.estimators.source.spectral import (
    accumulated_response,
    segment_decay,
    segment_response,
)
from tda_lightning.records.errors import NonFiniteError

_INVARIANT = 10  # rounding errors: nothing else is left of a vector


@dataclass
class SegmentFunctions:
    """F(M) v and S(M) v of some vectors.

    Attributes:
        response: F(M) v, [vector, parameters].
        left: S(M) v, likewise; None where it was not asked for.
        errors: the bound on the error of both, each relative to its own length, the larger of the
            two: float64 [vector]. S(M) v counts as no shorter than the rounding errors of v divided
            by the tolerance.
        products: how many each vector took, int64 [vector].
    """

    response: Tensor
    left: Tensor | None
    errors: Tensor
    products: Tensor


def segment_functions(
    apply: Callable[[Tensor], Tensor],
    vectors: Tensor,
    sizes: Sequence[int],
    time: float,
    steps: Iterable[int],
    *,
    tolerance: float,
    max_products: int,
    carry: bool,
) -> SegmentFunctions:
    """Lanczos's iteration of all ``vectors`` in step, each with its own Krylov space.

    M may consist of blocks on the diagonal; each block then has a space of its own, and one product
    serves them all. Every new vector is orthogonalised twice against all before it. A vector whose
    error is small enough leaves the iteration.

    Args:
        apply: multiplies rows with M, symmetric and positive semi-definite.
        vectors: [vector, parameters].
        sizes: parameters of each diagonal block of M, in their order.
        time: the segment's sum of applied rates.
        steps: numbers of the products, 1 to ``max_products``; the iteration may end earlier.
        tolerance: the relative error that is small enough.
        max_products: the most for each vector; 1 or more.
        carry: whether S(M) v is needed.

    Raises:
        NonFiniteError: a product is NaN or infinite.
    """
    lengths = _inner(vectors, vectors, sizes).sqrt()
    count = len(vectors)
    functions = SegmentFunctions(
        response=torch.zeros_like(vectors),
        # A vector that the loop leaves behind stays as it is.
        left=vectors.clone() if carry else None,
        errors=torch.zeros(count, dtype=torch.float64),
        products=torch.zeros(count, dtype=torch.int64),
    )
    active = lengths.sum(1).nonzero()[:, 0]
    basis = [_divided(vectors, lengths, sizes)[active]]
    diagonal: list[Tensor] = []  # of T, [active, block] for each step
    beside: list[Tensor] = []
    largest = torch.zeros_like(lengths[active])  # element of T so far, [active, block]
    rounding = _INVARIANT * torch.finfo(vectors.dtype).eps
    due = 1
    for step in steps if len(active) else ():
        product = apply(basis[-1])
        if not bool(product.isfinite().all()):
            raise NonFiniteError(
                "A product of a query with the curvature is not finite: the training loss has NaN "
                "or infinite derivatives at a checkpoint. Use other checkpoints or float64."
            )
        diagonal.append(_inner(product, basis[-1], sizes))
        rest = product
        for _ in range(2):
            for vector in basis:
                rest = rest - _spread(_inner(rest, vector, sizes), sizes, rest) * vector
        beta = _inner(rest, rest, sizes).sqrt()
        largest = largest.maximum(diagonal[-1].abs()).maximum(beta)
        beside.append(torch.where(beta > rounding * largest, beta, 0.0))
        if step < due and step < max_products:
            basis.append(_divided(rest, beside[-1], sizes))
            continue
        due = step + max(1, step // 10)  # a decomposition costs too: not at every step
        values, turn = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        values = values.clamp(min=0)  # negative by rounding alone
        first, last = turn[..., 0, :], turn[..., -1, :]
        wanted = [(segment_response(time), accumulated_response(time), functions.response, 0.0)]
        if functions.left is not None:
            # Where next to nothing is left of a vector, it is known to the vector's rounding.
            wanted.append((segment_decay(time), segment_response(time), functions.left, rounding))
        whole = lengths[active].norm(dim=1)
        parts, errors = [], []
        for function, remainder, _, least in wanted:
            # [active, block, step]: coordinates in the basis.
            part = (turn @ (function(values) * first)[..., None])[..., 0]
            part = part * lengths[active, :, None]
            bound = lengths[active] * beside[-1] * (last * remainder(values) * first).sum(-1).abs()
            own = part.square().sum((1, 2)).sqrt().maximum(whole * least / tolerance)
            errors.append(bound.norm(dim=1) / own.clamp(min=1e-300))
            parts.append(part)
        error = torch.stack(errors).amax(0)
        done = (error <= tolerance) | (step == max_products)
        basis.append(_divided(rest, beside[-1], sizes))
        if bool(done.any()):
            for part, (_, _, out, _) in zip(parts, wanted, strict=True):
                out[active[done]] = 0
                for number in range(step):
                    weight = _spread(part[done, :, number], sizes, rest)
                    out[active[done]] += weight * basis[number][done]
            functions.errors[active[done].cpu()] = error[done].cpu()
            functions.products[active[done].cpu()] = step
            active, largest = active[~done], largest[~done]
            basis = [vector[~done] for vector in basis]
            diagonal, beside = [a[~done] for a in diagonal], [b[~done] for b in beside]
            if len(active) == 0:
                break
    return functions


def _tridiagonal(diagonal: Sequence[Tensor], beside: Sequence[Tensor]) -> Tensor:
    """T, [active, block, step, step]; the last element of ``beside`` leads out of it."""
    matrix = torch.diag_embed(torch.stack(list(diagonal), -1))
    if len(beside) > 1:
        off = torch.stack(list(beside[:-1]), -1)
        matrix = matrix + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    return matrix


def _inner(left: Tensor, right: Tensor, sizes: Sequence[int]) -> Tensor:
    """Inner products of rows block by block, in float64: [row, block]."""
    parts = torch.split(left * right, list(sizes), dim=1)
    return torch.stack([part.sum(1, dtype=torch.float64) for part in parts], dim=1)


def _spread(values: Tensor, sizes: Sequence[int], like: Tensor) -> Tensor:
    """A number for each row and block, to multiply rows by."""
    values = values.to(like.dtype)
    if len(sizes) == 1:
        return values
    return values.repeat_interleave(torch.tensor(list(sizes), device=values.device), dim=1)


def _divided(rows: Tensor, lengths: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rows with each block divided by its length; 0 where that is 0."""
    inverse = torch.where(lengths > 0, 1 / lengths.clamp(min=1e-300), 0.0)
    return rows * _spread(inverse, sizes, rows)

"""Leading eigenvectors of the whole curvature, across layers, in front of a block-wise one.

Block-diagonal curvature drops the coupling between layers. Each block then takes the whole error
on itself, forgetting is too slow and scores are several times too large. The coupling lives in few
directions: those with the largest eigenvalues of the whole Gauss-Newton matrix F. They are found
by subspace iteration with products F v = mean_n g_n (g_n . v), which need no matrix, and kept
exactly; the rest, F minus those directions, is left to the blocks:

    F ~ V S V^T  +  (I - V V^T) U max(Lambda - diag(U^T V S V^T U), 0) U^T (I - V V^T)

with U, Lambda the block-wise basis and eigenvalues (EK-FAC): Lambda less what the leading
directions account for is exactly the diagonal of the residual in the basis U. Ours; the iteration
is that of Halko, Martinsson & Tropp 2011 (0909.4061), section 4.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tda_lightning.curvature.fit import WHOLE, Scales, cache_key, units
from tda_lightning.curvature.spectrum import Spectrum
from tda_lightning.gradients import Block, Gradient, Joined, scaled
from tda_lightning.session.session import Session, Span

# Two rounds of power iteration and one that takes the eigenvalues: Gauss-Newton spectra fall fast.
_ROUNDS = 3


@dataclass(frozen=True)
class LeadingDirections:
    """The leading eigenvectors of the whole curvature.

    Attributes:
        vectors: V, orthonormal rows [count, parameters].
        eigenvalues: S, descending [count].
    """

    vectors: Tensor
    eigenvalues: Tensor


def leading_directions(
    count: int,
    session: Session,
    steps: Sequence[int],
    scales: Scales,
    seed: int,
    title: str,
    used: Span | None = None,
) -> LeadingDirections:
    """Find the leading directions by subspace iteration, or take those that were kept.

    Args:
        count: how many, at most the number of parameters.
        session: the model and the training set.
        steps: checkpoints to average over.
        scales: h of all parameters, [1, 1, parameters], by checkpoint and unit; a missing one
            is 1.
        seed: of the sampled labels, the same as the block-wise fit's.
        title: of what is fitted, for progress bars.
        used: the steps whose use of examples weighs them; None: evenly.
    """
    count = min(count, session.num_parameters)
    place = (session.device, session.dtype)
    key = cache_key(session, f"leading {count} in {_ROUNDS}", steps, seed, scales, used=used)
    if (cached := session.trajectory.curvature.get(key)) is not None:
        return LeadingDirections(cached["vectors"].to(*place), cached["eigenvalues"].to(*place))
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(session.num_parameters, count, generator=generator)
    vectors = torch.linalg.qr(start).Q.T.to(*place)
    for number in range(1, _ROUNDS + 1):
        products = torch.zeros_like(vectors)
        for step in steps:
            walk = f"{title}: leading directions, round {number}, step {step}"
            for batch in session.walk(walk, step):
                weights = batch.curvature_weights(used)
                scale = scales.get(step, {}).get(WHOLE)
                for _ in session.each_draw():
                    sampled = session.fisher_gradients(batch.data, batch.examples, seed + step)
                    gradient = scaled(units("exact", sampled.blocks)[WHOLE], scale)
                    inner = gradient.dot(vectors[:, None, None])
                    inner = inner if weights is None else inner * weights
                    products += gradient.weighted_sums(inner).flatten(1)
        products = session.reduce(products) / (session.num_train * len(steps) * session.draws)
        if number < _ROUNDS:
            vectors = torch.linalg.qr(products.T.double()).Q.T.to(*place)
    # Rayleigh-Ritz: the best eigenvectors within the subspace.
    exact = vectors.double()
    values, turn = torch.linalg.eigh(exact @ products.double().T)
    order = values.argsort(descending=True)
    vectors = (turn[:, order].T @ exact).to(*place)
    eigenvalues = values[order].clamp(min=0).to(*place)
    session.trajectory.curvature[key] = {"vectors": vectors.cpu(), "eigenvalues": eigenvalues.cpu()}
    return LeadingDirections(vectors, eigenvalues)


@dataclass(frozen=True)
class DeflatedSpectrum:
    """Leading directions, and block-wise curvature of what they leave: a :class:`Spectrum` of all
    parameters in one row, with ``count`` more coordinates than parameters.

    Coordinates of x are (V x, U^T (x - V^T V x)); going back multiplies by the transpose, and
    there and back is the identity.
    """

    vectors: Tensor  # V, [count, parameters]
    turned: Tensor  # V in the blocks' bases, [count, parameters]
    blocks: tuple[Block, ...]
    rest: tuple[Spectrum, ...]
    eigenvalues: Tensor  # [1, 1, count + parameters]

    @classmethod
    def of(
        cls, leading: LeadingDirections, blocks: Sequence[Block], spectra: Mapping[str, Spectrum]
    ) -> DeflatedSpectrum:
        """The leading directions in front of block-wise ``spectra``."""
        rest = tuple(spectra[block.name] for block in blocks)
        vectors, values = leading.vectors, leading.eigenvalues
        parts = vectors.split([block.size for block in blocks], dim=1)
        turned = torch.cat(
            [
                spectrum.project(part.unflatten(1, block.shape)).flatten(1)
                for block, spectrum, part in zip(blocks, rest, parts, strict=True)
            ],
            dim=1,
        )
        own = torch.cat([spectrum.eigenvalues.flatten() for spectrum in rest])
        left = (own - values @ turned.square()).clamp(min=0)
        eigenvalues = torch.cat([values, left])[None, None]
        return cls(vectors, turned, tuple(blocks), rest, eigenvalues)

    def project(self, rows: Tensor) -> Tensor:
        """[..., 1, 1, parameters] -> [..., 1, 1, count + parameters]."""
        parts = [spectrum.project(part) for spectrum, part in self._by_block(rows)]
        return self._deflated(rows @ self.vectors.T, parts)

    def coordinates(self, gradient: Gradient, rows: slice) -> Tensor:
        """Coordinates of some examples' gradients, by way of their factors where they have any."""
        if not isinstance(gradient, Joined):
            return self.project(gradient.dense(rows))
        parts = [
            block.rotated(rows, spectrum.left, spectrum.right)
            for block, spectrum in zip(gradient.blocks, self.rest, strict=True)
        ]
        return self._deflated(gradient.dense(rows) @ self.vectors.T, parts)

    def _deflated(self, leading: Tensor, parts: Sequence[Tensor]) -> Tensor:
        whole = torch.cat([_as_rows(part) for part in parts], dim=-1)
        return torch.cat([leading, whole - leading @ self.turned], dim=-1)

    def lift(self, coordinates: Tensor) -> Tensor:
        """From coordinates back to the parameters."""
        count = len(self.vectors)
        leading, rest = coordinates[..., :count], coordinates[..., count:]
        parts = [spectrum.lift(part) for spectrum, part in self._by_block(rest)]
        remainder = torch.cat([_as_rows(part) for part in parts], dim=-1)
        return (leading - rest @ self.turned.T) @ self.vectors + remainder

    def shifted(self, diagonal: Tensor) -> DeflatedSpectrum:
        """With ``diagonal`` (weight decay) added, up to its projection on the basis."""
        parts = [spectrum.project_diagonal(part) for spectrum, part in self._by_block(diagonal)]
        leading = diagonal @ self.vectors.square().T
        added = torch.cat([leading, *(_as_rows(part) for part in parts)], dim=-1)
        return replace(self, eigenvalues=self.eigenvalues + added)

    def _by_block(self, rows: Tensor) -> list[tuple[Spectrum, Tensor]]:
        parts = rows[..., 0, 0, :].split([block.size for block in self.blocks], dim=-1)
        return [
            (spectrum, part.unflatten(-1, block.shape))
            for block, spectrum, part in zip(self.blocks, self.rest, parts, strict=True)
        ]


def _as_rows(matrix: Tensor) -> Tensor:
    return matrix.flatten(-3)[..., None, None, :]

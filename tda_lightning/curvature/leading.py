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
from typing import Any

import torch
from torch import Tensor

from tda_lightning.curvature.fit import WHOLE, cache_key, units
from tda_lightning.curvature.spectrum import Spectrum
from tda_lightning.gradients import Block, Gradient, Joined, scaled
from tda_lightning.session.passes import Pass, Session

# Two rounds of power iteration and one that takes the eigenvalues: Gauss-Newton spectra fall fast.
_ROUNDS = 3


class LeadingFit:
    """Plans the passes that find the leading directions, and holds them afterwards.

    Args:
        count: how many.
        context: what the passes work with.
        steps: checkpoints to average over.
        scale: h of all parameters, [1, 1, parameters]; None: 1.
        seed: of the sampled labels, the same as the block-wise fit's.
        title: of what is fitted, for progress bars.

    Attributes:
        vectors: V, orthonormal rows [count, parameters].
        eigenvalues: S, descending [count].
    """

    def __init__(
        self,
        count: int,
        context: Session,
        steps: Sequence[int],
        scale: Tensor | None,
        seed: int,
        title: str,
    ):
        size = sum(block.size for block in context.blocks)
        self.count = min(count, size)
        self.context, self.steps, self.scale = context, tuple(steps), scale
        self.seed, self.title = seed, title
        self.vectors = torch.empty(0)
        self.eigenvalues = torch.empty(0)
        self._products = torch.empty(0)
        self._size = size

    def passes(self) -> list[Pass]:
        """The passes still to run: none when the directions were kept from before."""
        scales = {} if self.scale is None else {WHOLE: self.scale}
        name = f"leading {self.count} in {_ROUNDS}"
        self._key = cache_key(self.context, name, self.steps, self.seed, scales)
        kept = self.context.trajectory.curvature.get(self._key)
        if kept is not None:
            self._hold(kept["vectors"], kept["eigenvalues"])
            return []
        passes = []
        for number in range(_ROUNDS):
            for position, step in enumerate(self.steps):
                passes.append(
                    Pass(
                        f"{self.title}: leading directions, round {number + 1}, step {step}",
                        step,
                        self._multiply(step),
                        self._begin(number) if position == 0 else None,
                        self._end(number) if position == len(self.steps) - 1 else None,
                    )
                )
        return passes

    def _begin(self, number: int) -> Any:
        def begin() -> None:
            if number == 0:
                generator = torch.Generator().manual_seed(self.seed)
                start = torch.randn(self._size, self.count, generator=generator)
                self._hold(torch.linalg.qr(start).Q.T, self.eigenvalues)
            self._products = torch.zeros_like(self.vectors)

        return begin

    def _multiply(self, step: int) -> Any:
        def accumulate(batch: Any, examples: Tensor, _: int) -> None:
            found = self.context.fisher_gradients(batch, examples, self.seed + step)
            gradient: Gradient = scaled(units("exact", found.blocks)[WHOLE], self.scale)
            inner = gradient.dot(self.vectors[:, None, None])
            self._products += gradient.weighted_sums(inner).flatten(1)

        return accumulate

    def _end(self, number: int) -> Any:
        def end() -> None:
            count = self.context.num_train * len(self.steps)
            products = self.context.reduce(self._products) / count
            if number < _ROUNDS - 1:
                self._hold(torch.linalg.qr(products.T.double()).Q.T, self.eigenvalues)
                return
            # Rayleigh-Ritz: the best eigenvectors within the subspace.
            vectors = self.vectors.double()
            values, turn = torch.linalg.eigh(vectors @ products.double().T)
            order = values.argsort(descending=True)
            self._hold(turn[:, order].T @ vectors, values[order].clamp(min=0))
            self._products = torch.empty(0)
            self.context.trajectory.curvature[self._key] = {
                "vectors": self.vectors.cpu(),
                "eigenvalues": self.eigenvalues.cpu(),
            }

        return end

    def _hold(self, vectors: Tensor, eigenvalues: Tensor) -> None:
        place = (self.context.device, self.context.dtype)
        self.vectors, self.eigenvalues = vectors.to(*place), eigenvalues.to(*place)


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
        cls, leading: LeadingFit, blocks: Sequence[Block], spectra: Mapping[str, Spectrum]
    ) -> DeflatedSpectrum:
        """The leading directions in front of block-wise ``spectra``."""
        place = (leading.context.device, leading.context.dtype)
        rest = tuple(spectra[block.name].to(*place) for block in blocks)
        vectors, values = leading.vectors.to(*place), leading.eigenvalues.to(*place)
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

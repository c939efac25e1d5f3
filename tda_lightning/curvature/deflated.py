"""Leading directions in front of block-wise curvature of what they leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tda_lightning.curvature.leading import LeadingDirections
from tda_lightning.curvature.spectrum import Spectrum
from tda_lightning.gradients import Block, Gradient, Joined


@dataclass(frozen=True)
class DeflatedSpectrum:
    """Leading directions, and block-wise curvature of what they leave: a :class:`Spectrum` of all
    parameters in one row, with ``count`` more coordinates than parameters.

    Coordinates of x are (V x, U^T (x - V^T V x)); going back multiplies by the transpose, and
    there and back is the identity.
    """

    leading: LeadingDirections
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
        return cls(leading, turned, tuple(blocks), rest, eigenvalues)

    @property
    def vectors(self) -> Tensor:
        """V, [count, parameters]."""
        return self.leading.vectors

    def project(self, rows: Tensor) -> Tensor:
        """[..., 1, 1, parameters] -> [..., 1, 1, count + parameters]."""
        parts = (spectrum.project(part) for spectrum, part in self._by_block(rows))
        return self._deflated(rows @ self.vectors.T, parts)

    def coordinates(self, gradient: Gradient, rows: slice) -> Tensor:
        """Coordinates of some examples' gradients, by way of their factors where they have any."""
        if not isinstance(gradient, Joined):
            return self.project(gradient.dense(rows))
        parts = (
            block.rotated(rows, spectrum.left, spectrum.right)
            for block, spectrum in zip(gradient.blocks, self.rest, strict=True)
        )
        return self._deflated(gradient.dense(rows) @ self.vectors.T, parts)

    def _deflated(self, leading: Tensor, parts: Iterable[Tensor]) -> Tensor:
        # Written in place: rows of queries are large.
        count, size = self.vectors.shape
        out = leading.new_empty(*leading.shape[:-1], count + size)
        out[..., :count] = leading
        widths = [block.size for block in self.blocks]
        for place, part in zip(out[..., count:].split(widths, dim=-1), parts, strict=True):
            place.copy_(_as_rows(part))
        rest = out.view(-1, count + size)[:, count:]
        rest.addmm_(leading.reshape(-1, count), self.turned, alpha=-1)
        return out

    def in_blocks(self, coordinates: Tensor) -> dict[str, tuple[Spectrum, Tensor]]:
        """From coordinates to those in each block's own basis, with which it is one: V is
        (V U) U^T."""
        count = len(self.vectors)
        leading, rest = coordinates[..., :count], coordinates[..., count:]
        along = (leading - rest @ self.turned.T).reshape(-1, count)
        flat = coordinates.reshape(-1, coordinates.shape[-1])[:, count:]
        whole = torch.addmm(flat, along, self.turned).view(rest.shape)
        own = zip(self.blocks, self._by_block(whole), strict=True)
        return {block.name: part for block, part in own}

    def lift(self, coordinates: Tensor) -> Tensor:
        """From coordinates back to the parameters."""
        own = self.in_blocks(coordinates).values()
        return torch.cat([_as_rows(spectrum.lift(part)) for spectrum, part in own], dim=-1)

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

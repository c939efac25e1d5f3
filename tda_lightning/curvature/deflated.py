"""Leading directions in front of block-wise curvature of what they leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tda_lightning.curvature.leading import LeadingDirections
from tda_lightning.curvature.spectrum import Spectrum
from tda_lightning.gradients import Block, Gradient, Joined
from tda_lightning.runtime.full_precision import full_precision


@dataclass(frozen=True)
class DeflatedSpectrum:
    """Leading directions, and block-wise curvature of what they leave: a :class:`Spectrum` of all
    parameters in one row, with ``count`` more coordinates than parameters.

    Coordinates of x are (V x, U^T (x - V^T V x)); going back multiplies by the transpose, and
    there and back is the identity. All of it is computed in the blocks' bases, from U^T x and V U.
    """

    leading: LeadingDirections
    blocks: tuple[Block, ...]
    rest: tuple[Spectrum, ...]
    eigenvalues: Tensor  # [1, 1, count + parameters]

    @classmethod
    @full_precision
    def of(
        cls, leading: LeadingDirections, blocks: Sequence[Block], spectra: Mapping[str, Spectrum]
    ) -> DeflatedSpectrum:
        """The leading directions in front of block-wise ``spectra``, in whose bases they are."""
        rest = tuple(spectra[block.name] for block in blocks)
        own = torch.cat([spectrum.eigenvalues.flatten() for spectrum in rest])
        left = own.addmv(leading.turned.square().T, leading.eigenvalues, alpha=-1).clamp_(min=0)
        eigenvalues = torch.cat([leading.eigenvalues, left])[None, None]
        return cls(leading, tuple(blocks), rest, eigenvalues)

    @property
    def count(self) -> int:
        """Number of leading directions."""
        return len(self.leading.turned)

    @property
    @full_precision
    def vectors(self) -> Tensor:
        """V on the parameters, [count, parameters]."""
        return self._lifted(self.leading.turned[:, None, None])[:, 0, 0]

    @property
    def spectra(self) -> dict[str, Spectrum]:
        """The blocks' own, by name."""
        return {block.name: own for block, own in zip(self.blocks, self.rest, strict=True)}

    def by_block(self, coordinates: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Coordinates, or what goes with them, [..., 1, 1, count + parameters] as those of the
        leading directions [..., count] and those of each block [..., groups, rows, columns]."""
        rest = self._by_block(coordinates[..., self.count :])
        names = [block.name for block in self.blocks]
        leading = coordinates[..., 0, 0, : self.count]
        return leading, {n: part for n, (_, part) in zip(names, rest, strict=True)}

    @full_precision
    def deflate(self, by_block: Mapping[str, Tensor]) -> Tensor:
        """V x [..., count] of x in the blocks' bases, which is taken from ``by_block`` in place."""
        leading = self.along(by_block)
        self.add(leading, by_block, alpha=-1)
        return leading

    @full_precision
    def inflate(self, leading: Tensor, by_block: Mapping[str, Tensor]) -> None:
        """Make ``by_block`` x in the blocks' bases, in place, from the coordinates of x."""
        self.add(leading - self.along(by_block), by_block)

    @full_precision
    def along(self, by_block: Mapping[str, Tensor]) -> Tensor:
        """V x [..., count] of x in the blocks' bases."""
        parts = [
            x.flatten(-3) @ turned.T
            for x, turned in zip(by_block.values(), self._turned, strict=True)
        ]
        return torch.stack(parts).sum(0)

    @full_precision
    def add(self, leading: Tensor, by_block: Mapping[str, Tensor], alpha: float = 1) -> None:
        """Add ``alpha`` V^T ``leading`` in the blocks' bases, in place."""
        flat = leading.reshape(-1, self.count)
        for x, turned in zip(by_block.values(), self._turned, strict=True):
            x.view(len(flat), -1).addmm_(flat, turned, alpha=alpha)

    @full_precision
    def project(self, rows: Tensor) -> Tensor:
        """[..., 1, 1, parameters] -> [..., 1, 1, count + parameters]."""
        parts = (spectrum.project(part) for spectrum, part in self._by_block(rows))
        return self._deflated(rows.shape[:-1], parts)

    @full_precision
    def coordinates(self, gradient: Gradient, rows: slice) -> Tensor:
        """Coordinates of some examples' gradients, by way of their factors where they have any."""
        if not isinstance(gradient, Joined):
            return self.project(gradient.dense(rows))
        parts = (
            block.rotated(rows, spectrum.left, spectrum.right)
            for block, spectrum in zip(gradient.blocks, self.rest, strict=True)
        )
        start, stop, _ = rows.indices(gradient.batch)
        return self._deflated((stop - start, 1, 1), parts)

    def _deflated(self, shape: Sequence[int], parts: Iterable[Tensor]) -> Tensor:
        # Written in place: rows of queries are large.
        turned, count = self.leading.turned, self.count
        size = turned.shape[1]
        out = turned.new_empty(*shape, count + size)
        widths = [block.size for block in self.blocks]
        for place, part in zip(out[..., count:].split(widths, dim=-1), parts, strict=True):
            place.copy_(_as_rows(part))
        rest = out.view(-1, count + size)[:, count:]
        leading = rest @ turned.T
        out.view(-1, count + size)[:, :count] = leading
        rest.addmm_(leading, turned, alpha=-1)
        return out

    @full_precision
    def lift(self, coordinates: Tensor) -> Tensor:
        """From coordinates back to the parameters."""
        turned, count = self.leading.turned, self.count
        flat = coordinates.reshape(-1, coordinates.shape[-1])
        leading, rest = flat[:, :count], flat[:, count:]
        along = torch.addmm(leading, rest, turned.T, alpha=-1)
        whole = torch.addmm(rest, along, turned)
        return self._lifted(whole.view(*coordinates.shape[:-1], -1))

    def _lifted(self, rows: Tensor) -> Tensor:
        own = (spectrum.lift(part) for spectrum, part in self._by_block(rows))
        return torch.cat([_as_rows(part) for part in own], dim=-1)

    @full_precision
    def shifted(self, diagonal: Tensor) -> DeflatedSpectrum:
        """With ``diagonal`` (weight decay) added, up to its projection on the basis."""
        if not bool(diagonal.any()):
            return self
        parts, leading = [], torch.zeros_like(self.leading.eigenvalues)
        for (spectrum, own), turned in zip(self._by_block(diagonal), self._turned, strict=True):
            parts.append(_as_rows(spectrum.project_diagonal(own)))
            if not bool((own == own.flatten()[0]).all()):
                turned = _as_rows(spectrum.lift(turned.unflatten(1, own.shape)))[:, 0, 0]
            leading += turned.square() @ own.flatten()
        added = torch.cat([leading[None, None], *parts], dim=-1)
        return replace(self, eigenvalues=self.eigenvalues + added)

    @property
    def _turned(self) -> list[Tensor]:
        """V U by block, [count, size]."""
        return list(self.leading.turned.split([block.size for block in self.blocks], dim=1))

    def _by_block(self, rows: Tensor) -> list[tuple[Spectrum, Tensor]]:
        parts = rows[..., 0, 0, :].split([block.size for block in self.blocks], dim=-1)
        return [
            (spectrum, part.unflatten(-1, block.shape))
            for block, spectrum, part in zip(self.blocks, self.rest, parts, strict=True)
        ]


def _as_rows(matrix: Tensor) -> Tensor:
    return matrix.flatten(-3)[..., None, None, :]

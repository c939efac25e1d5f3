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

Few directions need few examples: of a large training set a random sample is iterated on, and
another one, of the same size, takes the eigenvalues. What an iteration fits to the noise of its own
sample is not in the other one, so the ratio of the two sums of eigenvalues bounds the loss
(``LeadingDirections.held``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tda_lightning.curvature.fit import WHOLE, Scales, cache_key, units
from tda_lightning.curvature.orthonormal import orthonormal, products, turned
from tda_lightning.curvature.spectrum import Spectrum
from tda_lightning.gradients import Block, Gradient, Joined, scaled
from tda_lightning.runtime.digests import digest
from tda_lightning.session.session import Session, Span

# Rounds of power iteration before the one that takes the eigenvalues: Gauss-Newton spectra fall
# fast, and the directions of one segment are a good start for the next.
_ROUNDS, _ROUNDS_FROM_START = 2, 1
_SAMPLE = 16  # examples for each direction, in each of the two samples: 8 cost fidelity


@dataclass(frozen=True)
class LeadingDirections:
    """The leading eigenvectors of the whole curvature.

    Attributes:
        vectors: V, orthonormal rows [count, parameters].
        eigenvalues: S, descending [count].
        held: the sum of eigenvalues, in examples that the directions were not fitted to, over that
            in those that they were; 1 where they were fitted to all.
    """

    vectors: Tensor
    eigenvalues: Tensor
    held: float = 1.0


def leading_directions(
    count: int,
    session: Session,
    steps: Sequence[int],
    scales: Scales,
    seed: int,
    title: str,
    used: Span | None = None,
    start: LeadingDirections | None = None,
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
        start: directions to begin the iteration with; None: random ones.
    """
    count = min(count, session.num_parameters)
    place = (session.device, session.dtype)
    samples = _samples(session, steps, count, seed)
    if samples is None:
        start = None
    how = f"in {_ROUNDS + 1}" if samples is None else f"of {_SAMPLE} each"
    kind = f"leading {count} {how}"
    if start is not None:
        kind += f" from {digest(start.vectors)}"
    key = cache_key(session, kind, steps, seed, scales, used=used)
    if (cached := session.trajectory.curvature.get(key)) is not None:
        held = float(cached["held"]) if "held" in cached else 1.0
        return LeadingDirections(
            cached["vectors"].to(*place), cached["eigenvalues"].to(*place), held
        )
    if start is None:
        generator = torch.Generator().manual_seed(seed)
        begin = torch.randn(session.num_parameters, count, generator=generator)
        vectors = orthonormal(begin.T)[0].to(*place)
    else:
        vectors = start.vectors
    rounds = _ROUNDS if start is None else _ROUNDS_FROM_START
    fitted = 0.0
    for number in range(1, rounds + 2):
        last = number > rounds
        carried, total = torch.zeros_like(vectors), 0
        for place_of_step, step in enumerate(steps):
            walk = f"{title}: leading directions, round {number}, step {step}"
            sample = None if samples is None else samples[1 if last else 0]
            order = None if sample is None else sample[place_of_step]
            total += session.num_train if order is None else sum(map(len, order))
            for batch in session.walk(walk, step, order):
                weights = batch.curvature_weights(used)
                scale = scales.get(step, {}).get(WHOLE)
                for _ in session.losses.each_draw():
                    drawn = session.fisher_gradients(batch.data, batch.examples, seed + step)
                    gradient = scaled(units("exact", drawn.blocks)[WHOLE], scale)
                    inner = gradient.dot(vectors[:, None, None])
                    inner = inner if weights is None else inner * weights
                    carried += gradient.weighted_sums(inner).flatten(1)
        carried = session.reduce(carried).div_(total * session.draws)
        if not last:
            vectors, lengths = orthonormal(carried)
            fitted = float(lengths.sum())  # what these directions hold here
    # Rayleigh-Ritz: the best eigenvectors within the subspace.
    values, turn = torch.linalg.eigh(products(vectors, carried))
    order_of_values = values.argsort(descending=True)
    vectors = turned(turn[:, order_of_values].T, vectors)
    eigenvalues = values[order_of_values].clamp(min=0).to(*place)
    held = 1.0
    if samples is not None and fitted:
        held = min(1.0, float(eigenvalues.sum()) / fitted)
    session.trajectory.curvature[key] = {
        "vectors": vectors.cpu(),
        "eigenvalues": eigenvalues.cpu(),
        "held": torch.tensor([held]),
    }
    return LeadingDirections(vectors, eigenvalues, held)


def _samples(
    session: Session, steps: Sequence[int], count: int, seed: int
) -> tuple[list[list[list[int]]], list[list[list[int]]]] | None:
    """Two samples of training examples, to iterate on and to take the eigenvalues in: for each
    checkpoint, batches of indices. None where all examples together are not many more."""
    each = -(-_SAMPLE * count // len(steps))
    if session.num_train < 2 * each:
        return None
    generator = torch.Generator().manual_seed(seed)
    size = min(session.batch_size, each)

    def drawn() -> list[list[int]]:
        chosen = torch.randperm(session.num_train, generator=generator)[:each].sort().values
        return [part.tolist() for part in chosen.split(size)]

    return [drawn() for _ in steps], [drawn() for _ in steps]


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

    def in_blocks(self, coordinates: Tensor) -> dict[str, tuple[Spectrum, Tensor]]:
        """From coordinates to those in each block's own basis, with which it is one: V is
        (V U) U^T."""
        count = len(self.vectors)
        leading, rest = coordinates[..., :count], coordinates[..., count:]
        whole = rest + (leading - rest @ self.turned.T) @ self.turned
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

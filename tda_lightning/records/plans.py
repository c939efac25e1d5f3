"""What a recording or an attribution will take, told before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tda_lightning.records.display import html_rows
from tda_lightning.runtime.formatting import readable_bytes, readable_time


@dataclass(frozen=True)
class PassPlan:
    """Similar passes over the training set, or over the run.

    Attributes:
        title: what they do, with "#" for the numbers in which they differ.
        count: number of passes.
        batches: batches in all of them together, or steps of the run where they visit those.
        seconds: expected time of each.
    """

    title: str
    count: int
    batches: int
    seconds: float


@dataclass(frozen=True, repr=False)
class AttributionPlan:
    """How long (seconds) and how large (bytes) an attribution is expected to be on this machine.

    Attributes:
        estimator: class name.
        num_train: number of training examples scored.
        num_query: number of queries they are scored for.
        preparation: seconds outside the passes: reading checkpoints and cached curvature, checks,
            measuring the queries.
        passes: groups of similar passes, in order.
        peak_bytes: peak memory of the process, scores included; None where the system does not
            report it.
        device_bytes: the same on the accelerator; 0 without one.
        scores_bytes: size of the scores, by segment where the estimator has segments.
        curvature_bytes: fitted curvature that is cached next to the trajectory.
        features_bytes: features of the training examples, cached likewise.
        checks: seconds of the preparation in which losses and gradients of single examples are
            compared with plain autograd.
    """

    estimator: str
    num_train: int
    num_query: int
    preparation: float
    passes: tuple[PassPlan, ...]
    peak_bytes: int | None
    device_bytes: int
    scores_bytes: int
    curvature_bytes: int
    features_bytes: int = 0
    checks: float = 0.0

    @property
    def seconds(self) -> float:
        """Expected time of the whole attribution."""
        return self.preparation + sum(group.count * group.seconds for group in self.passes)

    @property
    def num_passes(self) -> int:
        """Number of passes over training examples or steps."""
        return sum(group.count for group in self.passes)

    @property
    def num_batches(self) -> int:
        """Number of batches in all passes."""
        return sum(group.batches for group in self.passes)

    def repeated(self, members: int, score_bytes: int) -> AttributionPlan:
        """The plan of an ensemble of so many members like this one.

        Args:
            score_bytes: of one score; those of every member are kept.
        """
        more = members * self.num_query * self.num_train * score_bytes
        return replace(
            self,
            preparation=self.preparation * members,
            checks=self.checks * members,
            passes=tuple(
                replace(group, count=group.count * members, batches=group.batches * members)
                for group in self.passes
            ),
            peak_bytes=None if self.peak_bytes is None else self.peak_bytes + more,
            scores_bytes=self.scores_bytes + more,
            curvature_bytes=self.curvature_bytes * members,
            features_bytes=self.features_bytes * members,
        )

    def __str__(self) -> str:
        memory = "unknown" if self.peak_bytes is None else readable_bytes(self.peak_bytes)
        lines = [
            f"{self.estimator}: {self.num_train} training examples for {self.num_query} queries, "
            f"about {readable_time(self.seconds)}, peak memory {memory}, scores "
            f"{readable_bytes(self.scores_bytes)}",
            f"  preparation: {readable_time(self.preparation)}, of which "
            f"{readable_time(self.checks)} for checks against plain autograd",
        ]
        for group in self.passes:
            each = f"{group.count} x " if group.count > 1 else ""
            lines.append(f"  {group.title}: {each}{readable_time(group.seconds)}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *lines = str(self).split("\n")
        rows = [line.strip().rpartition(": ")[::2] for line in lines]
        return html_rows(("what", "time"), rows, head)


@dataclass(frozen=True)
class PlanItem:
    """Something that takes disk or memory.

    Attributes:
        name: what it is.
        bytes: size of one; None if not known beforehand.
        count: how many there are; None if not known beforehand.
        in_checkpoint: each checkpoint holds one.
    """

    name: str
    bytes: int | None
    count: int | None = 1
    in_checkpoint: bool = False

    @property
    def total(self) -> int | None:
        """Size of all."""
        return None if self.bytes is None or self.count is None else self.bytes * self.count


@dataclass(frozen=True, repr=False)
class RecordingPlan:
    """What a recording will take, in bytes; None is not known.

    Attributes:
        steps: optimizer steps of the run.
        checkpoints: how many are written, the initial weights included.
        disk: what is on disk in the end. Steps are counted uncompressed: an upper bound.
        memory: what is held besides the training, at most.
        notes: what is not known, and why.
    """

    steps: int | None
    checkpoints: int | None
    disk: tuple[PlanItem, ...]
    memory: tuple[PlanItem, ...]
    notes: tuple[str, ...] = ()

    @property
    def disk_bytes(self) -> int | None:
        """Everything on disk."""
        return _sum([item.total for item in self.disk])

    @property
    def memory_bytes(self) -> int | None:
        """Everything in memory."""
        return _sum([item.total for item in self.memory])

    @property
    def checkpoint_bytes(self) -> int | None:
        """One checkpoint with everything that the recorder is to keep in it."""
        return _sum([item.bytes for item in self.disk if item.in_checkpoint])

    def _rows(self) -> list[tuple[str, str, str]]:
        return [
            (where, item.name, _readable(item.total))
            for where, items in (("disk", self.disk), ("memory", self.memory))
            for item in items
        ]

    def _title(self) -> str:
        steps = "an unknown number of" if self.steps is None else self.steps
        kept = "" if self.checkpoints is None else f", {self.checkpoints} checkpoints"
        return (
            f"Recording of {steps} steps{kept}: disk {_readable(self.disk_bytes)}, memory "
            f"{_readable(self.memory_bytes)}"
        )

    def __repr__(self) -> str:
        rows = [f"  {where}: {name}, {size}" for where, name, size in self._rows()]
        return "\n".join([self._title(), *rows, *(f"  {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        note = " ".join([f"{self._title()}.", *self.notes])
        return html_rows(("where", "what", "size"), self._rows(), note)


def _readable(size: int | None) -> str:
    return "not known" if size is None else readable_bytes(size)


def _sum(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None

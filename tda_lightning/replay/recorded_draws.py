"""The recorded batches with what they drew in training, for losses at the weights of checkpoints.

The random states before a batch are recorded where they are not what the batch before left behind,
so the batches in between are run through in train mode, forwards only: what they take from the
generators depends on their shapes and not on the weights. The states at the next checkpoint tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.replay.run import Replay
from tda_lightning.runtime.module_state import restored
from tda_lightning.runtime.processes import rank_and_world
from tda_lightning.runtime.random_states import Snapshot, unchanged_randomness
from tda_lightning.session.moments import show
from tda_lightning.session.session import Batch, Session
from tda_lightning.tasks.recorded_noise import RecordedNoise


class RecordedDraws:
    """Walks over recorded batches whose losses draw what they drew in training."""

    def __init__(self, session: Session) -> None:
        self.session, self.trajectory = session, session.trajectory
        self.replay = Replay(session.trajectory, session.module, session.task, session.examples)
        self._before: dict[int, Snapshot] = {}  # states by place in the table of batches

    @staticmethod
    def of(session: Session) -> RecordedDraws | None:
        """For a loss that draws random numbers, where the run's own can be had; else None, and the
        session notes why."""
        if not session.noise:
            return None
        draws = RecordedDraws(session)
        session.no_recorded_draws = draws.missing()
        session.recorded_draws = session.no_recorded_draws is None
        return draws if session.recorded_draws else None

    def missing(self) -> str | None:
        """Why the run's own draws cannot be had; None where they can."""
        session, settings = self.session, self.trajectory.facts.settings
        trained_on = str(settings.get("device", session.device.type))
        if not len(self.trajectory.steps.examples):
            return "the run has no example indices"
        if not self.replay.knows_randomness:
            return f"random states: {settings.get('random', 'absent')}"
        if trained_on.partition(":")[0] != session.device.type:
            return f"the run drew them on {trained_on}, and this is {session.device.type}"
        if session.edits is not None:
            return "edits put other examples and labels into the batches"
        if session.engine.generic:
            return (
                f"{', '.join(session.engine.generic[:3])} are differentiated example by example, "
                "outside of their batches"
            )
        try:
            self._noted(0, Snapshot.take())[0].gradients  # noqa: B018 - whether they can be had
        except UnsupportedTrainingError as error:
            return str(error)
        return None

    def walk(self, title: str, step: int, rows: range) -> Iterator[Batch]:
        """The batches of some rows, forwards, with the weights of checkpoint ``step`` in place; of
        several processes, each has its share."""
        rank, world = rank_and_world()
        self.session.load(step)
        number = 0
        for row in self.session.loop(title, self._rows_to(rows)):
            for place, batch in self._batches(row):
                del self._before[place]
                if row < rows.start:
                    continue
                if number % world == rank:
                    yield replace(batch, position=number)
                number += 1
        self._compare(rows.stop)

    def shares(self, rows: range) -> list[float]:
        """For each batch of some rows, the weight of its examples' losses in their step's loss."""
        steps, share = self.trajectory.steps, self.session.task.share
        return [
            share(len(batch)) / int(steps.accumulation[row])
            for row in rows
            for batch in steps.batches(row)
        ]

    def prepare(self, title: str, rows: range) -> None:
        """Find out the states before the batches of some rows, for :meth:`walk_places`."""
        for row in self.session.loop(title, self._rows_to(rows)):
            for _ in self._batches(row):
                pass
        self._compare(rows.stop)

    def walk_places(self, title: str, places: Sequence[int]) -> Iterator[Batch]:
        """The batches at some places of the table of batches, in any order; of several processes,
        each has its share."""
        rank, world = rank_and_world()
        for number, place in self.session.loop(title, list(enumerate(places))[rank::world]):
            before = self._before.get(place)
            unknown = RuntimeError(f"The states before batch {place} were not prepared.")
            self.session.require(before is not None, unknown)  # a dry run has some only
            batch, _ = self._noted(place, before or Snapshot.take())
            yield replace(batch, position=number)

    def _rows_to(self, rows: range) -> range:
        """The rows, and those before them from the last one whose states are known."""
        checkpoints = [step for step in self.trajectory.checkpoints if step <= rows.start]
        return range(max(checkpoints), rows.stop)

    def _batches(self, row: int) -> Iterator[tuple[int, Batch]]:
        """The batches of a row with their places; the states that they leave are kept."""
        steps = self.trajectory.steps
        first, stop = steps.batch_offsets[row : row + 2].tolist()
        for place in range(first, stop):
            if (recorded := steps.random.get(place)) is not None:
                self._before[place] = Snapshot.of(recorded)
            elif place == first:
                self._compare(row)
            if place not in self._before:
                raise UnsupportedTrainingError(
                    f"The random states before step {row + 1} of the run are not known."
                )
            batch, left = self._noted(place, self._before[place])
            self._before[place + 1] = left.like(self._before[place])
            yield place, batch

    def _compare(self, row: int) -> None:
        """Take the states of the checkpoint before ``row``, where there is one, unless those found
        contradict them."""
        checkpoint = self.trajectory.checkpoints.get(row)
        if checkpoint is None or checkpoint.random is None:
            return
        place = int(self.trajectory.steps.batch_offsets[row])
        found, known = self._before.get(place), Snapshot.of(checkpoint.random)
        if found is not None and found != known:
            raise UnsupportedTrainingError(
                f"The random numbers of the steps before step {row + 1} could not be repeated: "
                "they leave other random states than those recorded. The usual causes are changed "
                "data or code, and a training step whose number of draws depends on the weights."
            )
        self._before[place] = known

    def _noted(self, place: int, before: Snapshot) -> tuple[Batch, Snapshot]:
        """The batch with its draws, from the states before it was fetched; those that it leaves."""
        session, replay, steps = self.session, self.replay, self.trajectory.steps
        row = int(torch.searchsorted(steps.batch_offsets, place, right=True)) - 1
        first, last = steps.example_offsets[place : place + 2].tolist()
        examples = steps.examples[first:last]
        replay.see(row, place - int(steps.batch_offsets[row]))
        with unchanged_randomness():
            data, forward = replay.fetched(examples, before)
            noise = RecordedNoise(forward)
            with restored(session.module, "buffers"), replay.as_trained():
                left = noise.note(lambda: replay.loss_as_trained(data, examples))
        if session.loaded.step is not None:  # whose moment the step sees from here on
            show(session.module, self.trajectory, session.loaded.step - 1, source=session.examples)
        indices = examples.to(session.device)
        return Batch(session, data, indices, 0, indices, indices, noise=noise), left

"""Adds rows of new examples to an index."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.index.build import damage_of, write_missing
from tda_lightning.index.compression import Compression
from tda_lightning.index.facts import Appended, IndexFacts
from tda_lightning.index.opened import in_session
from tda_lightning.index.run_record import require_same_run
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.session.session import Session
from tda_lightning.store import fingerprint
from tda_lightning.store.lock import FolderLock


def append_rows(
    root: Path,
    compression: Compression,
    attribution: AttributionModule,
    source: ExampleSource,
    added: ExampleSource,
) -> IndexFacts:
    """Write rows for the examples of ``added``, and say in the index that they are there. Of those
    that are there already, damaged shards are made anew.

    That they are coming is written first, so that a process that is killed leaves neither a part of
    them for searches nor rows that would be written twice.

    Raises:
        ValueError: other examples are being appended, of which some are missing; or these may have
            been appended already, and cannot be told.
    """
    lock = FolderLock(root)
    lock.acquire()
    try:
        facts = IndexFacts.read(root)
        own = Appended(facts.num_rows, len(added), fingerprint(added.dataset), finished=False)
        last = facts.appended[-1] if facts.appended else None
        there = _same(facts, own)
        if there is not None:
            own = there
        elif last is not None and not last.finished:
            raise ValueError(
                f"{last.count} other examples are being appended from row {last.first} on, and "
                "some of them are missing: append them again first."
            )
        else:
            facts = replace(facts, appended=(*facts.appended, own))
            facts.write(root)
        ranges = list(facts.cut(own.first, own.first + own.count))
        if own.finished and all(damage_of(root, facts, *one) is None for one in ranges):
            return facts

        def work(session: Session) -> None:
            require_same_run(facts.provenance, session)
            placed = compression.to(session.device, session.dtype)
            examples = added.checked(session.module)
            write_missing(root, facts, placed, session, examples, ranges, own.first)

        in_session(attribution, source, added, work)
        if not own.finished:
            facts = replace(facts, appended=(*facts.appended[:-1], replace(own, finished=True)))
            facts.write(root)
        return facts
    finally:
        lock.release()


def _same(facts: IndexFacts, own: Appended) -> Appended | None:
    """The same examples, as far as they have been appended.

    Raises:
        ValueError: as many were appended last, and nothing tells whether they are the same.
    """
    same = [one for one in facts.appended if one.same_examples(own)]
    if same and (own.known or not same[-1].finished):
        return same[-1]
    if same and same[-1] is facts.appended[-1]:
        raise ValueError(
            f"The {own.count} examples differ from one reading to the next, and as many such "
            "examples were appended last: nothing tells whether they are the same. Append "
            "examples without random changes."
        )
    return None

"""Adds rows of new examples to an index."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.index.build import write_missing
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
    """Write rows for the examples of ``added``, and say in the index that they are there.

    That they are coming is written first, so that a process that is killed leaves neither a part of
    them for searches nor rows that would be written twice.

    Raises:
        ValueError: other examples are being appended, of which some are missing.
    """
    lock = FolderLock(root)
    lock.acquire()
    try:
        facts = IndexFacts.read(root)
        own = Appended(facts.num_rows, len(added), fingerprint(added.dataset), finished=False)
        last = facts.appended[-1] if facts.appended else None
        if last is not None and last.same_examples(own):
            own = last
        elif last is not None and not last.finished:
            raise ValueError(
                f"{last.count} other examples are being appended from row {last.first} on, and "
                "some of them are missing: append them again first."
            )
        else:
            facts = replace(facts, appended=(*facts.appended, own))
            facts.write(root)
        if own.finished:
            return facts

        def work(session: Session) -> None:
            require_same_run(facts.provenance, session)
            placed = compression.to(session.device, session.dtype)
            ranges = list(facts.cut(own.first, own.first + own.count))
            examples = added.checked(session.module)
            write_missing(root, facts, placed, session, examples, ranges, own.first)

        in_session(attribution, source, added, work)
        facts = replace(facts, appended=(*facts.appended[:-1], replace(own, finished=True)))
        facts.write(root)
        return facts
    finally:
        lock.release()

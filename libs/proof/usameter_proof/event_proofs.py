"""Whether an event is where its proof says: in its snapshot, that in its epoch, and the epoch in the chain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal
from uuid import UUID

from usameter_proof.chain import NotedHead, faults_of_epoch, faults_of_snapshot
from usameter_proof.documents import CorrectionEntry, EntryProof, Epoch, EventEntry, EventProof, UnusableDocument
from usameter_proof.findings import Finding
from usameter_proof.inclusion import root_of_path
from usameter_proof.leaves import VOID, faults_of_delta, faults_of_entry, leaf_of, name_of_entry


def verify_event(proof: EventProof, *, noted: NotedHead | None = None) -> Iterator[Finding]:
    """All that is wrong; nothing where the event, and its correction if there is one, lead to the chain.

    The organization that the document names is held to everything that is hashed, all of which begins with it: under
    another, leaves, snapshots and roots are others. That the root is one of its chain is what `noted` is for.

    Args:
        proof: The whole document.
        noted: A head that was noted earlier; it must be one of the roots that the document shows.

    Raises:
        UnusableDocument: The document shows no root of the noted epoch.
    """
    org_id = UUID(proof.org_id)
    parts = [proof.event] if proof.correction is None else [proof.event, proof.correction]
    for part in parts:
        yield from _check_entry(org_id, part)
    if proof.correction is not None:
        where = name_of_entry(proof.correction.entry)
        yield from (Finding(where, what) for what in _faults_of_pair(proof.event, proof.correction))
    yield from _check_roots([part.epoch for part in parts], noted)


def _check_entry(org_id: UUID, part: EntryProof) -> Iterator[Finding]:
    entry, snapshot = part.entry, part.snapshot
    where = name_of_entry(entry)
    leaf = leaf_of(org_id, entry)
    yield from (Finding(where, what) for what in faults_of_entry(org_id, entry, leaf, snapshot))
    if entry.snapshot_id != snapshot.id:
        yield Finding(where, f"is of snapshot {entry.snapshot_id}, and proven to be in {snapshot.id}")
    path = [bytes.fromhex(each) for each in part.path]
    root = root_of_path(leaf, index=part.index, size=snapshot.entry_count, path=path)
    if root is None or root.hex() != snapshot.root:
        yield Finding(where, f"its fields and its path do not lead to the root of snapshot {snapshot.id}")
    yield from faults_of_snapshot(org_id, snapshot, part.epoch if part.epoch.epoch == snapshot.epoch else None)
    yield from faults_of_epoch(org_id, part.epoch)


def _faults_of_pair(event: EntryProof, correction: EntryProof) -> Iterator[str]:
    first, second = event.entry.content, correction.entry.content
    # `EventProof` has made sure of it.
    assert isinstance(first, EventEntry) and isinstance(second, CorrectionEntry)
    subjects = [(each.tenant_id, each.event_type, each.timestamp) for each in (first, second)]
    if second.event_id != first.id or subjects[0] != subjects[1]:
        yield f"is not of event {first.id}, its tenant, event type and timestamp"
    if correction.epoch.epoch < event.epoch.epoch:
        yield f"is of epoch {correction.epoch.epoch}, before its event's {event.epoch.epoch}"
    quantities = Decimal(first.quantity_decimal), Decimal(second.quantity_delta)
    yield from faults_of_delta(*quantities, is_void=second.kind == VOID)


def _check_roots(links: Sequence[Epoch], noted: NotedHead | None) -> Iterator[Finding]:
    """An epoch has one root, whichever part of the document, or whoever noted it, says it."""
    roots: dict[int, str] = {}
    for link in links:
        for epoch, root in ((link.epoch - 1, link.previous_root), (link.epoch, link.root)):
            if roots.setdefault(epoch, root) != root:
                yield Finding(f"epoch {epoch}", f"has the root {roots[epoch]}, and {root} elsewhere in the document")
    if noted is None:
        return
    if noted.epoch not in roots:
        shown = ", ".join(map(str, sorted(roots)))
        raise UnusableDocument(f"shows no root of epoch {noted.epoch} to compare, but those of epochs {shown}")
    if roots[noted.epoch] != noted.root:
        yield Finding(f"epoch {noted.epoch}", f"has the root {roots[noted.epoch]}, and {noted.root} was noted")

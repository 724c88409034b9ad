"""Entries checked against their snapshots, in a stream."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from uuid import UUID

from usameter_core.decimals import CONTEXT, canonical
from usameter_core.ids import uuid_of
from usameter_proof.distinct import DistinctIds
from usameter_proof.documents import CorrectionEntry, Entry, EventEntry, InvoiceProof, Snapshot, day_number
from usameter_proof.findings import Finding
from usameter_proof.ledger_format import (
    correction_leaf_prefix,
    event_id_of_key,
    event_leaf_prefix,
    leaf_hash,
    request_hash,
)
from usameter_proof.merkle import MerkleRoot

# Hashed together: climbing the tree with each leaf takes twice as long.
_LEAVES_AT_ONCE = 256
VOID = "VOID"
_KINDS = frozenset((VOID, "AMEND"))


def leaf_of(org_id: UUID, entry: Entry) -> bytes:
    """The leaf that follows from everything else that an entry says (docs/ledger-format.md)."""
    match entry.content:
        case EventEntry() as event:
            prefix = event_leaf_prefix(
                org_id=org_id,
                event_id=uuid_of(bytes.fromhex(event.id[4:])),
                content_hash=request_hash(
                    event.tenant_id, event.event_type, event.quantity_decimal, event.metadata.encode()
                ),
                occurred_at=event.timestamp,
                timestamp_given=event.timestamp_given,
                idempotency_key=event.idempotency_key,
            )
        case CorrectionEntry() as correction:
            prefix = correction_leaf_prefix(
                org_id=org_id,
                event_id=uuid_of(bytes.fromhex(correction.event_id[4:])),
                kind=correction.kind,
                quantity_delta=Decimal(correction.quantity_delta),
                reason=correction.reason,
                occurred_at=correction.timestamp,
            )
    return leaf_hash(prefix, epoch=entry.epoch, ingested_at=entry.ingested_at)


class EntryCheck:
    """The entries of a proof's snapshots, one after the other in the proof's order.

    Holds one snapshot's tree at a time, which grows with the logarithm of its entries, and 29 bytes of each entry; of
    one that voids its event twice as many.
    """

    def __init__(self, proof: InvoiceProof) -> None:
        # Where there is no head there are no snapshots, and no entry is any of theirs.
        self._org_id = UUID(proof.head.org_id) if proof.head is not None else UUID(int=0)
        self._snapshots = proof.snapshots
        self._places = {snapshot.id: place for place, snapshot in enumerate(proof.snapshots)}
        # The next snapshot to be begun; the one before it is being read.
        self._next = 0
        self._sum = _Sum()
        # Events and corrections apart: both carry the event's id.
        self._distinct = DistinctIds(), DistinctIds()
        # Those of the corrections that are to leave nothing of their events.
        self._voids = DistinctIds()

    def add(self, entry: Entry) -> Iterator[Finding]:
        """What is wrong with the next entry, and with the snapshots that it shows to be at their end."""
        where = name_of_entry(entry)
        place = self._places.get(entry.snapshot_id)
        if place is None:
            yield Finding(where, f"is of snapshot {entry.snapshot_id}, which is not in the proof")
            return
        if place < self._next - 1:
            yield Finding(where, f"comes after entries of later snapshots than its {entry.snapshot_id}")
            return
        while self._next <= place:
            yield from self._end_snapshot()
            self._next += 1
        leaf = leaf_of(self._org_id, entry)
        yield from (Finding(where, what) for what in faults_of_entry(self._org_id, entry, leaf, self._snapshots[place]))
        if not self._sum.add(entry, leaf):
            yield Finding(where, "does not come after the entry before it, by event id")
        each, quantity = bytes.fromhex(entry.event_id[4:]), _quantity(entry)
        self._distinct[entry.correction is not None].add(each, quantity)
        if entry.correction is not None and entry.correction.kind == VOID:
            self._voids.add(each, quantity)

    def finish(self) -> Iterator[Finding]:
        """What shows when there are no more entries: what is lacking, and what came more than once."""
        while self._next <= len(self._snapshots):
            yield from self._end_snapshot()
            self._next += 1
        for prefix, ids in zip(("event", "correction of"), self._distinct, strict=True):
            yield from (Finding(f"{prefix} evt_{each.hex()}", "is counted more than once") for each in ids.repeated())
        # It is of the same day, so its event is behind the same line.
        events, corrections = self._distinct
        for each in events.lacking(corrections):
            yield Finding(f"correction of evt_{each.hex()}", "corrects an event that is not here")
        for ids, is_void in ((corrections, False), (self._voids, True)):
            for each, quantity, delta in events.matched(ids):
                # One that takes too much away is among the corrections, and named there.
                if not is_void or CONTEXT.add(quantity, delta) > 0:
                    where = f"correction of evt_{each.hex()}"
                    yield from (Finding(where, what) for what in faults_of_delta(quantity, delta, is_void=is_void))

    def _end_snapshot(self) -> Iterator[Finding]:
        if self._next:
            snapshot = self._snapshots[self._next - 1]
            stated = (snapshot.entry_count, Decimal(snapshot.total), snapshot.root)
            found = self._sum.close()
            if found != stated:
                differences = [
                    f"{name} {theirs} instead of {ours}"
                    for name, theirs, ours in zip(("count", "total", "root"), found, stated, strict=True)
                    if theirs != ours
                ]
                yield Finding(f"snapshot {snapshot.id}", f"its entries make {', '.join(differences)}")
        self._sum = _Sum()


class _Sum:
    """Count, total and root of the entries of one snapshot."""

    def __init__(self) -> None:
        self._tree = MerkleRoot()
        self._leaves: list[bytes] = []
        self._total = Decimal(0)
        self._last: tuple[str, bool] | None = None

    def add(self, entry: Entry, leaf: bytes) -> bool:
        """Take the next entry; false where it stands before the last one or is the same."""
        place = (entry.event_id, entry.correction is not None)
        in_order = self._last is None or self._last < place
        self._last = place
        self._total = CONTEXT.add(self._total, _quantity(entry))
        self._leaves.append(leaf)
        if len(self._leaves) == _LEAVES_AT_ONCE:
            self._climb()
        return in_order

    def close(self) -> tuple[int, Decimal, str]:
        self._climb()
        return self._tree.count, self._total, self._tree.root().hex()

    def _climb(self) -> None:
        self._tree.add(b"".join(self._leaves))
        self._leaves = []


def faults_of_entry(org_id: UUID, entry: Entry, leaf: bytes, snapshot: Snapshot) -> Iterator[str]:
    """What is wrong with an entry, whose fields make this leaf, by itself and in the snapshot that it names."""
    content = entry.content
    subject = (content.tenant_id, content.event_type, day_number(content.timestamp), entry.epoch)
    if subject != (snapshot.tenant_id, snapshot.event_type, snapshot.day_number, snapshot.epoch):
        yield f"is not of the tenant, event type, day and epoch of its snapshot {snapshot.id}"
    if isinstance(content, EventEntry) and content.idempotency_key is not None:
        event_id = event_id_of_key(org_id, content.idempotency_key)
        if content.id != f"evt_{event_id.hex}":
            yield f"its idempotency key is that of evt_{event_id.hex}"
    if isinstance(content, EventEntry) and _quantity(entry) <= 0:
        yield f"its quantity is {content.quantity_decimal}, not above 0"
    if isinstance(content, CorrectionEntry) and content.kind not in _KINDS:
        yield f'is of the kind "{content.kind}", which there is not'
    if leaf.hex() != entry.leaf:
        yield f"its fields make the leaf {leaf.hex()}, not {entry.leaf}"


def _quantity(entry: Entry) -> Decimal:
    content = entry.content
    return Decimal(content.quantity_decimal if isinstance(content, EventEntry) else content.quantity_delta)


def faults_of_delta(quantity: Decimal, delta: Decimal, *, is_void: bool) -> Iterator[str]:
    """What is wrong with what a correction does to its event's quantity."""
    left = CONTEXT.add(quantity, delta)
    if left < 0:
        yield f"takes {canonical(delta.copy_negate())} away from its event, which has {canonical(quantity)}"
    elif is_void and left:
        yield f"voids its event of {canonical(quantity)}, and adds {canonical(delta)} to it"


def name_of_entry(entry: Entry) -> str:
    """Where a finding is that concerns it."""
    return f"correction of {entry.event_id}" if entry.correction is not None else f"event {entry.event_id}"

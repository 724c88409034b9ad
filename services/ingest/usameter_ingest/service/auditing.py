"""The audit of the ledger: everything that is stored twice, or follows from something else, is compared."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from decimal import Decimal
from uuid import UUID

from usameter_core.audit import VIOLATIONS_MAX, Violation, report_violations
from usameter_core.decimals import CONTEXT, canonical
from usameter_core.ids import OrgId, format_id
from usameter_core.period import format_timestamp
from usameter_ingest.domain.auditing import Audited, AuditPlace, Stage
from usameter_ingest.domain.event import CorrectionKind
from usameter_ingest.store.auditing import (
    AuditStore,
    DaySpan,
    EpochRow,
    LedgerMoment,
    RollupDifference,
    SnapshotDifference,
    SnapshotLeaves,
    StoredCorrection,
    StoredEntry,
    Totals,
)
from usameter_ingest.store.epochs import NewSnapshot
from usameter_proof.ledger_format import (
    ZERO_ROOT,
    correction_leaf_prefix,
    epoch_root,
    event_id_of_key,
    event_leaf_prefix,
    leaf_hash,
    request_hash,
    snapshot_id_of,
    snapshot_leaf,
)
from usameter_proof.merkle import MerkleRoot

# Some seconds of work a page at most, unless one epoch or one tenant's day is larger: it is not divided.
EPOCHS_MAX = 1_000
SNAPSHOTS_MAX = 50_000
DAY_EVENTS_MAX = 100_000
ENTRIES_MAX = 20_000

_STATES = ("SEALED", "CLOSED", "OPEN")
_NOTHING = "nothing"


class AuditingService:
    """Compares an organization's ledger with itself, a page at a time.

    A page reads what it compares at one moment, so that what is recorded, corrected or sealed meanwhile is either in
    all of it or in none. In memory are a batch of rows, one tree's edge, and at most some thousand violations.
    """

    def __init__(
        self,
        store: AuditStore,
        *,
        epochs_max: int = EPOCHS_MAX,
        day_events_max: int = DAY_EVENTS_MAX,
        entries_max: int = ENTRIES_MAX,
    ) -> None:
        self._store = store
        self._epochs_max = epochs_max
        self._day_events_max = day_events_max
        self._entries_max = entries_max
        # Of the pool's connections, which events need, audits have one at a time, whoever asks for them.
        self._turn = asyncio.Lock()

    async def audit(self, org_id: OrgId, place: AuditPlace) -> Audited:
        """Compare the next page.

        Raises:
            Unavailable: The database cannot be reached. A retry is safe.
        """
        async with self._turn, self._store.moment(org_id) as ledger:
            match place.stage:
                case Stage.EPOCHS:
                    audited = await self._audit_epochs(org_id, ledger, place)
                case Stage.DAYS:
                    audited = await self._audit_days(ledger, place)
                case Stage.ENTRIES:
                    audited = await self._audit_entries(org_id, ledger, place)
        report_violations(org_id, audited.violations)
        return audited

    async def _audit_epochs(self, org_id: OrgId, ledger: LedgerMoment, place: AuditPlace) -> Audited:
        # The one before the first is read again: it was checked, and the first has to follow on it.
        rows = await ledger.list_epochs(since=place.epoch, limit=self._epochs_max + 1)
        before = rows.pop(0) if rows and rows[0].epoch == place.epoch else None
        found = _Violations()
        snapshots = 0
        for checked, row in enumerate(rows, start=1):
            found.add(_chain_violations(org_id, row, before))
            snapshots += await _audit_snapshots(org_id, ledger, row, found)
            before = row
            if checked == self._epochs_max or snapshots >= SNAPSHOTS_MAX:
                return Audited(checked, found.all, AuditPlace(epoch=row.epoch))
        if before is not None or await ledger.has_entries():
            state = _NOTHING if before is None else before.state
            found.add(_different("I9", "the last epoch is not open", "OPEN", state, {}, shown=str))
        return Audited(len(rows), found.all, AuditPlace(Stage.DAYS))

    async def _audit_days(self, ledger: LedgerMoment, place: AuditPlace) -> Audited:
        span = await ledger.span_from((place.tenant_id, place.moment), entries=self._day_events_max)
        found = _Violations()
        found.add(_rollup_violation(each) for each in await ledger.list_day_differences(span))
        found.add(_rollup_violation(each) for each in await ledger.list_hour_differences(span))
        found.add(await _root_violations(ledger, span))
        next_place = AuditPlace(Stage.ENTRIES)
        if span.until is not None:
            next_place = AuditPlace(Stage.DAYS, tenant_id=span.until[0], moment=span.until[1])
        return Audited(await ledger.count_events(span), found.all, next_place)

    async def _audit_entries(self, org_id: OrgId, ledger: LedgerMoment, place: AuditPlace) -> Audited:
        found = _Violations()
        checked, last = 0, None
        async for entry in ledger.stream_entries(after=(place.moment, place.event_id), limit=self._entries_max):
            found.add(_entry_violations(org_id, entry))
            checked, last = checked + 1, entry
        if last is None or checked < self._entries_max:
            return Audited(checked, found.all, None)
        return Audited(checked, found.all, AuditPlace(Stage.ENTRIES, moment=last.occurred_at, event_id=last.event_id))


class _Violations:
    """The violations of a page, so many at most."""

    def __init__(self) -> None:
        self.all: list[Violation] = []

    def add(self, violations: Iterable[Violation]) -> None:
        for each in violations:
            if len(self.all) == VIOLATIONS_MAX:
                return
            self.all.append(each)


def _chain_violations(org_id: OrgId, epoch: EpochRow, before: EpochRow | None) -> Iterator[Violation]:
    """I9: numbers without gap, and each root follows from the one before."""
    place = {"epoch": epoch.epoch}
    number = 1 if before is None else before.epoch + 1
    if epoch.epoch != number:
        yield Violation("I9", "an epoch is missing", f"epoch {number}", f"epoch {epoch.epoch}", {"epoch": number})
    elif before is not None and _STATES.index(before.state) > _STATES.index(epoch.state):
        yield Violation("I9", "an epoch is sealed before the one before it", before.state, epoch.state, place)
    if epoch.root is None or epoch.previous_root is None or epoch.snapshots_root is None:
        return
    previous_root = ZERO_ROOT if before is None else before.root
    # Where the one before is missing or not sealed nothing is known of its root, and that is said already.
    if epoch.epoch == number and previous_root is not None:
        yield from _different(
            "I9", "an epoch does not follow on the root before it", previous_root, epoch.previous_root, place
        )
    root = epoch_root(
        org_id=org_id, epoch=epoch.epoch, previous_root=epoch.previous_root, snapshots_root=epoch.snapshots_root
    )
    yield from _different("I9", "an epoch's root does not follow from what it is made of", root, epoch.root, place)


async def _audit_snapshots(org_id: OrgId, ledger: LedgerMoment, epoch: EpochRow, found: _Violations) -> int:
    """I3 and I9: the snapshots of an epoch beside its rollups, and its tree over them; returns how many they are."""
    tree = MerkleRoot()
    entries = 0
    async for stored in ledger.stream_snapshots(epoch.epoch):
        found.add(_snapshot_violations(org_id, stored, tree.count))
        tree.add(stored.leaf_hash)
        entries += stored.snapshot.entry_count
    if epoch.state != "SEALED":
        if tree.count:
            problem = "an epoch that is not sealed has snapshots"
            found.add([Violation("I3", problem, "0 snapshots", f"{tree.count} snapshots", {"epoch": epoch.epoch})])
        return tree.count
    for difference in await ledger.list_snapshot_differences(epoch.epoch):
        found.add([_snapshot_difference_violation(org_id, epoch.epoch, difference)])
    found.add(_epoch_totals_violations(epoch, entries=entries, tree=tree))
    return tree.count


def _snapshot_violations(org_id: OrgId, stored: NewSnapshot, position: int) -> Iterator[Violation]:
    """I3: a snapshot's id and leaf derive from what is stored, and it stands in the order of the tree."""
    snapshot = stored.snapshot
    tenant_id, event_type, day = snapshot.tenant_id, snapshot.event_type, snapshot.day
    place = _snapshot_place(snapshot.snapshot_id, snapshot.epoch, tenant_id, event_type, day)
    snapshot_id = snapshot_id_of(
        org_id=org_id, epoch=snapshot.epoch, tenant_id=tenant_id, event_type=event_type, day=day
    )
    yield from _different(
        "I3", "a snapshot's id is not that of its key", snapshot_id, snapshot.snapshot_id, place, shown=_id
    )
    leaf = snapshot_leaf(
        org_id=org_id,
        epoch=snapshot.epoch,
        tenant_id=tenant_id,
        event_type=event_type,
        day=day,
        entry_count=snapshot.entry_count,
        quantity=snapshot.quantity,
        root=snapshot.root,
    )
    yield from _different("I3", "a snapshot's leaf is not that of what it holds", leaf, stored.leaf_hash, place)
    yield from _different(
        "I3", "a snapshot is not at its place in the tree", position, stored.position, place, shown=str
    )


def _snapshot_difference_violation(org_id: OrgId, epoch: int, difference: SnapshotDifference) -> Violation:
    key = (difference.tenant_id, difference.event_type, difference.day)
    snapshot_id = snapshot_id_of(org_id=org_id, epoch=epoch, tenant_id=key[0], event_type=key[1], day=key[2])
    return Violation(
        "I3",
        "a snapshot is not the sum of its rollups",
        _total(difference.rollup_count, difference.rollup_quantity),
        _total(difference.snapshot_count, difference.snapshot_quantity),
        _snapshot_place(snapshot_id, epoch, *key),
    )


def _epoch_totals_violations(epoch: EpochRow, *, entries: int, tree: MerkleRoot) -> Iterator[Violation]:
    place = {"epoch": epoch.epoch}
    yield from _different(
        "I3", "an epoch's entries are not those of its snapshots", entries, epoch.entry_count, place, shown=str
    )
    yield from _different(
        "I3", "an epoch's snapshots are not as many", tree.count, epoch.snapshot_count, place, shown=str
    )
    yield from _different(
        "I9", "the root over an epoch's snapshots does not follow from them", tree.root(), epoch.snapshots_root, place
    )


async def _root_violations(ledger: LedgerMoment, span: DaySpan) -> list[Violation]:
    """I3: the roots of snapshots from the leaves of their entries."""
    found: list[Violation] = []
    tree, current = MerkleRoot(), None
    async for piece in ledger.stream_snapshot_leaves(span):
        if current is not None and piece.snapshot_id != current.snapshot_id:
            found += _root_violation(current, tree)
            tree = MerkleRoot()
        tree.add(piece.leaves)
        current = piece
    if current is not None:
        found += _root_violation(current, tree)
    return found[:VIOLATIONS_MAX]


def _root_violation(snapshot: SnapshotLeaves, tree: MerkleRoot) -> Iterator[Violation]:
    place = _snapshot_place(snapshot.snapshot_id, snapshot.epoch, snapshot.tenant_id, snapshot.event_type, snapshot.day)
    problem = "a snapshot's root does not follow from its entries"
    return _different("I3", problem, tree.root(), snapshot.root, place)


def _rollup_violation(difference: RollupDifference) -> Violation:
    place: dict[str, str | int] = {"tenant_id": difference.tenant_id, "event_type": difference.event_type}
    if difference.epoch is None:
        place["hour"] = format_timestamp(difference.start)
        problem = "the rollup of an hour is not the sum of its entries"
    else:
        place |= {"day": difference.start.date().isoformat(), "epoch": difference.epoch}
        problem = "the rollup of a day is not the sum of its entries"
    return Violation("I2", problem, _totals(difference.entries), _totals(difference.rollup), place)


def _entry_violations(org_id: OrgId, event: StoredEntry) -> Iterator[Violation]:
    """I1: an event's id is that of its key, and its hashes are those of what is stored; so with its correction."""
    place: dict[str, str | int] = {"event_id": format_id("evt", event.event_id), "epoch": event.epoch}
    if event.idempotency_key is not None:
        event_id = event_id_of_key(org_id, event.idempotency_key)
        yield from _different(
            "I1", "an event's id is not that of its key", event_id, event.event_id, place, shown=_event_id
        )
    content = request_hash(event.tenant_id, event.event_type, canonical(event.quantity), event.metadata.encode())
    yield from _different(
        "I1", "an event's request hash is not that of what is stored", content, event.request_hash, place
    )
    prefix = event_leaf_prefix(
        org_id=org_id,
        event_id=event.event_id,
        content_hash=event.request_hash,
        occurred_at=event.occurred_at,
        timestamp_given=event.timestamp_given,
        idempotency_key=event.idempotency_key,
    )
    leaf = leaf_hash(prefix, epoch=event.epoch, ingested_at=event.ingested_at)
    yield from _different("I1", "an event's leaf is not that of what is stored", leaf, event.leaf_hash, place)
    if event.correction is not None:
        yield from _correction_violations(org_id, event, event.correction)


def _correction_violations(org_id: OrgId, event: StoredEntry, correction: StoredCorrection) -> Iterator[Violation]:
    place: dict[str, str | int] = {"event_id": format_id("evt", event.event_id), "epoch": correction.epoch}
    prefix = correction_leaf_prefix(
        org_id=org_id,
        event_id=event.event_id,
        kind=correction.kind,
        quantity_delta=correction.quantity_delta,
        reason=correction.reason,
        occurred_at=correction.occurred_at,
    )
    leaf = leaf_hash(prefix, epoch=correction.epoch, ingested_at=correction.ingested_at)
    yield from _different("I1", "a correction's leaf is not that of what is stored", leaf, correction.leaf_hash, place)
    theirs = (correction.tenant_id, correction.event_type, correction.occurred_at)
    yield from _different(
        "I1",
        "a correction's tenant, type or time is not its event's",
        (event.tenant_id, event.event_type, event.occurred_at),
        theirs,
        place,
        shown=lambda each: f"{each[0]}, {each[1]}, {format_timestamp(each[2])}",
    )
    left = CONTEXT.add(event.quantity, correction.quantity_delta)
    if left < 0 or (left == 0) != (correction.kind == CorrectionKind.VOID):
        expected = "0" if correction.kind == CorrectionKind.VOID else "more than 0"
        yield Violation(
            "I1", "a correction leaves another quantity than its kind does", expected, canonical(left), place
        )


def _different(
    invariant: str,
    problem: str,
    expected: object,
    found: object,
    place: Mapping[str, str | int],
    *,
    shown: Callable[..., str] = bytes.hex,
) -> Iterator[Violation]:
    if expected != found:
        yield Violation(invariant, problem, shown(expected), shown(found), place)


def _snapshot_place(snapshot_id: UUID, epoch: int, tenant_id: str, event_type: str, day: date) -> dict[str, str | int]:
    return {
        "snapshot_id": _id(snapshot_id),
        "epoch": epoch,
        "tenant_id": tenant_id,
        "event_type": event_type,
        "day": day.isoformat(),
    }


def _id(snapshot_id: UUID) -> str:
    return format_id("snp", snapshot_id)


def _event_id(event_id: UUID) -> str:
    return format_id("evt", event_id)


def _total(count: int | None, quantity: Decimal | None) -> str:
    return _NOTHING if count is None or quantity is None else f"{count} entries, {canonical(quantity)}"


def _totals(totals: Totals) -> str:
    corrections = f", {totals.corrections} corrections" if totals.corrections else ""
    return f"{totals.events} events{corrections}, {canonical(totals.quantity)}"

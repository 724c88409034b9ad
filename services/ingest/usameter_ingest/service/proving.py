"""Proofs: that an entry is in its snapshot, a snapshot in its epoch, and an epoch in the chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from uuid import UUID

from usameter_core.errors import FailedPrecondition, NotFound
from usameter_core.ids import OrgId, format_id
from usameter_ingest.service.trail import load_all
from usameter_ingest.store.ledger import LedgerEntry, LedgerEpoch, LedgerStore, PlacedSnapshot
from usameter_proof.inclusion import AuditPaths

# Seven seconds of reading and hashing.
LEAVES_A_CALL = 4_000_000


@dataclass(frozen=True, slots=True)
class SnapshotProof:
    """A snapshot with the audit path to its epoch's tree over snapshots."""

    placed: PlacedSnapshot
    path: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class EntryProof:
    """An entry with the audit path to its snapshot's root, and from there to the chain."""

    entry: LedgerEntry
    index: int
    path: Sequence[bytes]
    snapshot: SnapshotProof
    epoch: LedgerEpoch


class ProvingService:
    """Makes audit paths, in streams: what they hold grows with the logarithm of what they read."""

    def __init__(self, ledger: LedgerStore) -> None:
        self._ledger = ledger

    async def head(self, org_id: OrgId) -> LedgerEpoch:
        """The end of the chain.

        Raises:
            NotFound: No epoch is sealed yet.
        """
        head = await self._ledger.find_head(org_id)
        if head is None:
            raise NotFound("sealed epoch", str(org_id))
        return head

    async def prove_event(self, org_id: OrgId, event_id: UUID) -> list[EntryProof]:
        """The proofs of an event and, where that is sealed, of its correction.

        Raises:
            NotFound: The organization has no such event.
            FailedPrecondition: NOT_SEALED: its epoch is still open or being sealed.
        """
        entries = await self._ledger.find_entries(org_id, event_id)
        if not entries:
            raise NotFound("event", format_id("evt", event_id))
        sealed = await self._ledger.load_snapshots(org_id, [entry.snapshot_id for entry in entries])
        if entries[0].snapshot_id not in sealed:
            raise FailedPrecondition("NOT_SEALED", f"The epoch of {format_id('evt', event_id)} is not sealed yet")
        return [
            await self._prove_entry(org_id, entry, sealed[entry.snapshot_id])
            for entry in entries
            if entry.snapshot_id in sealed
        ]

    async def prove_snapshots(self, org_id: OrgId, snapshot_ids: Sequence[UUID]) -> list[SnapshotProof]:
        """The proofs of the snapshots, in the order named: epoch by epoch, each of which is read once.

        Ends early, but not before the first epoch, where it would read more than 4 million leaves.

        Raises:
            NotFound: The organization lacks one of them.
        """
        placed = await load_all(self._ledger, org_id, snapshot_ids)
        proofs: list[SnapshotProof] = []
        leaves = 0
        for number, of_epoch in groupby(placed, key=lambda each: each.snapshot.epoch):
            epoch = await self._epoch(org_id, number)
            leaves += epoch.snapshot_count
            if proofs and leaves > LEAVES_A_CALL:
                break
            same = list(of_epoch)
            paths = await self._paths_in_epoch(org_id, epoch, same)
            proofs += [SnapshotProof(each, paths[each.snapshot.snapshot_id]) for each in same]
        return proofs

    async def _paths_in_epoch(
        self, org_id: OrgId, epoch: LedgerEpoch, placed: Sequence[PlacedSnapshot]
    ) -> dict[UUID, list[bytes]]:
        tree = AuditPaths([each.position for each in placed], size=epoch.snapshot_count)
        async for leaves in self._ledger.stream_snapshot_leaves(org_id, epoch.epoch):
            tree.add(leaves)
        return {each.snapshot.snapshot_id: tree.path(each.position) for each in placed}

    async def _prove_entry(self, org_id: OrgId, entry: LedgerEntry, placed: PlacedSnapshot) -> EntryProof:
        index = await self._ledger.count_entries_before(org_id, entry.snapshot_id, entry.place)
        tree = AuditPaths([index], size=placed.snapshot.entry_count)
        async for leaves in self._ledger.stream_entry_leaves(org_id, entry.snapshot_id):
            tree.add(leaves)
        epoch = await self._epoch(org_id, entry.epoch)
        paths = await self._paths_in_epoch(org_id, epoch, [placed])
        return EntryProof(entry, index, tree.path(index), SnapshotProof(placed, paths[entry.snapshot_id]), epoch)

    async def _epoch(self, org_id: OrgId, epoch: int) -> LedgerEpoch:
        (found,) = await self._ledger.list_epochs(org_id, after=epoch - 1, through=epoch, limit=1)
        return found

"""The trail: from the snapshots that were billed to their entries, page by page."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from usameter_core.errors import NotFound
from usameter_core.ids import OrgId, format_id
from usameter_ingest.service.leaf_order import LeafOrder
from usameter_ingest.store.ledger import EntryPlace, LedgerEntry, LedgerStore, PlacedSnapshot

# A page of one that is not larger reads all its entries, in some milliseconds.
LARGE_SNAPSHOT_ENTRIES = 2_000


class TrailService:
    """Answers which entries are behind snapshots.

    A page costs as much as reading the tenant's events on the days of its snapshots, where these are small. Those of a
    large snapshot cost what they hold, but for one in some hundred, which sorts all its entries; `LeafOrder` says when
    more of them do.
    """

    def __init__(self, *, ledger: LedgerStore, order: LeafOrder) -> None:
        self._ledger = ledger
        self._order = order

    async def read(
        self, org_id: OrgId, snapshot_ids: Sequence[UUID], *, after: EntryPlace | None, limit: int
    ) -> list[LedgerEntry]:
        """Up to `limit` entries of the snapshots, in the order named, of the first those behind `after`.

        Within a snapshot they are in the order of its leaves, by (event, event before correction).

        Raises:
            NotFound: The organization lacks one of the snapshots.
        """
        placed = await load_all(self._ledger, org_id, snapshot_ids)
        entries: list[LedgerEntry] = []
        start = 0
        while start < len(placed) and len(entries) < limit:
            wanted = limit - len(entries)
            behind = after if start == 0 else None
            if _is_large(placed[start]):
                entries += await self._read_large(org_id, snapshot_ids[start], after=behind, limit=wanted)
                start += 1
            else:
                end = _end_of_enough(placed, start, wanted=wanted)
                entries += await self._ledger.list_entries(org_id, snapshot_ids[start:end], after=behind, limit=wanted)
                start = end
        return entries

    async def _read_large(
        self, org_id: OrgId, snapshot_id: UUID, *, after: EntryPlace | None, limit: int
    ) -> list[LedgerEntry]:
        entries: list[LedgerEntry] = []
        while len(entries) < limit:
            places = await self._order.places_behind(org_id, snapshot_id, after, limit - len(entries))
            if not places:
                break
            entries += await self._ledger.list_entries_at(org_id, snapshot_id, places)
            after = places[-1]
        return entries


async def load_all(ledger: LedgerStore, org_id: OrgId, snapshot_ids: Sequence[UUID]) -> list[PlacedSnapshot]:
    """The snapshots, in the order named.

    Raises:
        NotFound: The organization lacks one of them.
    """
    found = await ledger.load_snapshots(org_id, snapshot_ids)
    missing = next((each for each in snapshot_ids if each not in found), None)
    if missing is not None:
        raise NotFound("snapshot", format_id("snp", missing))
    return [found[each] for each in snapshot_ids]


def _is_large(placed: PlacedSnapshot) -> bool:
    return placed.snapshot.entry_count > LARGE_SNAPSHOT_ENTRIES


def _end_of_enough(placed: Sequence[PlacedSnapshot], start: int, *, wanted: int) -> int:
    """Behind the first snapshots from `start` on that have the wanted number of entries together, and are not large."""
    end = start
    while end < len(placed) and wanted > 0 and not _is_large(placed[end]):
        wanted -= placed[end].snapshot.entry_count
        end += 1
    return end

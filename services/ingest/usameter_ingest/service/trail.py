"""The trail: from the snapshots that were billed to their entries, page by page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from usameter_core.errors import NotFound
from usameter_core.ids import OrgId, format_id
from usameter_core.pages import decode_page_token, encode_page_token
from usameter_ingest.store.ledger import EntryPlace, LedgerEntry, LedgerStore, PlacedSnapshot


@dataclass(frozen=True, slots=True)
class EntryPage:
    """Some entries of a snapshot, and where they go on."""

    entries: Sequence[LedgerEntry]
    next_page_token: str | None


class TrailService:
    """Answers which entries are behind snapshots.

    A page costs as much as reading the tenant's events on the days of its snapshots: their order is that of
    the leaves, which no index has.
    """

    def __init__(self, ledger: LedgerStore) -> None:
        self._ledger = ledger

    async def list_snapshot(self, org_id: OrgId, snapshot_id: UUID, *, limit: int, page_token: str) -> EntryPage:
        """A page of a snapshot's entries, by (event, event before correction).

        Raises:
            NotFound: The organization has no such snapshot.
        """
        after = decode_page_token(page_token, tuple[UUID, bool])
        entries = await self.read(org_id, [snapshot_id], after=after, limit=limit + 1)
        if len(entries) <= limit:
            return EntryPage(entries, None)
        event_id, is_correction = entries[limit - 1].place
        return EntryPage(entries[:limit], encode_page_token([str(event_id), is_correction]))

    async def read(
        self, org_id: OrgId, snapshot_ids: Sequence[UUID], *, after: EntryPlace | None, limit: int
    ) -> list[LedgerEntry]:
        """Up to `limit` entries of the snapshots, in the order named, of the first those behind `after`.

        Raises:
            NotFound: The organization lacks one of the snapshots.
        """
        placed = await load_all(self._ledger, org_id, snapshot_ids)
        entries: list[LedgerEntry] = []
        start = 0
        while start < len(placed) and len(entries) < limit:
            end = _end_of_enough(placed, start, wanted=limit - len(entries))
            entries += await self._ledger.list_entries(
                org_id,
                snapshot_ids[start:end],
                after=after if start == 0 else None,
                limit=limit - len(entries),
            )
            start = end
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


def _end_of_enough(placed: Sequence[PlacedSnapshot], start: int, *, wanted: int) -> int:
    """Behind the first snapshots from `start` on that have the wanted number of entries together."""
    end = start
    while end < len(placed) and wanted > 0:
        wanted -= placed[end].snapshot.entry_count
        end += 1
    return end

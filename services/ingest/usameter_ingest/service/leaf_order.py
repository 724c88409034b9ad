"""The order of the entries of large snapshots, remembered from one page to the next.

Entries are read in the order of their leaves, by event id, and no index has a snapshot's entries in it: one that had
would take 120 bytes an event and, tried, a fifth of the rate at which events are inserted. So whoever pages through a
snapshot has its entries sorted once for many pages. What is sealed does not change, so what is remembered stays true.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from usameter_core.ids import OrgId
from usameter_ingest.store.ledger import PLACE_BYTES, EntryPlace, LedgerStore

# 4.25 MB each: 34 MB in all.
STRETCH_PLACES = 250_000
_STRETCHES_MAX = 8


@dataclass(frozen=True, slots=True)
class _Stretch:
    """The places of a snapshot that come right behind `after`; packed, as `LedgerStore.read_places` has them."""

    snapshot_id: UUID
    after: bytes
    places: bytes
    is_last: bool

    def begins_behind(self, snapshot_id: UUID, after: bytes) -> bool:
        """Whether what comes right behind a place is known here."""
        known = self.is_last or after < self.places[-PLACE_BYTES:]
        return snapshot_id == self.snapshot_id and self.after <= after and known

    def behind(self, after: bytes, limit: int) -> list[EntryPlace]:
        """Up to `limit` places behind one."""
        count = len(self.places) // PLACE_BYTES
        start = bisect_right(range(count), after, key=self._packed)
        return [_unpack(self._packed(number)) for number in range(start, min(start + limit, count))]

    def _packed(self, number: int) -> bytes:
        return self.places[number * PLACE_BYTES : (number + 1) * PLACE_BYTES]


class LeafOrder:
    """Says which entries of a snapshot come next; one call in many reads all of them."""

    def __init__(self, ledger: LedgerStore) -> None:
        self._ledger = ledger
        # Those that were used last come first.
        self._stretches: deque[_Stretch] = deque(maxlen=_STRETCHES_MAX)

    async def places_behind(
        self, org_id: OrgId, snapshot_id: UUID, after: EntryPlace | None, limit: int
    ) -> Sequence[EntryPlace]:
        """Up to `limit` places behind one (None: from the first on), ascending; fewer also where more will follow.

        Nothing is behind the last entry only.
        """
        packed = b"" if after is None else _pack(after)
        stretch = next((each for each in self._stretches if each.begins_behind(snapshot_id, packed)), None)
        if stretch is None:
            places = await self._ledger.read_places(org_id, snapshot_id, after=after, limit=STRETCH_PLACES)
            stretch = _Stretch(snapshot_id, packed, places, is_last=len(places) < STRETCH_PLACES * PLACE_BYTES)
        else:
            self._stretches.remove(stretch)
        self._stretches.appendleft(stretch)
        return stretch.behind(packed, limit)


def _pack(place: EntryPlace) -> bytes:
    event_id, is_correction = place
    return event_id.bytes + bytes([is_correction])


def _unpack(packed: bytes) -> EntryPlace:
    return UUID(bytes=packed[:-1]), bool(packed[-1])

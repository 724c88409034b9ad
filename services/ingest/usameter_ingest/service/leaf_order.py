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

# 4.25 MB.
STRETCH_PLACES = 250_000
# Of all stretches that are remembered: eight of the largest, or a thousand of those of the smallest large snapshots.
# Beyond that whoever comes back in turn finds nothing any more, and each page sorts.
_BYTES_MAX = 34_000_000
# What a stretch counts for at least, so that those of the last pages are not so many that looking for one takes long.
_STRETCH_BYTES_MIN = 34_000


@dataclass(frozen=True, slots=True)
class _Stretch:
    """The places of a snapshot that come right behind `after`; packed, as `LedgerStore.read_places` has them."""

    snapshot_id: UUID
    after: bytes
    places: bytes
    is_last: bool

    def begins_behind(self, snapshot_id: UUID, after: bytes) -> bool:
        """Whether what comes right behind a place is known here."""
        if snapshot_id != self.snapshot_id or after < self.after:
            return False
        return self.is_last or after < self.places[-PLACE_BYTES:]

    def behind(self, after: bytes, limit: int) -> list[EntryPlace]:
        """Up to `limit` places behind one."""
        count = len(self.places) // PLACE_BYTES
        start = bisect_right(range(count), after, key=self._packed)
        return [_unpack(self._packed(number)) for number in range(start, min(start + limit, count))]

    @property
    def weight(self) -> int:
        """What remembering it costs, in bytes."""
        return max(len(self.places), _STRETCH_BYTES_MIN)

    def _packed(self, number: int) -> bytes:
        return self.places[number * PLACE_BYTES : (number + 1) * PLACE_BYTES]


class LeafOrder:
    """Says which entries of a snapshot come next; one call in many reads all of them.

    That is one for 250,000 places, as long as the stretches that are read at once fit into 34 MB.
    """

    def __init__(self, ledger: LedgerStore) -> None:
        self._ledger = ledger
        # Those that were used last come first.
        self._stretches: deque[_Stretch] = deque()
        self._weight = 0

    async def places_behind(
        self, org_id: OrgId, snapshot_id: UUID, after: EntryPlace | None, limit: int
    ) -> Sequence[EntryPlace]:
        """Up to `limit` places behind one (None: from the first on), ascending; fewer also where more will follow.

        Nothing is behind the last entry only.
        """
        packed = b"" if after is None else _pack(after)
        stretch = self._find(snapshot_id, packed)
        if stretch is None:
            places = await self._ledger.read_places(org_id, snapshot_id, after=after, limit=STRETCH_PLACES)
            stretch = _Stretch(snapshot_id, packed, places, is_last=len(places) < STRETCH_PLACES * PLACE_BYTES)
            # Who read the same meanwhile has remembered it.
            if self._find(snapshot_id, packed) is None:
                self._remember(stretch)
        return stretch.behind(packed, limit)

    def _find(self, snapshot_id: UUID, after: bytes) -> _Stretch | None:
        """The stretch that has what comes right behind a place, which counts as its use."""
        stretch = next((each for each in self._stretches if each.begins_behind(snapshot_id, after)), None)
        if stretch is not None:
            self._stretches.remove(stretch)
            self._stretches.appendleft(stretch)
        return stretch

    def _remember(self, stretch: _Stretch) -> None:
        self._stretches.appendleft(stretch)
        self._weight += stretch.weight
        while self._weight > _BYTES_MAX:
            self._weight -= self._stretches.pop().weight


def _pack(place: EntryPlace) -> bytes:
    event_id, is_correction = place
    return event_id.bytes + bytes([is_correction])


def _unpack(packed: bytes) -> EntryPlace:
    return UUID(bytes=packed[:-1]), bool(packed[-1])

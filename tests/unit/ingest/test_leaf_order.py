"""How many readers page through large snapshots at once before their entries are sorted again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast
from uuid import UUID

from usameter_core.ids import OrgId
from usameter_ingest.service.leaf_order import STRETCH_PLACES, LeafOrder
from usameter_ingest.store.ledger import EntryPlace, LedgerStore

ORG = OrgId(UUID(int=7))
PAGE = 100


class SortedLedger:
    """A ledger of snapshots of which each has as many entries; counts the times that it sorts one."""

    def __init__(self, entries: int) -> None:
        self._places = b"".join(_packed(number) for number in range(entries))
        self.sorted = 0

    async def read_places(self, org_id: OrgId, snapshot_id: UUID, *, after: EntryPlace | None, limit: int) -> bytes:
        self.sorted += 1
        await asyncio.sleep(0)
        start = 0 if after is None else after[0].int + 1
        return self._places[start * 17 : (start + limit) * 17]


def _packed(number: int) -> bytes:
    return number.to_bytes(16, "big") + b"\x00"


async def times_sorted(*, readers: int, entries: int, pages: int, at_once: bool = False) -> int:
    """Each reads the first pages of a snapshot of its own, in turn; `at_once`: all of the same one."""
    ledger = SortedLedger(entries)
    order = LeafOrder(cast(LedgerStore, ledger))
    snapshot_ids = [UUID(int=0 if at_once else number) for number in range(readers)]
    after: list[EntryPlace | None] = [None] * readers
    for page in range(pages):
        reading = [order.places_behind(ORG, snapshot_ids[number], after[number], PAGE) for number in range(readers)]
        read: list[Sequence[Any]] = await asyncio.gather(*reading) if at_once else [await each for each in reading]
        for number, places in enumerate(read):
            assert [event_id.int for event_id, _ in places] == list(range(page * PAGE, (page + 1) * PAGE))
            after[number] = places[-1]
    return ledger.sorted


async def test_each_of_many_readers_of_snapshots_that_are_just_large_sorts_once() -> None:
    assert await times_sorted(readers=9, entries=3_000, pages=29) == 9
    # 34 KB each.
    assert await times_sorted(readers=1_000, entries=2_000, pages=3) == 1_000


async def test_readers_of_the_largest_sort_again_beyond_34_megabytes() -> None:
    assert await times_sorted(readers=8, entries=STRETCH_PLACES, pages=3) == 8
    assert await times_sorted(readers=9, entries=STRETCH_PLACES, pages=3) == 27


async def test_a_stretch_is_remembered_once_however_many_have_read_it_at_once() -> None:
    # Twelve stretches of the largest would not fit; the readers of the second page all find the first one's.
    assert await times_sorted(readers=12, entries=STRETCH_PLACES, pages=2, at_once=True) == 12


async def test_last_pages_do_not_fill_the_memory_with_stretches_of_nothing() -> None:
    ledger = SortedLedger(3_000)
    order = LeafOrder(cast(LedgerStore, ledger))
    last = (UUID(int=2_999), False)
    for number in range(1_500):
        assert await order.places_behind(ORG, UUID(int=number), last, PAGE) == []
    assert ledger.sorted == 1_500
    # The last thousand are still known.
    for number in range(500, 1_500):
        await order.places_behind(ORG, UUID(int=number), last, PAGE)
    assert ledger.sorted == 1_500
    await order.places_behind(ORG, UUID(int=0), last, PAGE)
    assert ledger.sorted == 1_501

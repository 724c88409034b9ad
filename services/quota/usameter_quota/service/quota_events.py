"""Reading and watching what happened to quotas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from usameter_core.ids import OrgId
from usameter_quota.domain.quota_events import QuotaEvent, QuotaEventFilter
from usameter_quota.store.quota_events import QuotaEventStore

# A watcher costs one look-up in an index each time; events of other replicas ring no bell here.
_POLL_SECONDS = 0.5
_PAGE_EVENTS_MAX = 1_000


class QuotaEventService:
    """The log of quota events of organizations."""

    def __init__(self, *, store: QuotaEventStore) -> None:
        self._store = store
        self._stopped = asyncio.Event()

    def stop_watching(self) -> None:
        """End every watch: the server stops, and would wait for them."""
        self._stopped.set()

    async def list_events(
        self, org_id: OrgId, wanted: QuotaEventFilter, *, before: int | None, limit: int
    ) -> list[QuotaEvent]:
        """Up to `limit` events below the position `before` (None: the newest), newest first."""
        return await self._store.list_before(org_id, wanted, before=before, limit=limit)

    async def watch(self, org_id: OrgId, wanted: QuotaEventFilter, *, after: int) -> AsyncIterator[QuotaEvent]:
        """Every event above the position `after`, ascending, for as long as somebody asks; none is left out."""
        while not self._stopped.is_set():
            # Positions become visible in order, so nothing can still appear up to the newest that is visible.
            last = await self._store.last_position(org_id)
            while after < last:
                events = await self._store.list_between(
                    org_id, wanted, after=after, through=last, limit=_PAGE_EVENTS_MAX
                )
                for event in events:
                    yield event
                after = events[-1].position if len(events) == _PAGE_EVENTS_MAX else last
            try:
                async with asyncio.timeout(_POLL_SECONDS):
                    await self._stopped.wait()
            except TimeoutError:
                pass

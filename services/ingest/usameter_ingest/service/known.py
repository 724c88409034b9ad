"""Known events: asked for in the cache while that can be trusted, else in PostgreSQL."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from uuid import UUID

from usameter_core.ids import OrgId
from usameter_ingest.counters.known import KnownEventCache
from usameter_ingest.domain.event import StoredEvent, UsageEvent
from usameter_ingest.metrics import KNOWN_EVENTS
from usameter_ingest.store.entries import GENERATION_SECONDS, EntryStore

# An organization that sent a stored event is taken to send more of them for so long.
_RESENDING_SECONDS = 60.0
# Forgetting one costs a look-up.
_ORGANIZATIONS_MAX = 10_000


class KnownEvents:
    """Finds stored events.

    An answer of the cache is as true as PostgreSQL's was at most `GENERATION_SECONDS` before: the cache is asked
    only in a generation that a look-up confirmed within that time. Look-ups that find nothing confirm nothing, and
    what is recorded is cached only where stored events were sent lately: whoever sends new events only neither
    asks nor writes the cache, which would cost them what it spares the others.
    """

    def __init__(
        self,
        *,
        entries: EntryStore,
        cache: KnownEventCache,
        monotonic_seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._entries = entries
        self._cache = cache
        self._monotonic_seconds = monotonic_seconds
        # The generation that was found last, and when it was asked for.
        self._confirmed: dict[OrgId, tuple[str, float]] = {}

    async def find(self, org_id: OrgId, event_ids: Sequence[UUID]) -> dict[UUID, StoredEvent]:
        """Those of the events that are stored, by id.

        Raises:
            Unavailable: The database cannot be reached, and the cache does not know all of them.
        """
        cached = await self._find_cached(org_id, event_ids)
        missing = [event_id for event_id in event_ids if event_id not in cached]
        if not missing:
            return cached
        # Before the question: of what has happened since, the answer may know nothing.
        asked_at = self._monotonic_seconds()
        found = await self._entries.find_stored(org_id, missing)
        if found.generation is None:
            return cached
        KNOWN_EVENTS.labels("database").inc(len(found.events))
        if len(self._confirmed) >= _ORGANIZATIONS_MAX:
            self._confirmed.clear()
        self._confirmed[org_id] = found.generation, asked_at
        self._cache.add(org_id, found.generation, found.events.values())
        return cached | found.events

    def add(self, org_id: OrgId, generation: str, events: Sequence[UsageEvent]) -> None:
        """Remember events that are committed in this generation, if they are likely to be sent again."""
        if self._confirmed_within(org_id, _RESENDING_SECONDS):
            # Without a key an event has an id that is never sent.
            self._cache.add(org_id, generation, [event for event in events if event.idempotency_key is not None])

    async def _find_cached(self, org_id: OrgId, event_ids: Sequence[UUID]) -> dict[UUID, StoredEvent]:
        generation = self._confirmed_within(org_id, GENERATION_SECONDS)
        if generation is None:
            return {}
        cached = await self._cache.read(org_id, generation, event_ids)
        KNOWN_EVENTS.labels("cache").inc(len(cached))
        return cached

    def _confirmed_within(self, org_id: OrgId, seconds: float) -> str | None:
        generation, asked_at = self._confirmed.get(org_id, (None, 0.0))
        return generation if self._monotonic_seconds() - asked_at < seconds else None

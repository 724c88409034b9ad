"""Reading events and usage."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from usameter_core.clock import Clock
from usameter_core.errors import FieldViolation, InvalidArgument, NotFound
from usameter_core.ids import OrgId, format_id
from usameter_core.period import Period, month_of
from usameter_ingest.store.entries import EntryStore, EventFilter, ListedEvent
from usameter_ingest.store.usage import Grouping, UsageStore, UsageSum


class ReadingService:
    """Answers what is in the ledger."""

    def __init__(self, *, entries: EntryStore, usage: UsageStore, clock: Clock) -> None:
        self._entries = entries
        self._usage = usage
        self._clock = clock

    async def get_event(self, org_id: OrgId, event_id: UUID) -> ListedEvent:
        """One event.

        Raises:
            NotFound: The organization has none with this id.
        """
        event = await self._entries.find_event(org_id, event_id)
        if event is None:
            raise NotFound("event", format_id("evt", event_id))
        return event

    async def list_events(
        self, org_id: OrgId, which: EventFilter, *, before: tuple[datetime, UUID] | None, limit: int
    ) -> list[ListedEvent]:
        """The latest `limit` events before a key, (occurred_at, event_id), latest first.

        Events that are recorded meanwhile shift no page.
        """
        if which.start is not None and which.end is not None:
            _check_order(which.start, which.end)
        return await self._entries.list_events(org_id, which, before=before, limit=limit)

    async def get_usage(
        self,
        org_id: OrgId,
        *,
        tenant_id: str | None,
        event_type: str | None,
        start: datetime | None,
        end: datetime | None,
        grouping: Grouping,
    ) -> tuple[Period, list[UsageSum]]:
        """Use by group within [start, end); where one is not given, this UTC month's."""
        month = month_of(self._clock.now())
        span = Period(month.start if start is None else start, month.end if end is None else end)
        _check_order(span.start, span.end)
        sums = await self._usage.sum_usage(org_id, span, tenant_id=tenant_id, event_type=event_type, grouping=grouping)
        return span, sums


def _check_order(start: datetime, end: datetime) -> None:
    if start >= end:
        raise InvalidArgument([FieldViolation("end_date", "must be after start_date")])

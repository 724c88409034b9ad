"""Reading events and usage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from usameter_core.clock import Clock
from usameter_core.errors import FieldViolation, InvalidArgument, NotFound
from usameter_core.ids import OrgId, format_id
from usameter_core.pages import decode_page_token, encode_page_token
from usameter_core.period import Period, format_timestamp, month_of
from usameter_ingest.store.entries import EntryStore, EventFilter, ListedEvent
from usameter_ingest.store.usage import Grouping, UsageStore, UsageSum


@dataclass(frozen=True, slots=True)
class EventPage:
    """Some events, and where the list goes on."""

    events: Sequence[ListedEvent]
    next_page_token: str | None


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

    async def list_events(self, org_id: OrgId, which: EventFilter, *, limit: int, page_token: str) -> EventPage:
        """A page of events, latest first. Events recorded meanwhile shift no page."""
        if which.start is not None and which.end is not None:
            _check_order(which.start, which.end)
        key = decode_page_token(page_token, tuple[datetime, UUID])
        # One more than asked for tells whether there is a next page.
        events = await self._entries.list_events(org_id, which, before=key, limit=limit + 1)
        if len(events) <= limit:
            return EventPage(events, None)
        last = events[limit - 1]
        token = encode_page_token([format_timestamp(last.occurred_at), str(last.event_id)])
        return EventPage(events[:limit], token)

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

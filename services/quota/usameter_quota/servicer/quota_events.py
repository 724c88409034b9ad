"""The public `QuotaEventService`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from usameter.quota.v1 import quota_event_pb2, quota_event_pb2_grpc, quota_pb2
from usameter_core.decimals import canonical
from usameter_core.grpc.context import current_principal
from usameter_core.grpc.timestamps import timestamp_from_datetime
from usameter_core.pages import DEFAULT_LIMIT, decode_page_token, encode_page_token
from usameter_quota.domain.quota_events import QuotaEvent, QuotaEventFilter, QuotaEventType
from usameter_quota.service.quota_events import QuotaEventService


class QuotaEventServicer(quota_event_pb2_grpc.QuotaEventServiceServicer):
    """The quota events of the calling organization."""

    def __init__(self, service: QuotaEventService) -> None:
        self._service = service

    async def ListQuotaEvents(
        self, request: quota_event_pb2.ListQuotaEventsRequest, context: Any
    ) -> quota_event_pb2.ListQuotaEventsResponse:
        """A page of events, the newest first."""
        limit = request.limit if request.HasField("limit") else DEFAULT_LIMIT
        before = decode_page_token(request.page_token, tuple[int])
        # One more than asked for tells whether there is a next page.
        events = await self._service.list_events(
            current_principal().org_id,
            filter_from_proto(request),
            before=before[0] if before else None,
            limit=limit + 1,
        )
        response = quota_event_pb2.ListQuotaEventsResponse(
            quota_events=[event_to_proto(event) for event in events[:limit]]
        )
        if len(events) > limit:
            response.next_page_token = encode_page_token((events[limit - 1].position,))
        return response

    async def WatchQuotaEvents(
        self, request: quota_event_pb2.WatchQuotaEventsRequest, context: Any
    ) -> AsyncIterator[quota_event_pb2.QuotaEvent]:
        """Events above a position, and those to come."""
        events = self._service.watch(
            current_principal().org_id, filter_from_proto(request), after=request.after_position
        )
        async for event in events:
            yield event_to_proto(event)


def filter_from_proto(
    request: quota_event_pb2.ListQuotaEventsRequest | quota_event_pb2.WatchQuotaEventsRequest,
) -> QuotaEventFilter:
    """Which events a request means."""
    return QuotaEventFilter(
        tenant_id=request.tenant_id or None,
        event_type=request.event_type or None,
        type=QuotaEventType(quota_event_pb2.QuotaEventType.Name(request.type)) if request.type else None,
    )


def event_to_proto(event: QuotaEvent) -> quota_event_pb2.QuotaEvent:
    """An event as its readers see it."""
    return quota_event_pb2.QuotaEvent(
        position=event.position,
        type=quota_event_pb2.QuotaEventType.Value(event.type.value),
        tenant_id=event.tenant_id,
        event_type=event.event_type,
        occurred_at=timestamp_from_datetime(event.occurred_at),
        limit_value=canonical(event.limit_value),
        enforcement_mode=quota_pb2.EnforcementMode.Value(event.enforcement_mode.value),
        period=quota_pb2.QuotaPeriod.Value(event.period.value),
        soft_limit_percent=event.soft_limit_percent,
        period_start=timestamp_from_datetime(event.period_start),
        period_end=timestamp_from_datetime(event.period_end),
        stored=canonical(event.stored),
        grace_ends_at=None if event.grace_ends_at is None else timestamp_from_datetime(event.grace_ends_at),
    )

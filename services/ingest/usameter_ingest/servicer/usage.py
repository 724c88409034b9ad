"""UsageService: see usameter/ingest/v1/usage.proto."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

import grpc.aio

from usameter.ingest.v1 import usage_pb2, usage_pb2_grpc
from usameter_core.decimals import canonical
from usameter_core.grpc.context import current_principal
from usameter_core.grpc.timestamps import datetime_in, timestamp_from_datetime
from usameter_ingest.counters.live import LiveCounters, LiveUsage
from usameter_ingest.service.reading import ReadingService
from usameter_ingest.store.usage import Grouping, UsageSum

_GROUPINGS = {
    usage_pb2.USAGE_GROUPING_UNSPECIFIED: Grouping.EVENT_TYPE,
    usage_pb2.event_type: Grouping.EVENT_TYPE,
    usage_pb2.tenant: Grouping.TENANT,
    usage_pb2.day: Grouping.DAY,
    usage_pb2.hour: Grouping.HOUR,
}


class UsageServicer(usage_pb2_grpc.UsageServiceServicer):
    """Sums the caller's organization's use."""

    def __init__(self, reading: ReadingService, *, live: LiveCounters) -> None:
        self._reading = reading
        self._live = live

    async def GetUsage(
        self, request: usage_pb2.GetUsageRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> usage_pb2.GetUsageResponse:
        grouping = _GROUPINGS[request.group_by]
        span, sums = await self._reading.get_usage(
            current_principal().org_id,
            tenant_id=request.tenant_id or None,
            event_type=request.event_type or None,
            start=datetime_in(request, "start_date"),
            end=datetime_in(request, "end_date"),
            grouping=grouping,
        )
        return usage_pb2.GetUsageResponse(
            usage=[group_to_proto(grouping, each) for each in sums],
            period=usage_pb2.UsagePeriod(
                start=timestamp_from_datetime(span.start), end=timestamp_from_datetime(span.end)
            ),
        )

    async def GetLiveUsage(
        self, request: usage_pb2.GetLiveUsageRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> usage_pb2.GetLiveUsageResponse:
        usage = await self._live.read(current_principal().org_id)
        return usage_pb2.GetLiveUsageResponse(degraded=True) if usage is None else live_usage_to_proto(usage)


def live_usage_to_proto(usage: LiveUsage) -> usage_pb2.GetLiveUsageResponse:
    """The last hour, as Redis knows it."""
    return usage_pb2.GetLiveUsageResponse(
        minutes=[
            usage_pb2.LiveMinute(minute=timestamp_from_datetime(start), event_count=events)
            for start, events in usage.minutes
        ],
        busiest_tenants=[
            usage_pb2.LiveTenant(tenant_id=tenant_id, event_count=events) for tenant_id, events in usage.busiest_tenants
        ],
    )


def group_to_proto(grouping: Grouping, usage: UsageSum) -> usage_pb2.UsageGroup:
    """The use of one group, named by what it is grouped by."""
    message = usage_pb2.UsageGroup(total_quantity=canonical(usage.quantity), event_count=usage.event_count)
    match grouping, usage.key:
        case Grouping.EVENT_TYPE, str(event_type):
            message.event_type = event_type
        case Grouping.TENANT, str(tenant_id):
            message.tenant_id = tenant_id
        case Grouping.HOUR, datetime() as hour:
            message.hour.CopyFrom(timestamp_from_datetime(hour))
        case Grouping.DAY, date() as day:
            message.date = day.isoformat()
    return message

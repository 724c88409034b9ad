"""Answers and events as the messages of usameter/ingest/v1/event.proto."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from usameter.common.v1 import error_pb2
from usameter.ingest.v1 import event_pb2
from usameter_core.decimals import canonical
from usameter_core.errors import Internal, UsameterError
from usameter_core.grpc.status import reason_and_details_of
from usameter_core.grpc.timestamps import timestamp_from_datetime
from usameter_core.ids import format_id
from usameter_ingest.clients import LimitWarning
from usameter_ingest.domain.metadata import decode_metadata
from usameter_ingest.service.recording import EventResult, Recorded
from usameter_ingest.store.entries import Correction, ListedEvent


def is_refusal(error: Exception) -> TypeGuard[UsameterError]:
    """Whether the caller is told; whatever else went wrong is ours."""
    return isinstance(error, UsameterError) and not isinstance(error, Internal)


def single_to_proto(recorded: Recorded) -> event_pb2.RecordEventsResponse:
    """The answer to a single event."""
    (result,) = recorded.results
    return event_pb2.RecordEventsResponse(
        success=True,
        event_id=format_id("evt", result.event_id),
        deduplicated=result.deduplicated,
        voided=True if result.voided else None,
        warnings=[warning_to_proto(warning) for warning in recorded.warnings],
    )


def batch_to_proto(recorded: Recorded) -> event_pb2.RecordEventsResponse:
    """The answer to a batch."""
    duplicates = sum(result.deduplicated for result in recorded.results)
    return event_pb2.RecordEventsResponse(
        success=True,
        count=len(recorded.results),
        new_events=len(recorded.results) - duplicates,
        duplicate_events=duplicates,
        results=[result_to_proto(result) for result in recorded.results],
        warnings=[warning_to_proto(warning) for warning in recorded.warnings],
    )


def partial_to_proto(outcomes: Sequence[Recorded | Exception], request_id: str) -> event_pb2.RecordEventsResponse:
    """The answer to a partial batch: each event's result or error, in order."""
    recorded = [outcome for outcome in outcomes if isinstance(outcome, Recorded)]
    duplicates = sum(outcome.results[0].deduplicated for outcome in recorded)
    return event_pb2.RecordEventsResponse(
        success=True,
        count=len(outcomes),
        new_events=len(recorded) - duplicates,
        duplicate_events=duplicates,
        results=[
            result_to_proto(outcome.results[0])
            if isinstance(outcome, Recorded)
            else error_to_proto(outcome, request_id)
            for outcome in outcomes
        ],
        # The last word on each limit: its `current` includes all the events before.
        warnings=list(
            {
                (warning.tenant_id, warning.event_type): warning_to_proto(warning)
                for outcome in recorded
                for warning in outcome.warnings
            }.values()
        ),
    )


def error_to_proto(error: Exception, request_id: str) -> event_pb2.EventResult:
    """The error of one event of a partial batch; of a fault of ours it tells the request id and nothing else."""
    details: Message | None
    if is_refusal(error):
        sentence, (code, details) = str(error), reason_and_details_of(error)
    else:
        sentence, code, details = "Internal error", "INTERNAL", error_pb2.InternalDetails(request_id=request_id)
    return event_pb2.EventResult(
        error=event_pb2.EventError(
            error=sentence,
            code=code,
            details=Struct() if details is None else ParseDict(_as_printed(details), Struct()),
        )
    )


def _as_printed(details: Message) -> dict[str, Any]:
    return MessageToDict(details, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def result_to_proto(result: EventResult) -> event_pb2.EventResult:
    """One event's part of a batch's answer."""
    return event_pb2.EventResult(
        event_id=format_id("evt", result.event_id),
        deduplicated=result.deduplicated,
        voided=True if result.voided else None,
    )


def warning_to_proto(warning: LimitWarning) -> event_pb2.Warning:
    """A limit that the request came near or went over."""
    return event_pb2.Warning(
        code=warning.code,
        tenant_id=warning.tenant_id,
        event_type=warning.event_type,
        limit=canonical(warning.limit),
        current=canonical(warning.current),
        reset_at=None if warning.reset_at is None else timestamp_from_datetime(warning.reset_at),
    )


def event_to_proto(event: ListedEvent) -> event_pb2.Event:
    """An event as it is read."""
    return event_pb2.Event(
        id=format_id("evt", event.event_id),
        tenant_id=event.tenant_id,
        event_type=event.event_type,
        quantity=float(event.quantity),  # the published field; quantity_decimal is the exact one
        quantity_decimal=canonical(event.quantity),
        metadata=ParseDict(decode_metadata(event.metadata), Struct()),
        timestamp=timestamp_from_datetime(event.occurred_at),
        ingested_at=timestamp_from_datetime(event.ingested_at),
        idempotency_key=event.idempotency_key,
        invoice_id=event.invoice_id,
        billed_at=None if event.billed_at is None else timestamp_from_datetime(event.billed_at),
        correction=None if event.correction is None else correction_to_proto(event.correction),
    )


def correction_to_proto(correction: Correction) -> event_pb2.Correction:
    """The signed entry beside an event."""
    return event_pb2.Correction(
        event_id=format_id("evt", correction.event_id),
        kind=event_pb2.CorrectionKind.Value(correction.kind),
        quantity_delta=canonical(correction.quantity_delta),
        quantity_decimal=canonical(correction.quantity),
        reason=correction.reason,
        ingested_at=timestamp_from_datetime(correction.ingested_at),
    )

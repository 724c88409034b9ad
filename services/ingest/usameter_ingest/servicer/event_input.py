"""Requests to record, as they arrive: every rule of the contract, checked by code made for it.

The rules are those of usameter/ingest/v1/event.proto. The general validator takes 7 µs an event to
check them, a third of what recording takes altogether, so RecordEvents does without it; that both
come to the same verdict is a property test (tests/unit/ingest/test_event_input.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from google.protobuf.struct_pb2 import Struct, Value

from usameter.ingest.v1 import event_pb2
from usameter_core.errors import FieldViolation, InvalidArgument
from usameter_core.grpc.timestamps import datetime_from_timestamp
from usameter_core.ids import OrgId
from usameter_ingest.domain.event import (
    AHEAD_MAX,
    EARLIEST,
    ONE,
    InvalidQuantity,
    UsageEvent,
    checked_quantity,
    new_event,
    quantity_from_double,
)
from usameter_ingest.domain.metadata import METADATA_BYTES_MAX, InvalidMetadata, Json, encode_metadata, too_large

BATCH_EVENTS_MAX = 1_000
# A thousand sentences help nobody.
_VIOLATIONS_MAX = 20
# Larger, a Struct is too large as JSON as well: it has at most 11 bytes (a digit in a list) where that has two.
# Taking one of 1.4 million numbers apart to find that out took a second.
_STRUCT_BYTES_MAX = 8 * METADATA_BYTES_MAX
_SINGLE_FIELDS = frozenset(
    {
        "event_type",
        "tenant_id",
        "quantity",
        "quantity_decimal",
        "idempotency_key",
        "metadata",
        "timestamp",
        "reservation_id",
    }
)
is_event_type = re.compile(r"[A-Za-z0-9_.:-]{1,100}").fullmatch
# Printable: neither control characters (Cc) nor line and paragraph separators (Zl, Zp).
is_tenant_id = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,100}").fullmatch
is_idempotency_key = re.compile(r"[^\x00-\x1f\x7f-\x9f]{1,255}").fullmatch
is_reservation_id = re.compile(r"[A-Za-z0-9_.-]{1,100}").fullmatch
is_quantity_decimal = re.compile(r"(0|[1-9][0-9]{0,13})([.][0-9]{1,6})?").fullmatch

EventMessage = event_pb2.EventInput | event_pb2.RecordEventsRequest
QuantityMessage = EventMessage | event_pb2.AmendEventRequest


@dataclass(frozen=True, slots=True)
class RefusedEvent:
    """An event of a partial batch that breaks a rule; the others do not mind."""

    error: InvalidArgument


def events_from_proto(
    org_id: OrgId, request: event_pb2.RecordEventsRequest, *, now: datetime
) -> list[UsageEvent | RefusedEvent]:
    """The events of a request, in order; refused ones only of a partial batch.

    Raises:
        InvalidArgument: Names what is wrong where, up to 20 faults.
    """
    latest = now + AHEAD_MAX
    if not request.events:
        _check_single(request)
        return [_event_from_input(org_id, request, now=now, latest=latest)]
    _check_batch(request)
    events: list[UsageEvent | RefusedEvent] = []
    violations: list[FieldViolation] = []
    for index, each in enumerate(request.events):
        try:
            events.append(_event_from_input(org_id, each, now=now, latest=latest))
        except InvalidArgument as error:
            faults = [FieldViolation(f"events[{index}].{fault.field}", fault.description) for fault in error.violations]
            events.append(RefusedEvent(InvalidArgument(faults)))
            violations.extend(faults)
            if len(violations) >= _VIOLATIONS_MAX and not request.partial:
                break
    if violations and not request.partial:
        raise InvalidArgument(violations)
    return events


def quantity_from_proto(message: QuantityMessage) -> Decimal | None:
    """The quantity, exact; None where none is given.

    Raises:
        InvalidQuantity: It is out of range, too fine, malformed or given twice.
    """
    if not message.HasField("quantity_decimal"):
        return quantity_from_double(message.quantity) if message.HasField("quantity") else None
    if message.HasField("quantity"):
        raise InvalidQuantity("cannot stand beside quantity_decimal")
    if not is_quantity_decimal(message.quantity_decimal):
        raise InvalidQuantity("must be a decimal with at most 14 digits before and 6 after the point")
    return checked_quantity(Decimal(message.quantity_decimal))


def json_from_struct(struct: Struct) -> dict[str, Json]:
    """The JSON object that a Struct stands for; its numbers are doubles."""
    return {key: _json_from_value(value) for key, value in struct.fields.items()}


def _json_from_value(value: Value) -> Json:
    match value.WhichOneof("kind"):
        case "string_value":
            return value.string_value
        case "number_value":
            return value.number_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return json_from_struct(value.struct_value)
        case "list_value":
            return [_json_from_value(each) for each in value.list_value.values]
        case _:
            return None


def _check_single(request: event_pb2.RecordEventsRequest) -> None:
    if not request.ListFields():
        fields = "must hold 1 to 1000 events, or the request the fields of one event"
        raise InvalidArgument([FieldViolation("events", fields)])
    missing = [name for name in ("event_type", "tenant_id") if not request.HasField(name)]
    if missing:
        raise InvalidArgument([FieldViolation(name, "is required") for name in missing])
    if request.partial:
        raise InvalidArgument([FieldViolation("partial", "is for batches")])


def _check_batch(request: event_pb2.RecordEventsRequest) -> None:
    if len(request.events) > BATCH_EVENTS_MAX:
        raise InvalidArgument([FieldViolation("events", f"has more than {BATCH_EVENTS_MAX} events")])
    for descriptor, _ in request.ListFields():
        if descriptor.name in _SINGLE_FIELDS:
            raise InvalidArgument([FieldViolation(descriptor.name, "cannot stand beside `events`")])


def _event_from_input(org_id: OrgId, message: EventMessage, *, now: datetime, latest: datetime) -> UsageEvent:
    """One event.

    Raises:
        InvalidArgument: Names every field that is wrong.
    """
    faults: list[FieldViolation] = []
    event_type, tenant_id = message.event_type, message.tenant_id
    if not is_event_type(event_type):
        faults.append(FieldViolation("event_type", "must be 1 to 100 of A-Z a-z 0-9 _ . : -"))
    if not is_tenant_id(tenant_id):
        faults.append(FieldViolation("tenant_id", "must be 1 to 100 printable characters"))
    key = message.idempotency_key if message.HasField("idempotency_key") else None
    if key is not None and not is_idempotency_key(key):
        faults.append(FieldViolation("idempotency_key", "must be 1 to 255 characters, none a control character"))
    quantity: Decimal | None = ONE
    try:
        quantity = quantity_from_proto(message)
    except InvalidQuantity as error:
        field = "quantity" if message.HasField("quantity") else "quantity_decimal"
        faults.append(FieldViolation(field, str(error)))
    metadata = b""
    try:
        if message.metadata.ByteSize() > _STRUCT_BYTES_MAX:
            raise too_large()
        metadata = encode_metadata(json_from_struct(message.metadata))
    except InvalidMetadata as error:
        faults.append(FieldViolation("metadata", str(error)))
    timestamp = None
    if message.HasField("timestamp"):
        try:
            timestamp = datetime_from_timestamp(message.timestamp, field="timestamp")
            if timestamp > latest:
                faults.append(FieldViolation("timestamp", "is more than 5 minutes ahead"))
            elif timestamp < EARLIEST:
                faults.append(FieldViolation("timestamp", "cannot be on the first day of the calendar"))
        except InvalidArgument as error:
            faults.extend(error.violations)
    reservation_id = message.reservation_id if message.HasField("reservation_id") else None
    if reservation_id is not None and not is_reservation_id(reservation_id):
        faults.append(FieldViolation("reservation_id", "must be 1 to 100 of A-Z a-z 0-9 _ . -"))
    if faults:
        raise InvalidArgument(faults)
    return new_event(
        org_id=org_id,
        tenant_id=tenant_id,
        event_type=event_type,
        quantity=ONE if quantity is None else quantity,
        metadata=metadata,
        idempotency_key=key,
        timestamp=timestamp,
        reservation_id=reservation_id,
        now=now,
    )

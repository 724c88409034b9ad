"""RecordEvents as REST writes it, read and answered without a message in between.

A message with a Struct in it costs more to make and to take apart than everything else that recording
does with an event. So requests in JSON are read directly into events, as long as they are plain: valid
and written in the usual way. Whatever is not is left unread, and the edge transcodes it like any other
request: the rules, and what is said about breaking them, are in `event_input` and the edge alone. That both
ways come to the same events is a property test (tests/contract/test_event_json.py).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import msgspec

from usameter_core.decimals import DOUBLE_DIGITS
from usameter_core.ids import OrgId
from usameter_ingest.domain.event import (
    AHEAD_MAX,
    EARLIEST,
    ONE,
    UsageEvent,
    checked_quantity,
    new_event,
)
from usameter_ingest.domain.metadata import encode_metadata
from usameter_ingest.service.recording import Recorded
from usameter_ingest.servicer.event_input import (
    BATCH_EVENTS_MAX,
    is_event_type,
    is_idempotency_key,
    is_quantity_decimal,
    is_reservation_id,
    is_tenant_id,
)

# No exponent, and an offset only as Z: what else RFC 3339 and JSON allow is rare.
_is_plain_number = re.compile(rb"(?:0|[1-9][0-9]*)(?:[.][0-9]{1,6})?").fullmatch
_is_plain_time = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:[.][0-9]{1,6})?Z").fullmatch


_NULL = b"null"


class _Unread(Exception):
    """The request is not plain."""


class _PlainEvent(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The fields of an event; null is the same as absent."""

    event_type: str | None = None
    tenant_id: str | None = None
    quantity: msgspec.Raw = msgspec.Raw(_NULL)
    quantity_decimal: str | None = None
    idempotency_key: str | None = None
    metadata: dict[str, Any] | None = None
    timestamp: str | None = None
    reservation_id: str | None = None


class _PlainRequest(_PlainEvent, forbid_unknown_fields=True, gc=False):
    """A batch, or the fields of a single event."""

    events: list[_PlainEvent] | None = None
    partial: bool | None = None


_decode: Callable[[bytes], _PlainRequest] = msgspec.json.Decoder(_PlainRequest).decode


@dataclass(frozen=True, slots=True)
class PlainRequest:
    """A request whose events obey every rule."""

    events: list[UsageEvent]
    # Else a single event.
    batch: bool
    partial: bool


def events_from_json(org_id: OrgId, text: bytes, *, now: datetime) -> PlainRequest | None:
    """The events of a request in JSON, in order; None where it is wrong, or written in an unusual way."""
    latest = now + AHEAD_MAX
    try:
        text.decode()  # the decoder does not look at what it skips
        request = _decode(text)
        inputs = request.events
        if inputs is None:
            if request.partial:
                return None
            return PlainRequest([_event(org_id, request, now=now, latest=latest)], batch=False, partial=False)
        if not 0 < len(inputs) <= BATCH_EVENTS_MAX or _has_single_fields(request):
            return None
        events = [_event(org_id, each, now=now, latest=latest) for each in inputs]
    except (msgspec.DecodeError, RecursionError, ValueError, _Unread):
        return None
    return PlainRequest(events, batch=True, partial=bool(request.partial))


def answer_to_json(recorded: Recorded, *, batch: bool) -> bytes | None:
    """The answer as REST prints it; None where it says more than ids and duplicates."""
    if recorded.warnings or any(result.voided for result in recorded.results):
        return None
    results = [
        f'"event_id":"evt_{result.event_id.hex}","deduplicated":{"true" if result.deduplicated else "false"}'
        for result in recorded.results
    ]
    if not batch:
        return f'{{"success":true,{results[0]}}}'.encode()
    duplicates = sum(result.deduplicated for result in recorded.results)
    return (
        f'{{"success":true,"count":{len(results)},"new_events":{len(results) - duplicates},'
        f'"duplicate_events":{duplicates},"results":[{{{"},{".join(results)}}}]}}'
    ).encode()


def _has_single_fields(request: _PlainRequest) -> bool:
    fields = (getattr(request, name) for name in _PlainEvent.__struct_fields__ if name != "quantity")
    return bytes(request.quantity) != _NULL or any(value is not None for value in fields)


def _event(org_id: OrgId, event: _PlainEvent, *, now: datetime, latest: datetime) -> UsageEvent:
    """One event.

    Raises:
        _Unread, ValueError: Some field is not plain.
    """
    event_type, tenant_id, key, time = event.event_type, event.tenant_id, event.idempotency_key, event.timestamp
    if not (event_type and is_event_type(event_type) and tenant_id and is_tenant_id(tenant_id)):
        raise _Unread
    if key is not None and not is_idempotency_key(key):
        raise _Unread
    if event.reservation_id is not None and not is_reservation_id(event.reservation_id):
        raise _Unread
    timestamp = None
    if time is not None:
        if not _is_plain_time(time):
            raise _Unread
        timestamp = datetime.fromisoformat(time)
        if not EARLIEST <= timestamp <= latest:
            raise _Unread
    return new_event(
        org_id=org_id,
        tenant_id=tenant_id,
        event_type=event_type,
        quantity=_quantity(event),
        metadata=encode_metadata(event.metadata or {}),
        idempotency_key=key,
        timestamp=timestamp,
        reservation_id=event.reservation_id,
        now=now,
    )


def _quantity(event: _PlainEvent) -> Decimal:
    literal = bytes(event.quantity)
    if event.quantity_decimal is None:
        return ONE if literal == _NULL else _quantity_of_literal(literal)
    if literal != _NULL or not is_quantity_decimal(event.quantity_decimal):
        raise _Unread
    return checked_quantity(Decimal(event.quantity_decimal))


@functools.lru_cache(maxsize=10_000)
def _quantity_of_literal(literal: bytes) -> Decimal:
    """The quantity that a JSON number names: with at most 15 digits its double's shortest form is the same number."""
    if len(literal) > DOUBLE_DIGITS + 1 or not _is_plain_number(literal):
        raise _Unread
    return checked_quantity(Decimal(literal.decode()))

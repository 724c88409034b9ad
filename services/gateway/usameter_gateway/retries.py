"""Whether a request whose answer was lost may be sent again."""

from __future__ import annotations

from typing import Any

import msgspec
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_KEY = "idempotency_key"
# Of what is done to a reservation. An event that names one has a key of its own.
_RESERVATION_KEY = "reservation_id"


class _Keyed(msgspec.Struct):
    """As much of a request to record events as tells whether each has a key."""

    idempotency_key: Any = None
    events: list[_Keyed] | None = None


_decode_keys = msgspec.json.Decoder(_Keyed).decode


def is_recording_retry_safe(body: bytes) -> bool:
    """As `is_retry_safe`, of a request to record events in JSON: no message is made, which may take seconds."""
    try:
        request = _decode_keys(body)
    except msgspec.DecodeError:
        return False
    return all(each.idempotency_key for each in request.events or [request])


def is_retry_safe(verb: str, request: Message) -> bool:
    """Whether sending the same request again cannot record anything twice.

    GET, PUT and DELETE are idempotent by their meaning in HTTP. What POST records is recorded once
    only under an idempotency key: that of the request itself, or of every entry of its batch; a
    reservation is made and cancelled once under its id. A POST without keys counts as unsafe, also
    where a second one would merely be refused.
    """
    if verb != "POST":
        return True
    entries = [entry for field, value in request.ListFields() if _is_repeated_with_key(field) for entry in value] or [
        request
    ]
    return all(_has_key(each) for each in entries)


def _has_key(entry: Message) -> bool:
    fields = entry.DESCRIPTOR.fields_by_name
    key = _KEY if _KEY in fields else _RESERVATION_KEY
    return key in fields and bool(getattr(entry, key))


def _is_repeated_with_key(field: FieldDescriptor) -> bool:
    message = field.message_type
    return field.is_repeated and message is not None and _KEY in message.fields_by_name

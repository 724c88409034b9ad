"""What a line of the input becomes: events ready to send, or a fault."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

import msgspec

from usameter_core.decimals import canonical
from usameter_core.period import format_timestamp


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the input.

    Args:
        line: Its number, from 1; of a CSV row over several lines, the first.
        events: JSON objects as POST /api/v1/events takes them, each with an idempotency key.
        fault: What is wrong with the line, which then has no events; None: nothing.
        cut_off: The line may still be being written, and has no events yet.
    """

    line: int
    events: tuple[bytes, ...] = ()
    fault: str | None = None
    cut_off: bool = False


class EventBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """An event as the API takes it; what is None is not sent."""

    event_type: str
    tenant_id: str
    idempotency_key: str
    timestamp: str | None = None
    # One of the two, or none for 1: whole numbers as `quantity`, all else exactly as `quantity_decimal`.
    quantity: int | None = None
    quantity_decimal: str | None = None
    metadata: msgspec.Raw | None = None


class LineFault(Exception):
    """The line cannot be read; `str()` says why."""


def unreadable(number: int, line: bytes, fault: LineFault) -> Record:
    """The record of a line that cannot be read: its fault, or cut off where it has no line end yet."""
    return Record(number, fault=str(fault)) if line.endswith(b"\n") else Record(number, cut_off=True)


def idempotency_key(source: str, line: int, event_type: str) -> str:
    """The key of the event that a line makes: the same however often, and in whatever grown file, it is read.

    Lines may be equal to the letter and still be two uses, so it is the place that counts.
    """
    return f"{source}:{line}:{event_type}"


# An event's `quantity` and `quantity_decimal`: one of the two.
Quantity = tuple[int | None, str | None]


def split_quantity(text: str) -> Quantity:
    """`quantity` and `quantity_decimal` for a plain decimal such as "12" or "0.5"; bounds are the server's.

    Raises:
        LineFault: It is no plain decimal: no sign, exponent or grouping is read.
    """
    digits, point, decimals = text.partition(".")
    if not _are_digits(digits) or (point and not _are_digits(decimals)):
        raise LineFault(f'quantity {text!r} is not a plain decimal like "12" or "0.5"')
    value = canonical(Decimal(text))
    # A JSON number beyond 15 digits would be rounded on its way through a double.
    return (int(value), None) if value.isdigit() and len(value) <= 15 else (None, value)


def utc_timestamp(text: str) -> str:
    """An RFC 3339 time, in UTC.

    Raises:
        LineFault: It is none, or has no offset from UTC: an hour's guess could move it to another month.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise LineFault(f'timestamp {text!r} is not like "2026-01-15T10:30:00Z"') from None
    if moment.tzinfo is None:
        raise LineFault(f'timestamp {text!r} has no offset from UTC, such as "Z" or "+02:00"')
    try:
        return format_timestamp(moment.astimezone(UTC))
    except OverflowError:
        raise LineFault(f"timestamp {text!r} is outside the years 1 to 9999") from None


def encode_event(body: EventBody) -> bytes:
    """The event as JSON.

    Raises:
        LineFault: A text came from bytes that are not UTF-8.
    """
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:
        raise LineFault("is not UTF-8") from None


def _are_digits(text: str) -> bool:
    return text.isascii() and text.isdigit()

"""Access logs in the *combined* format of Apache and nginx, as usage.

A line is one request: its tenant is the client's address (or the user who logged in), and each metric makes
one event of it. The time's offset is read, so a server's local time and its changes are of no consequence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import assert_never

import msgspec

from usameter_cli.errors import UsageError
from usameter_cli.importing.records import (
    EventBody,
    LineFault,
    Quantity,
    Record,
    encode_event,
    idempotency_key,
    split_quantity,
    unreadable,
)
from usameter_core.period import format_timestamp

# The request and the referrer end at their first quote that is not escaped. The user agent is whatever is
# left: some servers write quotes in it as they are, and some cut it off, closing quote and all. We need none
# of it.
_COMBINED = re.compile(
    r"(?P<address>\S+) \S+ (?P<user>.*?) \[(?P<time>[^\]]+)\] "
    r'"(?P<request>(?:[^"\\]|\\.)*)" (?P<status>\d{3}) (?P<bytes>\d+|-) "(?:[^"\\]|\\.)*" ".*'
)
_REQUEST = re.compile(r"(?P<method>[A-Z_-]{1,32}) (?P<path>[^ ?#]+)")
_TIME = re.compile(r"(\d{2})/([A-Z][a-z]{2})/(\d{4}):(\d{2}):(\d{2}):(\d{2}) ([+-])(\d{2})(\d{2})")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_UNSET = "-"
# Metadata says which request it was; it is no second log.
_PATH_CHARACTERS_MAX = 500
_MILLION = 1_000_000
_EVENT_TYPE = re.compile(r"[A-Za-z0-9_.:-]{1,100}")


class TenantField(StrEnum):
    """The field of a line that names the tenant."""

    REMOTE_ADDR = "remote_addr"
    REMOTE_USER = "remote_user"


@dataclass(frozen=True, slots=True)
class PerRequest:
    """The same quantity for each line, above 0."""

    event_type: str
    quantity: Quantity


@dataclass(frozen=True, slots=True)
class PerByte:
    """The bytes sent, divided; lines that sent none make no event.

    `divisor` divides a million, so that six decimals are exact.
    """

    event_type: str
    divisor: int


Metric = PerRequest | PerByte

DEFAULT_METRICS = ("api_request=1", "egress_mb=bytes/1000000")


@dataclass(frozen=True, slots=True)
class Mapping:
    """How lines become events."""

    source: str
    tenant_from: TenantField
    metrics: Sequence[Metric]


def metric_from_text(text: str) -> Metric:
    """Read "EVENT_TYPE=1", "EVENT_TYPE=bytes" or "EVENT_TYPE=bytes/1000000".

    Raises:
        UsageError: It is none of these, or the division is not exact in six decimals.
    """
    event_type, _, expression = text.partition("=")
    if not _EVENT_TYPE.fullmatch(event_type):
        raise UsageError(f"--metric {text}: the event type must be 1 to 100 of A-Z a-z 0-9 _ . : -")
    head, slash, divisor_text = expression.partition("/")
    if head == "bytes":
        divisor = int(divisor_text) if divisor_text.isascii() and divisor_text.isdigit() else 0
        if not slash:
            return PerByte(event_type, 1)
        if divisor == 0 or _MILLION % divisor:
            raise UsageError(f"--metric {text}: the divisor must divide 1000000, so that quantities are exact.")
        return PerByte(event_type, divisor)
    try:
        quantity = split_quantity(expression)
    except LineFault:
        raise UsageError(f"--metric {text}: say EVENT_TYPE=1, EVENT_TYPE=bytes or EVENT_TYPE=bytes/1000000.") from None
    if quantity == (0, None):
        raise UsageError(f"--metric {text}: the quantity must be above 0.")
    return PerRequest(event_type, quantity)


def is_combined(line: bytes) -> bool:
    """Whether the line has the combined format."""
    return _COMBINED.fullmatch(_decode(line)) is not None


def read_access_log(lines: Iterable[bytes], mapping: Mapping) -> Iterator[Record]:
    """A record for each line that is not blank, with an event for each metric that it has something for.

    A line that cannot be read and has no end is cut off: nothing is taken of the user agent, which is last.
    """
    for number, line in enumerate(lines, start=1):
        text = _decode(line)
        if text:
            try:
                yield Record(number, tuple(_events(text, mapping, number)))
            except LineFault as fault:
                yield unreadable(number, line, fault)


def _decode(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape").rstrip("\r\n")


def _events(line: str, mapping: Mapping, number: int) -> Iterator[bytes]:
    match = _COMBINED.fullmatch(line)
    if match is None:
        raise LineFault("has not the combined log format")
    tenant_id = match["address" if mapping.tenant_from is TenantField.REMOTE_ADDR else "user"]
    if tenant_id == _UNSET:
        raise LineFault(f"has no {mapping.tenant_from}")
    timestamp = _timestamp(match["time"])
    metadata = _metadata(match)
    for metric in mapping.metrics:
        quantity = _quantity(metric, 0 if match["bytes"] == _UNSET else int(match["bytes"]))
        if quantity is not None:
            yield encode_event(
                EventBody(
                    event_type=metric.event_type,
                    tenant_id=tenant_id,
                    idempotency_key=idempotency_key(mapping.source, number, metric.event_type),
                    timestamp=timestamp,
                    quantity=quantity[0],
                    quantity_decimal=quantity[1],
                    metadata=metadata,
                )
            )


def _quantity(metric: Metric, bytes_sent: int) -> Quantity | None:
    match metric:
        case PerRequest(quantity=quantity):
            return quantity
        case PerByte(divisor=divisor):
            if bytes_sent == 0:
                return None
            # In millionths, whole numbers only: a float would show in the sixth decimal.
            whole, millionths = divmod(bytes_sent * (_MILLION // divisor), _MILLION)
            return (None, f"{whole}.{millionths:06}".rstrip("0")) if millionths else (whole, None)
        case _:
            assert_never(metric)


def _metadata(match: re.Match[str]) -> msgspec.Raw:
    # Without the query: it may hold what must not be kept for ever, such as passwords and tokens.
    request = _REQUEST.match(match["request"])
    fields: dict[str, str | int] = {"status": int(match["status"])}
    if request is not None:
        fields |= {"method": request["method"], "path": request["path"][:_PATH_CHARACTERS_MAX]}
    try:
        return msgspec.Raw(msgspec.json.encode(fields))
    except UnicodeEncodeError:
        raise LineFault("is not UTF-8") from None


@lru_cache(maxsize=1024)
def _timestamp(text: str) -> str:
    match = _TIME.fullmatch(text)
    if match is None:
        raise LineFault(f'time {text!r} is not like "17/May/2015:10:05:03 +0000"')
    day, month, year, hour, minute, second, sign, offset_hours, offset_minutes = match.groups()
    offset = timedelta(hours=int(offset_hours), minutes=int(offset_minutes))
    try:
        local = datetime(int(year), _MONTHS.index(month) + 1, int(day), int(hour), int(minute), int(second), tzinfo=UTC)
        return format_timestamp(local + offset if sign == "-" else local - offset)
    except (ValueError, OverflowError):
        raise LineFault(f"time {text!r} does not exist") from None

"""Timestamp and Struct in JSON, both directions."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from google.protobuf.struct_pb2 import ListValue, Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from usameter_gateway.literals import NumberLiteral
from usameter_gateway.scalars import kind_of, string_from_json
from usameter_gateway.violations import Refused

STRUCT_DEPTH_MAX = 32
# As JSON each takes two bytes or more, and the contract's objects have 16 KiB at most. Two million of them, which are
# what a body can hold, took six seconds to make a message of.
STRUCT_VALUES_MAX = 16 * 1024

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# 0001-01-01 and 9999-12-31T23:59:59, the bounds of google.protobuf.Timestamp.
_SECONDS_MIN, _SECONDS_MAX = -62_135_596_800, 253_402_300_799
# datetime.fromisoformat reads much more than RFC 3339 ("2026-W03-4", "20260115T10").
_RFC3339 = re.compile(r"\d\d\d\d-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d)", re.ASCII).fullmatch
_TIMESTAMP_EXPECTED = 'expected an RFC 3339 time with a zone offset, e.g. "2026-01-15T10:30:00Z"'

_EXACT_INTEGER_MAX = 2**53


def timestamp_from_json(value: object) -> dict[str, int]:
    """The fields of the Timestamp that an RFC 3339 text names, cut to microseconds.

    Raises:
        Refused: It is no text, no RFC 3339 time, has no offset or no such moment exists.
    """
    # Events come in UTC, without a fraction and many in the same minute: half the time of parsing.
    if type(value) is str and value[19:] == "Z":
        second = _SECOND_OF_TEXT.get(value[16:19])
        if second is not None:
            return {"seconds": _minute_from_text(value[:16]) + second}
    return _parse_timestamp(value)


def _parse_timestamp(value: object) -> dict[str, int]:
    if type(value) is not str or not _RFC3339(value):
        raise Refused.because(_TIMESTAMP_EXPECTED)
    try:
        since_epoch = datetime.fromisoformat(value) - _EPOCH
    except ValueError:
        raise Refused.because(f"{_TIMESTAMP_EXPECTED}; there is no such date or time") from None
    seconds = since_epoch.days * 86_400 + since_epoch.seconds
    if not _SECONDS_MIN <= seconds <= _SECONDS_MAX:
        raise Refused.because("expected a time in the years 1 to 9999, UTC")
    return {"seconds": seconds, "nanos": since_epoch.microseconds * 1_000}


_SECOND_OF_TEXT = {f":{second:02}": second for second in range(60)}


@lru_cache(maxsize=4096)
def _minute_from_text(text: str) -> int:
    return _parse_timestamp(f"{text}:00Z")["seconds"]


def timestamp_to_json(value: Timestamp) -> str:
    """RFC 3339 in UTC, with 0, 3, 6 or 9 decimals, as few as carry it."""
    days, second_of_day = divmod(value.seconds, 86_400)
    text = _date_text(days) + _TIME_PREFIXES[second_of_day // 60] + _SECONDS[second_of_day % 60]
    nanos = value.nanos
    if not nanos:
        return f"{text}Z"
    if nanos % 1_000_000 == 0:
        return f"{text}.{nanos // 1_000_000:03}Z"
    if nanos % 1_000 == 0:
        return f"{text}.{nanos // 1_000:06}Z"
    return f"{text}.{nanos:09}Z"


# Lists hold few days, and formatting a datetime takes four times as long as looking its parts up.
_SECONDS = [f"{second:02}" for second in range(60)]
_TIME_PREFIXES = [f"T{hour:02}:{minute:02}:" for hour in range(24) for minute in range(60)]


@lru_cache(maxsize=1024)
def _date_text(days_since_epoch: int) -> str:
    return (_EPOCH + timedelta(days_since_epoch)).date().isoformat()


def struct_from_json(value: object) -> dict[str, Any]:
    """A JSON object that a Struct carries unchanged, as it is.

    A Struct has doubles only, so an integer beyond 2^53 would come out as another number.

    Raises:
        Refused: Some value cannot be carried; all of them are named.
    """
    if type(value) is not dict:
        raise Refused.because(f"expected an object, got {kind_of(value)}")
    if _has_more_values(value, STRUCT_VALUES_MAX):
        raise Refused.because(f"has more than {STRUCT_VALUES_MAX} values")
    _check_object(value, STRUCT_DEPTH_MAX)
    return value


def _has_more_values(value: dict[str, Any], values_max: int) -> bool:
    count = 0
    containers: list[dict[str, Any] | list[Any]] = [value]
    while containers and count <= values_max:
        container = containers.pop()
        count += len(container)
        items = container.values() if type(container) is dict else container
        containers += [item for item in items if type(item) is dict or type(item) is list]
    return count > values_max


def _check_object(value: dict[str, Any], depth_left: int) -> None:
    refusals = None
    for key, item in value.items():
        try:
            if not key.isascii() or "\0" in key:
                string_from_json(key)
            # Most values are ASCII texts: passed here without a call.
            if type(item) is not str or not item.isascii() or "\0" in item:
                value[key] = _value_from_json(item, depth_left)
        except Refused as refused:
            refusals = refusals or Refused()
            refusals.add(key, refused)
    if refusals:
        raise refusals


def _check_array(value: list[Any], depth_left: int) -> None:
    refusals = None
    for index, item in enumerate(value):
        try:
            value[index] = _value_from_json(item, depth_left)
        except Refused as refused:
            refusals = refusals or Refused()
            refusals.add(index, refused)
            if refusals.is_full:
                break
    if refusals:
        raise refusals


def _value_from_json(value: Any, depth_left: int) -> Any:
    kind = type(value)
    if kind is str:
        string_from_json(value)
    elif kind is int:
        if not -_EXACT_INTEGER_MAX <= value <= _EXACT_INTEGER_MAX:
            raise Refused.because("an integer beyond 2^53 cannot be carried exactly; send it as a string")
    elif kind is NumberLiteral:
        # Many digits are common in computed values, and nothing is billed by metadata.
        return value.nearest_double()
    elif kind is dict or kind is list:
        if depth_left == 1:
            raise Refused.because(f"nested deeper than {STRUCT_DEPTH_MAX} levels")
        check = _check_object if kind is dict else _check_array
        check(value, depth_left - 1)
    return value


def struct_to_json(value: Struct) -> dict[str, Any]:
    """A plain JSON object, keys in order of their text: a Struct remembers no other order."""
    fields = value.fields
    return {key: _value_to_json(fields[key]) for key in sorted(fields)}


def _value_to_json(value: Value) -> Any:
    # Most values are texts, and asking which field is set takes as long as reading one.
    text = value.string_value
    if text:
        return text
    match value.WhichOneof("kind"):
        case "string_value":
            return ""
        case "number_value":
            number = value.number_value
            exact = number.is_integer() and abs(number) <= _EXACT_INTEGER_MAX
            return int(number) if exact else number
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return struct_to_json(value.struct_value)
        case "list_value":
            return _list_to_json(value.list_value)
    return None


def _list_to_json(value: ListValue) -> list[Any]:
    return [_value_to_json(each) for each in value.values]

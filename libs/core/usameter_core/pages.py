"""Page tokens: where a list goes on, opaque to the caller."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import astuple, is_dataclass
from datetime import UTC, datetime
from typing import TypeVar

import msgspec

from usameter_core.errors import FieldViolation, InvalidArgument

Key = TypeVar("Key")

DEFAULT_LIMIT = 100
# Integers of ours stay below it, and one more still is a bigint.
_INTEGER_MAX = 2**53
# With another offset they may be beyond the calendar.
_EARLIEST, _LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


def encode_page_token(key: Sequence[object]) -> str:
    """A token that says: after the row with this sort key, of whatever JSON has a form for."""
    return base64.urlsafe_b64encode(msgspec.json.encode(list(key))).decode().rstrip("=")


def decode_page_token(token: str, shape: type[Key]) -> Key | None:
    """The sort key in a token; None for the empty token, which means the first page.

    Args:
        token: As `encode_page_token` wrote it.
        shape: The type of the key, e.g. `tuple[str, str]`.

    Raises:
        InvalidArgument: The token is not one of ours.
    """
    if not token:
        return None
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        key = msgspec.json.decode(raw, type=shape)
    except (binascii.Error, ValueError, msgspec.DecodeError):
        raise _foreign() from None
    if not _is_storable(key):
        raise _foreign()
    return key


def _is_storable(value: object) -> bool:
    """Whether a forged key could stand in a row: what PostgreSQL has no form for would fail there."""
    match value:
        case int():
            return abs(value) <= _INTEGER_MAX
        case str():
            return "\0" not in value
        case datetime():
            return value.tzinfo is not None and _EARLIEST <= value <= _LATEST
        case list() | tuple():
            return all(map(_is_storable, value))
        case _:
            return not is_dataclass(value) or isinstance(value, type) or _is_storable(astuple(value))


def _foreign() -> InvalidArgument:
    return InvalidArgument([FieldViolation("page_token", "is not a token that this list returned")])

"""Identifiers: 16 bytes inside, a prefix and 32 hex digits outside."""

from __future__ import annotations

import os
import time
from typing import NewType
from uuid import UUID

from asyncpg.pgproto.pgproto import UUID as FastUUID

from usameter_core.errors import FieldViolation, InvalidArgument

OrgId = NewType("OrgId", UUID)
EventId = NewType("EventId", UUID)
ReservationId = NewType("ReservationId", UUID)

_ID_HEX_DIGITS = 32


def new_uuid() -> UUID:
    """A fresh UUIDv7 (RFC 9562): ascending with the clock to a quarter of a microsecond (its method 3), 62 random bits.

    By the millisecond alone, lists in the order of their ids showed what was made at once in any order.
    """
    milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
    random = int.from_bytes(os.urandom(8), "big")
    value = milliseconds << 80 | 0x7 << 76 | (nanoseconds << 12) // 1_000_000 << 64 | 0b10 << 62 | random >> 2
    return uuid_of(value.to_bytes(16, "big"))


def uuid_of(value: bytes) -> UUID:
    """The UUID of 16 bytes.

    Of the kind that asyncpg reads and writes, which to everybody is a UUID: made, hashed and printed
    in C, in a fifth of the time.
    """
    uuid: UUID = FastUUID(value)
    return uuid


def format_id(prefix: str, value: UUID) -> str:
    """`prefix`, an underscore and 32 lower-case hex digits."""
    return f"{prefix}_{value.hex}"


def parse_id(prefix: str, text: str, *, field: str) -> UUID:
    """The value of an id written by `format_id`.

    Raises:
        InvalidArgument: `text` has another prefix or form; `field` is named.
    """
    head, _, digits = text.partition("_")
    if head != prefix or len(digits) != _ID_HEX_DIGITS or not set(digits) <= set("0123456789abcdef"):
        raise InvalidArgument([FieldViolation(field, f'must be "{prefix}_" and 32 lower-case hex digits')])
    return UUID(hex=digits)

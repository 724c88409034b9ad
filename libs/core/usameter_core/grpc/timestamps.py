"""google.protobuf.Timestamp and datetime, both ways, exact to the microsecond."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from usameter_core.errors import FieldViolation, InvalidArgument

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def timestamp_from_datetime(moment: datetime) -> Timestamp:
    """The moment as a message."""
    since = moment - _EPOCH
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1_000)


def datetime_from_timestamp(message: Timestamp, *, field: str) -> datetime:
    """The moment in a message, aware UTC; what is finer than a microsecond is cut off.

    Raises:
        InvalidArgument: It is not between the years 1 and 9999; `field` is named.
    """
    try:
        return _EPOCH + timedelta(0, message.seconds, message.nanos // 1_000)
    except OverflowError:
        raise InvalidArgument([FieldViolation(field, "must be between the years 1 and 9999")]) from None


def datetime_in(message: Message, field: str) -> datetime | None:
    """The moment in a Timestamp field of a message; None where it is unset.

    Raises:
        InvalidArgument: As `datetime_from_timestamp`.
    """
    return datetime_from_timestamp(getattr(message, field), field=field) if message.HasField(field) else None

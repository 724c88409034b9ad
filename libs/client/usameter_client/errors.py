"""What can go wrong while recording, each with what became of the events.

    ClientError
    ├── InvalidEvent      record() was given what no event can be; nothing was buffered
    ├── BufferFull        no room within `wait_seconds`; this event was not buffered, the others still are
    ├── RecorderClosed    closed, or stopped by a failure (its cause); this event was not buffered
    ├── Undelivered       flush() or close() could not deliver; carries every event that is not confirmed
    ├── EventRefused      the server refused events for what they are; on_rejected gets it
    ├── CallRefused       the server refused the caller, whatever it sends: a wrong key, a missing scope
    └── Unavailable       no answer, or "come back later"; the recorder tries again by itself

Every event has an idempotency key, so sending any of them again is always safe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from usameter_client.events import UsageEvent


class ClientError(Exception):
    """The root; its text is a sentence that says what to do."""


class InvalidEvent(ClientError, ValueError):
    """The arguments of record() cannot be carried exactly, so they are not carried at all."""


class BufferFull(ClientError):
    """Nothing was dropped: the caller still has the event that did not fit."""


class RecorderClosed(ClientError):
    """The recorder takes no more events; where a failure stopped it, that is the cause."""


class Undelivered(ClientError):
    """These events are not confirmed. Some may be recorded: their answer was lost.

    Store them, or give them to `record_event` of another recorder; their keys keep each from
    being recorded twice. The cause is the last failure, where there was one.
    """

    def __init__(self, events: Sequence[UsageEvent], last_failure: BaseException | None) -> None:
        self.events = tuple(events)
        reason = f"; last failure: {last_failure}" if last_failure is not None else ""
        super().__init__(f"{len(self.events)} usage events were not delivered (see .events){reason}")


class EventRefused(ClientError):
    """Nothing of it was recorded, and sending the same again gives the same answer until something changes.

    Args:
        code: As in REST errors, e.g. "QUOTA_EXCEEDED" or "IDEMPOTENCY_CONFLICT".
        details: The error's `details`, as REST prints them.
    """

    def __init__(self, sentence: str, *, code: str, details: Mapping[str, Any]) -> None:
        self.code = code
        self.details = details
        super().__init__(sentence)


class CallRefused(ClientError):
    """No event is at fault; with this key or URL none will ever be recorded."""

    def __init__(self, sentence: str, *, code: str) -> None:
        self.code = code
        super().__init__(sentence)


class Unavailable(ClientError):
    """Whether the events were recorded is unknown; the same ones, sent again, find out.

    `retry_after_seconds` is what the server asked for, 0 where it asked for nothing.
    """

    def __init__(self, sentence: str, *, retry_after_seconds: float = 0.0) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(sentence)

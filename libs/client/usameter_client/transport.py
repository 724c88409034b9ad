"""How events reach a server: what a transport does, and what a server's error means to a recorder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from usameter_client.errors import CallRefused, EventRefused, InvalidEvent, Unavailable
from usameter_client.events import EVENT_BYTES_MAX, UsageEvent

# What an event, or a batch for its events' sake, is refused with. The last two name no event.
_EVENT_CODES = frozenset(
    {
        "INVALID_ARGUMENT",
        "QUOTA_EXCEEDED",
        "IDEMPOTENCY_CONFLICT",
        "TENANT_SUSPENDED",
        "MALFORMED_JSON",
        "PAYLOAD_TOO_LARGE",
    }
)
# INTERNAL too: with keys a second attempt is safe, and a restart cures most of them.
_PASSING_CODES = frozenset({"UNAVAILABLE", "INTERNAL", "RATE_LIMIT_EXCEEDED"})


class Transport(Protocol):
    """Carries encoded events to a server, once a call. Belongs to one recorder, which opens and closes it.

    Everything but `encode` and `decode` is called in the recorder's event loop.
    """

    def encode(self, event: UsageEvent) -> bytes:
        """The event as `send` takes it; called in any thread.

        Raises:
            InvalidEvent: It cannot be encoded, or is larger than any event may be.
        """
        ...

    def decode(self, body: bytes) -> UsageEvent:
        """The event that `encode` was given: equal to it, and encoded the same again; called in any thread."""
        ...

    async def open(self) -> None:
        """Get ready; connects on first use."""
        ...

    async def close(self) -> None:
        """Give back what `open` took."""
        ...

    async def send(self, bodies: Sequence[bytes], *, partial: bool) -> Sequence[EventRefused | Unavailable | None]:
        """Send a batch of 1 to 1,000 events of at most 4 MiB, once. Several batches may be under way.

        Args:
            partial: Record what can be recorded; else all or nothing.

        Returns:
            For each event, in order: None where it is recorded (or was before), else its error.

        Raises:
            EventRefused: The batch is refused whole, for the sake of events in it.
            CallRefused: The caller is refused.
            Unavailable: No answer, or none that says what became of the events.
        """
        ...


def checked_body(body: bytes) -> bytes:
    """The encoded event.

    Raises:
        InvalidEvent: It is longer than any event may be.
    """
    if len(body) > EVENT_BYTES_MAX:
        raise InvalidEvent(f"the event has {len(body)} bytes; metadata may have at most 16 KiB")
    return body


def authorization(api_key: str) -> str:
    """The value of the header, or the metadata, `authorization`.

    Raises:
        ValueError: No key has such characters. They would be refused below us, by an error that repeats
            the key into logs; this one does not.
    """
    if not api_key or not all("!" <= character <= "~" for character in api_key):
        raise ValueError("api_key must be printable ASCII without spaces; is there a line end at its end?")
    return f"Bearer {api_key}"


def event_error(*, code: str, sentence: str, details: Mapping[str, Any]) -> EventRefused | Unavailable:
    """What the error of one event of a batch means."""
    if code in _PASSING_CODES:
        return Unavailable(sentence)
    return EventRefused(sentence, code=code, details=details)


def call_error(
    *, code: str, sentence: str, details: Mapping[str, Any], retry_after_seconds: float = 0.0
) -> EventRefused | CallRefused | Unavailable:
    """What the error of a whole call means.

    Args:
        code: The API's; empty where the answer is none of Usameter's, such as a proxy's page. That
            is like no answer: it must not stop a recorder that the next minute would serve.
    """
    if code in _EVENT_CODES:
        return EventRefused(sentence, code=code, details=details)
    if code in _PASSING_CODES or not code:
        return Unavailable(sentence, retry_after_seconds=retry_after_seconds)
    return CallRefused(sentence, code=code)

"""Events over the REST API: POST /api/v1/events."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import httpx
import msgspec

from usameter_client.errors import ClientError, EventRefused, InvalidEvent, Unavailable
from usameter_client.events import UsageEvent
from usameter_client.transport import authorization, call_error, checked_body, event_error
from usameter_core.decimals import canonical
from usameter_core.period import format_timestamp

_PATH = "/api/v1/events"
_CONNECT_SECONDS_MAX = 5.0


class _EventBody(msgspec.Struct, frozen=True, omit_defaults=True):
    event_type: str
    tenant_id: str
    quantity_decimal: str
    idempotency_key: str
    timestamp: str | None = None
    metadata: Any = None
    reservation_id: str | None = None


class _EventError(msgspec.Struct, frozen=True):
    error: str
    code: str
    details: dict[str, Any] = {}


class _EventResult(msgspec.Struct, frozen=True):
    error: _EventError | None = None


class _Answer(msgspec.Struct, frozen=True):
    results: list[_EventResult]


_ENCODER = msgspec.json.Encoder()
_EVENT = msgspec.json.Decoder(_EventBody)
_ANSWER = msgspec.json.Decoder(_Answer)
_ERROR = msgspec.json.Decoder(_EventError)


class RestTransport:
    """See `Transport`; any number of connections, kept open.

    Args:
        url: Of the server, e.g. "https://usage.example.com"; without /api/v1.
        api_key: With the scope events:write.
        timeout_seconds: For one attempt; a slower answer counts as none, and the batch is sent again.

    Raises:
        ValueError: The URL is none of HTTP, or the key has characters that no key has.
    """

    def __init__(self, url: str, *, api_key: str, timeout_seconds: float = 30.0) -> None:
        if httpx.URL(url).scheme not in {"http", "https"}:
            raise ValueError(f"{url!r} is not an http:// or https:// URL")
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"authorization": authorization(api_key), "content-type": "application/json"},
            timeout=httpx.Timeout(timeout_seconds, connect=min(timeout_seconds, _CONNECT_SECONDS_MAX)),
            # The key goes to the server that was named and to nobody it, or the environment, points to.
            follow_redirects=False,
            trust_env=False,
        )

    def encode(self, event: UsageEvent) -> bytes:
        """See `Transport`."""
        body = _EventBody(
            event_type=event.event_type,
            tenant_id=event.tenant_id,
            quantity_decimal=canonical(event.quantity),
            idempotency_key=event.idempotency_key,
            timestamp=None if event.timestamp is None else format_timestamp(event.timestamp),
            metadata=event.metadata,
            reservation_id=event.reservation_id,
        )
        try:
            # A copy: msgspec's own bytes keep up to half their size more behind them, which nobody sees.
            return checked_body(bytes(memoryview(_ENCODER.encode(body))))
        except UnicodeEncodeError as error:
            raise InvalidEvent(f"a text is not Unicode: {error}") from error

    def decode(self, body: bytes) -> UsageEvent:
        """See `Transport`."""
        event = _EVENT.decode(body)
        return UsageEvent(
            event_type=event.event_type,
            tenant_id=event.tenant_id,
            quantity=Decimal(event.quantity_decimal),
            idempotency_key=event.idempotency_key,
            timestamp=None if event.timestamp is None else datetime.fromisoformat(event.timestamp),
            metadata=event.metadata,
            reservation_id=event.reservation_id,
        )

    async def open(self) -> None:
        """See `Transport`: nothing to do before the first request."""

    async def close(self) -> None:
        """See `Transport`."""
        await self._http.aclose()

    async def send(self, bodies: Sequence[bytes], *, partial: bool) -> Sequence[EventRefused | Unavailable | None]:
        """See `Transport`."""
        head = b'{"partial":true,"events":[' if partial else b'{"events":['
        try:
            response = await self._http.post(_PATH, content=head + b",".join(bodies) + b"]}")
        except httpx.RequestError as error:
            reason = str(error) or type(error).__name__
            raise Unavailable(f"{self._http.base_url} did not answer: {reason}") from error
        if response.status_code != httpx.codes.OK:
            raise _refusal(response)
        try:
            results = _ANSWER.decode(response.content).results
        except msgspec.DecodeError as error:
            raise Unavailable(f"{_PATH} answered 200, and not as a Usameter server does") from error
        if len(results) != len(bodies):
            raise Unavailable(f"{_PATH} answered {len(results)} results for {len(bodies)} events")
        return [None if each.error is None else _event_error(each.error) for each in results]


def _event_error(error: _EventError) -> EventRefused | Unavailable:
    return event_error(code=error.code, sentence=error.error, details=error.details)


def _refusal(response: httpx.Response) -> ClientError:
    try:
        error = _ERROR.decode(response.content)
    except msgspec.DecodeError:
        sentence = f"{_PATH} answered {response.status_code}, and not as a Usameter server does"
        error = _EventError(error=sentence, code="")
    retry_after = response.headers.get("retry-after", "")
    return call_error(
        code=error.code,
        sentence=error.error,
        details=error.details,
        # HTTP allows a date too; our servers, and proxies that limit rates, send seconds.
        retry_after_seconds=float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0,
    )

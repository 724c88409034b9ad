"""Events over gRPC: EventService.RecordEvents.

The channel is grpc's own, not grpc.aio's: that one serves a single event loop a process (grpc
#25364), and an application may have loops of its own beside a recorder's. A batch of 1,000 events makes the
hop between grpc's thread and the loop cheap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

# Known to the descriptor pool from here on: the details of errors are read by name.
from usameter.common.v1 import error_pb2  # noqa: F401
from usameter.ingest.v1 import event_pb2
from usameter_client.errors import ClientError, EventRefused, InvalidEvent, Unavailable
from usameter_client.events import EXACT_INTEGER_MAX, UsageEvent
from usameter_client.transport import authorization, call_error, checked_body, event_error
from usameter_core.decimals import canonical
from usameter_core.grpc.channels import CHANNEL_OPTIONS
from usameter_core.grpc.status import DETAILS_KEY, DOMAIN
from usameter_core.grpc.timestamps import datetime_in, timestamp_from_datetime

_METHOD = "/usameter.ingest.v1.EventService/RecordEvents"
_PARTIAL = event_pb2.RecordEventsRequest(partial=True).SerializeToString()


class GrpcTransport:
    """See `Transport`; one channel, which connects again whenever it must.

    Must not be opened before a fork: grpc's threads do not survive one.

    Args:
        target: Of ingest, "host:port" or any gRPC target.
        api_key: With the scope events:write.
        credentials: Of a TLS channel; None: plain text, for networks that are one's own.
        timeout_seconds: For one attempt; a slower answer counts as none, and the batch is sent again.

    Raises:
        ValueError: The key has characters that no key has.
    """

    def __init__(
        self,
        target: str,
        *,
        api_key: str,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_seconds: float = 30.0,
    ) -> None:
        self._target = target
        self._metadata = (("authorization", authorization(api_key)),)
        self._credentials = credentials
        self._timeout_seconds = timeout_seconds
        self._channel: grpc.Channel | None = None

    def encode(self, event: UsageEvent) -> bytes:
        """See `Transport`. Serialized requests, one after the other, are one request with all their events."""
        try:
            body = event_pb2.EventInput(
                event_type=event.event_type,
                tenant_id=event.tenant_id,
                quantity_decimal=canonical(event.quantity),
                idempotency_key=event.idempotency_key,
                timestamp=None if event.timestamp is None else timestamp_from_datetime(event.timestamp),
                # A Struct takes a dict as it is; its stub does not know.
                metadata=event.metadata,  # type: ignore[arg-type]
                reservation_id=event.reservation_id,
            )
        except (TypeError, ValueError) as error:
            raise InvalidEvent(f"the event cannot be encoded: {error}") from error
        return checked_body(event_pb2.RecordEventsRequest(events=[body]).SerializeToString())

    def decode(self, body: bytes) -> UsageEvent:
        """See `Transport`."""
        (event,) = event_pb2.RecordEventsRequest.FromString(body).events
        return UsageEvent(
            event_type=event.event_type,
            tenant_id=event.tenant_id,
            quantity=Decimal(event.quantity_decimal),
            idempotency_key=event.idempotency_key,
            timestamp=datetime_in(event, "timestamp"),
            metadata=_with_integers(MessageToDict(event.metadata)) if event.HasField("metadata") else None,
            reservation_id=event.reservation_id if event.HasField("reservation_id") else None,
        )

    async def open(self) -> None:
        """See `Transport`."""
        if self._credentials is None:
            self._channel = grpc.insecure_channel(self._target, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(self._target, self._credentials, options=CHANNEL_OPTIONS)

    async def close(self) -> None:
        """See `Transport`."""
        if self._channel is not None:
            self._channel.close()

    async def send(self, bodies: Sequence[bytes], *, partial: bool) -> Sequence[EventRefused | Unavailable | None]:
        """See `Transport`."""
        call = await self._call(b"".join(bodies) + (_PARTIAL if partial else b""))
        if call.code() is not grpc.StatusCode.OK:
            raise _refusal(call)
        try:
            answer = event_pb2.RecordEventsResponse.FromString(call.result())
        except DecodeError as error:
            raise Unavailable("the server answered OK, and not as a Usameter server does") from error
        if len(answer.results) != len(bodies):
            raise Unavailable(f"the server answered {len(answer.results)} results for {len(bodies)} events")
        return [_event_error(each.error) if each.HasField("error") else None for each in answer.results]

    async def _call(self, request: bytes) -> grpc._CallFuture[bytes]:
        assert self._channel is not None, "the recorder opens its transport before it sends"
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def tell(_: object) -> None:
            # Closed: the recorder was, and nobody waits for this call any more.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(ended.set)

        # Without serializers the method takes and gives bytes.
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(_METHOD)
        call = method.future(request, timeout=self._timeout_seconds, metadata=self._metadata)
        call.add_done_callback(tell)
        try:
            await ended.wait()
        except asyncio.CancelledError:
            call.cancel()
            raise
        return call


def _with_integers(value: Any) -> Any:
    """JSON from a Struct, where every number is a double, with whole numbers as integers again."""
    match value:
        # An integer has no -0; beyond 2^53 no event has one.
        case float() if value.is_integer() and abs(value) <= EXACT_INTEGER_MAX and repr(value) != "-0.0":
            return int(value)
        case dict():
            return {name: _with_integers(each) for name, each in value.items()}
        case list():
            return [_with_integers(each) for each in value]
    return value


def _event_error(error: event_pb2.EventError) -> EventRefused | Unavailable:
    return event_error(code=error.code, sentence=error.error, details=MessageToDict(error.details))


def _refusal(call: grpc._CallFuture[bytes]) -> ClientError:
    code, details = _stated(call)
    return call_error(
        code=code,
        sentence=f"{call.code().name}: {call.details()}" if not code else call.details(),
        details=details,
        retry_after_seconds=float(details.get("retryAfter", 0.0)),
    )


def _stated(call: grpc._CallFuture[bytes]) -> tuple[str, Mapping[str, Any]]:
    """The code and the details of an error that a Usameter service meant; an empty code for others."""
    raw = next((value for key, value in call.trailing_metadata() or () if key == DETAILS_KEY), b"")
    code, details = "", {}
    try:
        for packed in Status.FromString(raw).details:
            info = ErrorInfo()
            if packed.Unpack(info):
                code = info.reason if info.domain == DOMAIN else ""
            else:
                details = MessageToDict(packed, preserving_proto_field_name=True)
                details.pop("@type", None)
    except (DecodeError, TypeError):
        # TypeError: details of a kind that this release does not know. The code says enough.
        pass
    return code, details

"""Servers for the recorders, HTTP and gRPC, that fail in all ways.

Each records a key once, as the platform does; what it does instead is scripted, answer by answer.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import grpc.aio
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.struct_pb2 import Struct
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from usameter.common.v1 import error_pb2
from usameter.ingest.v1 import event_pb2, event_pb2_grpc
from usameter_client import (
    AsyncRecorder,
    EventRefused,
    GrpcTransport,
    Options,
    Recorder,
    RestTransport,
    Transport,
    UsageEvent,
)
from usameter_devstack.fault_proxy import FaultProxy

Body = dict[str, Any]
QUICK = Options(linger_seconds=0.01)
LOCAL = "127.0.0.1"
API_KEY = "usa_test"
# REST's status and gRPC's code of the errors that are used here.
CODES = {
    "INVALID_ARGUMENT": (400, grpc.StatusCode.INVALID_ARGUMENT),
    "UNAUTHENTICATED": (401, grpc.StatusCode.UNAUTHENTICATED),
    "IDEMPOTENCY_CONFLICT": (409, grpc.StatusCode.ALREADY_EXISTS),
    "RATE_LIMIT_EXCEEDED": (429, grpc.StatusCode.RESOURCE_EXHAUSTED),
    "INTERNAL": (500, grpc.StatusCode.INTERNAL),
    "UNAVAILABLE": (503, grpc.StatusCode.UNAVAILABLE),
    # What a proxy says, and no service of ours.
    "": (404, grpc.StatusCode.UNIMPLEMENTED),
}


class Fault(Exception):
    """An error of the whole call."""

    def __init__(self, code: str, *, retry_after: str = "") -> None:
        super().__init__(code)
        self.code = code
        self.retry_after = retry_after


@dataclass
class Ledger:
    """What was recorded, by key, and the requests that came. `faults` are answered first, one a request."""

    stored: dict[str, Body] = field(default_factory=dict)
    requests: list[tuple[bool, list[str]]] = field(default_factory=list)
    faults: deque[Fault] = field(default_factory=deque)
    # The code an event is refused with; none for a good one.
    refuse: Callable[[Body], str | None] = lambda _: None
    # Refuses any batch with such an event whole, even a partial one.
    cannot_read: Callable[[Body], bool] = lambda _: False
    after_storing: Callable[[], Awaitable[None]] | None = None

    async def record(self, events: list[Body], *, partial: bool) -> list[str | None]:
        """The code that each event is refused with."""
        self.requests.append((partial, [event["idempotency_key"] for event in events]))
        if self.faults:
            raise self.faults.popleft()
        if any(self.cannot_read(event) for event in events):
            raise Fault("INVALID_ARGUMENT")
        codes = [self.refuse(event) for event in events]
        if not partial and (bad := next((code for code in codes if code), None)):
            raise Fault(bad)
        for event, code in zip(events, codes, strict=True):
            if code is None:
                self.stored.setdefault(event["idempotency_key"], event)
        if self.after_storing is not None:
            await self.after_storing()
        return codes

    @property
    def sizes(self) -> list[int]:
        """Events of each request."""
        return [len(keys) for _, keys in self.requests]


class HttpServer:
    """POST /api/v1/events, and nothing else."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"POST /api/v1/events HTTP/1.1\r\n")
                assert f"authorization: Bearer {API_KEY}\r\n".encode() in head.lower().replace(b"bearer", b"Bearer")
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                assert length is not None
                writer.write(await self._answer(json.loads(await reader.readexactly(int(length[1])))))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _answer(self, body: Body) -> bytes:
        headers = ""
        try:
            codes = await self._ledger.record(body["events"], partial=body.get("partial", False))
        except Fault as fault:
            status = CODES[fault.code][0]
            text = json.dumps({"error": "refused", "code": fault.code, "details": {}}) if fault.code else "<html>"
            headers = f"retry-after: {fault.retry_after}\r\n" if fault.retry_after else ""
        else:
            status = 200
            text = json.dumps({"success": True, "results": [self._result(code) for code in codes]})
        reason = HTTPStatus(status).phrase
        return f"HTTP/1.1 {status} {reason}\r\n{headers}content-length: {len(text)}\r\n\r\n{text}".encode()

    def _result(self, code: str | None) -> Body:
        return {"error": {"error": "refused", "code": code, "details": {"n": 1}}} if code else {"event_id": "evt_1"}


class GrpcServer(event_pb2_grpc.EventServiceServicer):
    """EventService.RecordEvents, and nothing else."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def RecordEvents(self, request: Any, context: Any) -> event_pb2.RecordEventsResponse:
        assert dict(context.invocation_metadata())["authorization"] == f"Bearer {API_KEY}"
        events = [MessageToDict(event, preserving_proto_field_name=True) for event in request.events]
        try:
            codes = await self._ledger.record(events, partial=request.partial)
        except Fault as fault:
            status = Status()
            if fault.code:
                status.details.add().Pack(ErrorInfo(reason=fault.code, domain="usameter"))
            if fault.retry_after:
                status.details.add().Pack(error_pb2.RateLimitDetails(retryAfter=int(fault.retry_after)))
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            await context.abort(CODES[fault.code][1], "refused")
        return event_pb2.RecordEventsResponse(success=True, results=[self._result(code) for code in codes])

    def _result(self, code: str | None) -> event_pb2.EventResult:
        if code is None:
            return event_pb2.EventResult(event_id="evt_1")
        details = ParseDict({"n": 1}, Struct())
        return event_pb2.EventResult(error=event_pb2.EventError(error="refused", code=code, details=details))


@dataclass
class World:
    """A server behind a fault proxy, and how it is reached."""

    kind: str
    ledger: Ledger
    proxy: FaultProxy
    rejected: list[tuple[UsageEvent, EventRefused]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{LOCAL}:{self.proxy.port}"

    def transport(self, *, timeout_seconds: float = 5.0) -> Transport:
        if self.kind == "rest":
            return RestTransport(self.url, api_key=API_KEY, timeout_seconds=timeout_seconds)
        return GrpcTransport(f"{LOCAL}:{self.proxy.port}", api_key=API_KEY, timeout_seconds=timeout_seconds)

    def recorder(self, options: Options = QUICK, *, timeout_seconds: float = 5.0) -> AsyncRecorder:
        return AsyncRecorder(self.transport(timeout_seconds=timeout_seconds), on_rejected=self.reject, options=options)

    def blocking_recorder(self, options: Options = QUICK) -> Recorder:
        return Recorder(self.transport(), on_rejected=self.reject, options=options)

    def reject(self, event: UsageEvent, error: EventRefused) -> None:
        self.rejected.append((event, error))


async def record_all(recorder: AsyncRecorder, count: int, **given: Any) -> list[str]:
    """Record events that are told apart by their quantity, 1 to count; returns their keys."""
    events = [await recorder.record("api_request", tenant_id="t", quantity=n + 1, **given) for n in range(count)]
    return [event.idempotency_key for event in events]

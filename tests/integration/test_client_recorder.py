"""The recorders against real servers, HTTP and gRPC, that fail in all ways.

Each server records a key once, as the platform does; what it does instead is scripted, answer by answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import grpc.aio
import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.struct_pb2 import Struct
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from tests.support.wait import until
from usameter.common.v1 import error_pb2
from usameter.ingest.v1 import event_pb2, event_pb2_grpc
from usameter_client import (
    AsyncRecorder,
    BufferFull,
    CallRefused,
    EventRefused,
    GrpcTransport,
    Options,
    Recorder,
    RecorderClosed,
    RestTransport,
    Transport,
    Undelivered,
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


@pytest.fixture(params=["rest", "grpc"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    ledger = Ledger()
    async with AsyncExitStack() as opened:
        if request.param == "rest":
            server = await asyncio.start_server(HttpServer(ledger).serve, LOCAL, 0, limit=8_000_000)
            opened.callback(server.close)
            port = server.sockets[0].getsockname()[1]
        else:
            grpc_server = grpc.aio.server()
            event_pb2_grpc.add_EventServiceServicer_to_server(GrpcServer(ledger), grpc_server)
            port = grpc_server.add_insecure_port(f"{LOCAL}:0")
            await grpc_server.start()
            opened.push_async_callback(grpc_server.stop, grace=0)
        yield World(request.param, ledger, await opened.enter_async_context(FaultProxy(LOCAL, port)))


async def record_all(recorder: AsyncRecorder, count: int, **given: Any) -> list[str]:
    """Record events that are told apart by their quantity, 1 to count; returns their keys."""
    events = [await recorder.record("api_request", tenant_id="t", quantity=n + 1, **given) for n in range(count)]
    return [event.idempotency_key for event in events]


async def test_an_event_arrives_with_everything_it_was_given(world: World) -> None:
    async with world.recorder() as recorder:
        await recorder.record(
            "gpu.seconds", tenant_id="t", quantity=0.25, idempotency_key="job-7", metadata={"zone": "b"}
        )
    assert world.ledger.stored == {
        "job-7": {
            "event_type": "gpu.seconds",
            "tenant_id": "t",
            "quantity_decimal": "0.25",
            "idempotency_key": "job-7",
            "metadata": {"zone": "b"},
        }
    }


async def test_a_full_batch_leaves_at_once_and_the_rest_on_flush(world: World) -> None:
    async with world.recorder(Options(linger_seconds=600, batch_events_max=3)) as recorder:
        await record_all(recorder, 7)

        async def two_batches_arrived() -> bool:
            return world.ledger.sizes == [3, 3]

        await until(two_batches_arrived, "both full batches arrived")
        await recorder.flush()
        assert world.ledger.sizes == [3, 3, 1]
    assert world.ledger.sizes == [3, 3, 1]


async def test_an_event_waits_for_company_no_longer_than_it_may(world: World) -> None:
    async with world.recorder(Options(linger_seconds=0.05)) as recorder:
        await record_all(recorder, 2)

        async def arrived() -> bool:
            return len(world.ledger.stored) == 2

        await until(arrived, "the events arrived without a flush")
        assert world.ledger.sizes == [2]


@pytest.mark.parametrize("code", ["UNAVAILABLE", "INTERNAL", "RATE_LIMIT_EXCEEDED", ""])
async def test_a_passing_failure_is_tried_again_on_the_same_keys(world: World, code: str) -> None:
    world.ledger.faults.extend([Fault(code), Fault(code)])
    async with world.recorder() as recorder:
        keys = await record_all(recorder, 5)
        await recorder.flush()
        assert world.ledger.requests == [(False, keys)] * 3
    assert not world.rejected


async def test_a_server_that_says_when_is_not_asked_before(world: World) -> None:
    world.ledger.faults.append(Fault("RATE_LIMIT_EXCEEDED", retry_after="1"))
    began = time.monotonic()
    async with world.recorder() as recorder:
        await record_all(recorder, 1)
        await recorder.flush()
    assert time.monotonic() - began >= 1.0


async def test_an_ok_that_is_no_answer_of_ours_is_tried_again() -> None:
    """A proxy may say such a thing over gRPC as well."""
    answers = [
        b"\xff<html>",
        b"",
        event_pb2.RecordEventsResponse(results=[event_pb2.EventResult()]).SerializeToString(),
    ]
    server = grpc.aio.server()

    async def record_events(request: bytes, context: object) -> bytes:
        return answers.pop(0)

    handlers: dict[str, Any] = {"RecordEvents": grpc.unary_unary_rpc_method_handler(record_events)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("usameter.ingest.v1.EventService", handlers)])
    port = server.add_insecure_port(f"{LOCAL}:0")
    await server.start()
    try:
        transport = GrpcTransport(f"{LOCAL}:{port}", api_key=API_KEY)
        async with AsyncRecorder(transport, on_rejected=lambda *_: None, options=QUICK) as recorder:
            await record_all(recorder, 1)
            await recorder.flush(timeout_seconds=10)
        assert not answers
    finally:
        await server.stop(grace=0)


async def test_an_answer_that_is_lost_on_its_way_is_fetched_again(world: World) -> None:
    """Keys make it safe: the events were stored, and are stored once."""

    async def cut() -> None:
        await world.proxy.cut()
        await world.proxy.forward()

    async def after_storing() -> None:
        if len(world.ledger.requests) <= 3:
            # Shielded: over gRPC the cut cancels the very call that it is made in.
            await asyncio.shield(asyncio.create_task(cut()))

    world.ledger.after_storing = after_storing
    async with world.recorder() as recorder:
        keys = await record_all(recorder, 5)
    assert list(world.ledger.stored) == keys
    assert world.ledger.requests == [(False, keys)] * 4


async def test_a_server_that_swallows_everything_is_given_up_after_the_timeout(world: World) -> None:
    await world.proxy.swallow()
    async with world.recorder(timeout_seconds=0.2) as recorder:
        keys = await record_all(recorder, 3)
        with pytest.raises(TimeoutError):
            await recorder.flush(timeout_seconds=0.3)
        await world.proxy.forward()
        await recorder.flush()
        assert list(world.ledger.stored) == keys


async def test_one_bad_event_is_reported_and_the_others_are_recorded(world: World) -> None:
    world.ledger.refuse = lambda event: "IDEMPOTENCY_CONFLICT" if event["quantity_decimal"] == "4" else None
    async with world.recorder() as recorder:
        keys = await record_all(recorder, 10)
        await recorder.flush()
        ((event, error),) = world.rejected
        assert (event.idempotency_key, error.code, error.details) == (keys[3], "IDEMPOTENCY_CONFLICT", {"n": 1})
    assert list(world.ledger.stored) == keys[:3] + keys[4:]
    assert [partial for partial, _ in world.ledger.requests] == [False, True]


async def test_events_that_a_server_cannot_read_at_all_are_found_by_halves(world: World) -> None:
    world.ledger.cannot_read = lambda event: event["quantity_decimal"] in {"4", "100"}
    async with world.recorder() as recorder:
        keys = await record_all(recorder, 100)
    assert [event.idempotency_key for event, _ in world.rejected] == [keys[3], keys[99]]
    assert set(world.ledger.stored) == set(keys) - {keys[3], keys[99]}
    assert len(world.ledger.requests) <= 2 + 2 * 2 * 7


async def test_of_a_partial_batch_only_what_was_not_settled_is_sent_again(world: World) -> None:
    """An event refused because its group's commit failed says UNAVAILABLE in its own result."""
    seen: list[str] = []

    def refuse(event: Body) -> str | None:
        if event["quantity_decimal"] == "1":
            return "INVALID_ARGUMENT"
        if event["quantity_decimal"] == "2" and len(world.ledger.requests) == 2:
            seen.append(event["idempotency_key"])
            return "UNAVAILABLE"
        return None

    world.ledger.refuse = refuse
    async with world.recorder() as recorder:
        keys = await record_all(recorder, 3)
    assert world.ledger.requests == [(False, keys), (True, keys), (True, [keys[1]])]
    assert [event.idempotency_key for event, _ in world.rejected] == [keys[0]]
    assert set(world.ledger.stored) == set(keys[1:])


async def test_at_its_bound_record_waits_for_room_and_raises_when_there_is_none(world: World) -> None:
    await world.proxy.cut()
    options = Options(linger_seconds=0.01, batch_events_max=5, events_max=5, wait_seconds=0.05)
    async with world.recorder(options) as recorder:
        keys = await record_all(recorder, 5)
        with pytest.raises(BufferFull, match="5 usage events wait"):
            await recorder.record("api_request", tenant_id="t")
        await world.proxy.forward()
        await recorder.flush()
        keys += await record_all(recorder, 1)
    assert list(world.ledger.stored) == keys


async def test_a_waiting_record_goes_on_as_soon_as_there_is_room(world: World) -> None:
    """And is encoded once, however often it looks for room."""
    transport, encoded = world.transport(), 0
    encode = transport.encode

    def counted(event: UsageEvent) -> bytes:
        nonlocal encoded
        encoded += 1
        return encode(event)

    transport.encode = counted  # type: ignore[method-assign]
    options = Options(linger_seconds=0.01, batch_events_max=10, events_max=10)
    async with AsyncRecorder(transport, on_rejected=world.reject, options=options) as recorder:
        each_ten = await asyncio.gather(*(record_all(recorder, 10) for _ in range(10)))
    assert sorted(world.ledger.stored) == sorted(key for keys in each_ten for key in keys)
    assert encoded == 100


async def test_what_cannot_be_delivered_at_the_end_is_raised_and_can_be_given_to_another(world: World) -> None:
    async def after_storing() -> None:
        await world.proxy.cut()

    world.ledger.after_storing = after_storing
    options = Options(linger_seconds=0.01, batch_events_max=2, events_max=10, close_seconds=0.3)
    with pytest.raises(Undelivered, match="last failure") as raised:
        async with world.recorder(options) as recorder:
            keys = await record_all(recorder, 6)
    assert [event.idempotency_key for event in raised.value.events] == keys
    world.ledger.after_storing = None
    await world.proxy.forward()
    async with world.recorder() as other:
        for event in raised.value.events:
            await other.record_event(event)
    assert sorted(world.ledger.stored) == sorted(keys)


async def test_a_refused_key_stops_the_recorder_and_loses_nothing(world: World) -> None:
    world.ledger.faults.extend([Fault("UNAUTHENTICATED")] * 10)
    with pytest.raises(Undelivered) as raised:
        async with world.recorder() as recorder:
            keys = await record_all(recorder, 3)
            with pytest.raises(Undelivered):
                await recorder.flush()
            with pytest.raises(RecorderClosed, match="has stopped") as refused:
                await recorder.record("api_request", tenant_id="t")
            assert isinstance(refused.value.__cause__, CallRefused)
    assert [event.idempotency_key for event in raised.value.events] == keys
    assert not world.rejected


async def test_an_on_rejected_that_raises_does_not_lose_its_event(world: World) -> None:
    def on_rejected(event: UsageEvent, error: EventRefused) -> None:
        raise ZeroDivisionError

    world.ledger.refuse = lambda _: "INVALID_ARGUMENT"
    with pytest.raises(Undelivered) as raised:
        async with AsyncRecorder(world.transport(), on_rejected=on_rejected, options=QUICK) as recorder:
            keys = await record_all(recorder, 1)
    assert [event.idempotency_key for event in raised.value.events] == keys
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


async def test_a_recorder_takes_events_and_flushes_only_between_open_and_close(world: World) -> None:
    recorder = world.recorder()
    with pytest.raises(RecorderClosed, match="not open"):
        await recorder.record("api_request", tenant_id="t")
    with pytest.raises(RecorderClosed, match="not open"):
        await recorder.flush()
    async with recorder:
        pass
    await recorder.close()
    with pytest.raises(RecorderClosed):
        await recorder.record("api_request", tenant_id="t")
    with pytest.raises(RecorderClosed, match="is closed"):
        await recorder.flush()


async def test_threads_record_through_one_recorder(world: World) -> None:
    def work() -> None:
        with world.blocking_recorder(Options(linger_seconds=0.01, batch_events_max=100, events_max=200)) as recorder:

            def record() -> None:
                for _ in range(250):
                    recorder.record("api_request", tenant_id="t")

            threads = [threading.Thread(target=record) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            recorder.flush()
            assert len(world.ledger.stored) == 1_000
            recorder.record("api_request", tenant_id="t")
        recorder.close()
        with pytest.raises(RecorderClosed):
            recorder.record("api_request", tenant_id="t")

    await asyncio.to_thread(work)
    assert len(world.ledger.stored) == 1_001
    assert max(world.ledger.sizes) <= 100


async def test_a_blocking_recorder_raises_where_the_other_does(world: World) -> None:
    await world.proxy.cut()
    options = Options(linger_seconds=0.01, batch_events_max=2, events_max=2, wait_seconds=0.05, close_seconds=0.2)

    def work() -> None:
        recorder = world.blocking_recorder(options)
        events = [recorder.record("api_request", tenant_id="t") for _ in range(2)]
        with pytest.raises(BufferFull):
            recorder.record("api_request", tenant_id="t")
        with pytest.raises(TimeoutError):
            recorder.flush(timeout_seconds=0.05)
        with pytest.raises(Undelivered) as raised:
            recorder.close()
        assert list(raised.value.events) == events
        recorder.close()
        with pytest.raises(RecorderClosed):
            recorder.flush()

    await asyncio.to_thread(work)


async def test_threads_that_wait_are_released_when_the_recorder_closes(world: World) -> None:
    await world.proxy.cut()
    options = Options(linger_seconds=0.01, batch_events_max=1, events_max=1, close_seconds=0.1)

    def work() -> list[type[BaseException]]:
        recorder = world.blocking_recorder(options)
        recorder.record("api_request", tenant_id="t")
        ended: list[type[BaseException]] = []

        def wait_in(call: Callable[[], object]) -> None:
            try:
                call()
            except Exception as error:
                ended.append(type(error))

        waiting = [
            threading.Thread(target=wait_in, args=(lambda: recorder.record("api_request", tenant_id="t"),)),
            threading.Thread(target=wait_in, args=(recorder.flush,)),
        ]
        for thread in waiting:
            thread.start()
        with pytest.raises(Undelivered):
            recorder.close()
        for thread in waiting:
            thread.join(timeout=5)
        return ended

    ended = await asyncio.to_thread(work)
    assert len(ended) == 2
    assert set(ended) <= {RecorderClosed, Undelivered}


async def test_on_rejected_may_not_wait_for_its_own_recorder(world: World) -> None:
    world.ledger.refuse = lambda _: "INVALID_ARGUMENT"

    def work() -> None:
        recorder: Recorder | None = None

        def on_rejected(event: UsageEvent, error: EventRefused) -> None:
            assert recorder is not None
            recorder.flush()

        recorder = Recorder(world.transport(), on_rejected=on_rejected, options=QUICK)
        recorder.record("api_request", tenant_id="t")
        with pytest.raises(Undelivered, match="own recorder"):
            recorder.close()

    await asyncio.to_thread(work)


async def output_of(program: str) -> str:
    """What a Python program prints, errors included; it has 60 s."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        async with asyncio.timeout(60):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            # The children that it forked, too.
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return output.decode()


# A name, too: to look it up needs a thread, and none can be started as the interpreter exits.
@pytest.mark.parametrize("host", [LOCAL, "localhost"])
async def test_an_unclosed_recorder_delivers_as_its_program_ends(world: World, host: str) -> None:
    target, transport = f"{host}:{world.proxy.port}", "GrpcTransport"
    if world.kind == "rest":
        target, transport = f"http://{target}", "RestTransport"
    program = f"""
from usameter_client import {transport}, Recorder
recorder = Recorder({transport}({target!r}, api_key={API_KEY!r}), on_rejected=print)
recorder.record("api_request", tenant_id="t")
"""
    assert await output_of(program) == ""
    assert len(world.ledger.stored) == 1


# grpc itself does not support a fork once a channel is open.
@pytest.mark.parametrize("world", ["rest"], indirect=True)
async def test_a_recorder_refuses_in_a_forked_child_whatever_would_wait(world: World) -> None:
    program = f"""
import os, sys
from usameter_client import Options, Recorder, RecorderClosed, RestTransport
options = Options(batch_events_max=1, events_max=1, linger_seconds=600)
recorder = Recorder(RestTransport({world.url!r}, api_key={API_KEY!r}), on_rejected=print, options=options)
event = recorder.record("api_request", tenant_id="t")
if not os.fork():
    for call in (
        lambda: recorder.record("api_request", tenant_id="t"),
        lambda: recorder.record_event(event),
        lambda: recorder.flush(),
        lambda: recorder.flush(timeout_seconds=1),
    ):
        try:
            call()
        except RecorderClosed:
            print("refused")
    recorder.close()
    sys.exit()
os.wait()
"""
    assert await output_of(program) == "refused\n" * 4
    assert len(world.ledger.stored) == 1

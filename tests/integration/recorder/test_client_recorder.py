"""The recorders against real servers that fail in all ways: every event is recorded once, or reported."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc.aio
import pytest

from tests.support.recorder import API_KEY, LOCAL, QUICK, Body, Fault, World, record_all
from tests.support.wait import until
from usameter.ingest.v1 import event_pb2
from usameter_client import (
    AsyncRecorder,
    GrpcTransport,
    Options,
)


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

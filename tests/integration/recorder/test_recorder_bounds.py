"""What a recorder holds: how much, until when, and what becomes of it when it cannot be delivered."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.recorder import QUICK, Fault, World, record_all
from usameter_client import (
    AsyncRecorder,
    BufferFull,
    CallRefused,
    EventRefused,
    Options,
    RecorderClosed,
    Undelivered,
    UsageEvent,
)


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

"""The recorders in programs: threads, blocking callers, ends without a close, forks."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from tests.support.recorder import API_KEY, LOCAL, QUICK, World
from usameter_client import (
    BufferFull,
    EventRefused,
    Options,
    Recorder,
    RecorderClosed,
    Undelivered,
    UsageEvent,
)


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

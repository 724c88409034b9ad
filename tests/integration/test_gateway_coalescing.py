"""Coalescing at the edge: what shares a call, what waits for how long, and what is refused."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc.aio
import pytest

from tests.support.wait import until
from usameter.ingest.v1 import event_pb2, event_pb2_grpc
from usameter_core.config import Address
from usameter_core.grpc.channels import open_channel
from usameter_core.grpc.server import SERVER_OPTIONS
from usameter_gateway import coalescing
from usameter_gateway.coalescing import CoalescedCall
from usameter_gateway.errors import ApiError


class Ingest(event_pb2_grpc.EventServiceServicer):
    """Answers each item with its own request id; a call waits while one of its callers is held up."""

    def __init__(self) -> None:
        # Callers and request ids of each call.
        self.calls: list[list[tuple[str, str]]] = []
        self.held_up: dict[str, asyncio.Event] = {}

    async def RecordMany(self, request: Any, context: Any) -> Any:
        self.calls.append([(item.authorization, item.request_id) for item in request.items])
        for caller in {item.authorization for item in request.items} & self.held_up.keys():
            await self.held_up[caller].wait()
        outcomes = [event_pb2.RecordOutcome(json=item.request_id.encode()) for item in request.items]
        return event_pb2.RecordManyResponse(outcomes=outcomes)

    def hold_up(self, caller: str) -> asyncio.Event:
        """Whoever has the event set lets the caller's calls go on."""
        self.held_up[caller] = asyncio.Event()
        return self.held_up[caller]

    async def got_calls(self, count: int) -> bool:
        return len(self.calls) >= count

    @property
    def requests(self) -> list[str]:
        return [request_id for call in self.calls for _, request_id in call]


@pytest.fixture
async def ingest() -> AsyncIterator[Ingest]:
    yield Ingest()


@pytest.fixture
async def call(ingest: Ingest) -> AsyncIterator[CoalescedCall]:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    event_pb2_grpc.add_EventServiceServicer_to_server(ingest, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(Address("127.0.0.1", port)) as channel:
            yield CoalescedCall([channel])
    finally:
        await server.stop(None)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing is sent for having waited too long."""
    monkeypatch.setattr(coalescing, "_WAITING_SECONDS_MAX", 60)


def send(call: CoalescedCall, *ids: str, caller: str = "a", size_bytes: int = 0) -> list[asyncio.Task[Any]]:
    """Requests that come in one turn of the loop."""
    items = [event_pb2.RecordManyItem(json=b"x" * size_bytes, authorization=caller, request_id=each) for each in ids]
    return [asyncio.create_task(call(item)) for item in items]


async def answers(requests: list[asyncio.Task[Any]]) -> list[str]:
    return [outcome.json.decode() for outcome in await asyncio.gather(*requests)]


async def test_what_comes_together_shares_its_callers_call_and_each_gets_its_own_answer(
    ingest: Ingest, call: CoalescedCall
) -> None:
    requests = send(call, "1", "2", "3") + send(call, "4", caller="b") + send(call, "5")
    assert await answers(requests) == ["1", "2", "3", "4", "5"]
    assert sorted(ingest.calls) == [[("a", "1"), ("a", "2"), ("a", "3"), ("a", "5")], [("b", "4")]]


@pytest.mark.usefixtures("patient")
async def test_few_events_wait_until_they_are_as_many_as_the_call_under_way_carries(
    ingest: Ingest, call: CoalescedCall
) -> None:
    go_on = ingest.hold_up("a")
    requests = send(call, "1", "2", "3")
    await until(partial(ingest.got_calls, 1), "the first call is under way")
    for some in (("4", "5"), ("6",)):
        requests += send(call, *some)
        await asyncio.sleep(0)
    await until(partial(ingest.got_calls, 2), "the second call is under way")
    requests += send(call, "7", "8")
    await asyncio.sleep(0)
    requests += send(call, "9")
    go_on.set()
    assert await answers(requests) == [str(number) for number in range(1, 10)]
    assert [len(each) for each in ingest.calls] == [3, 3, 3]


async def test_nobody_waits_long_for_others_to_come(
    ingest: Ingest, call: CoalescedCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coalescing, "_WAITING_SECONDS_MAX", 0.05)
    go_on = ingest.hold_up("a")
    requests = send(call, "1", "2", "3")
    await until(partial(ingest.got_calls, 1), "the first call is under way")
    requests += send(call, "4")
    await until(partial(ingest.got_calls, 2), "one alone is sent after a while")
    go_on.set()
    assert await answers(requests) == ["1", "2", "3", "4"]


@pytest.mark.usefixtures("patient")
async def test_four_batches_are_under_way_at_once_and_the_others_wait(ingest: Ingest, call: CoalescedCall) -> None:
    go_on = ingest.hold_up("a")
    requests = [task for number in range(7) for task in send(call, str(number), size_bytes=70_000)]
    await until(partial(ingest.got_calls, 4), "four calls are under way")
    # What was sent before this has arrived before it.
    assert await answers(send(call, "other", caller="b")) == ["other"]
    assert len(ingest.calls) == 5
    go_on.set()
    assert await answers(requests) == [str(number) for number in range(7)]


async def test_a_caller_that_is_held_up_holds_up_nobody_else(
    ingest: Ingest, call: CoalescedCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coalescing, "_WAITING_SECONDS_MAX", 0)
    go_on = ingest.hold_up("slow")
    requests = []
    for number in range(40):
        requests += send(call, f"slow{number}", caller="slow")
        await asyncio.sleep(0.001)
    await until(partial(ingest.got_calls, 16), "as many calls hang as a caller may have")
    assert await answers(send(call, "1", caller="quick")) == ["1"]
    assert Counter(each[0][0] for each in ingest.calls) == {"slow": 16, "quick": 1}
    go_on.set()
    assert await answers(requests) == [f"slow{number}" for number in range(40)]


@pytest.mark.parametrize(
    ("bound", "value"), [("_HELD_ITEMS_OF_CALLER_MAX", 2), ("HELD_ITEMS_MAX", 2), ("_HELD_BYTES_MAX", 2_500)]
)
async def test_beyond_a_bound_requests_are_refused_until_others_are_answered(
    ingest: Ingest, call: CoalescedCall, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    monkeypatch.setattr(coalescing, bound, value)
    go_on = ingest.hold_up("a")
    held = send(call, "1", "2", size_bytes=1_000)
    await until(partial(ingest.got_calls, 1), "two are held")
    with pytest.raises(ApiError) as refused:
        await asyncio.gather(*send(call, "3", size_bytes=1_000))
    assert (refused.value.status, refused.value.headers) == (503, ((b"retry-after", b"1"),))
    if bound == "_HELD_ITEMS_OF_CALLER_MAX":
        assert await answers(send(call, "4", caller="b")) == ["4"]
    go_on.set()
    assert await answers(held) == ["1", "2"]
    assert await answers(send(call, "5", size_bytes=1_000)) == ["5"]
    assert "3" not in ingest.requests


@pytest.mark.usefixtures("patient")
async def test_what_nobody_waits_for_any_more_is_not_sent(ingest: Ingest, call: CoalescedCall) -> None:
    go_on = ingest.hold_up("a")
    requests = send(call, "1", "2", "3")
    await until(partial(ingest.got_calls, 1), "the first call is under way")
    (gone,) = send(call, "4")
    requests += send(call, "5")
    await asyncio.sleep(0)
    gone.cancel()
    go_on.set()
    assert await answers(requests) == ["1", "2", "3", "5"]
    assert ingest.requests == ["1", "2", "3", "5"]

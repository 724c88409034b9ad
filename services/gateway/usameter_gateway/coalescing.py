"""Coalescing: the requests of a caller that wait while others of it are under way share the next call.

A gRPC hop between processes costs some 250 µs of CPU, and one that carries many requests costs
hardly more. Each item keeps its own bearer token and is authenticated and answered by itself, so
the edge is trusted with nothing more than before. A call is answered when the slowest of its requests
is, so those of different callers do not share one: what holds up an organization holds up nobody else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import grpc.aio
from google.protobuf.message import Message

from usameter.ingest.v1 import event_pb2
from usameter_gateway.errors import overloaded
from usameter_gateway.upstream import DEADLINE_SECONDS

_RECORD_MANY = "/usameter.ingest.v1.EventService/RecordMany"

# A call costs ingest, quota and PostgreSQL some milliseconds, whatever it carries, and is answered when the slowest of
# its requests is. So few events wait for the call under way, until they are as many as it carries: then the next is
# sent, and ingest has read them when it is done with the others. Sent at any number, they made groups of 21 instead of
# 32 from 64 connections, and all was slower; sent when the call was back, all waited for the way there and back too.
# A batch waits for one of four (or as many as there are connections to several processes). Nobody waits for long.
_SMALL_CALLS_MAX = 1
_LARGE_CALLS_MAX = 4
_CALLS_MAX = 16
_WAITING_SECONDS_MAX = 0.02
_ITEMS_A_CALL_MAX = 256
# A call takes no further item once it is this large. Single events are 200 bytes, a batch of 1,000 is a call's worth.
_BYTES_A_CALL_MAX = 64 * 1024
# Held are those that wait and those under way. Fewer than the server serves at once: the others are told to come
# again, and whoever asks something else is served.
HELD_ITEMS_MAX = 768
_HELD_ITEMS_OF_CALLER_MAX = 512
_HELD_BYTES_MAX = 256 * 1024 * 1024

_Invoke: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[Message, event_pb2.RecordManyResponse]"
_Call: TypeAlias = "grpc.aio.UnaryUnaryCall[Message, event_pb2.RecordManyResponse]"


@dataclass(slots=True)
class _Item:
    """A request that waits for its call, and whoever waits for its answer."""

    message: event_pb2.RecordManyItem
    size_bytes: int
    # On the loop's clock.
    since: float
    answer: asyncio.Future[event_pb2.RecordOutcome] = field(default_factory=asyncio.Future)


@dataclass(slots=True)
class _Connection:
    """A channel, which may lead to a process of its own."""

    invoke: _Invoke
    calls_under_way: int = 0
    # On the loop's clock.
    last_call: float = 0.0


class CoalescedCall:
    """Sends requests to record events, many to one RPC. Belongs to one event loop."""

    def __init__(self, channels: Sequence[grpc.aio.Channel]) -> None:
        self._connections = [
            _Connection(
                channel.unary_unary(
                    _RECORD_MANY,
                    request_serializer=event_pb2.RecordManyRequest.SerializeToString,
                    response_deserializer=event_pb2.RecordManyResponse.FromString,
                )
            )
            for channel in channels
        ]
        # By bearer token; only callers of whom something is held.
        self._lanes: dict[str, _Lane] = {}
        self._held_items = 0
        self._held_bytes = 0

    async def __call__(self, item: event_pb2.RecordManyItem) -> event_pb2.RecordOutcome:
        """What became of one request.

        Raises:
            AioRpcError: The call that carried it failed.
            ApiError: UNAVAILABLE, at once, while too much is held; nothing of it was sent.
        """
        waiting = _Item(item, item.ByteSize(), asyncio.get_running_loop().time())
        lane = self._lanes.get(item.authorization)
        held = lane.held_items if lane is not None else 0
        if (
            held >= _HELD_ITEMS_OF_CALLER_MAX
            or self._held_items >= HELD_ITEMS_MAX
            or self._held_bytes + waiting.size_bytes > _HELD_BYTES_MAX
        ):
            raise overloaded()
        if lane is None:
            lane = self._lanes[item.authorization] = _Lane(self._connections)
        self._held_items += 1
        self._held_bytes += waiting.size_bytes
        lane.held_items += 1
        lane.add(waiting)
        try:
            return await waiting.answer
        finally:
            self._held_items -= 1
            self._held_bytes -= waiting.size_bytes
            lane.held_items -= 1
            if not lane.held_items:
                del self._lanes[item.authorization]


class _Lane:
    """The requests of one caller."""

    def __init__(self, connections: Sequence[_Connection]) -> None:
        self.held_items = 0
        self._connections = connections
        self._small_calls_max = max(_SMALL_CALLS_MAX, len(connections) // 2)
        self._large_calls_max = max(_LARGE_CALLS_MAX, len(connections))
        self._calls_max = max(_CALLS_MAX, len(connections))
        self._waiting: deque[_Item] = deque()
        self._waiting_bytes = 0
        self._calls_under_way = 0
        self._items_under_way = 0
        self._answering: set[asyncio.Task[None]] = set()
        self._impatience: asyncio.TimerHandle | None = None
        self._start_due = False

    def add(self, item: _Item) -> None:
        """Have it sent soon."""
        if not self._start_due:
            # After this turn of the loop, so that requests that came in together go together.
            self._start_due = True
            asyncio.get_running_loop().call_soon(self._start_calls)
        self._waiting.append(item)
        self._waiting_bytes += item.size_bytes

    def _start_calls(self) -> None:
        self._start_due = False
        loop = asyncio.get_running_loop()
        while self._waiting and self._is_call_due(loop.time()):
            if items := self._next_items():
                self._start_call(items)
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None
        if self._waiting and self._calls_under_way < self._calls_max:
            self._impatience = loop.call_at(self._waiting[0].since + _WAITING_SECONDS_MAX, self._start_calls)

    def _is_call_due(self, now: float) -> bool:
        if self._calls_under_way < self._small_calls_max:
            return True
        as_many_wait = len(self._waiting) * self._calls_under_way >= self._items_under_way
        if as_many_wait and self._calls_under_way < 2 * self._small_calls_max:
            return True
        if self._calls_under_way < self._large_calls_max and self._waiting_bytes >= _BYTES_A_CALL_MAX:
            return True
        is_late = now - self._waiting[0].since >= _WAITING_SECONDS_MAX
        return is_late and self._calls_under_way < self._calls_max

    def _next_items(self) -> list[_Item]:
        items: list[_Item] = []
        size_bytes = 0
        while self._waiting and len(items) < _ITEMS_A_CALL_MAX and size_bytes < _BYTES_A_CALL_MAX:
            item = self._waiting.popleft()
            self._waiting_bytes -= item.size_bytes
            size_bytes += item.size_bytes
            if not item.answer.done():  # else its client has gone away
                items.append(item)
        return items

    def _start_call(self, items: list[_Item]) -> None:
        request = event_pb2.RecordManyRequest(items=[item.message for item in items])
        now = asyncio.get_running_loop().time()
        # Those to a process that is behind get fewer calls.
        connection = min(self._connections, key=lambda each: (each.calls_under_way, each.last_call))
        connection.calls_under_way += 1
        connection.last_call = now
        self._calls_under_way += 1
        self._items_under_way += len(items)
        # In this very turn, not in the task: whoever is answered in it would be served before the call is sent.
        call = connection.invoke(request, timeout=max(0.0, items[0].since + DEADLINE_SECONDS - now))
        answering = asyncio.create_task(self._answer(items, call, connection))
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)

    async def _answer(self, items: list[_Item], call: _Call, connection: _Connection) -> None:
        """Answer the items of a call; what it raises is every item's answer."""
        try:
            try:
                response = await call
            finally:
                # The next call goes first: writing all these answers takes as long as a third of it.
                connection.calls_under_way -= 1
                self._calls_under_way -= 1
                self._items_under_way -= len(items)
                self._start_calls()
            for item, outcome in zip(items, response.outcomes, strict=True):
                if not item.answer.done():
                    item.answer.set_result(outcome)
        except Exception as error:
            # The top of a task: whatever it was is the answer to all that it carried, for nobody may wait for ever.
            for item in items:
                if not item.answer.done():
                    item.answer.set_exception(error)
        finally:
            for item in items:
                item.answer.cancel()  # of those that are not answered, since we are being cancelled

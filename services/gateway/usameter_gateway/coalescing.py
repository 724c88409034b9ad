"""Coalescing: the requests that wait while others are under way share the next call.

A gRPC hop between processes costs some 250 µs of CPU, and one that carries many requests costs
hardly more. Each item keeps its own bearer token and is authenticated and answered by itself, so
the edge is trusted with nothing more than before.
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
_WAITING_BYTES_MAX = 256 * 1024 * 1024

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


class CoalescedCall:
    """Sends requests to record events, many to one RPC. Belongs to one event loop."""

    def __init__(self, channels: Sequence[grpc.aio.Channel]) -> None:
        invokes = [
            channel.unary_unary(
                _RECORD_MANY,
                request_serializer=event_pb2.RecordManyRequest.SerializeToString,
                response_deserializer=event_pb2.RecordManyResponse.FromString,
            )
            for channel in channels
        ]
        # The connection that has been used least lately is next: those to a process that is behind get fewer calls.
        self._idle = deque(invokes * max(1, _CALLS_MAX // len(invokes)))
        self._small_calls_max = max(_SMALL_CALLS_MAX, len(invokes) // 2)
        self._large_calls_max = max(_LARGE_CALLS_MAX, len(invokes))
        self._waiting: deque[_Item] = deque()
        self._waiting_bytes = 0
        self._calls_under_way = 0
        self._items_under_way = 0
        self._answering: set[asyncio.Task[None]] = set()
        self._impatience: asyncio.TimerHandle | None = None
        self._start_due = False

    async def __call__(self, item: event_pb2.RecordManyItem) -> event_pb2.RecordOutcome:
        """What became of one request.

        Raises:
            AioRpcError: The call that carried it failed.
            ApiError: UNAVAILABLE, at once, while too much is waiting; nothing of it was sent.
        """
        loop = asyncio.get_running_loop()
        waiting = _Item(item, item.ByteSize(), loop.time())
        if self._waiting_bytes + waiting.size_bytes > _WAITING_BYTES_MAX:
            raise overloaded()
        if not self._start_due:
            # After this turn of the loop, so that requests that came in together go together.
            self._start_due = True
            loop.call_soon(self._start_calls)
        self._waiting.append(waiting)
        self._waiting_bytes += waiting.size_bytes
        return await waiting.answer

    def _start_calls(self) -> None:
        self._start_due = False
        loop = asyncio.get_running_loop()
        while self._waiting and self._idle and self._is_call_due(loop.time()):
            if items := self._next_items():
                self._start_call(items)
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None
        if self._waiting and self._idle:
            self._impatience = loop.call_at(self._waiting[0].since + _WAITING_SECONDS_MAX, self._start_calls)

    def _is_call_due(self, now: float) -> bool:
        if self._calls_under_way < self._small_calls_max:
            return True
        as_many_wait = len(self._waiting) * self._calls_under_way >= self._items_under_way
        if as_many_wait and self._calls_under_way < 2 * self._small_calls_max:
            return True
        if self._calls_under_way < self._large_calls_max and self._waiting_bytes >= _BYTES_A_CALL_MAX:
            return True
        return now - self._waiting[0].since >= _WAITING_SECONDS_MAX

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
        waited = asyncio.get_running_loop().time() - items[0].since
        invoke = self._idle.popleft()
        self._calls_under_way += 1
        self._items_under_way += len(items)
        # In this very turn, not in the task: whoever is answered in it would be served before the call is sent.
        call = invoke(request, timeout=max(0.0, DEADLINE_SECONDS - waited))
        answering = asyncio.create_task(self._answer(items, call, invoke))
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)

    async def _answer(self, items: list[_Item], call: _Call, invoke: _Invoke) -> None:
        """Answer the items of a call; what it raises is every item's answer."""
        try:
            try:
                response = await call
            finally:
                # The next call goes first: writing all these answers takes as long as a third of it.
                self._idle.append(invoke)
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

"""An HTTP/1.1 client that costs little: whole requests go out as bytes, a status and a body come in.

It shares the machine with what it measures, so that its own cost (the column "client") lowers every
figure: 1 µs an event in batches, some 70 for a single event, the making of the request included.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

_HEAD_END = b"\r\n\r\n"
_LENGTH = b"content-length:"


class UnexpectedAnswer(Exception):
    """The server answered something that a benchmark cannot go on with."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    body: bytes


class HttpConnection(asyncio.Protocol):
    """A kept-alive connection; one exchange at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(UnexpectedAnswer(f"the connection was lost: {exc}"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head_end = self._buffer.find(_HEAD_END)
        if head_end < 0:
            return
        head = bytes(self._buffer[:head_end]).lower()
        start = head.index(_LENGTH) + len(_LENGTH)
        length = int(head[start:].partition(b"\r\n")[0])
        body_start = head_end + len(_HEAD_END)
        if len(self._buffer) >= body_start + length:
            answer = Answer(int(head[9:12]), bytes(self._buffer[body_start : body_start + length]))
            self._buffer.clear()
            assert self._answer is not None
            self._answer.set_result(answer)

    async def exchange(self, request: bytes) -> Answer:
        """Send a whole request, and wait for its answer.

        Raises:
            UnexpectedAnswer: The connection was lost.
        """
        assert self._transport is not None
        if self._transport.is_closing():
            raise UnexpectedAnswer("the connection is closed")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()


@asynccontextmanager
async def open_connections(url: str, count: int) -> AsyncIterator[list[HttpConnection]]:
    """Connections to the server of a URL."""
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None, url
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as opened:
        connections = []
        for _ in range(count):
            _, connection = await loop.create_connection(HttpConnection, parts.hostname, parts.port)
            opened.callback(connection.close)
            connections.append(connection)
        yield connections


def http_request(method: str, path: str, api_key: str, body: bytes = b"") -> bytes:
    """A request as it goes over the wire."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {api_key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def for_seconds(seconds: float, requests: Iterable[bytes]) -> Iterator[bytes]:
    """As many of the requests as are asked for within the time."""
    deadline = time.perf_counter() + seconds
    for request in requests:
        if time.perf_counter() >= deadline:
            return
        yield request


def expect_ok(answer: Answer) -> None:
    """Raise UnexpectedAnswer unless it is a 200."""
    if answer.status != 200:
        raise UnexpectedAnswer(f"{answer.status} {answer.body[:500]!r}")


@dataclass(frozen=True, slots=True)
class Sent:
    """What a closed loop did."""

    requests: int
    seconds: float

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


async def send_closed(
    connections: Sequence[HttpConnection],
    requests: Iterable[bytes],
    check: Callable[[Answer], None] = expect_ok,
) -> Sent:
    """Send the requests, each connection its next one as soon as it has its answer."""
    waiting = iter(requests)
    done = 0

    async def send(connection: HttpConnection) -> None:
        nonlocal done
        for request in waiting:
            check(await connection.exchange(request))
            done += 1

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for connection in connections:
            tasks.create_task(send(connection))
    return Sent(done, time.perf_counter() - started)


async def send_paced(
    connections: Sequence[HttpConnection], requests: Iterable[bytes], *, rate: float, seconds: float
) -> list[float]:
    """Send `rate` requests a second, however long answers take; the latency of each in seconds, ascending.

    Latency counts from the moment a request was due, so that waiting for a free connection counts
    too, and so does up to a millisecond of the timer's.
    """
    idle: asyncio.Queue[HttpConnection] = asyncio.Queue()
    for connection in connections:
        idle.put_nowait(connection)
    latencies: list[float] = []

    async def send(connection: HttpConnection, request: bytes, due: float) -> None:
        expect_ok(await connection.exchange(request))
        latencies.append(time.perf_counter() - due)
        idle.put_nowait(connection)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number, request in zip(range(int(rate * seconds)), requests, strict=False):
            due = started + number / rate
            if (early := due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            tasks.create_task(send(await idle.get(), request, due))
    return sorted(latencies)


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values do not exceed."""
    return ascending[min(len(ascending) - 1, int(len(ascending) * percent / 100))]

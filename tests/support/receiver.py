"""A webhook endpoint on loopback: a real HTTP server that answers what a test wants."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.support.wait import until

# In place of a status: the message is read, and never answered.
SILENCE = 0


@dataclass(frozen=True, slots=True)
class Received:
    """A message as it came in."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def is_signed_with(self, secret: str) -> bool:
        """By the letter of Standard Webhooks 1.0.0, from the text that the owner was given."""
        key = base64.b64decode(secret.removeprefix("whsec_"))
        signed = b".".join([self.id.encode(), self.headers["webhook-timestamp"].encode(), self.body])
        expected = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        return expected in self.headers["webhook-signature"].split(" ")


@dataclass(slots=True)
class Receiver:
    """What came, in order; the next answers, then 200 for ever."""

    port: int = 0
    received: list[Received] = field(default_factory=list)
    answers: deque[int] = field(default_factory=deque)
    always: int = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hooks"

    async def until_received(self, count: int) -> list[Received]:
        """The messages, once there are so many."""

        async def came() -> bool:
            return len(self.received) >= count

        await until(came, f"{count} messages came; there are {len(self.received)}")
        return self.received

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
            body = await reader.readexactly(int(headers["content-length"]))
            self.received.append(Received(head[0].split(" ")[1], headers, body))
            status = self.answers.popleft() if self.answers else self.always
            if status == SILENCE:
                await reader.read()
            else:
                writer.write(
                    f"HTTP/1.1 {status} Said\r\nlocation: {self.url}/elsewhere\r\nset-cookie: a=b\r\n".encode()
                )
                writer.write(b"content-length: 2\r\n\r\nok")
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # whoever sent it has gone
        finally:
            writer.close()


@asynccontextmanager
async def open_receiver(*, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    receiver = Receiver()
    server = await asyncio.start_server(receiver._serve, "127.0.0.1", 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()


def resolver_of(*answers: list[str]) -> Callable[[str, int], Any]:
    """A resolver that gives these answers in turn, then the last for ever; [] is a name that does not exist."""
    left = deque(answers)

    async def resolve(_host: str, _port: int) -> list[str]:
        addresses = left.popleft() if len(left) > 1 else left[0]
        if not addresses:
            raise OSError("no such name")
        return addresses

    return resolve

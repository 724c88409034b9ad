"""A TCP proxy on loopback that loses, delays or swallows what passes through it: for fault tests."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType

from usameter_devstack.ports import LOOPBACK, free_port

_CHUNK_BYTES_MAX = 65_536
_NO_LINGER = struct.pack("ii", 1, 0)


class FaultMode(StrEnum):
    """What the proxy does to connections, old and new."""

    FORWARD = "forward"
    CUT = "cut"
    SWALLOW = "swallow"
    DELAY = "delay"


@dataclass(frozen=True, slots=True)
class _Trap:
    needle: bytes
    answered: bool
    then: FaultMode


@dataclass(slots=True, eq=False)
class _Link:
    client: asyncio.StreamWriter
    task: asyncio.Task[object] | None
    target: asyncio.StreamWriter | None = None
    swallowed: bool = False
    # Sprung by the next answer.
    trap: _Trap | None = None

    def reset(self) -> None:
        """Close both ends as a crashed host does: with a RST, and without what is still in the buffers."""
        for writer in (self.client, self.target):
            if writer is not None:
                with suppress(OSError):
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
                writer.transport.abort()
        if self.task is not None:
            self.task.cancel()


@dataclass(slots=True)
class FaultProxy:
    """Forwards a port of its own to `target_host`:`target_port`, as an async context manager.

    Starts in mode FORWARD. The port stays the same through all modes:

    - `forward()`: bytes pass unchanged;
    - `cut()`: every connection is reset now, new ones are refused;
    - `swallow()`: connections are accepted and read, nothing is forwarded or answered. A connection that has
      lost bytes that way is reset when the mode changes, never continued with a hole in it;
    - `delay(seconds)`: each chunk that a *client* sends is held back that long; answers pass at once.

    `cut_at(needle, …)` adds to them the worst moment of a single exchange.
    """

    target_host: str
    target_port: int
    # Not one that the kernel chooses: of those it may give one to an outgoing connection between `cut` and `forward`.
    port: int = field(default_factory=free_port)
    mode: FaultMode = FaultMode.FORWARD
    _delay_seconds: float = 0.0
    _server: asyncio.Server | None = None
    _trap: _Trap | None = None
    _links: set[_Link] = field(default_factory=set)

    async def __aenter__(self) -> FaultProxy:
        await self._listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cut()

    async def forward(self) -> None:
        await self._change(FaultMode.FORWARD)

    async def cut(self) -> None:
        await self._change(FaultMode.CUT)

    async def swallow(self) -> None:
        await self._change(FaultMode.SWALLOW)

    async def delay(self, seconds: float) -> None:
        self._delay_seconds = seconds
        await self._change(FaultMode.DELAY)

    def cut_at(self, needle: bytes, *, answered: bool, then: FaultMode = FaultMode.FORWARD) -> None:
        """Reset the connection on which a client next sends `needle`, once, in mode FORWARD.

        Args:
            needle: Bytes that are sent in one piece; a small message is.
            answered: The message arrives and the first answer to it is lost; else it is lost itself.
            then: CUT resets all others at the same moment, and refuses new ones.
        """
        self._trap = _Trap(needle, answered, then)

    @property
    def connections(self) -> int:
        """How many clients are connected now."""
        return len(self._links)

    async def _change(self, mode: FaultMode) -> None:
        broken = self._enter(mode)
        await asyncio.gather(*(link.task for link in broken if link.task), return_exceptions=True)
        if mode is not FaultMode.CUT and self._server is None:
            await self._listen()

    def _enter(self, mode: FaultMode) -> list[_Link]:
        """Reset what the mode breaks."""
        self.mode = mode
        if mode is FaultMode.CUT and self._server is not None:
            self._server.close()
            self._server = None
        broken = [
            link for link in self._links if mode is FaultMode.CUT or (link.swallowed and mode is not FaultMode.SWALLOW)
        ]
        for link in broken:
            link.reset()
        return broken

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, LOOPBACK, self.port, limit=_CHUNK_BYTES_MAX)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(client=writer, task=asyncio.current_task())
        self._links.add(link)
        try:
            if self.mode is FaultMode.CUT:
                return
            target_reader, link.target = await asyncio.open_connection(self.target_host, self.target_port)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(link, reader, link.target, from_client=True))
                pumps.create_task(self._pump(link, target_reader, writer, from_client=False))
        except OSError:
            pass  # the target refuses: so does the proxy, by closing
        except asyncio.CancelledError:
            pass  # reset; asyncio reports a handler that ends as cancelled
        finally:
            for end in (link.client, link.target):
                if end is not None:
                    end.close()
            self._links.discard(link)

    async def _pump(
        self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, from_client: bool
    ) -> None:
        with suppress(OSError):
            while chunk := await reader.read(_CHUNK_BYTES_MAX):
                if from_client and self.mode is FaultMode.DELAY:
                    await asyncio.sleep(self._delay_seconds)
                if self.mode is FaultMode.SWALLOW:
                    link.swallowed = True
                    continue
                if self._is_lost(link, chunk, from_client=from_client):
                    return
                writer.write(chunk)
                await writer.drain()
            # The other direction may still have something to say.
            if not writer.is_closing():
                writer.write_eof()

    def _is_lost(self, link: _Link, chunk: bytes, *, from_client: bool) -> bool:
        """Whether a chunk is the one that the trap was set for; the connection is reset then."""
        if from_client:
            if self._trap is None or self.mode is not FaultMode.FORWARD or self._trap.needle not in chunk:
                return False
            link.trap, self._trap = self._trap, None
            if link.trap.answered:
                return False
        if link.trap is None:
            return False
        link.reset()
        if link.trap.then is not FaultMode.FORWARD:
            self._enter(link.trap.then)
        return True

"""The fault proxy, between a real client and an echo server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from usameter_devstack.fault_proxy import FaultMode, FaultProxy


@pytest.fixture
async def proxy() -> AsyncIterator[FaultProxy]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(65_536):
            writer.write(chunk)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server, FaultProxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        yield proxy


async def say(proxy: FaultProxy, text: bytes, *, seconds: float = 5.0) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        writer.write(text)
        return await asyncio.wait_for(reader.readexactly(len(text)), seconds)
    finally:
        writer.close()


async def test_forwards_both_ways_and_closes_with_its_ends(proxy: FaultProxy) -> None:
    text = b"x" * 1_000_000
    assert await say(proxy, text) == text
    async with asyncio.timeout(5):
        while proxy.connections:  # noqa: ASYNC110 - the proxy tells nobody
            await asyncio.sleep(0.01)


async def test_cut_resets_what_is_open_and_refuses_what_comes(proxy: FaultProxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    await proxy.cut()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 5)
    with pytest.raises(ConnectionRefusedError):
        await say(proxy, b"anybody?")
    await proxy.forward()
    assert await say(proxy, b"again") == b"again"


async def test_swallowed_connections_never_answer_and_are_not_continued(proxy: FaultProxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    await proxy.swallow()
    writer.write(b"lost")
    with pytest.raises(TimeoutError):
        await say(proxy, b"also lost", seconds=0.1)
    await proxy.forward()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 5)
    assert await say(proxy, b"again") == b"again"


async def test_delay_holds_back_what_a_client_sends(proxy: FaultProxy) -> None:
    await proxy.delay(0.2)
    began = time.monotonic()
    assert await say(proxy, b"hello") == b"hello"
    assert 0.2 <= time.monotonic() - began < 2.0


@pytest.mark.parametrize("then", [FaultMode.FORWARD, FaultMode.CUT])
@pytest.mark.parametrize("answered", [False, True])
async def test_cut_at_loses_one_message_or_its_answer(answered: bool, then: FaultMode) -> None:
    arrived: list[bytes] = []

    async def note_and_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionResetError):
            while chunk := await reader.read(65_536):
                arrived.append(chunk)
                writer.write(chunk)
        writer.close()

    server = await asyncio.start_server(note_and_echo, "127.0.0.1", 0)
    async with server, FaultProxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        other_reader, other = await asyncio.open_connection("127.0.0.1", proxy.port)
        proxy.cut_at(b"commit", answered=answered, then=then)
        for text in (b"before", b"commit 1"):
            writer.write(text)
            if text == b"before":
                assert await reader.readexactly(len(text)) == text
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 5)
        assert arrived == [b"before", b"commit 1"][: 2 if answered else 1]
        if then is FaultMode.CUT:
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(other_reader.read(), 5)
            with pytest.raises(ConnectionRefusedError):
                await say(proxy, b"anybody?")
            await proxy.forward()
        else:
            other.write(b"commit 2")
            assert await other_reader.readexactly(8) == b"commit 2"
        other.close()
        assert await say(proxy, b"again") == b"again"

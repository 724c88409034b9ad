"""Assembles the gateway: channels, application, HTTP server; closes them in reverse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from granian.constants import Interfaces
from granian.server.embed import Server

from usameter_core.config import Address
from usameter_core.grpc.channels import open_channel
from usameter_core.grpc.server import wait_for_stop
from usameter_core.listening import reserved_address
from usameter_core.logging import configure_logging, get_logger
from usameter_core.metrics import serve_metrics
from usameter_gateway.app import Gateway, gateway
from usameter_gateway.coalescing import HELD_ITEMS_MAX
from usameter_gateway.config import GatewaySettings
from usameter_gateway.descriptors import load_methods

log = get_logger()

# Bodies in memory are bounded by this times 4 MiB; requests beyond it wait in the server. More than are held of those
# that record, which may all wait for one service: the others, and probes, are to be answered then.
_REQUESTS_AT_ONCE_MAX = HELD_ITEMS_MAX + 256


async def serve() -> None:
    """Serve until told to stop, then finish what is under way."""
    settings = GatewaySettings.from_environment()
    configure_logging(service="gateway", log_format=settings.log_format, level=settings.log_level)
    serve_metrics(settings.metrics_port)
    async with open_gateway(settings):
        await wait_for_stop()


@asynccontextmanager
async def open_gateway(settings: GatewaySettings) -> AsyncIterator[Address]:
    """A gateway that answers from here on, in this event loop; yields the address it listens on.

    On the way out no new connection is taken, requests under way are finished, and then the
    channels are closed. Services need not be there: requests to those that are away get a 503.

    Raises:
        ConfigError: The address cannot be listened on.
    """
    async with AsyncExitStack() as stack:
        channels = {
            name: [await stack.enter_async_context(open_channel(address)) for _ in range(settings.connections_to(name))]
            for name, address in settings.services.items()
        }
        application = gateway(load_methods(), channels)
        # The server listens with SO_REUSEPORT and would share a taken port.
        address = stack.enter_context(reserved_address(settings.listen))
        await stack.enter_async_context(_open_http_server(application, address))
        log.info("server_started", address=str(address))
        yield address
    log.info("server_stopped")


@asynccontextmanager
async def _open_http_server(application: Gateway, address: Address) -> AsyncIterator[None]:
    server = Server(
        application,
        address=address.host,
        port=address.port,
        # In this process and loop: grpc.aio works in one loop only, and not across a fork.
        interface=Interfaces.ASGINL,
        websockets=False,
        backlog=1024,
        backpressure=_REQUESTS_AT_ONCE_MAX,
        log_enabled=False,
    )
    serving = asyncio.create_task(server.serve())
    try:
        await _wait_until_listening(address, serving)
        yield
    finally:
        server.stop()  # type: ignore[no-untyped-call]
        await serving


async def _wait_until_listening(address: Address, serving: asyncio.Task[None]) -> None:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104
    while not serving.done():
        try:
            _, writer = await asyncio.open_connection(host, address.port)
        except OSError:
            await asyncio.sleep(0.01)
        else:
            writer.close()
            return
    await serving

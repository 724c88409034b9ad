"""The gRPC server of a service: interceptors, health, reflection, and a graceful end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from usameter_core.config import Address, ConfigError
from usameter_core.grpc.auth import AccessControl, access_of
from usameter_core.grpc.channels import MESSAGE_BYTES_MAX
from usameter_core.grpc.interceptors import AccessInterceptor, CallInterceptor, ValidationInterceptor
from usameter_core.logging import get_logger

log = get_logger()

SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_permit_without_calls", 1),
    # The default is five minutes: a channel that pings every 20 s (channels.py) and carries no call would be
    # cut off at the third ping (GOAWAY, too_many_pings), and the next call on it would fail.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # Clients look the name up again when a connection ends, and so find replicas that are new.
    ("grpc.max_connection_age_ms", 300_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
)


@dataclass(frozen=True, slots=True)
class Servicer:
    """A generated service and what implements it.

    `register` is the generated `add_<Service>Servicer_to_server`.
    """

    descriptor: ServiceDescriptor
    register: Callable[[Any, grpc.aio.Server], None]
    implementation: Any


@asynccontextmanager
async def open_server(
    listen: Address,
    *,
    servicers: Sequence[Servicer],
    control: AccessControl,
    drain_seconds: int,
    validating_methods: Collection[str] = (),
    shares_port: bool = False,
) -> AsyncIterator[Address]:
    """A server that answers from here on, and that drains on the way out.

    Args:
        validating_methods: Full names of methods whose servicers check the contract's rules themselves.
        shares_port: Others of this user may listen on the same address, and each gets a part of the
            connections (SO_REUSEPORT); else a taken port is an error.

    Yields the address it listens on. On the way out health says NOT_SERVING, no new call is
    taken, and calls under way have `drain_seconds` to finish.

    Raises:
        ConfigError: The address cannot be listened on.
        ValueError: A method does not state its access.
    """
    access = {
        f"/{method.containing_service.full_name}/{method.name}": access_of(method)
        for servicer in servicers
        for method in servicer.descriptor.methods
    }
    interceptors = [CallInterceptor(), AccessInterceptor(access, control), ValidationInterceptor(validating_methods)]
    options = (*SERVER_OPTIONS, ("grpc.so_reuseport", int(shares_port)))
    server = grpc.aio.server(interceptors=interceptors, options=options)
    for servicer in servicers:
        servicer.register(servicer.implementation, server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = [servicer.descriptor.full_name for servicer in servicers]
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    address = Address(listen.host, _bind(server, listen))
    await server.start()
    for name in ("", *names):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    log.info("server_started", address=str(address))
    try:
        yield address
    finally:
        await checks.enter_graceful_shutdown()
        await server.stop(grace=drain_seconds)
        log.info("server_stopped")


def _bind(server: grpc.aio.Server, listen: Address) -> int:
    try:
        return server.add_insecure_port(str(listen))
    except RuntimeError:
        raise ConfigError(f"USAMETER_LISTEN: {listen} cannot be listened on; is the port taken?") from None


async def wait_for_stop() -> None:
    """Return when the process is told to stop (SIGTERM or SIGINT)."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()

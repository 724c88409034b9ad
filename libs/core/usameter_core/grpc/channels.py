"""Channels to other services of the deployment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from usameter_core.config import Address
from usameter_core.grpc.context import current_request_id
from usameter_core.logging import get_logger

log = get_logger()

_PEERS_SECONDS_MAX = 5.0

# 4 MiB of JSON, which is what the edge reads, are up to 23 MiB as a message: a number in an array takes two bytes in
# the one and eleven in the other.
MESSAGE_BYTES_MAX = 32 * 1024 * 1024

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A call that records events without keys must not be sent twice, so no channel retries by itself.
    ("grpc.enable_retries", 0),
    # Over all addresses of the name: with the default a client would keep to one replica of many.
    ("grpc.lb_policy_name", "round_robin"),
    # Each channel has a connection of its own; by default equal channels of a process share one, and
    # one connection is the work of one process.
    ("grpc.use_local_subchannel_pool", 1),
    # A peer that comes back is found again within this time.
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # And, despite its name, how long connecting may take: 100 ms was too little for 64 channels that connected
    # at once to a busy machine, and their calls failed.
    ("grpc.min_reconnect_backoff_ms", 1_000),
)


@asynccontextmanager
async def open_channel(address: Address) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a service; connects on first use, and again whenever it must.

    Has to be opened in the event loop that uses it. It has one connection of its own to each address of
    the service, and where several processes share an address (`usameter_core.workers`) that is to one of them.
    """
    channel = grpc.aio.insecure_channel(str(address), options=CHANNEL_OPTIONS)
    try:
        yield channel
    finally:
        await channel.close()


async def wait_for_peers(*channels: grpc.aio.Channel) -> None:
    """Return once each channel is connected, or after some seconds: a peer that is away keeps nobody from starting.

    For a service before it answers. Channels that were used before their peer listened try again after up to a
    second, and fail every call until then: the first requests to a platform that had just said it was ready.
    """
    try:
        async with asyncio.timeout(_PEERS_SECONDS_MAX):
            await asyncio.gather(*[channel.channel_ready() for channel in channels])
    except TimeoutError:
        log.warning("started_without_peers")


def service_metadata(internal_token: str) -> tuple[tuple[str, str], ...]:
    """What a call from one service to another carries: who it is from, and which request it serves."""
    return (("authorization", f"Bearer {internal_token}"), ("x-request-id", current_request_id()))

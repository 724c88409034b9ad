"""Calls to the services behind the edge."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import grpc.aio
from google.protobuf.message import Message

from usameter_gateway.descriptors import Method, message_class

DEADLINE_SECONDS = 30.0

Metadata = tuple[tuple[str, str], ...]

# Long work says with this that it goes on after its answer.
_HTTP_STATUS_KEY = "usameter-http-status"
# What an answer that is a file is called; as the HTTP header is written (RFC 6266).
_DISPOSITION_KEY = "content-disposition"
# See usameter_core.ratelimit.standing.
_RATE_LIMIT_KEYS = ("ratelimit", "x-ratelimit-", "retry-after")


@dataclass(frozen=True, slots=True)
class Reply:
    """A method's answer; `accepted` where the work goes on and REST says 202, `headers` are for its client too."""

    message: Message
    accepted: bool
    headers: tuple[tuple[bytes, bytes], ...]


# Sends one request with its metadata. Raises grpc.aio.AioRpcError.
Call = Callable[[Message, Metadata], Awaitable[Reply]]


def unary_call(channels: Sequence[grpc.aio.Channel], method: Method) -> Call:
    """The call of a method, one RPC for each request, on the channels in turn, with a deadline of 30 seconds."""
    turns = itertools.cycle(
        [
            channel.unary_unary(
                method.path,
                request_serializer=message_class(method.request).SerializeToString,
                response_deserializer=message_class(method.response).FromString,
            )
            for channel in channels
        ]
    )

    async def call(request: Message, metadata: Metadata) -> Reply:
        rpc = next(turns)(request, metadata=metadata, timeout=DEADLINE_SECONDS)
        message = await rpc
        initial, trailing = await rpc.initial_metadata(), await rpc.trailing_metadata()
        return Reply(
            message,
            accepted=trailing.get(_HTTP_STATUS_KEY) == "202",
            headers=rate_limit_headers(initial) + _disposition_header(trailing),
        )

    return call


def _disposition_header(trailing_metadata: grpc.aio.Metadata) -> tuple[tuple[bytes, bytes], ...]:
    value = trailing_metadata.get(_DISPOSITION_KEY)
    return ((_DISPOSITION_KEY.encode(), value.encode()),) if isinstance(value, str) else ()


def rate_limit_headers(initial_metadata: Iterable[tuple[str, str | bytes]]) -> tuple[tuple[bytes, bytes], ...]:
    """What a service says of the caller's rate limits, as headers of the answer."""
    return tuple(
        (key.encode(), value.encode())
        for key, value in initial_metadata
        if isinstance(value, str) and key.startswith(_RATE_LIMIT_KEYS)
    )

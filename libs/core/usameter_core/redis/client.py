"""The Redis client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from usameter_core.redis.breaker import CircuitBreaker


@asynccontextmanager
async def open_redis(url: str) -> AsyncIterator[tuple[Redis, CircuitBreaker]]:
    """A client and the breaker that every call to it goes through. Connects on first use.

    Errors and time-outs of single calls are the breaker's to judge, so the client does not retry.
    """
    client = Redis.from_url(
        url,
        decode_responses=False,
        retry=Retry(NoBackoff(), 0),
        # With a timeout of its own the client sends by asyncio.wait_for, which before Python 3.12 loses a
        # cancellation that comes as it ends: a loop that was cancelled there went on, and no service ever stopped.
        socket_timeout=None,
        socket_connect_timeout=1,
    )
    breaker = CircuitBreaker(dependency="redis", failure_types=(RedisError, OSError))
    try:
        yield client, breaker
    finally:
        await client.aclose()

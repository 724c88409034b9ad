"""A loop that is cancelled while it talks to Redis ends: or else its service never stops."""

from __future__ import annotations

import asyncio
import random

from usameter_core.redis.client import open_redis
from usameter_core.tasks import repeat
from usameter_devstack.valkey import EmbeddedValkey


async def test_a_loop_ends_at_whatever_moment_of_a_call_it_is_cancelled(valkey: EmbeddedValkey) -> None:
    seed = random.randrange(10**6)
    source = random.Random(seed)
    async with open_redis(valkey.url()) as (redis, breaker):

        async def work() -> None:
            await breaker.call(lambda: redis.hget("key", "field"))

        await work()
        for attempt in range(200):
            loop = asyncio.create_task(repeat(work, every_seconds=0, name="test"))
            for _ in range(source.randrange(1, 40)):
                await asyncio.sleep(0)
            loop.cancel()
            done, _ = await asyncio.wait([loop], timeout=5)
            assert done, f"attempt {attempt} of seed {seed} goes on"

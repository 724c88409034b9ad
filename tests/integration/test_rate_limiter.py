"""The limiter on a real Valkey: one script for all windows, policies from the mirror, counting while Redis is away."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from itertools import accumulate
from typing import Any
from uuid import uuid4

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.support.clock import ManualClock
from tests.support.wait import until
from usameter_core.clock import Clock, SystemClock
from usameter_core.grpc.context import Principal
from usameter_core.ids import OrgId
from usameter_core.metrics import RATE_LIMIT_DECISIONS
from usameter_core.ratelimit.limiter import POLICY_CACHE_SECONDS, RateLimiter
from usameter_core.ratelimit.mirror import PolicyMirror
from usameter_core.ratelimit.policy import OrganizationPolicies, RateLimit, RatePolicy
from usameter_core.ratelimit.standing import Standing
from usameter_core.ratelimit.windows import (
    SCRIPT,
    Counts,
    Decision,
    count_requests,
    decision_from_script,
    script_arguments,
)
from usameter_core.redis.breaker import CircuitBreaker
from usameter_core.redis.client import open_redis
from usameter_devstack.fault_proxy import FaultProxy
from usameter_devstack.valkey import EmbeddedValkey

# Of its own: other tests have a quota service that keeps the mirror of theirs.
DATABASE = 5


@pytest.fixture
async def redis(valkey: EmbeddedValkey) -> AsyncIterator[Redis]:
    async with open_redis(valkey.url(DATABASE)) as (client, _):
        await client.flushdb()
        yield client


@pytest.fixture
async def proxy(valkey: EmbeddedValkey) -> AsyncIterator[FaultProxy]:
    async with FaultProxy("127.0.0.1", valkey.port) as between:
        yield between


def patient() -> CircuitBreaker:
    """As in `open_redis`, but on a busy machine 50 ms pass for other reasons than a Redis that is away."""
    return CircuitBreaker(dependency="redis", failure_types=(RedisError, OSError), timeout_seconds=5)


@asynccontextmanager
async def open_limiter(url: str, *, clock: Clock | None = None) -> AsyncIterator[RateLimiter]:
    async with open_redis(url) as (client, _):
        yield RateLimiter(client, patient(), clock=clock or SystemClock())


@asynccontextmanager
async def open_mirror(valkey: EmbeddedValkey) -> AsyncIterator[PolicyMirror]:
    async with open_redis(valkey.url(DATABASE)) as (client, _):
        yield PolicyMirror(client, patient())


def caller(org_id: OrgId | None = None) -> Principal:
    return Principal(org_id or OrgId(uuid4()), f"key_{uuid4().hex}", frozenset())


async def publish(valkey: EmbeddedValkey, org_id: OrgId, policies: OrganizationPolicies) -> None:
    """What quota does."""
    async with open_mirror(valkey) as mirror:
        await mirror.write(org_id, policies)


async def publish_nothing_else(valkey: EmbeddedValkey) -> None:
    """What quota's refresh does where no organization has a policy."""
    async with open_mirror(valkey) as mirror:
        await mirror.replace({}, listed=set())


def limited(**requests: int) -> OrganizationPolicies:
    return OrganizationPolicies(RatePolicy(**requests))


def admitted(standings: list[Standing | None]) -> int:
    assert all(standing is not None for standing in standings)
    return sum(standing.admitted for standing in standings if standing is not None)


async def count_by_script(script: Any, key: str, limits: tuple[RateLimit, ...], requests: int) -> Decision:
    return decision_from_script(limits, await script(keys=[key], args=script_arguments(limits, requests)))


@pytest.mark.parametrize("seed", range(6))
async def test_the_script_and_memory_decide_the_same_at_the_same_time(redis: Redis, seed: int) -> None:
    """The algorithm's properties are tested in memory, with any time; this carries them over to the script."""
    chance = random.Random(seed)
    script, key = redis.register_script(SCRIPT), f"test:{seed}"
    counts: Counts = {}
    windows = [timedelta(milliseconds=each) for each in chance.sample([5, 20, 50, 200, 1000], 3)]
    refused = 0
    for step in range(400):
        if step % 40 == 0:
            # Every now and then the policy changes, and now and then a window leaves it.
            limits = tuple(
                RateLimit(str(each), chance.choice([1, 3, 10, 50]), each)
                for each in sorted(chance.sample(windows, chance.randint(1, 3)))
            )
        if chance.random() < 0.3:
            await asyncio.sleep(chance.choice([0, 0.001, 0.003, 0.01]))
        requests = chance.choice([1, 1, 2, 7])
        decision = await count_by_script(script, key, limits, requests)
        expected = count_requests(counts, limits, requests, now_us=decision.now_us)
        assert decision == expected, f"seed {seed}, step {step}"
        refused += requests - decision.admitted
    assert refused, "the limits were never met"


async def test_clients_of_many_connections_never_get_more_than_the_limit_in_any_second(
    valkey: EmbeddedValkey, redis: Redis
) -> None:
    limits, key = RatePolicy(requests_per_second=30).limits, "test:racing"
    admitted_at_us: list[int] = []

    async def hammer(number: int) -> None:
        async with open_redis(valkey.url(DATABASE)) as (client, _):
            script = client.register_script(SCRIPT)
            ends = time.monotonic() + 2.5
            while time.monotonic() < ends:
                decision = await count_by_script(script, key, limits, number % 3 + 1)
                admitted_at_us.extend([decision.now_us] * decision.admitted)

    await asyncio.gather(*(hammer(number) for number in range(8)))
    admitted_at_us.sort()
    spans = zip(admitted_at_us, admitted_at_us[30:], strict=False)
    assert min(later - earlier for earlier, later in spans) >= 1_000_000
    # And they get nearly all of it: three full windows began within the time.
    assert len(admitted_at_us) >= 60


async def test_a_key_without_a_policy_is_not_limited_and_soon_asks_for_nothing(
    valkey: EmbeddedValkey, redis: Redis
) -> None:
    principal = caller()
    await publish_nothing_else(valkey)
    async with open_limiter(valkey.url(DATABASE)) as limiter:
        assert await limiter.count(principal, 2) == [None, None]
        await redis.config_resetstat()
        for _ in range(100):
            assert await limiter.count(principal) == [None]
        stats = await redis.info("commandstats")
        assert stats.get("cmdstat_hmget", {"calls": 0})["calls"] <= 1, "one look a second"
        assert "cmdstat_evalsha" not in stats


async def test_the_default_binds_each_key_by_itself_and_a_keys_own_policy_replaces_it(
    valkey: EmbeddedValkey, redis: Redis
) -> None:
    org_id = OrgId(uuid4())
    first, second, own, exempt = (caller(org_id) for _ in range(4))
    policies = OrganizationPolicies(
        RatePolicy(requests_per_minute=3),
        {own.api_key_id: RatePolicy(requests_per_hour=5), exempt.api_key_id: RatePolicy()},
    )
    await publish(valkey, org_id, policies)
    async with open_limiter(valkey.url(DATABASE)) as limiter:
        assert admitted(await limiter.count(first, 10)) == 3
        assert admitted(await limiter.count(second, 10)) == 3
        assert admitted(await limiter.count(own, 10)) == 5
        assert await limiter.count(exempt, 10) == [None] * 10
        assert await limiter.count(caller(), 1) == [None], "another organization"


async def test_a_standing_tells_the_window_that_binds_most(valkey: EmbeddedValkey, redis: Redis) -> None:
    principal = caller()
    await publish(valkey, principal.org_id, limited(requests_per_minute=10, requests_per_hour=12))
    async with open_limiter(valkey.url(DATABASE)) as limiter:
        (standing,) = await limiter.count(principal)
        assert standing is not None and standing.admitted
        assert (standing.limit, standing.remaining) == (10, 9)
        assert 59 <= standing.reset_seconds <= 60
        assert standing.reset_at.microsecond == 0
        standings = await limiter.count(principal, 10)
        assert admitted(standings) == 9, "refused requests use up nothing"
        last = standings[-1]
        assert last is not None and not last.admitted
        assert (last.limit, last.remaining) == (10, 0)
        assert dict(last.metadata)["ratelimit-policy"] == '"minute";q=10;w=60, "hour";q=12;w=3600'
        assert dict(last.metadata)["ratelimit"].startswith('"minute";r=0;t=')


async def test_replicas_share_the_windows(valkey: EmbeddedValkey, redis: Redis) -> None:
    principal = caller()
    await publish(valkey, principal.org_id, limited(requests_per_hour=100))
    async with AsyncExitStack() as opened:
        replicas = [await opened.enter_async_context(open_limiter(valkey.url(DATABASE))) for _ in range(3)]
        calls = (replicas[number % 3].count(principal, number % 4 + 1) for number in range(90))
        assert sum(map(admitted, await asyncio.gather(*calls))) == 100


async def test_requests_that_come_together_cost_one_script(valkey: EmbeddedValkey, redis: Redis) -> None:
    principal = caller()
    await publish(valkey, principal.org_id, limited(requests_per_hour=150))
    async with open_limiter(valkey.url(DATABASE)) as limiter:
        await limiter.count(principal)  # the script is known from here on
        await redis.config_resetstat()
        answers = await asyncio.gather(*(limiter.count(principal) for _ in range(256)))
        assert sum(map(admitted, answers)) == 149
        assert list(accumulate(admitted(each) for each in answers))[148] == 149, "in the order in which they came"
        assert (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"] == 1
        assert admitted(await limiter.count(principal, 256)) == 0
        assert (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"] == 2


async def test_a_caller_that_gives_up_while_it_waits_is_not_counted(valkey: EmbeddedValkey, redis: Redis) -> None:
    principal = caller()
    await publish(valkey, principal.org_id, limited(requests_per_hour=10))
    async with open_limiter(valkey.url(DATABASE)) as limiter:
        gone = asyncio.create_task(limiter.count(principal))
        await asyncio.sleep(0)
        gone.cancel()
        assert admitted(await limiter.count(principal, 20)) == 10


async def test_a_changed_policy_is_in_force_within_a_second(valkey: EmbeddedValkey, redis: Redis) -> None:
    principal = caller()
    await publish_nothing_else(valkey)
    async with open_limiter(valkey.url(DATABASE)) as limiter:
        assert await limiter.count(principal) == [None]
        await publish(valkey, principal.org_id, limited(requests_per_hour=2))
        published = time.monotonic()

        async def is_a_second_later() -> bool:
            return time.monotonic() - published > POLICY_CACHE_SECONDS

        await until(is_a_second_later, "a second has passed")
        assert await limiter.count(principal) != [None]
        await publish(valkey, principal.org_id, OrganizationPolicies())

        async def is_free() -> bool:
            return await limiter.count(principal) == [None]

        await until(is_free, "no policy binds any more")


def counted_in_memory() -> float:
    return sum(RATE_LIMIT_DECISIONS.labels("memory", outcome)._value.get() for outcome in ("admitted", "refused"))


async def test_without_redis_the_same_windows_are_counted_in_memory_and_with_it_in_redis_again(
    valkey: EmbeddedValkey, redis: Redis, proxy: FaultProxy
) -> None:
    principal, clock = caller(), ManualClock()
    await publish(valkey, principal.org_id, limited(requests_per_minute=100))
    url = f"redis://127.0.0.1:{proxy.port}/{DATABASE}"
    async with open_limiter(url, clock=clock) as limiter, open_limiter(valkey.url(DATABASE)) as other:
        assert admitted(await limiter.count(principal, 60)) == 60
        before = counted_in_memory()
        await proxy.cut()
        # By itself now: a hundred in any minute, of a bursty client and of a uniform one.
        assert sum([admitted(await limiter.count(principal, 7)) for _ in range(30)]) == 100
        assert counted_in_memory() == before + 210
        clock.advance(timedelta(seconds=59))
        assert admitted(await limiter.count(principal, 7)) == 0
        clock.advance(timedelta(seconds=1))
        uniform = 0
        for _ in range(240):
            uniform += admitted(await limiter.count(principal))
            clock.advance(timedelta(milliseconds=500))
        # Two minutes at 120 a minute.
        assert 195 <= uniform <= 200
        await proxy.forward()

        async def counted_in_redis() -> bool:
            counted = counted_in_memory()
            await limiter.count(principal)
            return counted_in_memory() == counted

        await until(counted_in_redis, "Redis counts again")
        # What both had before is still there, and both count it.
        total = admitted(await limiter.count(principal, 100)) + admitted(await other.count(principal, 100))
        assert 30 <= total < 40


async def test_a_policy_outlives_the_loss_of_its_mirror(valkey: EmbeddedValkey, redis: Redis) -> None:
    principal = caller()
    await publish(valkey, principal.org_id, limited(requests_per_hour=3))
    async with open_limiter(valkey.url(DATABASE)) as limiter:
        assert admitted(await limiter.count(principal, 2)) == 2
        await redis.flushdb()
        await asyncio.sleep(POLICY_CACHE_SECONDS)  # until the policy is looked for again
        assert admitted(await limiter.count(principal, 9)) == 3, "the windows are lost, the policy is not"
        await publish_nothing_else(valkey)

        async def is_free() -> bool:
            return await limiter.count(principal) == [None]

        await until(is_free, "a mirror that is complete says that there is no policy")


async def test_a_policy_that_nobody_knows_yet_binds_from_the_moment_that_the_mirror_has_it(
    valkey: EmbeddedValkey, redis: Redis
) -> None:
    principal = caller()
    async with open_limiter(valkey.url(DATABASE)) as limiter:
        assert await limiter.count(principal) == [None], "the mirror is lost"
        await publish(valkey, principal.org_id, limited(requests_per_hour=3))
        assert admitted(await limiter.count(principal, 9)) == 3, "the guess was not kept"


async def test_a_refresh_deletes_what_is_gone_and_keeps_what_came_in_between(
    valkey: EmbeddedValkey, redis: Redis
) -> None:
    kept, gone, new = (OrgId(uuid4()) for _ in range(3))
    async with open_mirror(valkey) as mirror:
        for org_id in (kept, gone):
            await mirror.write(org_id, limited(requests_per_hour=1))
        assert await mirror.read(new) is None, "nobody has said that this is all there is"
        listed = await mirror.list_organizations()
        await mirror.write(new, limited(requests_per_hour=2))
        await mirror.replace({kept: limited(requests_per_hour=3)}, listed=listed)
        assert await mirror.read(kept) == limited(requests_per_hour=3)
        assert await mirror.read(gone) == OrganizationPolicies()
        assert await mirror.read(new) == limited(requests_per_hour=2)


async def test_windows_are_forgotten_when_they_are_over(valkey: EmbeddedValkey, redis: Redis) -> None:
    principal = caller()
    await publish(valkey, principal.org_id, limited(requests_per_second=5))
    async with open_limiter(valkey.url(DATABASE)) as limiter:
        await limiter.count(principal, 9)
        key = f"usameter:rate:{{{principal.org_id}}}:{principal.api_key_id}"
        assert 0 < await redis.pttl(key) <= 1_000

"""Decides for each request of an API key whether its rate limits admit it.

The windows are in Redis, shared by all services and replicas:

    usameter:rate:{<organization>}:<API key's id>      the counts of the key's windows; see `windows.SCRIPT`

While Redis is away each process counts by itself, in memory.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from redis.asyncio import Redis

from usameter_core.clock import Clock
from usameter_core.grpc.context import Principal
from usameter_core.ids import OrgId
from usameter_core.metrics import RATE_LIMIT_DECISIONS
from usameter_core.ratelimit.mirror import PolicyMirror
from usameter_core.ratelimit.policy import OrganizationPolicies, RateLimit
from usameter_core.ratelimit.standing import Standing, standings_of
from usameter_core.ratelimit.windows import (
    SCRIPT,
    Counts,
    Decision,
    count_requests,
    decision_from_script,
    script_arguments,
)
from usameter_core.redis.breaker import CircuitBreaker, CircuitOpen

# A changed policy is in force everywhere this long after it is in the mirror.
POLICY_CACHE_SECONDS = 1.0
_CACHED_POLICIES_MAX = 10_000
# Whose windows are kept in memory: at most some 20 KB each.
_COUNTED_KEYS_MAX = 2_000

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_Key = tuple[OrgId, str]


@dataclass(frozen=True, slots=True)
class _Waiting:
    requests: int
    answer: asyncio.Future[list[Standing | None]]


class RateLimiter:
    """Counts requests against the limits of their API keys. Belongs to one event loop.

    Requests of one key that come together, or while a decision on that key is under way, are decided
    together: one script for all of them.
    """

    def __init__(self, redis: Redis, breaker: CircuitBreaker, *, clock: Clock) -> None:
        self._script = redis.register_script(SCRIPT)
        self._breaker = breaker
        self._mirror = PolicyMirror(redis, breaker)
        self._clock = clock
        # By organization: until when they are believed, and the policies.
        self._policies: OrderedDict[OrgId, tuple[float, OrganizationPolicies]] = OrderedDict()
        self._counts: OrderedDict[_Key, Counts] = OrderedDict()
        self._waiting: dict[_Key, list[_Waiting]] = {}
        self._deciding: dict[_Key, asyncio.Task[None]] = {}

    async def count(self, principal: Principal, requests: int = 1) -> list[Standing | None]:
        """Count some requests of a key, in order: a standing for each, or None where no limit binds the key.

        Each is admitted or refused by itself; a refused one counts in no window.
        """
        key = (principal.org_id, principal.api_key_id)
        known = self._policies.get(principal.org_id)
        if known is not None and known[0] > time.monotonic() and not known[1].limits_of(principal.api_key_id):
            return [None] * requests
        waiting = _Waiting(requests, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(key, []).append(waiting)
        if key not in self._deciding:
            # In a context of its own: it decides for others too.
            self._deciding[key] = asyncio.create_task(self._decide_waiting(key), context=Context())
        return await waiting.answer

    async def _decide_waiting(self, key: _Key) -> None:
        decided: list[_Waiting] = []
        try:
            while key in self._waiting:
                # Whose caller has gone away is not counted.
                decided = [each for each in self._waiting.pop(key) if not each.answer.done()]
                standings = iter(await self._decide(key, sum(each.requests for each in decided)))
                for each in decided:
                    own = list(itertools.islice(standings, each.requests))
                    if not each.answer.done():
                        each.answer.set_result(own)
        except Exception as error:
            # The top of a task: whatever it was is the answer to all who wait, for nobody may wait for ever.
            for each in (*decided, *self._waiting.pop(key, ())):
                if not each.answer.done():
                    each.answer.set_exception(error)
        finally:
            del self._deciding[key]

    async def _decide(self, key: _Key, requests: int) -> list[Standing | None]:
        """What `count` answers for some requests of one key, the admitted ones first."""
        limits = (await self._policies_of(key[0])).limits_of(key[1])
        if not limits:
            return [None] * requests
        try:
            decision = await self._breaker.call(partial(self._count_in_redis, key, limits, requests))
            counted_by = "redis"
        except CircuitOpen:
            decision = self._count_in_memory(key, limits, requests)
            counted_by = "memory"
        RATE_LIMIT_DECISIONS.labels(counted_by, "admitted").inc(decision.admitted)
        RATE_LIMIT_DECISIONS.labels(counted_by, "refused").inc(requests - decision.admitted)
        return [*standings_of(decision, requests)]

    async def _count_in_redis(self, key: _Key, limits: tuple[RateLimit, ...], requests: int) -> Decision:
        name = f"usameter:rate:{{{key[0]}}}:{key[1]}"
        return decision_from_script(limits, await self._script(keys=[name], args=script_arguments(limits, requests)))

    def _count_in_memory(self, key: _Key, limits: tuple[RateLimit, ...], requests: int) -> Decision:
        counts = self._counts.setdefault(key, {})
        self._counts.move_to_end(key)
        if len(self._counts) > _COUNTED_KEYS_MAX:
            self._counts.popitem(last=False)
        now_us = (self._clock.now() - _EPOCH) // timedelta(microseconds=1)
        return count_requests(counts, limits, requests, now_us=now_us)

    async def _policies_of(self, org_id: OrgId) -> OrganizationPolicies:
        """The organization's policies; while the mirror cannot be read the last that were known here."""
        believed_until, policies = self._policies.get(org_id, (0.0, None))
        if policies is not None and believed_until > time.monotonic():
            return policies
        with suppress(CircuitOpen):
            policies = await self._mirror.read(org_id) or policies
        if policies is None:
            # Nobody knows. A guess is not kept: the next request asks again.
            return OrganizationPolicies()
        self._policies[org_id] = (time.monotonic() + POLICY_CACHE_SECONDS, policies)
        self._policies.move_to_end(org_id)
        if len(self._policies) > _CACHED_POLICIES_MAX:
            self._policies.popitem(last=False)
        return policies

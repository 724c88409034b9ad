"""Random histories of replicas whose clocks differ, held against the audit of limits (invariant I4)."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from tests.support.auditing import audit_limits
from tests.support.quota import NOW, Bench
from usameter_core.errors import FailedPrecondition, IdempotencyConflict, NotFound, QuotaExceeded
from usameter_core.ids import ReservationId
from usameter_core.postgres.pool import Pool, open_pool
from usameter_quota.domain.admission import Outcome
from usameter_quota.domain.limits import LimitPeriod
from usameter_quota.service.auditing import LimitAuditingService
from usameter_quota.store.auditing import AuditStore
from usameter_quota.worker import CLOCK_SKEW_MAX

MIDNIGHT = NOW.replace(hour=0, minute=0) + timedelta(days=1)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
LIMITS = ("0", "3", "6", "10")
QUANTITIES = ("0.5", "1", "2", "5")
# How far from now events are dated: ahead, and on both sides of what the rolling window drops.
DISTANCES = (*[timedelta(0)] * 5, timedelta(minutes=5), -HOUR, -DAY, -28 * DAY, -29 * DAY, -30 * DAY)
PAUSES = (timedelta(seconds=5), timedelta(seconds=15), HOUR, HOUR, 2 * HOUR, DAY, DAY, 31 * DAY)
# In one of these (143) a rolling limit, set after midnight, once did not bind a replica whose clock was before it.
SEEDS = range(200)


@pytest.fixture
async def pool(database: Any) -> AsyncIterator[Pool]:
    async with open_pool(database.role_url("quota"), application_name="test") as opened:
        yield opened


class History:
    """An organization with one quota, about midnight; each step is of a replica with a clock of its own."""

    def __init__(self, pool: Pool, seed: int) -> None:
        self.random = random.Random(seed)
        self.bench = Bench(pool)
        self.moment = MIDNIGHT - timedelta(seconds=self.random.choice([20, 3_600, 7_200, 90_000]))
        self.left_open: list[ReservationId] = []

    async def live(self) -> None:
        """One step; what is refused is a step too."""
        skew = CLOCK_SKEW_MAX.total_seconds()
        self.bench.clock.moment = self.moment + timedelta(seconds=self.random.uniform(-skew, skew))
        steps = [self.change] * 4 + [self.reserve] * 5 + [self.settle, self.settle, self.hold, self.claim, self.claim]
        with suppress(NotFound, QuotaExceeded, IdempotencyConflict, FailedPrecondition):
            await self.random.choice([*steps, self.wait, self.wait, self.wait, self.bench.expire_holds])()
        self.bench.clock.moment = self.moment

    async def change(self) -> None:
        pick, bench = self.random.choice, self.bench
        value, period = pick(LIMITS), pick(list(LimitPeriod)).value
        match pick(["set", "set", "set", "default", "delete", "delete default"]):
            case "set":
                await bench.limit(value, pick(["HARD"] * 5 + ["SOFT"]), period)
            case "default":
                await bench.default(value, period=period)
            case "delete":
                await bench.quotas.delete_quota(bench.caller, "t", "e")
            case _:
                await bench.quotas.delete_default(bench.caller, "e")

    async def reserve(self) -> None:
        quantity = self.random.choice(QUANTITIES)
        first, second = [("t", "e", quantity)], [("t", "e", "1"), ("t", "e", quantity)]
        await self.bench.reserve(first, second, at=self.some_time(), reservation_id=self.new_id())

    async def settle(self) -> None:
        if self.left_open:
            reservation_id = self.left_open.pop(self.random.randrange(len(self.left_open)))
            await self.bench.settle(reservation_id, self.random.choice(list(Outcome)))

    async def hold(self) -> None:
        quantity = self.random.choice(QUANTITIES)
        await self.bench.hold(quantity, name=self.random.choice("abc"), ttl=self.random.choice([HOUR, DAY]))

    async def claim(self) -> None:
        quantity, name = self.random.choice(QUANTITIES), self.random.choice("abc")
        await self.bench.claim(quantity, name=name, at=self.some_time(), reservation_id=self.new_id())

    async def wait(self) -> None:
        self.moment += self.random.choice(PAUSES)

    def new_id(self) -> ReservationId:
        self.left_open.append(ReservationId(uuid4()))
        return self.left_open[-1]

    def some_time(self) -> datetime:
        return self.bench.clock.now() + self.random.choice(DISTANCES)


async def test_random_histories_of_clocks_that_differ_keep_every_limit(pool: Pool) -> None:
    """I4: whichever replica decides, no admission takes a counter above the limit in force, and no audit says so."""
    judged = 0
    for seed in SEEDS:
        history = History(pool, seed)
        auditing = LimitAuditingService(clock=history.bench.clock, store=AuditStore(pool))
        for _ in range(history.random.randint(10, 40)):
            await history.live()
            checked, found = await audit_limits(auditing, history.bench.caller.org_id)
            assert found == [], f"seed {seed}"
            judged += checked
    assert judged > 1_000

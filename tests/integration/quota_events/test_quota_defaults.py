"""The organization's default limits: who they apply to, from when, and what of them is logged."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import timedelta
from decimal import Decimal

import pytest

from tests.support.quota import NOW, Bench, said
from tests.support.quota_lines import check, is_waited
from tests.support.wait import until
from usameter_core.errors import NotFound
from usameter_core.postgres.pool import Connection, Pool


async def test_a_default_applies_to_whoever_has_no_limit_of_their_own(bench: Bench) -> None:
    await bench.default("10")
    await bench.limit("20", tenant_id="own")
    await bench.limit("5", "DISABLED", tenant_id="free")
    assert said((await bench.reserve([("t", "e", "11")]))[0]) == "DENY"
    assert said((await bench.reserve([("own", "e", "11")]))[0]) == "ALLOW"
    assert said((await bench.reserve([("free", "e", "11")]))[0]) == "ALLOW"
    assert said((await bench.reserve([("t", "other", "11")]))[0]) == "ALLOW"
    listed = await bench.quotas.list_quotas(bench.caller.org_id, tenant_id=None, after=("", ""), limit=10)
    assert [(each.tenant_id, each.terms.limit_value, each.from_default) for each in listed] == [
        ("free", 5, False),
        ("own", 20, False),
        ("t", 10, True),
    ]
    assert await bench.quotas.list_quotas(bench.caller.org_id, tenant_id="own", after=("", ""), limit=1) == listed[1:2]
    await bench.quotas.delete_quota(bench.caller, "own", "e")
    quota = await bench.quota("own")
    assert (quota.terms.limit_value, quota.from_default, quota.current) == (10, True, 11)
    assert not await check(bench, "1", "own")
    with pytest.raises(NotFound):
        await bench.quotas.delete_quota(bench.caller, "own", "e")
    await bench.quotas.delete_default(bench.caller, "e")
    assert await check(bench, "1", "own")
    with pytest.raises(NotFound):
        await bench.quota("own")
    with pytest.raises(NotFound):
        await bench.quotas.delete_default(bench.caller, "e")


async def test_a_default_says_of_a_tenant_above_it_that_it_is_at_the_tenants_next_request(bench: Bench) -> None:
    await bench.store("12")
    await bench.default("10")
    assert await bench.happened() == []
    assert said(await bench.store("1")) == "DENY"
    assert await bench.happened() == ["SOFT_LIMIT_REACHED", "LIMIT_REACHED"]
    await bench.default("10", "SOFT", grace=1)
    assert said(await bench.store("1")) == "QUOTA_EXCEEDED"
    assert (await bench.quota()).grace_ends_at == NOW + timedelta(hours=1)
    assert len(await bench.happened()) == 5


async def test_every_change_of_a_default_is_logged(bench: Bench) -> None:
    await bench.default("10")
    await bench.default("10")
    await bench.default("20", "SOFT", grace=3)
    await bench.quotas.delete_default(bench.caller, "e")
    rows = await bench.pool.fetch(
        """
        SELECT tenant_id, version, limit_value, grace_period_hours
        FROM quota.limit_change
        WHERE org_id = $1
        ORDER BY version
        """,
        bench.caller.org_id,
    )
    assert [tuple(row) for row in rows] == [("", 1, 10, None), ("", 2, 20, 3), ("", 3, None, None)]


Change = Callable[[Connection, Bench], Awaitable[object]]


async def lower_the_default(connection: Connection, bench: Bench) -> object:
    return await connection.execute(
        "SELECT quota.set_limit($1, '', 'e', $2, 'key_test', 5, 'HARD', 'MONTHLY', 80::smallint, NULL)",
        bench.caller.org_id,
        NOW,
    )


async def delete_the_own_limit(connection: Connection, bench: Bench) -> object:
    return await connection.execute("SELECT quota.delete_limit($1, 't', 'e', $2, 'key_test')", bench.caller.org_id, NOW)


@pytest.mark.parametrize("change", [lower_the_default, delete_the_own_limit])
async def test_a_reserve_that_waited_for_a_change_is_held_to_the_new_default(
    bench: Bench, replica: Pool, change: Change
) -> None:
    """I4: no admission above the limit then in force, also where that is a default."""
    await bench.default("10" if change is lower_the_default else "5")
    if change is delete_the_own_limit:
        await bench.limit("10")
    async with replica.acquire() as connection:
        async with connection.transaction():
            await change(connection, bench)
            waiting = asyncio.create_task(bench.use("6"))
            await until(lambda: is_waited(connection), "the reserve waits")
        assert said(await waiting) == "DENY"


async def test_a_default_is_not_changed_under_a_reserve_that_has_decided(bench: Bench, replica: Pool) -> None:
    """I4: once the change is answered, nothing commits that was admitted under the old default."""
    await bench.default("10")
    async with replica.acquire() as connection:
        async with connection.transaction():
            await connection.execute("SELECT quota.lock_heads($1, '{t}', '{e}')", bench.caller.org_id)
            changing = asyncio.create_task(bench.default("5"))
            await until(lambda: is_waited(connection), "the change waits")
            assert not changing.done()
        await changing


async def test_a_default_lowered_under_load_holds_every_tenant_from_its_answer_on(bench: Bench, replica: Pool) -> None:
    """I4, on two replicas: what is counted when the change is answered grows no more where it is above."""
    await bench.default("1000")
    sides = [bench, Bench(replica, bench.clock, bench.caller)]
    tenants = [f"t{number}" for number in range(8)]
    stop = asyncio.Event()

    async def drain(side: Bench) -> None:
        while not stop.is_set():
            await side.reserve(*[[(tenant, "e", "1")] for tenant in random.sample(tenants, 5)])

    async def counted() -> dict[str, Decimal]:
        rows = await bench.pool.fetch(
            "SELECT tenant_id, quantity FROM quota.usage_day WHERE org_id = $1", bench.caller.org_id
        )
        return {row["tenant_id"]: row["quantity"] for row in rows}

    async def is_busy() -> bool:
        return min((await counted()).values(), default=0) > 5

    racing = [asyncio.create_task(drain(side)) for side in sides * 4]
    await until(is_busy, "every tenant has used some")
    await sides[1].default("5")
    answered = await counted()
    await asyncio.sleep(0.2)
    stop.set()
    await asyncio.gather(*racing)
    assert await counted() == answered

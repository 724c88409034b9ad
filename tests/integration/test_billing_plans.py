"""Plans over gRPC on a real database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.billing import Organization, World, open_world
from tests.support.services import details_of, reason_of
from usameter.billing.v1 import plan_pb2, price_pb2
from usameter.common.v1 import error_pb2

PER_UNIT = price_pb2.Price(model=price_pb2.per_unit, currency="USD", unit_amount="0.02")
SEEDED = ["Enterprise", "Growth", "Starter"]


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with open_world(database) as world:
        yield world


@pytest.fixture
async def org(world: World) -> AsyncIterator[Organization]:
    async with world.open_service() as channel:
        yield world.organization(channel)


async def listed(org: Organization, **fields: Any) -> plan_pb2.ListPlansResponse:
    answer: plan_pb2.ListPlansResponse = await org.plans.ListPlans(
        plan_pb2.ListPlansRequest(**fields), metadata=org.metadata
    )
    return answer


async def violations_of(call: Any) -> dict[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert reason_of(caught.value) == "INVALID_ARGUMENT"
    found = details_of(caught.value, error_pb2.ViolationDetails()).violations
    return {violation.field: violation.description for violation in found}


async def test_a_plan_is_listed_as_it_was_written(org: Organization) -> None:
    tiers = [price_pb2.PriceTier(up_to="1000"), price_pb2.PriceTier(unit_amount="0.0250")]
    image = price_pb2.Price(model=price_pb2.graduated, currency="USD", tiers=tiers)
    made = await org.set_plan("Pro", "49.90", interval=plan_pb2.YEARLY, prices={"call": PER_UNIT, "image": image})
    assert (made.name, made.base_fee, made.currency, made.interval) == ("Pro", "49.9", "USD", plan_pb2.YEARLY)
    assert {each.event_type: each.price for each in made.prices} == {"call": PER_UNIT, "image": image}
    assert made in (await listed(org)).plans


async def test_a_plan_without_an_interval_is_monthly(org: Organization) -> None:
    made = await org.set_plan(interval=plan_pb2.PLAN_INTERVAL_UNSPECIFIED)
    assert made.interval == plan_pb2.MONTHLY


async def test_the_published_plans_are_there_from_the_first_list_on_and_only_once(org: Organization) -> None:
    first = await listed(org)
    assert [(plan.name, plan.base_fee, plan.currency, plan.interval) for plan in first.plans] == [
        ("Enterprise", "499", "USD", plan_pb2.MONTHLY),
        ("Growth", "99", "USD", plan_pb2.MONTHLY),
        ("Starter", "29", "USD", plan_pb2.MONTHLY),
    ]
    assert await listed(org) == first
    # Overage is pro rata per event: $0.50 for 1,000 beyond the included ones.
    for plan, included, per_thousand in zip(
        first.plans, ("5000000", "500000", "100000"), ("0.10", "0.30", "0.50"), strict=True
    ):
        assert [each.event_type for each in plan.prices] == ["api_request"]
        for quantity, amount in ((included, "0.00"), (str(int(included) + 1000), per_thousand)):
            request = price_pb2.PreviewPriceRequest(price=plan.prices[0].price, quantity=quantity)
            assert (await org.prices.PreviewPrice(request, metadata=org.metadata)).amount == amount


async def test_first_lists_at_once_seed_each_plan_once(org: Organization) -> None:
    answers = await asyncio.gather(*(listed(org) for _ in range(8)))
    assert all(answer == answers[0] for answer in answers)
    assert [plan.name for plan in answers[0].plans] == SEEDED
    assert all(len(plan.prices) == 1 for plan in answers[0].plans)


async def test_an_own_plan_of_a_published_name_stays(org: Organization) -> None:
    own = await org.set_plan("Starter", "1")
    assert [plan.name for plan in (await listed(org)).plans] == SEEDED
    assert own in (await listed(org)).plans


async def test_a_plan_of_the_same_name_exists_already(world: World, org: Organization) -> None:
    first = await org.set_plan("Pro")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await org.set_plan("Pro", "99", prices={"call": PER_UNIT})
    assert reason_of(caught.value) == "ALREADY_EXISTS"
    assert details_of(caught.value, error_pb2.ResourceDetails()).id == first.id
    assert await world.admin.fetchval("SELECT count(*) FROM billing.price") == 0
    other = world.organization(org.channel)
    await other.set_plan("Pro")
    assert first not in (await listed(other)).plans


async def test_plans_are_paged_by_name(org: Organization) -> None:
    await org.set_plan("Alpha")
    first = await listed(org, limit=2)
    second = await listed(org, limit=2, page_token=first.next_page_token)
    assert [plan.name for plan in (*first.plans, *second.plans)] == ["Alpha", *SEEDED]
    assert not second.HasField("next_page_token")


async def test_what_is_wrong_with_a_plan_is_named_field_by_field(org: Organization) -> None:
    euro = price_pb2.Price(model=price_pb2.per_unit, currency="EUR", unit_amount="-1")
    found = await violations_of(
        org.plans.CreatePlan(
            plan_pb2.CreatePlanRequest(
                name="Pro",
                base_fee="-29",
                currency="USD",
                prices=[
                    plan_pb2.PlanPrice(event_type="call", price=PER_UNIT),
                    plan_pb2.PlanPrice(event_type="call", price=euro),
                ],
            ),
            metadata=org.metadata,
        )
    )
    assert found == {
        "base_fee": "must not be negative",
        "prices[1].event_type": "call has a price in this plan already",
        "prices[1].price.currency": "must be the plan's, USD",
        "prices[1].price.unit_amount": "must not be negative",
    }
    assert set(await violations_of(org.set_plan(base_fee="twenty"))) == {"base_fee"}
    assert set(await violations_of(org.set_plan(base_fee=""))) == {"base_fee"}
    assert set(await violations_of(org.set_plan(base_fee="0.1234567890123"))) == {"base_fee"}


async def test_prices_of_plans_are_no_defaults_and_not_listed_among_prices(org: Organization) -> None:
    await org.set_plan(prices={"call": PER_UNIT})
    assert not (await org.prices.ListPrices(price_pb2.ListPricesRequest(), metadata=org.metadata)).prices
    org.seal(("acme", "call", "2026-01-10", "100"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await org.draft("acme")
    assert reason_of(caught.value) == "FAILED_PRECONDITION"

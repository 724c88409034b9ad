"""Price versions over gRPC on a real database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import grpc.aio
import pytest
from structlog.testing import capture_logs

from tests.conftest import Database
from tests.support.billing import Organization, World, open_world
from tests.support.services import details_of, reason_of
from usameter.billing.v1 import price_pb2
from usameter.common.v1 import error_pb2


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with open_world(database) as world:
        yield world


@pytest.fixture
async def org(world: World) -> AsyncIterator[Organization]:
    async with world.open_service() as channel:
        yield world.organization(channel)


async def test_a_version_is_listed_as_it_was_written(org: Organization) -> None:
    price = price_pb2.Price(
        model=price_pb2.graduated,
        currency="USD",
        tiers=[price_pb2.PriceTier(up_to="1000", unit_amount="0.10"), price_pb2.PriceTier(unit_amount="0.050")],
        minimum_amount="1.00",
    )
    made = await org.set_terms("image", price, tenant_id="acme")
    assert made.price == price
    answer = await org.prices.ListPrices(price_pb2.ListPricesRequest(), metadata=org.metadata)
    assert list(answer.prices) == [made]
    assert not answer.HasField("next_page_token")


async def test_a_version_at_the_same_moment_exists_already(org: Organization) -> None:
    first = await org.set_price("call", "1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await org.set_price("call", "2")
    assert reason_of(caught.value) == "ALREADY_EXISTS"
    assert details_of(caught.value, error_pb2.ResourceDetails()).id == first.id
    await org.set_price("call", "2", tenant_id="acme")


async def test_versions_are_paged_by_type_tenant_and_moment(org: Organization) -> None:
    moments = [datetime(2026, 1, day, microsecond=day, tzinfo=UTC) for day in (1, 2)]
    made = [
        await org.set_price(event_type, "1", tenant_id=tenant_id, effective_from=moment)
        for event_type in ("a", "b")
        for tenant_id in (None, "acme")
        for moment in moments
    ]
    listed: list[price_pb2.PriceVersion] = []
    token = ""
    while True:
        request = price_pb2.ListPricesRequest(limit=3, page_token=token)
        answer = await org.prices.ListPrices(request, metadata=org.metadata)
        listed += answer.prices
        if not answer.HasField("next_page_token"):
            break
        token = answer.next_page_token
    assert listed == made
    request = price_pb2.ListPricesRequest(event_type="b", tenant_id="acme")
    assert list((await org.prices.ListPrices(request, metadata=org.metadata)).prices) == made[6:]


async def test_a_preview_explains_the_amount_and_stores_nothing(org: Organization) -> None:
    price = price_pb2.Price(
        model=price_pb2.graduated,
        currency="USD",
        tiers=[price_pb2.PriceTier(up_to="1000"), price_pb2.PriceTier(unit_amount="0.02")],
    )
    request = price_pb2.PreviewPriceRequest(price=price, quantity="5247")
    answer = await org.prices.PreviewPrice(request, metadata=org.metadata)
    assert (answer.amount, answer.exact_amount) == ("84.94", "84.94")
    assert [(part.up_to, part.quantity, part.amount) for part in answer.breakdown] == [
        ("1000", "1000", "0"),
        ("", "4247", "84.94"),
    ]
    assert not (await org.prices.ListPrices(price_pb2.ListPricesRequest(), metadata=org.metadata)).prices


async def test_a_wrong_price_names_the_fields_in_the_request(org: Organization) -> None:
    price = price_pb2.Price(
        model=price_pb2.volume,
        currency="USD",
        tiers=[price_pb2.PriceTier(up_to="10"), price_pb2.PriceTier(up_to="5"), price_pb2.PriceTier()],
    )
    request = price_pb2.PreviewPriceRequest(price=price, quantity="1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await org.prices.PreviewPrice(request, metadata=org.metadata)
    assert reason_of(caught.value) == "INVALID_ARGUMENT"
    violations = details_of(caught.value, error_pb2.ViolationDetails()).violations
    assert [violation.field for violation in violations] == ["price.tiers[1].up_to"]


@pytest.mark.parametrize("change", ['{"unit_amount": "-0.02"}', '{"unit_amount": null}', '{"model": "barter"}'])
async def test_a_stored_price_that_is_none_is_a_fault_of_ours_and_only_the_log_names_it(
    world: World, org: Organization, change: str
) -> None:
    made = await org.set_price("call", "0.02")
    org.seal(("acme", "call", "2026-01-10", "100"))
    invoice = await org.bill("acme")
    await world.admin.execute("UPDATE billing.price SET terms = terms || $1::jsonb", change)
    for read in (
        lambda: org.get(invoice.id),
        lambda: org.draft("acme"),
        lambda: org.prices.ListPrices(price_pb2.ListPricesRequest(), metadata=org.metadata),
    ):
        with capture_logs() as logs, pytest.raises(grpc.aio.AioRpcError) as caught:
            await read()
        assert (reason_of(caught.value), caught.value.details()) == ("INTERNAL", "Internal error")
        (failure,) = (each for each in logs if each["event"] == "call_failed")
        assert f"the stored terms of {made.id} are no price" in str(failure["exc_info"])

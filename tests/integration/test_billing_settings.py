"""How a tenant is billed: tax, due days, currency; over gRPC on a real database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.billing import FEBRUARY, Organization, World, open_world
from tests.support.services import details_of, reason_of
from usameter.billing.v1 import invoice_pb2, settings_pb2
from usameter.common.v1 import error_pb2
from usameter_core.grpc.timestamps import datetime_in


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with open_world(database) as world:
        yield world


@pytest.fixture
async def org(world: World) -> AsyncIterator[Organization]:
    async with world.open_service() as channel:
        org = world.organization(channel)
        await org.set_price("call", "0.01")
        yield org


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def condition_of(call: Any) -> str:
    error = await refused(call)
    assert reason_of(error) == "FAILED_PRECONDITION"
    return str(details_of(error, error_pb2.PreconditionDetails()).condition)


async def settings_of(org: Organization, tenant_id: str) -> settings_pb2.BillingSettings:
    request = settings_pb2.GetBillingSettingsRequest(tenant_id=tenant_id)
    found: settings_pb2.BillingSettings = await org.settings.GetBillingSettings(request, metadata=org.metadata)
    return found


async def test_a_tenant_without_settings_has_the_defaults(org: Organization) -> None:
    assert await settings_of(org, "acme") == settings_pb2.BillingSettings(tenant_id="acme", tax_rate="0")


async def test_settings_are_replaced_as_a_whole(org: Organization) -> None:
    made = await org.set_settings("acme", currency="EUR", tax_rate="7.70", due_days=0, address="Acme\nBern")
    assert made == settings_pb2.BillingSettings(
        tenant_id="acme", currency="EUR", tax_rate="7.7", due_days=0, address="Acme\nBern"
    )
    assert await settings_of(org, "acme") == made
    assert await org.set_settings("acme", tax_rate="19") == await settings_of(org, "acme")
    assert not (await settings_of(org, "acme")).HasField("currency")


@pytest.mark.parametrize("tax_rate", ["-1", "100.0001", "101", "1e1", "0.12345", "", "01", "7,7"])
async def test_a_tax_rate_that_is_none_is_refused(org: Organization, tax_rate: str) -> None:
    error = await refused(org.set_settings("acme", tax_rate=tax_rate))
    assert reason_of(error) == "INVALID_ARGUMENT"
    (violation,) = details_of(error, error_pb2.ViolationDetails()).violations
    assert violation.field == "tax_rate"


@pytest.mark.parametrize("tax_rate", ["0", "0.0001", "9", "99.9999", "100", "100.0000"])
async def test_a_tax_rate_at_the_edge_is_accepted(org: Organization, tax_rate: str) -> None:
    await org.set_settings("acme", tax_rate=tax_rate)


@pytest.mark.parametrize(
    "character",
    ["\x00", "\x08", "\x0b", "\r", "\x1f", "\x7f", "\x9f", "\u2028", "\u2029", "\u202a", "\u202e", "\u2066", "\u2069"],
)
async def test_an_address_and_a_plans_name_print_as_they_read(org: Organization, character: str) -> None:
    for call, field in (
        (org.set_settings("acme", address=f"Acme\n{character}Bern"), "address"),
        (org.set_plan(f"Ba{character}sic"), "name"),
    ):
        error = await refused(call)
        assert reason_of(error) == "INVALID_ARGUMENT"
        (violation,) = details_of(error, error_pb2.ViolationDetails()).violations
        assert violation.field == field
        assert violation.description.startswith("must not contain control characters")


@pytest.mark.parametrize(
    "character", ["\t", "\n", "\n\n", " ", "\xa0", "\u2027", "\u202f", "\u2065", "\u206a", "\u200f", "東", "ע"]
)
async def test_an_address_has_lines_of_any_text(org: Organization, character: str) -> None:
    for address in (f"Acme{character}Bern", f"Acme{character}"):
        assert (await org.set_settings("acme", address=address)).address == address
    if character[0] not in "\t\n":
        assert (await org.set_plan(f"Ba{character}sic")).name == f"Ba{character}sic"


async def test_tax_is_added_and_the_due_date_is_the_tenants(world: World, org: Organization) -> None:
    """I7: the total is the sum of the lines, and tax."""
    await org.set_settings("acme", tax_rate="7.7", due_days=14)
    org.seal(("acme", "call", "2026-01-10", "5000"), ("other", "call", "2026-01-10", "5000"))
    invoice = await org.bill("acme")
    assert (invoice.subtotal, invoice.tax, invoice.total, invoice.amount_due) == ("50.00", "3.85", "53.85", "53.85")
    assert [line.tax_rate for line in invoice.lines] == ["7.7"]
    assert datetime_in(invoice, "due_at") == world.clock.now() + timedelta(days=14)
    other = await org.bill("other")
    assert (other.tax, other.total) == ("0.00", "50.00")
    assert datetime_in(other, "due_at") == world.clock.now() + timedelta(days=30)


async def test_a_bulk_run_taxes_and_dates_like_a_single_call(world: World, org: Organization) -> None:
    await org.set_settings("acme", tax_rate="7.7", due_days=14)
    org.seal(("acme", "call", "2026-01-10", "5000"), ("other", "call", "2026-01-10", "5000"))
    await org.wait_for(await org.start_bulk(finalize=True))
    assert {(each.tenant_id, each.tax, each.total) for each in await org.list()} == {
        ("acme", "3.85", "53.85"),
        ("other", "0.00", "50.00"),
    }
    issued = world.clock.now()
    assert {datetime_in(each, "due_at") for each in await org.list()} == {
        issued + timedelta(days=14),
        issued + timedelta(days=30),
    }


async def test_a_new_rate_outdates_drafts_and_leaves_billed_periods_at_theirs(org: Organization) -> None:
    await org.set_price("image", "1")
    await org.set_settings("acme", tax_rate="19")
    org.seal(("acme", "call", "2026-01-10", "1000"))
    january = await org.draft("acme")
    assert january.total == "11.90"
    await org.set_settings("acme", tax_rate="20")
    assert await condition_of(org.finalize(january.id)) == "DRAFT_CHANGED"
    await org.set_settings("acme", tax_rate="19")
    await org.draft("acme")
    assert (await org.finalize(january.id)).total == "11.90"
    await org.set_settings("acme", tax_rate="20")
    org.seal(
        ("acme", "call", "2026-01-11", "100"),
        ("acme", "image", "2026-01-11", "1"),
        ("acme", "call", "2026-02-10", "1000"),
    )
    february = await org.bill("acme", FEBRUARY)
    assert [(invoice_pb2.LineKind.Name(line.kind), line.event_type, line.tax_rate) for line in february.lines] == [
        ("USAGE", "call", "20"),
        ("TRUE_UP", "call", "19"),
        # Also what was not billed of it before: it is the period that has the rate.
        ("TRUE_UP", "image", "19"),
    ]
    assert (february.subtotal, february.tax, february.total) == ("12.00", "2.38", "14.38")


async def test_a_void_invoice_lets_go_of_its_rate(org: Organization) -> None:
    await org.set_settings("acme", tax_rate="19")
    org.seal(("acme", "call", "2026-01-10", "1000"))
    wrong = await org.bill("acme")
    await org.set_settings("acme", tax_rate="7")
    await org.void(wrong.id)
    assert (await org.bill("acme")).total == "10.70"


async def test_a_corrected_period_gives_its_tax_back_as_credit(org: Organization) -> None:
    await org.set_settings("acme", tax_rate="19")
    org.seal(("acme", "call", "2026-01-10", "1000"))
    await org.bill("acme")
    org.seal(("acme", "call", "2026-01-10", "-1000"))
    credit = await org.bill("acme")
    assert (credit.subtotal, credit.tax, credit.total, credit.amount_due) == ("-10.00", "-1.90", "-11.90", "0.00")
    org.seal(("acme", "call", "2026-02-10", "2000"))
    assert (await org.bill("acme", FEBRUARY)).amount_due == "11.90"


async def test_plans_and_own_prices_must_be_in_the_tenants_currency(org: Organization) -> None:
    euro, dollar = await org.set_plan("Euro", currency="EUR"), await org.set_plan("Dollar")
    await org.set_settings("acme", currency="EUR")
    assert await condition_of(org.subscribe("acme", dollar.id)) == "CURRENCY_MISMATCH"
    assert await condition_of(org.set_price("image", "1", tenant_id="acme")) == "CURRENCY_MISMATCH"
    await org.set_price("image", "1", tenant_id="acme", currency="EUR")
    made = await org.subscribe("acme", euro.id)
    assert await condition_of(org.change_plan(made.id, dollar.id)) == "CURRENCY_MISMATCH"
    assert await condition_of(org.set_settings("acme", currency="USD")) == "CURRENCY_MISMATCH"
    await org.cancel(made.id, at=datetime(2026, 3, 1, tzinfo=UTC))
    await org.set_settings("acme", currency="USD")


async def test_another_organization_has_its_own_settings(world: World, org: Organization) -> None:
    await org.set_settings("acme", tax_rate="19")
    assert (await settings_of(world.organization(org.channel), "acme")).tax_rate == "0"

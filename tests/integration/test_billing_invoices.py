"""Drafts, finalizing, true-ups and credit of one tenant, over gRPC on a real database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.billing import FEBRUARY, JANUARY, Organization, World, open_world, until
from tests.support.services import details_of, reason_of
from usameter.billing.v1 import invoice_pb2, price_pb2
from usameter.common.v1 import error_pb2
from usameter_core.grpc.timestamps import datetime_in
from usameter_core.period import Period, month_of

USAGE, TRUE_UP = invoice_pb2.USAGE, invoice_pb2.TRUE_UP


@dataclass
class Billing:
    """A running service, and an organization that sells calls at 0.02 USD."""

    world: World
    org: Organization

    @property
    def ledger(self) -> Any:
        return self.world.ledger

    async def count(self, table: str) -> int:
        return int(await self.world.admin.fetchval(f"SELECT count(*) FROM billing.{table}"))


@pytest.fixture
async def billing(database: Database) -> AsyncIterator[Billing]:
    async with open_world(database) as world, world.open_service() as channel:
        org = world.organization(channel)
        await org.set_price("call", "0.02")
        yield Billing(world, org)


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def condition_of(call: Any) -> str:
    error = await refused(call)
    assert reason_of(error) == "FAILED_PRECONDITION"
    return str(details_of(error, error_pb2.PreconditionDetails()).condition)


async def test_a_draft_states_all_that_checking_it_needs(billing: Billing) -> None:
    org = billing.org
    ids = org.seal(("acme", "call", "2026-01-31", "100.5"), ("acme", "call", "2026-01-01", "1"))
    org.seal(("acme", "call", "2026-02-01", "7"), ("other", "call", "2026-01-15", "9"))
    draft = await org.draft("acme")
    assert (draft.status, draft.HasField("number"), draft.currency) == (invoice_pb2.draft, False, "USD")
    assert (draft.subtotal, draft.tax, draft.total, draft.amount_due) == ("2.03", "0.00", "2.03", "2.03")
    assert draft.through_epoch == 2
    (line,) = draft.lines
    assert (line.kind, line.event_type, line.quantity) == (USAGE, "call", "101.5")
    assert (line.rated_amount, line.amount) == ("2.03", "2.03")
    assert [(part.quantity, part.unit_amount, part.amount) for part in line.breakdown] == [("101.5", "0.02", "2.03")]
    assert line.price.price.unit_amount == "0.02"
    assert [snapshot.id for snapshot in line.snapshots] == ids
    assert [len(snapshot.root) for snapshot in line.snapshots] == [64, 64]
    assert await org.get(draft.id) == draft


async def test_creating_again_changes_nothing_and_new_use_refreshes_the_same_draft(billing: Billing) -> None:
    org = billing.org
    org.seal(("acme", "call", "2026-01-10", "100"))
    first = await org.draft("acme")
    assert await org.draft("acme") == first
    org.seal(("acme", "call", "2026-01-11", "50"))
    refreshed = await org.draft("acme")
    assert (refreshed.id, refreshed.total, refreshed.through_epoch) == (first.id, "3.00", 2)
    assert len(await org.list()) == 1


async def test_finalizing_freezes_numbers_and_dates_the_draft(billing: Billing) -> None:
    org, now = billing.org, billing.world.clock.now()
    org.seal(("acme", "call", "2026-01-10", "100"))
    draft = await org.draft("acme")
    invoice = await org.finalize(draft.id)
    assert (invoice.id, invoice.number, invoice.status) == (draft.id, 1, invoice_pb2.open)
    assert datetime_in(invoice, "issued_at") == now
    assert datetime_in(invoice, "due_at") == now + timedelta(days=30)
    assert list(invoice.lines) == list(draft.lines)
    assert await org.finalize(draft.id) == invoice
    assert await org.draft("acme") == invoice
    assert await billing.count("draft") == await billing.count("draft_line") == 0
    assert await billing.count("pending_use") == 0


async def test_a_later_number_has_no_earlier_date_where_a_clock_is_behind(billing: Billing) -> None:
    org, clock = billing.org, billing.world.clock
    org.seal(*((tenant, "call", "2026-01-10", "100") for tenant in ("a", "b", "c")))
    ahead = clock.now()
    first = await org.bill("a")
    clock.advance(-timedelta(seconds=3))
    second = await org.bill("b")
    clock.advance(timedelta(seconds=5))
    third = await org.bill("c")
    assert [invoice.number for invoice in (first, second, third)] == [1, 2, 3]
    issued = [datetime_in(invoice, "issued_at") for invoice in (first, second, third)]
    assert issued == [ahead, ahead, ahead + timedelta(seconds=2)]
    for invoice, moment in zip((first, second, third), issued, strict=True):
        assert moment is not None and datetime_in(invoice, "due_at") == moment + timedelta(days=30)


async def test_ingest_is_told_which_invoice_covers_a_snapshot_once_it_can_be_reached(billing: Billing) -> None:
    org, admin = billing.org, billing.world.admin
    ids = org.seal(("acme", "call", "2026-01-10", "100"), ("acme", "call", "2026-01-11", "1"))
    billing.ledger.refuses_marks = True
    invoice = await org.bill("acme")
    await until(lambda: admin.fetchval("SELECT attempt_after > now() FROM billing.mark_outbox"))
    billing.ledger.refuses_marks = False
    # It is tried again after 15 seconds.
    await admin.execute("UPDATE billing.mark_outbox SET attempt_after = now()")
    await until(lambda: admin.fetchval("SELECT count(*) = 0 FROM billing.mark_outbox"))
    assert set(billing.ledger.marks) == set(ids)
    assert {mark.invoice_id for mark in billing.ledger.marks.values()} == {invoice.id}
    assert {mark.billed_at.seconds for mark in billing.ledger.marks.values()} == {invoice.issued_at.seconds}


async def test_finalizing_an_outdated_draft_is_refused_and_refreshes_it(billing: Billing) -> None:
    org = billing.org
    org.seal(("acme", "call", "2026-01-10", "100"))
    draft = await org.draft("acme")
    org.seal(("acme", "call", "2026-01-11", "100"))
    assert await condition_of(org.finalize(draft.id)) == "DRAFT_CHANGED"
    assert (await org.get(draft.id)).total == "4.00"
    assert (await org.finalize(draft.id)).total == "4.00"


async def test_a_later_epoch_without_the_tenant_does_not_outdate_its_draft(billing: Billing) -> None:
    org = billing.org
    org.seal(("acme", "call", "2026-01-10", "100"))
    draft = await org.draft("acme")
    org.seal(("other", "call", "2026-01-11", "100"))
    assert (await org.finalize(draft.id)).through_epoch == 2


async def test_a_late_event_is_a_true_up_of_exactly_the_difference(billing: Billing) -> None:
    org = billing.org
    org.seal(("acme", "call", "2026-01-10", "100"))
    first = await org.bill("acme")
    late = org.seal(("acme", "call", "2026-01-10", "0.3"))
    second = await org.bill("acme")
    (line,) = second.lines
    assert (second.number, second.total, second.id == first.id) == (2, "0.01", False)
    assert (line.kind, line.quantity, line.rated_amount, line.amount) == (TRUE_UP, "100.3", "2.01", "0.01")
    assert [(each.invoice_id, each.amount) for each in line.previously_billed] == [(first.id, "2.00")]
    assert [snapshot.id for snapshot in line.snapshots] == late
    assert await org.draft("acme") == second


async def test_late_use_of_an_earlier_period_rides_on_the_next_invoice(billing: Billing) -> None:
    org = billing.org
    org.seal(("acme", "call", "2026-01-10", "100"))
    await org.bill("acme")
    org.seal(("acme", "call", "2026-01-31", "50"), ("acme", "call", "2026-02-01", "10"))
    february = await org.bill("acme", FEBRUARY)
    assert [(line.kind, line.amount) for line in february.lines] == [(USAGE, "0.20"), (TRUE_UP, "1.00")]
    assert february.lines[1].period_start.ToDatetime(tzinfo=UTC) == JANUARY.start


async def test_a_use_of_two_drafts_is_billed_by_the_first_and_dropped_from_the_other(billing: Billing) -> None:
    org = billing.org
    org.seal(("acme", "call", "2026-01-10", "100"))
    january = await org.draft("acme")
    february = await org.draft("acme", FEBRUARY)
    assert (await org.finalize(february.id)).total == "2.00"
    assert await condition_of(org.finalize(january.id)) == "NOTHING_DUE"
    assert reason_of(await refused(org.get(january.id))) == "NOT_FOUND"


async def test_a_correction_below_what_was_billed_is_a_credit_that_the_next_invoices_draw_on(billing: Billing) -> None:
    org = billing.org
    org.seal(("acme", "call", "2026-01-10", "100"))
    await org.bill("acme")
    org.seal(("acme", "call", "2026-01-10", "-75"))
    credit = await org.bill("acme")
    assert (credit.total, credit.amount_due, credit.status) == ("-1.50", "0.00", invoice_pb2.paid)
    assert credit.paid_at == credit.issued_at

    org.seal(("acme", "call", "2026-02-01", "50"))
    covered = await org.bill("acme", FEBRUARY)
    assert (covered.total, covered.amount_due, covered.status) == ("1.00", "0.00", invoice_pb2.paid)
    org.seal(("acme", "call", "2026-02-02", "50"))
    part = await org.bill("acme", FEBRUARY)
    assert (part.total, part.amount_due, part.status) == ("1.00", "0.50", invoice_pb2.open)
    assert not part.HasField("paid_at")
    assert await billing.world.admin.fetchval("SELECT sum(amount) FROM billing.credit_entry") == 0


async def test_use_that_costs_nothing_is_invoiced_as_paid(billing: Billing) -> None:
    org = billing.org
    tiers = [price_pb2.PriceTier(up_to="1000"), price_pb2.PriceTier(unit_amount="0.02")]
    await org.set_terms("image", price_pb2.Price(model=price_pb2.graduated, currency="USD", tiers=tiers))
    org.seal(("acme", "image", "2026-01-10", "1000"))
    free = await org.bill("acme")
    assert (free.total, free.status) == ("0.00", invoice_pb2.paid)
    org.seal(("acme", "image", "2026-01-10", "4247"))
    assert (await org.bill("acme")).total == "84.94"


async def test_the_first_finalized_line_pins_the_price_of_its_period(billing: Billing) -> None:
    org = billing.org
    org.seal(("acme", "call", "2026-01-10", "100"))
    first = await org.bill("acme")
    dearer = await org.set_price("call", "1", tenant_id="acme", effective_from=datetime(2025, 6, 1, tzinfo=UTC))
    assert len(dearer.notices) == 1
    assert "2026-01-01T00:00:00Z" in dearer.notices[0]
    org.seal(("acme", "call", "2026-01-10", "50"), ("acme", "call", "2026-02-10", "2"))
    invoice = await org.bill("acme", FEBRUARY)
    assert [(line.price.id, line.amount) for line in invoice.lines] == [
        (dearer.id, "2.00"),
        (first.lines[0].price.id, "1.00"),
    ]


async def test_a_price_set_before_finalizing_outdates_the_draft(billing: Billing) -> None:
    org = billing.org
    org.seal(("acme", "call", "2026-01-10", "100"))
    draft = await org.draft("acme")
    assert (await org.set_price("call", "1", effective_from=JANUARY.start)).notices == []
    assert await condition_of(org.finalize(draft.id)) == "DRAFT_CHANGED"
    assert (await org.get(draft.id)).total == "100.00"


async def test_use_without_a_price_is_reported_and_waits_for_one(billing: Billing) -> None:
    org = billing.org
    org.seal(("acme", "call", "2026-01-10", "100"), ("acme", "image", "2026-01-10", "5"))
    org.seal(("other", "image", "2026-01-10", "1"))
    invoice = await org.bill("acme")
    assert (invoice.total, list(invoice.unpriced_event_types)) == ("2.00", ["image"])
    error = await refused(org.draft("other"))
    assert details_of(error, error_pb2.PreconditionDetails()).condition == "NOTHING_DUE"
    assert "image" in (error.details() or "")
    await org.set_price("image", "1", effective_from=JANUARY.start)
    later = await org.bill("acme")
    assert [(line.kind, line.event_type, line.amount) for line in later.lines] == [(USAGE, "image", "5.00")]


async def test_a_tenant_without_use_has_nothing_due(billing: Billing) -> None:
    assert await condition_of(billing.org.draft("nobody")) == "NOTHING_DUE"


async def test_bounds_that_are_no_billing_period_are_refused_with_the_right_ones(billing: Billing) -> None:
    january, february = (
        "[2026-01-01T00:00:00Z, 2026-02-01T00:00:00Z)",
        "[2026-02-01T00:00:00Z, 2026-03-01T00:00:00Z)",
    )
    one_day = timedelta(days=1)
    for asked, fields, right in (
        (Period(JANUARY.start, JANUARY.end + one_day), ["period_end"], january),
        (Period(JANUARY.start + one_day, JANUARY.end), ["period_start"], january),
        (Period(JANUARY.start + one_day, JANUARY.end + one_day), ["period_start", "period_end"], january),
        (Period(JANUARY.end, JANUARY.start), ["period_end"], february),
        (Period(datetime(9999, 12, 5, tzinfo=UTC), JANUARY.end), ["period_start"], "beyond the calendar"),
    ):
        error = await refused(billing.org.draft("acme", asked))
        assert reason_of(error) == "INVALID_ARGUMENT"
        violations = details_of(error, error_pb2.ViolationDetails()).violations
        assert [violation.field for violation in violations] == fields
        assert right in violations[0].description


async def test_amounts_have_the_currencys_decimals(billing: Billing) -> None:
    org = billing.org
    for currency, unit_amount, total in (("JPY", "0.5", "52"), ("KWD", "0.0015", "0.155"), ("USD", "0.0015", "0.15")):
        await org.set_price("image", unit_amount, currency=currency, tenant_id=currency)
        org.seal((currency, "image", "2026-01-10", "103"))
        invoice = await org.bill(currency)
        assert (invoice.currency, invoice.total, invoice.lines[0].amount) == (currency, total, total)


async def test_each_currency_has_an_invoice_and_the_first_by_code_is_answered(billing: Billing) -> None:
    org = billing.org
    await org.set_price("image", "1", currency="EUR")
    org.seal(("acme", "call", "2026-01-10", "100"), ("acme", "image", "2026-01-10", "3"))
    assert (await org.draft("acme")).currency == "EUR"
    drafts = await org.list(tenant_id="acme", status=invoice_pb2.draft)
    assert {(draft.currency, draft.total) for draft in drafts} == {("EUR", "3.00"), ("USD", "2.00")}
    for draft in drafts:
        await org.finalize(draft.id)
    assert sorted(invoice.number for invoice in await org.list()) == [1, 2]


async def test_numbers_have_no_gap_under_sixteen_finalizes_at_once(billing: Billing) -> None:
    """I7: unique and gapless."""
    org = billing.org
    tenants = [f"tenant_{number:02}" for number in range(16)]
    org.seal(*((tenant, "call", "2026-01-10", "100") for tenant in tenants))
    drafts = await asyncio.gather(*(org.draft(tenant) for tenant in tenants))
    # Each twice: the second of a pair waits, and answers with what the first made.
    invoices = await asyncio.gather(*(org.finalize(draft.id) for draft in drafts * 2))
    assert sorted({invoice.number for invoice in invoices}) == list(range(1, 17))
    assert await billing.count("invoice") == 16


async def test_concurrent_drafts_and_finalizes_of_one_tenant_bill_everything_once(billing: Billing) -> None:
    """I5 and I6, whatever the order."""
    org = billing.org

    async def invoice_once() -> None:
        try:
            await org.bill("acme")
        except grpc.aio.AioRpcError as error:
            assert reason_of(error) in ("FAILED_PRECONDITION", "NOT_FOUND")

    for day in range(1, 11):
        org.seal(("acme", "call", f"2026-01-{day:02}", "33"))
        await asyncio.gather(*(invoice_once() for _ in range(4)))
    await org.bill("acme")
    assert await billing.world.admin.fetchval("SELECT sum(amount) FROM billing.invoice_line") * 100 == 660
    assert await billing.count("snapshot_cover") == 10


async def test_a_pull_that_breaks_off_goes_on_where_it_was(billing: Billing) -> None:
    org, ledger = billing.org, billing.ledger
    org.seal(*(("acme", "call", f"2026-01-{day:02}", "1") for day in range(1, 6)))
    org.seal(*(("acme", "call", f"2026-01-{day:02}", "1") for day in range(6, 11)))
    # Three a page: the second page ends within the second epoch, which must not count until it is whole.
    ledger.pages_left = 2
    assert reason_of(await refused(org.draft("acme"))) == "UNAVAILABLE"
    assert await billing.world.admin.fetchval("SELECT through_epoch FROM billing.ledger_cursor") == 1
    ledger.pages_left = None
    draft = await org.draft("acme")
    assert (draft.through_epoch, draft.lines[0].quantity) == (2, "10")


async def test_an_ingest_that_is_away_is_unavailable_and_reading_goes_on(billing: Billing) -> None:
    org = billing.org
    org.seal(("acme", "call", "2026-01-10", "100"))
    draft = await org.draft("acme")
    billing.ledger.is_down = True
    assert reason_of(await refused(org.draft("acme"))) == "UNAVAILABLE"
    assert reason_of(await refused(org.finalize(draft.id))) == "UNAVAILABLE"
    assert await org.get(draft.id) == draft


async def test_lists_are_paged_newest_first_and_filtered(billing: Billing) -> None:
    org = billing.org
    org.seal(*((tenant, "call", day, "100") for tenant in ("a", "b", "c") for day in ("2026-01-10", "2026-02-10")))
    made = [await org.bill("a"), await org.bill("b"), await org.draft("c"), await org.draft("a", FEBRUARY)]
    newest_first = [invoice.id for invoice in reversed(made)]
    pages, token = [], ""
    while True:
        request = invoice_pb2.ListInvoicesRequest(limit=3, page_token=token)
        answer = await org.invoices.ListInvoices(request, metadata=org.metadata)
        pages.append([invoice.id for invoice in answer.invoices])
        if not answer.HasField("next_page_token"):
            break
        token = answer.next_page_token
    assert pages == [newest_first[:3], newest_first[3:]]
    assert not any(invoice.lines for invoice in await org.list())
    assert [each.id for each in await org.list(tenant_id="a")] == [made[3].id, made[0].id]
    assert [each.id for each in await org.list(status=invoice_pb2.open)] == [made[1].id, made[0].id]
    assert [each.id for each in await org.list(period_start=made[3].period_start)] == [made[3].id]


async def test_another_organization_sees_none_of_it_and_has_its_own_numbers(billing: Billing) -> None:
    org, other = billing.org, billing.world.organization(billing.org.channel)
    org.seal(("acme", "call", "2026-01-10", "100"))
    invoice = await org.bill("acme")
    assert reason_of(await refused(other.get(invoice.id))) == "NOT_FOUND"
    assert reason_of(await refused(other.finalize(invoice.id))) == "NOT_FOUND"
    assert await other.list() == []
    await other.set_price("call", "1")
    other.seal(("acme", "call", "2026-01-10", "100"))
    assert (await other.bill("acme")).number == 1


async def test_the_services_role_cannot_change_what_was_billed(database: Database) -> None:
    connection = await asyncpg.connect(database.role_url("billing"))
    try:
        for statement in (
            "UPDATE billing.invoice SET total = 0, subtotal = 0",
            "DELETE FROM billing.invoice",
            "UPDATE billing.invoice_line SET amount = 0",
            "DELETE FROM billing.invoice_line",
            "UPDATE billing.snapshot SET total = 0",
            "DELETE FROM billing.snapshot_cover",
            "UPDATE billing.price SET terms = '{}'",
            "UPDATE billing.credit_entry SET amount = 1",
            "TRUNCATE billing.invoice",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
    finally:
        await connection.close()


async def test_billing_periods_of_a_tenant_cannot_overlap(billing: Billing) -> None:
    billing.org.seal(("acme", "call", "2026-01-10", "100"))
    await billing.org.draft("acme")
    with pytest.raises(asyncpg.ExclusionViolationError):
        await billing.world.admin.execute(
            "INSERT INTO billing.billing_period SELECT org_id, tenant_id, $1, $2 FROM billing.billing_period",
            datetime(2026, 1, 31, tzinfo=UTC),
            month_of(datetime(2026, 2, 1, tzinfo=UTC)).end,
        )

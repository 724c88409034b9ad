"""What becomes of finalized invoices: void, paid, uncollectible, overdue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.billing import FEBRUARY, JANUARY, Organization, World, open_world, until
from tests.support.services import details_of, reason_of
from usameter.billing.v1 import credit_pb2, invoice_pb2
from usameter.common.v1 import error_pb2, job_pb2
from usameter_core.grpc.timestamps import datetime_in, timestamp_from_datetime

INSTANT = timedelta(microseconds=1)


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with open_world(database) as world:
        yield world


@pytest.fixture
async def org(world: World) -> AsyncIterator[Organization]:
    """Sells calls at 0.02 USD; `acme` has used 100 of them in January."""
    async with world.open_service() as channel:
        org = world.organization(channel)
        await org.set_price("call", "0.02")
        org.seal(("acme", "call", "2026-01-10", "100"))
        yield org


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def condition_of(call: Any) -> str:
    error = await refused(call)
    assert reason_of(error) == "FAILED_PRECONDITION"
    return str(details_of(error, error_pb2.PreconditionDetails()).condition)


async def covers(world: World) -> list[str]:
    rows = await world.admin.fetch("SELECT invoice_id FROM billing.snapshot_cover")
    return [f"inv_{row['invoice_id'].hex}" for row in rows]


async def test_a_void_invoice_is_billed_again_to_the_cent_under_the_next_number(
    world: World, org: Organization
) -> None:
    first = await org.bill("acme")
    voided = await org.void(first.id, reason="wrong address")
    assert (voided.status, voided.number, voided.total) == (invoice_pb2.void, 1, "2.00")
    assert (voided.amount_due, voided.void_reason) == ("0.00", "wrong address")
    assert datetime_in(voided, "voided_at") == world.clock.now()
    assert list(voided.lines) == list(first.lines)
    assert await covers(world) == []
    again = await org.bill("acme")
    assert (again.number, again.total, again.id == first.id) == (2, "2.00", False)
    assert [line.kind for line in again.lines] == [invoice_pb2.USAGE]
    assert await covers(world) == [again.id]
    assert await org.get(first.id) == voided


async def test_lines_of_a_void_invoice_no_longer_count_as_billed(world: World, org: Organization) -> None:
    first = await org.bill("acme")
    org.seal(("acme", "call", "2026-01-11", "0.3"))
    second = await org.bill("acme")
    await org.void(first.id)
    third = await org.bill("acme")
    (line,) = third.lines
    assert (line.rated_amount, line.amount, line.quantity) == ("2.01", "2.00", "100.3")
    assert [billed.invoice_id for billed in line.previously_billed] == [second.id]
    await org.void(second.id)
    assert (await org.bill("acme")).total == "0.01"
    assert len(set(await covers(world))) == 2


async def test_a_void_ends_the_pin_of_the_price(org: Organization) -> None:
    first = await org.bill("acme")
    await org.set_price("call", "1", effective_from=datetime(2025, 6, 1, tzinfo=UTC))
    org.seal(("acme", "call", "2026-01-11", "50"))
    second = await org.bill("acme")
    assert second.total == "1.00"
    await org.void(first.id)
    # The second invoice still pins the price by which it billed.
    assert (await org.draft("acme")).total == "2.00"
    await org.void(second.id)
    assert (await org.bill("acme")).total == "150.00"


async def test_drafts_are_out_of_date_after_a_void(org: Organization) -> None:
    first = await org.bill("acme")
    org.seal(("acme", "call", "2026-02-10", "10"))
    february = await org.draft("acme", FEBRUARY)
    await org.void(first.id)
    assert await condition_of(org.finalize(february.id)) == "DRAFT_CHANGED"
    assert [line.amount for line in (await org.finalize(february.id)).lines] == ["0.20", "2.00"]


async def test_a_bulk_run_bills_what_was_voided(org: Organization) -> None:
    first = await org.bill("acme")
    await org.void(first.id)
    job = await org.wait_for(await org.start_bulk(finalize=True))
    assert (job.state, job.done) == (job_pb2.succeeded, 1)
    assert [(invoice.number, invoice.total) for invoice in await org.list()] == [(2, "2.00"), (1, "2.00")]


async def test_ingest_is_told_that_the_snapshots_are_not_billed_and_then_by_whom(
    world: World, org: Organization
) -> None:
    first = await org.bill("acme")
    (snapshot_id,) = [snapshot.id for snapshot in first.lines[0].snapshots]

    async def marked_by(invoice_id: str) -> bool:
        mark = world.ledger.marks.get(snapshot_id)
        return mark is not None and mark.invoice_id == invoice_id

    await until(lambda: marked_by(first.id))
    await org.void(first.id)
    await until(lambda: marked_by(""))
    assert not world.ledger.marks[snapshot_id].HasField("billed_at")
    again = await org.bill("acme")
    await until(lambda: marked_by(again.id))


async def test_a_void_replaces_the_mark_that_ingest_has_not_heard_yet(world: World, org: Organization) -> None:
    world.ledger.refuses_marks = True
    first = await org.bill("acme")
    (snapshot_id,) = [snapshot.id for snapshot in first.lines[0].snapshots]
    await org.void(first.id)
    again = await org.bill("acme")
    world.ledger.refuses_marks = False
    await world.admin.execute("UPDATE billing.mark_outbox SET attempt_after = now()")
    await until(lambda: world.admin.fetchval("SELECT count(*) = 0 FROM billing.mark_outbox"))
    assert world.ledger.marks[snapshot_id].invoice_id == again.id


async def test_a_void_returns_what_the_invoice_drew(org: Organization) -> None:
    first = await org.bill("acme")
    org.seal(("acme", "call", "2026-01-10", "-75"))
    await org.bill("acme")
    org.seal(("acme", "call", "2026-02-01", "50"), ("acme", "call", "2026-02-02", "50"))
    drawing = await org.bill("acme", FEBRUARY)
    assert (drawing.total, drawing.amount_due, await org.balance("acme")) == ("2.00", "0.50", "0.00")
    await org.void(drawing.id)
    assert await org.balance("acme") == "1.50"
    again = await org.bill("acme", FEBRUARY)
    assert (again.amount_due, await org.balance("acme")) == ("0.50", "0.00")
    request = credit_pb2.ListCreditEntriesRequest(tenant_id="acme")
    entries = (await org.credits.ListCreditEntries(request, metadata=org.metadata)).credit_entries
    assert [(credit_pb2.CreditEntryKind.Name(entry.kind), entry.amount) for entry in entries] == [
        ("DRAWN", "-1.50"),
        ("RETURNED", "1.50"),
        ("DRAWN", "-1.50"),
        ("GRANTED", "1.50"),
    ]
    assert first.id not in {entry.invoice_id for entry in entries}


async def test_an_invoice_that_credit_has_covered_can_be_voided_since_no_money_came(org: Organization) -> None:
    await org.bill("acme")
    org.seal(("acme", "call", "2026-01-10", "-75"))
    await org.bill("acme")
    org.seal(("acme", "call", "2026-02-01", "50"))
    covered = await org.bill("acme", FEBRUARY)
    assert (covered.status, covered.amount_paid) == (invoice_pb2.paid, "0.00")
    assert (await org.void(covered.id)).status == invoice_pb2.void
    assert await org.balance("acme") == "1.50"


async def test_a_credit_can_be_voided_until_it_was_drawn_on(org: Organization) -> None:
    await org.bill("acme")
    org.seal(("acme", "call", "2026-01-10", "-75"))
    credit = await org.bill("acme")
    assert await org.balance("acme") == "1.50"
    assert (await org.void(credit.id)).status == invoice_pb2.void
    assert await org.balance("acme") == "0.00"
    again = await org.bill("acme")
    assert (again.total, await org.balance("acme")) == ("-1.50", "1.50")
    org.seal(("acme", "call", "2026-02-01", "1"))
    drawing = await org.bill("acme", FEBRUARY)
    assert await condition_of(org.void(again.id)) == "CREDIT_DRAWN"
    await org.void(drawing.id)
    assert (await org.void(again.id)).status == invoice_pb2.void
    assert await org.balance("acme") == "0.00"


async def test_a_payment_is_recorded_with_its_reference_and_moment(world: World, org: Organization) -> None:
    invoice = await org.bill("acme")
    world.clock.advance(timedelta(days=2))
    moment = world.clock.now() - timedelta(days=1)
    paid = await org.mark_paid(invoice.id, reference="wire 17", paid_at=timestamp_from_datetime(moment))
    assert (paid.status, paid.amount_due, paid.amount_paid) == (invoice_pb2.paid, "0.00", "2.00")
    assert (paid.payment_reference, datetime_in(paid, "paid_at")) == ("wire 17", moment)
    assert await org.mark_paid(invoice.id, reference="wire 17") == paid
    # Another reference is another payment, and not a retry.
    assert await condition_of(org.mark_paid(invoice.id, reference="wire 18")) == "INVOICE_PAID"
    assert await condition_of(org.mark_paid(invoice.id)) == "INVOICE_PAID"


async def test_a_payment_is_of_now_unless_stated_and_never_of_the_future(world: World, org: Organization) -> None:
    invoice = await org.bill("acme")
    future = timestamp_from_datetime(world.clock.now() + INSTANT)
    assert reason_of(await refused(org.mark_paid(invoice.id, paid_at=future))) == "INVALID_ARGUMENT"
    paid = await org.mark_paid(invoice.id)
    assert datetime_in(paid, "paid_at") == world.clock.now()
    assert await org.mark_paid(invoice.id) == paid


async def test_a_payment_is_not_from_before_the_invoice_was_issued(world: World, org: Organization) -> None:
    invoice = await org.bill("acme")
    issued_at = datetime_in(invoice, "issued_at")
    assert issued_at is not None
    world.clock.advance(timedelta(days=1))
    error = await refused(org.mark_paid(invoice.id, paid_at=timestamp_from_datetime(issued_at - INSTANT)))
    assert reason_of(error) == "INVALID_ARGUMENT"
    (violation,) = details_of(error, error_pb2.ViolationDetails()).violations
    assert violation.field == "paid_at"
    assert violation.description == "lies before 2026-03-01T06:00:00Z, when the invoice was issued"
    assert (await org.get(invoice.id)).status == invoice_pb2.open
    paid = await org.mark_paid(invoice.id, paid_at=timestamp_from_datetime(issued_at))
    assert datetime_in(paid, "paid_at") == issued_at


async def test_a_payment_is_of_now_also_where_the_clock_that_issued_was_ahead(world: World, org: Organization) -> None:
    invoice = await org.bill("acme")
    world.clock.advance(-INSTANT)
    assert (await org.mark_paid(invoice.id)).paid_at == invoice.issued_at


async def test_every_transition_from_every_state(org: Organization) -> None:
    """The table of the README: the state after a transition, or the condition that refuses it."""
    void, paid, uncollectible = invoice_pb2.void, invoice_pb2.paid, invoice_pb2.uncollectible
    expected: dict[str, tuple[Any, Any, Any]] = {
        #                 void            paid            uncollectible
        "draft": ("INVOICE_DRAFT", "INVOICE_DRAFT", "INVOICE_DRAFT"),
        "open": (void, paid, uncollectible),
        "uncollectible": (void, paid, uncollectible),
        "paid": ("INVOICE_PAID", paid, "INVOICE_PAID"),
        "void": (void, "INVOICE_VOID", "INVOICE_VOID"),
    }
    transitions = (org.void, org.mark_paid, org.mark_uncollectible)
    for state, outcomes in expected.items():
        for number, (transition, outcome) in enumerate(zip(transitions, outcomes, strict=True)):
            tenant = f"{state}_{number}"
            org.seal((tenant, "call", "2026-01-10", "100"))
            invoice = await org.draft(tenant)
            if state != "draft":
                await org.finalize(invoice.id)
            if state in ("void", "paid", "uncollectible"):
                await {"void": org.void, "paid": org.mark_paid, "uncollectible": org.mark_uncollectible}[state](
                    invoice.id
                )
            if isinstance(outcome, str):
                before = await org.get(invoice.id)
                assert await condition_of(transition(invoice.id)) == outcome, (state, number)
                assert await org.get(invoice.id) == before
            else:
                assert (await transition(invoice.id)).status == outcome, (state, number)
                after = await org.get(invoice.id)
                assert await transition(invoice.id) == after


async def test_an_uncollectible_invoice_stays_billed_and_due(org: Organization) -> None:
    invoice = await org.bill("acme")
    written_off = await org.mark_uncollectible(invoice.id, reason="bankrupt")
    assert (written_off.amount_due, written_off.uncollectible_reason) == ("2.00", "bankrupt")
    assert await org.draft("acme") == written_off
    paid = await org.mark_paid(invoice.id)
    assert (paid.amount_paid, paid.uncollectible_reason) == ("2.00", "bankrupt")


async def test_an_open_invoice_is_overdue_from_its_due_date_on(world: World, org: Organization) -> None:
    invoice = await org.bill("acme")
    org.seal(("other", "call", "2026-01-10", "1"), ("third", "call", "2026-01-10", "1"))
    settled, written_off = await org.bill("other"), await org.bill("third")
    await org.mark_paid(settled.id)
    await org.mark_uncollectible(written_off.id)
    due_at = datetime_in(invoice, "due_at")
    assert due_at is not None
    world.clock.set(due_at - INSTANT)
    assert not (await org.get(invoice.id)).overdue
    assert await org.list(overdue=True) == []
    world.clock.set(due_at)
    assert (await org.get(invoice.id)).overdue
    assert [each.id for each in await org.list(overdue=True)] == [invoice.id]
    assert [each.overdue for each in await org.list()] == [False, False, True]
    assert not (await org.mark_paid(invoice.id)).overdue


async def test_voids_at_once_void_once(world: World, org: Organization) -> None:
    await org.bill("acme")
    org.seal(("acme", "call", "2026-01-10", "-75"))
    credit = await org.bill("acme")
    voided = await asyncio.gather(*(org.void(credit.id, reason=str(number)) for number in range(8)))
    assert len({each.void_reason for each in voided}) == 1
    assert await org.balance("acme") == "0.00"
    assert await world.admin.fetchval("SELECT count(*) FROM billing.credit_entry WHERE kind = 'REVOKED'") == 1


async def test_void_and_finalize_at_once_bill_everything_once(world: World, org: Organization) -> None:
    """I5, I6 and I7, whatever the order."""

    async def bill_once() -> None:
        try:
            await org.bill("acme")
        except grpc.aio.AioRpcError as error:
            assert reason_of(error) in ("FAILED_PRECONDITION", "NOT_FOUND")

    async def void_newest() -> None:
        newest = next(iter(await org.list(status=invoice_pb2.open)), None)
        if newest is not None:
            await org.void(newest.id)

    for day in range(11, 19):
        org.seal(("acme", "call", f"2026-01-{day}", "33"))
        await asyncio.gather(*(bill_once() for _ in range(3)), *(void_newest() for _ in range(2)))
    await bill_once()
    billed = await world.admin.fetchval(
        """
        SELECT sum(line.amount) FROM billing.invoice_line AS line JOIN billing.invoice USING (org_id, invoice_id)
        WHERE status <> 'void'
        """
    )
    assert billed * 100 == (100 + 8 * 33) * 2
    assert await world.admin.fetchval("SELECT count(*) FROM billing.invoice WHERE status = 'void'") > 0
    assert await world.admin.fetchval("SELECT count(*) FROM billing.pending_use") == 0
    assert await world.admin.fetchval("SELECT count(*) FROM billing.snapshot_cover") == 9
    numbers = [row["number"] for row in await world.admin.fetch("SELECT number FROM billing.invoice ORDER BY number")]
    assert numbers == list(range(1, len(numbers) + 1))


async def test_another_organization_cannot_touch_an_invoice(world: World, org: Organization) -> None:
    invoice = await org.bill("acme")
    other = world.organization(org.channel)
    for call in (other.void(invoice.id), other.mark_paid(invoice.id), other.mark_uncollectible(invoice.id)):
        assert reason_of(await refused(call)) == "NOT_FOUND"
    assert await org.get(invoice.id) == invoice


async def test_the_services_role_can_change_what_became_of_an_invoice_and_nothing_that_was_billed(
    world: World, org: Organization
) -> None:
    invoice = await org.bill("acme")
    connection = await asyncpg.connect(world.database.role_url("billing"))
    try:
        for column in ("total", "subtotal", "tax", "number", "currency", "period_start", "tenant_id", "issued_at"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(f"UPDATE billing.invoice SET {column} = {column}")
        # The only way to end a cover leaves that of an invoice which is not void alone.
        for each in await connection.fetch("SELECT org_id, invoice_id FROM billing.invoice"):
            await connection.execute("SELECT billing.uncover_snapshots($1, $2)", each["org_id"], each["invoice_id"])
        assert await covers(world) == [invoice.id]
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute("UPDATE billing.invoice SET status = 'paid', paid_at = now()")
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute("UPDATE billing.invoice SET amount_due = total + 1")
    finally:
        await connection.close()


async def test_a_period_that_was_voided_can_be_drafted_again(org: Organization) -> None:
    first = await org.bill("acme")
    await org.void(first.id)
    draft = await org.draft("acme", JANUARY)
    assert (draft.status, draft.total) == (invoice_pb2.draft, "2.00")


async def test_base_fees_and_tax_of_a_void_invoice_are_billed_again(world: World, org: Organization) -> None:
    world.clock.set(datetime(2026, 1, 1, 6, tzinfo=UTC))
    plan = await org.set_plan(base_fee="31")
    await org.subscribe("sub", plan.id, datetime(2026, 1, 1, tzinfo=UTC))
    await org.set_settings("sub", tax_rate="19")
    world.clock.set(datetime(2026, 3, 1, 6, tzinfo=UTC))
    first = await org.bill("sub")
    assert {line.kind for line in first.lines} == {invoice_pb2.BASE_FEE}
    assert first.tax != "0.00"
    # No line covers a snapshot, so there is nothing to tell ingest, and the outbox empties all the same.
    await until(lambda: world.admin.fetchval("SELECT count(*) = 0 FROM billing.mark_outbox"))
    await org.void(first.id)
    again = await org.bill("sub")
    assert (again.subtotal, again.tax, again.total) == (first.subtotal, first.tax, first.total)
    assert [line.amount for line in again.lines] == [line.amount for line in first.lines]
    await until(lambda: world.admin.fetchval("SELECT count(*) = 0 FROM billing.mark_outbox"))

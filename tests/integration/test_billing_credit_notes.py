"""Credit notes and the credit that they grant, over gRPC on a real database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import asyncpg
import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.billing import FEBRUARY, Organization, World, open_world
from tests.support.services import details_of, reason_of
from usameter.billing.v1 import credit_note_pb2, credit_pb2, invoice_pb2
from usameter.common.v1 import error_pb2
from usameter_core.grpc.timestamps import datetime_in


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with open_world(database) as world:
        yield world


@pytest.fixture
async def org(world: World) -> AsyncIterator[Organization]:
    """Sells calls at 0.02 and images at 1 USD; `acme` has used 100 and 8 of them in January: 10.00 USD."""
    async with world.open_service() as channel:
        org = world.organization(channel)
        await org.set_price("call", "0.02")
        await org.set_price("image", "1")
        org.seal(("acme", "call", "2026-01-10", "100"), ("acme", "image", "2026-01-10", "8"))
        yield org


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def condition_of(call: Any) -> str:
    error = await refused(call)
    assert reason_of(error) == "FAILED_PRECONDITION"
    return str(details_of(error, error_pb2.PreconditionDetails()).condition)


async def violation_of(call: Any) -> str:
    error = await refused(call)
    assert reason_of(error) == "INVALID_ARGUMENT"
    (violation,) = details_of(error, error_pb2.ViolationDetails()).violations
    return str(violation.field)


def line(invoice: invoice_pb2.Invoice, event_type: str, amount: str) -> credit_note_pb2.CreditNoteLineInput:
    (found,) = [each for each in invoice.lines if each.event_type == event_type]
    return credit_note_pb2.CreditNoteLineInput(line_id=found.id, amount=amount)


async def test_a_credit_note_reduces_what_is_due(world: World, org: Organization) -> None:
    invoice = await org.bill("acme")
    note = await org.credit(invoice.id, "4.50", reason="slow week")
    assert (note.number, note.invoice_id, note.tenant_id, note.currency) == ("CN-1", invoice.id, "acme", "USD")
    assert (note.subtotal, note.tax, note.total, note.reason) == ("4.50", "0.00", "4.50", "slow week")
    assert (note.amount_due_reduced, note.credit_granted) == ("4.50", "0.00")
    assert datetime_in(note, "issued_at") == world.clock.now()
    request = credit_note_pb2.GetCreditNoteRequest(credit_note_id=note.id)
    assert await org.credit_notes.GetCreditNote(request, metadata=org.metadata) == note
    after = await org.get(invoice.id)
    assert (after.status, after.total, after.amount_due) == (invoice_pb2.open, "10.00", "5.50")
    assert await org.balance("acme") == ""


async def test_an_invoice_of_which_nothing_is_left_is_paid(org: Organization) -> None:
    invoice = await org.bill("acme")
    await org.credit(invoice.id, "9.99")
    assert (await org.get(invoice.id)).status == invoice_pb2.open
    await org.credit(invoice.id, "0.01")
    after = await org.get(invoice.id)
    assert (after.status, after.amount_due, after.amount_paid) == (invoice_pb2.paid, "0.00", "0.00")
    assert after.HasField("paid_at")
    assert await condition_of(org.credit(invoice.id, "0.01")) == "CREDIT_EXCEEDS_INVOICE"
    # It stays billed: crediting forgives, and bills nothing again.
    assert await org.draft("acme") == after


async def test_what_is_more_than_was_due_is_credit_of_the_tenant(org: Organization) -> None:
    invoice = await org.bill("acme")
    await org.credit(invoice.id, "4")
    await org.mark_paid(invoice.id)
    note = await org.credit(invoice.id, "6")
    assert (note.amount_due_reduced, note.credit_granted) == ("0.00", "6.00")
    assert await org.balance("acme") == "6.00"
    after = await org.get(invoice.id)
    assert (after.status, after.amount_paid) == (invoice_pb2.paid, "6.00")
    org.seal(("acme", "call", "2026-02-10", "200"))
    february = await org.bill("acme", FEBRUARY)
    assert (february.total, february.amount_due, await org.balance("acme")) == ("4.00", "0.00", "2.00")
    # What was drawn comes back as credit, however often it is credited.
    back = await org.credit(february.id, "1")
    assert (back.credit_granted, await org.balance("acme")) == ("1.00", "3.00")


async def test_one_credit_note_may_reduce_what_is_due_and_grant_the_rest(org: Organization) -> None:
    org.seal(("acme", "image", "2026-01-10", "-3"))
    await org.bill("acme")
    org.seal(("acme", "image", "2026-01-10", "-1"))
    await org.bill("acme")
    org.seal(("acme", "image", "2026-02-10", "3"))
    invoice = await org.bill("acme", FEBRUARY)
    assert (invoice.total, invoice.amount_due) == ("3.00", "2.00")
    note = await org.credit(invoice.id, "3")
    assert (note.amount_due_reduced, note.credit_granted, await org.balance("acme")) == ("2.00", "1.00", "1.00")
    assert (await org.get(invoice.id)).status == invoice_pb2.paid


async def test_lines_are_credited_up_to_each_and_to_the_whole(org: Organization) -> None:
    invoice = await org.bill("acme")
    note = await org.credit(invoice.id, lines=[line(invoice, "image", "7"), line(invoice, "call", "0.50")])
    assert (note.total, [each.amount for each in note.lines]) == ("7.50", ["7.00", "0.50"])
    assert [each.line_id for each in note.lines] == [
        line(invoice, "image", "1").line_id,
        line(invoice, "call", "1").line_id,
    ]
    assert await condition_of(org.credit(invoice.id, lines=[line(invoice, "image", "1.01")])) == (
        "CREDIT_EXCEEDS_INVOICE"
    )
    await org.credit(invoice.id, lines=[line(invoice, "image", "1")])
    await org.credit(invoice.id, "1")
    # 1.50 of the line are left, but only 0.50 of the invoice.
    assert await condition_of(org.credit(invoice.id, lines=[line(invoice, "call", "0.51")])) == (
        "CREDIT_EXCEEDS_INVOICE"
    )
    await org.credit(invoice.id, lines=[line(invoice, "call", "0.50")])
    assert (await org.get(invoice.id)).status == invoice_pb2.paid


async def test_what_cannot_be_credited_is_refused_and_takes_no_number(org: Organization) -> None:
    draft = await org.draft("acme")
    assert await condition_of(org.credit(draft.id, "1")) == "INVOICE_DRAFT"
    invoice = await org.finalize(draft.id)
    assert await condition_of(org.credit(invoice.id, "10.01")) == "CREDIT_EXCEEDS_INVOICE"
    assert await violation_of(org.credit(invoice.id, "0.001")) == "amount"
    assert await violation_of(org.credit(invoice.id, "0.00")) == "amount"
    assert await violation_of(org.credit(invoice.id, "-1")) == "amount"
    assert await violation_of(org.credit(invoice.id)) == "amount"
    assert await violation_of(org.credit(invoice.id, "1", lines=[line(invoice, "call", "1")])) == "amount"
    assert await violation_of(org.credit(invoice.id, lines=[line(invoice, "call", "1.001")])) == "lines[0].amount"
    assert await violation_of(org.credit(invoice.id, lines=[line(invoice, "call", "1")] * 2)) == "lines[1].line_id"
    foreign = credit_note_pb2.CreditNoteLineInput(line_id=f"lin_{'0' * 32}", amount="1")
    assert await violation_of(org.credit(invoice.id, lines=[foreign])) == "lines[0].line_id"
    assert await violation_of(org.credit(invoice.id, "1", reason="")) == "reason"
    assert reason_of(await refused(org.credit(f"inv_{'0' * 32}", "1"))) == "NOT_FOUND"
    org.seal(("acme", "image", "2026-01-10", "-1"))
    negative = await org.bill("acme")
    assert await condition_of(org.credit(negative.id, "0.01")) == "CREDIT_EXCEEDS_INVOICE"
    org.seal(("other", "image", "2026-01-10", "1"))
    voided = await org.void((await org.bill("other")).id)
    assert await condition_of(org.credit(voided.id, "0.01")) == "INVOICE_VOID"
    assert (await org.credit(invoice.id, "1")).number == "CN-1"


async def test_an_uncollectible_invoice_can_be_credited(org: Organization) -> None:
    invoice = await org.bill("acme")
    await org.mark_uncollectible(invoice.id)
    await org.credit(invoice.id, "4")
    after = await org.get(invoice.id)
    assert (after.status, after.amount_due) == (invoice_pb2.uncollectible, "6.00")
    await org.credit(invoice.id, "6")
    assert (await org.get(invoice.id)).status == invoice_pb2.paid


async def test_an_invoice_with_credit_notes_cannot_be_voided(org: Organization) -> None:
    invoice = await org.bill("acme")
    await org.credit(invoice.id, "0.01")
    assert await condition_of(org.void(invoice.id)) == "INVOICE_CREDITED"
    await org.credit(invoice.id, "9.99")
    assert await condition_of(org.void(invoice.id)) == "INVOICE_CREDITED"


async def test_the_same_key_credits_once_and_for_ever(org: Organization) -> None:
    invoice = await org.bill("acme")
    first = await org.credit(invoice.id, "1", idempotency_key="refund-1")
    assert await org.credit(invoice.id, "1.00", idempotency_key="refund-1") == first
    await org.credit(invoice.id, "9", idempotency_key="refund-2")
    assert await org.credit(invoice.id, "1", idempotency_key="refund-1") == first
    assert await org.credit(invoice.id, "1", idempotency_key="refund-1") == first
    for change in ({"amount": "2"}, {"reason": "other"}, {"amount": None, "lines": [line(invoice, "call", "1")]}):
        fields = {"amount": "1", "idempotency_key": "refund-1", **change}
        error = await refused(org.credit(invoice.id, **fields))
        assert reason_of(error) == "IDEMPOTENCY_CONFLICT"
        assert details_of(error, error_pb2.ConflictDetails()).event_id == first.id
    by_lines = [line(await org.get(invoice.id), "call", "1")]
    org.seal(("other", "call", "2026-01-10", "100"))
    other = await org.bill("other")
    by_lines = [line(other, "call", "1")]
    second = await org.credit(other.id, lines=by_lines, idempotency_key="refund-3")
    assert await org.credit(other.id, lines=by_lines, idempotency_key="refund-3") == second
    assert reason_of(await refused(org.credit(other.id, "1", idempotency_key="refund-1"))) == "IDEMPOTENCY_CONFLICT"


async def test_retries_at_once_credit_once(world: World, org: Organization) -> None:
    invoice = await org.bill("acme")
    notes = await asyncio.gather(*(org.credit(invoice.id, "1", idempotency_key="refund") for _ in range(8)))
    assert len({note.id for note in notes}) == 1
    assert (await org.get(invoice.id)).amount_due == "9.00"
    assert await world.admin.fetchval("SELECT last_number FROM billing.credit_note_number") == 1


async def test_one_key_for_two_tenants_at_once_credits_one_of_them(world: World, org: Organization) -> None:
    tenants = [f"tenant_{number}" for number in range(6)]
    org.seal(*((tenant, "image", "2026-01-10", "5") for tenant in tenants))
    invoices = [await org.bill(tenant) for tenant in tenants]
    answers = await asyncio.gather(
        *(org.credit(invoice.id, "1", idempotency_key="refund") for invoice in invoices), return_exceptions=True
    )
    refusals = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert {reason_of(error) for error in refusals} == {"IDEMPOTENCY_CONFLICT"}
    assert len(refusals) == len(tenants) - 1
    assert await world.admin.fetchval("SELECT sum(total - amount_due) FROM billing.invoice") == 1
    assert await world.admin.fetchval("SELECT last_number FROM billing.credit_note_number") == 1


async def test_twenty_racing_credit_notes_never_exceed_the_invoice(world: World, org: Organization) -> None:
    invoice = await org.bill("acme")
    answers = await asyncio.gather(*(org.credit(invoice.id, "0.70") for _ in range(20)), return_exceptions=True)
    notes = [answer for answer in answers if isinstance(answer, credit_note_pb2.CreditNote)]
    assert len(notes) == 14  # 9.80 of 10.00
    assert sorted(int(note.number.removeprefix("CN-")) for note in notes) == list(range(1, 15))
    assert (await org.get(invoice.id)).amount_due == "0.20"
    assert await world.admin.fetchval("SELECT last_number FROM billing.credit_note_number") == 14


async def test_payment_and_credit_notes_at_once_lose_nothing(world: World, org: Organization) -> None:
    invoice = await org.bill("acme")
    await asyncio.gather(*(org.credit(invoice.id, "0.50") for _ in range(10)), org.mark_paid(invoice.id))
    after = await org.get(invoice.id)
    granted = Decimal(await org.balance("acme") or "0")
    reduced = await world.admin.fetchval("SELECT sum(amount_due_reduced) FROM billing.credit_note")
    assert after.status == invoice_pb2.paid
    assert granted + reduced == 5
    assert Decimal(after.amount_paid) + reduced == 10


async def test_void_and_credit_note_at_once_do_not_both_happen(org: Organization) -> None:
    for number in range(6):
        tenant = f"tenant_{number}"
        org.seal((tenant, "image", "2026-01-10", "5"))
        invoice = await org.bill(tenant)
        answers = await asyncio.gather(org.void(invoice.id), org.credit(invoice.id, "1"), return_exceptions=True)
        assert sum(isinstance(answer, grpc.aio.AioRpcError) for answer in answers) == 1


async def test_numbers_of_credit_notes_have_no_gap_after_a_rollback(world: World, org: Organization) -> None:
    invoice = await org.bill("acme")
    await org.credit(invoice.id, "1")
    # A fault after the number was taken: the constraint fails, and the transaction rolls back.
    await world.admin.execute(
        "ALTER TABLE billing.credit_note ADD CONSTRAINT fault CHECK (reason <> 'fault') NOT VALID"
    )
    assert reason_of(await refused(org.credit(invoice.id, "1", reason="fault"))) == "INTERNAL"
    assert (await org.credit(invoice.id, "1")).number == "CN-2"
    assert (await org.get(invoice.id)).amount_due == "8.00"


async def test_credit_notes_are_listed_newest_first_and_filtered(org: Organization) -> None:
    org.seal(("other", "image", "2026-01-10", "5"))
    invoice, other = await org.bill("acme"), await org.bill("other")
    made = [await org.credit(invoice.id, "1"), await org.credit(other.id, "1")]
    made.append(await org.credit(invoice.id, lines=[line(invoice, "call", "1")]))

    async def listed(**fields: Any) -> list[str]:
        found, token = [], ""
        while True:
            request = credit_note_pb2.ListCreditNotesRequest(limit=1, page_token=token, **fields)
            answer = await org.credit_notes.ListCreditNotes(request, metadata=org.metadata)
            found += answer.credit_notes
            if not answer.HasField("next_page_token"):
                assert all(note in made for note in found)
                return [note.number for note in found]
            token = answer.next_page_token

    assert await listed() == ["CN-3", "CN-2", "CN-1"]
    assert await listed(tenant_id="other") == ["CN-2"]
    assert await listed(invoice_id=invoice.id) == ["CN-3", "CN-1"]


async def test_credit_is_kept_by_currency_and_read_in_pages(org: Organization) -> None:
    await org.set_price("film", "1", currency="EUR")
    org.seal(("acme", "film", "2026-01-10", "5"), ("other", "film", "2026-01-10", "5"))
    await org.draft("acme")
    invoices = [await org.finalize(draft.id) for draft in await org.list(status=invoice_pb2.draft)]
    invoices.append(await org.bill("other"))
    for invoice in invoices:
        await org.mark_paid(invoice.id)
        await org.credit(invoice.id, "2")
        await org.credit(invoice.id, "1")
    balances, token = [], ""
    while token is not None:
        request = credit_pb2.ListCreditBalancesRequest(limit=1, page_token=token)
        answer = await org.credits.ListCreditBalances(request, metadata=org.metadata)
        balances += [(each.tenant_id, each.currency, each.balance) for each in answer.credit_balances]
        token = answer.next_page_token if answer.HasField("next_page_token") else None
    assert balances == [("acme", "EUR", "3.00"), ("acme", "USD", "3.00"), ("other", "EUR", "3.00")]
    entries, token = [], ""
    while token is not None:
        page = credit_pb2.ListCreditEntriesRequest(tenant_id="acme", limit=3, page_token=token)
        answer = await org.credits.ListCreditEntries(page, metadata=org.metadata)
        entries += answer.credit_entries
        token = answer.next_page_token if answer.HasField("next_page_token") else None
    assert sorted((each.currency, each.amount) for each in entries) == [
        ("EUR", "1.00"),
        ("EUR", "2.00"),
        ("USD", "1.00"),
        ("USD", "2.00"),
    ]
    assert all(each.HasField("credit_note_id") for each in entries)


async def test_another_organization_has_its_own_numbers_and_sees_nothing(world: World, org: Organization) -> None:
    invoice = await org.bill("acme")
    note = await org.credit(invoice.id, "1", idempotency_key="refund")
    other = world.organization(org.channel)
    request = credit_note_pb2.GetCreditNoteRequest(credit_note_id=note.id)
    assert reason_of(await refused(other.credit_notes.GetCreditNote(request, metadata=other.metadata))) == "NOT_FOUND"
    assert reason_of(await refused(other.credit(invoice.id, "1"))) == "NOT_FOUND"
    listing = credit_note_pb2.ListCreditNotesRequest()
    assert not (await other.credit_notes.ListCreditNotes(listing, metadata=other.metadata)).credit_notes
    await other.set_price("call", "0.02")
    other.seal(("acme", "call", "2026-01-10", "100"))
    own = await other.bill("acme")
    assert (await other.credit(own.id, "1", idempotency_key="refund")).number == "CN-1"


async def test_the_services_role_cannot_change_credit_notes(database: Database) -> None:
    connection = await asyncpg.connect(database.role_url("billing"))
    try:
        for table in ("credit_note", "credit_note_line", "credit_entry"):
            for statement in (f"UPDATE billing.{table} SET org_id = org_id", f"DELETE FROM billing.{table}"):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(statement)
    finally:
        await connection.close()

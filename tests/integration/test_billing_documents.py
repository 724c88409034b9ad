"""Documents of invoices, over gRPC on a real database."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import grpc
import grpc.aio
import pypdf
import pytest

from tests.conftest import Database
from tests.support.auditing import audit_billing
from tests.support.billing import FEBRUARY, JANUARY, Organization, StandInLedger, World, open_world
from tests.support.services import details_of, reason_of
from usameter.billing.v1 import document_pb2, document_pb2_grpc, invoice_pb2, price_pb2
from usameter.common.v1 import error_pb2
from usameter.ingest.v1 import ledger_pb2, proof_pb2, proof_pb2_grpc, snapshot_pb2_grpc
from usameter_core.config import Address
from usameter_core.decimals import CONTEXT
from usameter_core.money import round_amount


def root_of(epoch: int) -> str:
    return f"{epoch:064x}"


class StandInChain(proof_pb2_grpc.ProofServiceServicer):
    """The chain of the stand-in for ingest."""

    def __init__(self, ledger: StandInLedger) -> None:
        self._ledger = ledger

    async def ReadChain(self, request: Any, context: Any) -> proof_pb2.ReadChainResponse:
        if self._ledger.is_down:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "down")
        sealed = len(self._ledger.epochs[request.org_id])
        epochs = range(request.first_epoch, min(request.last_epoch, sealed) + 1)
        return proof_pb2.ReadChainResponse(epochs=[ledger_pb2.LedgerEpoch(epoch=n, root=root_of(n)) for n in epochs])


@asynccontextmanager
async def chained_world(database: Database) -> AsyncIterator[World]:
    """The stand-ins of `open_world`, with one for the chain beside them."""
    async with open_world(database) as world:
        server = grpc.aio.server()
        proof_pb2_grpc.add_ProofServiceServicer_to_server(StandInChain(world.ledger), server)
        snapshot_pb2_grpc.add_SnapshotServiceServicer_to_server(world.ledger, server)
        world.identity.add_to(server)
        world.peers = Address("127.0.0.1", server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        yield world
        await server.stop(None)


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with chained_world(database) as world:
        yield world


@pytest.fixture
async def org(world: World) -> AsyncIterator[Organization]:
    async with world.open_service() as channel:
        organization = world.organization(channel)
        await organization.set_price("call", "0.02")
        yield organization


class Documents:
    """The documents of an organization's invoices: bytes, media type, and how the file is called."""

    def __init__(self, org: Organization) -> None:
        self._org = org
        self._stub = document_pb2_grpc.InvoiceDocumentServiceStub(org.channel)

    async def _read(self, method: Any, request: Any) -> tuple[bytes, str, str]:
        call = method(request, metadata=self._org.metadata)
        answer = await call
        return answer.data, answer.content_type, dict(await call.trailing_metadata())["content-disposition"]

    async def pdf(self, invoice_id: str) -> tuple[bytes, str, str]:
        return await self._read(self._stub.GetInvoicePdf, document_pb2.GetInvoicePdfRequest(invoice_id=invoice_id))

    async def html(self, invoice_id: str) -> tuple[bytes, str, str]:
        return await self._read(self._stub.GetInvoiceHtml, document_pb2.GetInvoiceHtmlRequest(invoice_id=invoice_id))

    async def csv(self, invoice_id: str) -> tuple[bytes, str, str]:
        return await self._read(self._stub.GetInvoiceCsv, document_pb2.GetInvoiceCsvRequest(invoice_id=invoice_id))


def pdf_text(pdf: bytes) -> str:
    return "\n".join(page.extract_text() for page in pypdf.PdfReader(io.BytesIO(pdf)).pages)


async def test_a_finalized_invoice_in_every_form(org: Organization) -> None:
    await org.set_settings("acme", address="ACME Inc.\n1 Main Street", tax_rate="19")
    org.seal(("acme", "call", "2026-01-10", "5000"))
    org.seal(("other", "call", "2026-01-10", "1"))
    invoice = await org.bill("acme")
    documents = Documents(org)
    pdf, media_type, disposition = await documents.pdf(invoice.id)
    assert (media_type, disposition) == ("application/pdf", 'inline; filename="invoice-1.pdf"')
    said = pdf_text(pdf)
    for text in (
        "ACME Inc.",
        "1 Main Street",
        "acme",
        "100.00",
        "Tax 19 % on 100.00",
        "19.00",
        "119.00 USD",
        root_of(2),
    ):
        assert text in said
    page, media_type, disposition = await documents.html(invoice.id)
    assert (media_type, disposition) == ("text/html; charset=utf-8", 'inline; filename="invoice-1.html"')
    assert all(text in page.decode() for text in ("<td>119.00 USD</td>", root_of(2)))
    rows, media_type, disposition = await documents.csv(invoice.id)
    assert (media_type, disposition) == ("text/csv; charset=utf-8", 'attachment; filename="invoice-1.csv"')
    assert rows.count(b"\r\n") == 2
    assert b",5000,100.00,0.00,100.00,USD,19\r\n" in rows
    assert await documents.pdf(invoice.id) == (pdf, "application/pdf", 'inline; filename="invoice-1.pdf"')


async def test_a_draft_is_stamped_and_called_by_its_id(org: Organization) -> None:
    org.seal(("acme", "call", "2026-01-10", "5000"))
    draft = await org.draft("acme")
    pdf, _, disposition = await Documents(org).pdf(draft.id)
    assert "DRAFT" in pdf_text(pdf)
    assert disposition == f'inline; filename="draft-{draft.id}.pdf"'


async def test_a_finalized_invoice_keeps_the_names_and_addresses_that_it_was_issued_with(
    world: World, org: Organization
) -> None:
    await org.set_settings("acme", address="ACME Inc.\n1 Main Street")
    org.seal(("acme", "call", "2026-01-10", "5000"), ("bulk", "call", "2026-01-10", "5000"))
    invoice = await org.bill("acme")
    assert (invoice.seller_name, invoice.bill_to_address) == ("Demo Inc.", "ACME Inc.\n1 Main Street")
    documents = Documents(org)
    pdf, page = await documents.pdf(invoice.id), await documents.html(invoice.id)
    await org.set_settings("acme", address="Elsewhere")
    await org.set_settings("bulk", address="2 Side Street")
    world.identity.organization_name = "Renamed Ltd."
    assert (await documents.pdf(invoice.id), await documents.html(invoice.id)) == (pdf, page)
    assert all(name in pdf_text(pdf[0]) for name in ("Demo Inc.", "1 Main Street"))
    await org.wait_for(await org.start_bulk(finalize=True))
    (in_bulk,) = await org.list(tenant_id="bulk")
    assert (in_bulk.seller_name, in_bulk.bill_to_address) == ("Renamed Ltd.", "2 Side Street")


async def test_a_draft_shows_the_names_and_addresses_of_today(world: World, org: Organization) -> None:
    await org.set_settings("acme", address="1 Main Street")
    org.seal(("acme", "call", "2026-01-10", "5000"))
    draft = await org.draft("acme")
    assert not draft.HasField("seller_name") and not draft.HasField("bill_to_address")
    await org.set_settings("acme", address="Elsewhere")
    world.identity.organization_name = "Renamed Ltd."
    page = (await Documents(org).html(draft.id))[0].decode()
    assert "Renamed Ltd." in page and "Elsewhere" in page and "Main Street" not in page


async def test_a_void_invoice_and_a_true_up_with_its_credit(org: Organization) -> None:
    org.seal(("acme", "call", "2026-01-10", "5000"))
    first = await org.bill("acme")
    org.seal(("acme", "call", "2026-01-11", "-7"))
    second = await org.bill("acme")
    # Without spaces: an id may go on in the next line.
    said = "".join(pdf_text((await Documents(org).pdf(second.id))[0]).split())
    for text in ("true-up", f"billedby{first.id}", "99.86", "-100.00", "-0.14", "Addedtoyourcredit"):
        assert text in said
    await org.void(second.id)
    assert "VOID" in pdf_text((await Documents(org).pdf(second.id))[0])


async def test_amounts_of_more_than_28_digits_keep_their_cents_everywhere(org: Organization) -> None:
    """I7: the total is the sum of the rounded lines and tax; 28 digits is where Python's own sums begin to round."""
    documents = Documents(org)
    price, quantity = "123456789012345.67", "98765432109876.543211"
    await org.set_settings("acme", tax_rate="19")
    for event_type in ("image", "pixel"):
        await org.set_price(event_type, price)
    org.seal(("acme", "image", "2026-01-10", quantity), ("acme", "pixel", "2026-01-10", "0.000001"))
    draft = await org.draft("acme")
    large = round_amount(CONTEXT.multiply(Decimal(price), Decimal(quantity)), "USD")
    assert [line.amount for line in draft.lines] == [str(large), "123456789.01"]
    subtotal = CONTEXT.add(large, Decimal("123456789.01"))
    tax = round_amount(CONTEXT.multiply(subtotal, Decimal("0.19")), "USD")
    total = CONTEXT.add(subtotal, tax)
    assert len(total.as_tuple().digits) > 30
    assert (draft.subtotal, draft.tax, draft.total) == (str(subtotal), str(tax), str(total))
    invoice = await org.finalize(draft.id)
    assert (invoice.subtotal, invoice.total, invoice.amount_due) == (str(subtotal), str(total), str(total))
    assert f"{total:,f}" in (await documents.html(invoice.id))[0].decode()
    # It is wider than its column, and so in several lines.
    assert f"{total:,f}" in "".join(pdf_text((await documents.pdf(invoice.id))[0]).split())

    note = await org.credit(invoice.id, "100000000000000000000.01")
    assert note.total == note.amount_due_reduced == "100000000000000000000.01"
    assert (await org.get(invoice.id)).amount_due == str(CONTEXT.subtract(total, Decimal(note.total)))

    org.seal(("acme", "image", "2026-01-11", f"-{quantity}"))
    back = await org.bill("acme")
    (row,) = csv.DictReader(io.StringIO((await documents.csv(back.id))[0].decode()))
    assert (row["previously_billed"], row["amount"]) == (str(large), f"-{large}")
    assert await org.balance("acme") == back.total.removeprefix("-")
    org.seal(("acme", "image", "2026-02-11", "1"))
    drawing = await org.bill("acme", FEBRUARY)
    assert (drawing.status, drawing.amount_due) == (invoice_pb2.paid, "0.00")
    assert await org.balance("acme") == str(CONTEXT.subtract(Decimal(back.total).copy_abs(), Decimal(drawing.total)))
    assert await audit_billing(org.channel, org.metadata) == []


async def test_a_plan_without_any_use(org: Organization) -> None:
    plan = await org.set_plan("Basic", "31")
    await org.subscribe("acme", plan.id, JANUARY.start)
    said = pdf_text((await Documents(org).pdf((await org.bill("acme")).id))[0])
    assert "Basic, monthly base fee" in said
    # A base fee is due in advance, so February's too.
    assert "62.00 USD" in said


async def test_no_document_of_what_is_not_there_or_cannot_be_proven_now(org: Organization) -> None:
    documents = Documents(org)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await documents.pdf("inv_" + "0" * 32)
    assert reason_of(caught.value) == "NOT_FOUND"
    org.seal(("acme", "call", "2026-01-10", "5000"))
    invoice = await org.bill("acme")
    org.ledger.is_down = True
    for read in (documents.pdf, documents.html):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(invoice.id)
        assert reason_of(caught.value) == "UNAVAILABLE"
    assert b"100.00" in (await documents.csv(invoice.id))[0]


async def test_more_rows_than_a_document_holds_are_refused_and_said(org: Organization) -> None:
    tiers = [price_pb2.PriceTier(up_to=str(n), unit_amount="1") for n in range(1, 100)]
    price = price_pb2.Price(model=price_pb2.graduated, currency="USD", tiers=[*tiers, price_pb2.PriceTier()])
    types = [f"type.{number}" for number in range(60)]
    for event_type in types:
        await org.set_terms(event_type, price)
    org.seal(*(("acme", event_type, "2026-01-10", "1000") for event_type in types))
    invoice = await org.bill("acme")
    documents = Documents(org)
    for read in (documents.pdf, documents.html):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(invoice.id)
        details = details_of(caught.value, error_pb2.PreconditionDetails())
        assert details.condition == "DOCUMENT_TOO_LARGE"
        assert "6060 rows" in str(caught.value.details())
    assert (await documents.csv(invoice.id))[0].count(b"\r\n") == 61

"""What documents of invoices say, and that their renderers say all of it and nothing else."""

from __future__ import annotations

import asyncio
import csv
import io
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from html.parser import HTMLParser
from typing import Any

import msgspec
import pypdf
import pytest

from usameter.billing.v1 import invoice_pb2, plan_pb2, price_pb2
from usameter_billing.documents.html import HtmlRenderer
from usameter_billing.documents.lines_csv import COLUMNS, lines_csv
from usameter_billing.documents.model import Document, document_of
from usameter_billing.documents.pdf import PdfPrinter
from usameter_billing.domain.invoice import Parties
from usameter_core.errors import Internal
from usameter_core.grpc.timestamps import timestamp_from_datetime
from usameter_core.money import format_amount
from usameter_proof.rating import tax_amount

ROOT = "0123456789abcdef" * 4
INVOICE_ID = "inv_01a2046624d370c38d04780b8be86700"
HOSTILE = (
    '#panic("x") *b* _i_ $x$ \\ @ref `raw` #{1/0} /* c */',
    "<script>alert(1)</script>&amp;<!-- \"'",
    "{{7*7}} ${x} %s {0}",
    "\u202eabc\u202c \u05d0\u05d1\u05d2 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f600 \u682a\u5f0f\u4f1a\u793e e\u0301",
    "x" * 100,
    '=HYPERLINK("http://example.com")',
)


def moment(year: int, month: int, day: int = 1) -> Any:
    return timestamp_from_datetime(datetime(year, month, day, 12 if day != 1 else 0, tzinfo=UTC))


def usage(amount: str, *, tax_rate: str = "0", event_type: str = "image", **fields: Any) -> invoice_pb2.InvoiceLine:
    """A line of January's use; 1,000 free and the rest at 0.02."""
    line = invoice_pb2.InvoiceLine(
        id="lin_1",
        kind=invoice_pb2.USAGE,
        event_type=event_type,
        period_start=moment(2026, 1),
        period_end=moment(2026, 2),
        price=price_pb2.PriceVersion(
            price=price_pb2.Price(
                model=price_pb2.graduated, tiers=[{"up_to": "1000"}, {"unit_amount": "0.02"}], currency="USD"
            )
        ),
        quantity="5247",
        rated_amount=amount,
        breakdown=[
            {"up_to": "1000", "quantity": "1000", "unit_amount": "0", "flat_amount": "0", "amount": "0"},
            {"quantity": "4247", "unit_amount": "0.02", "flat_amount": "0", "amount": "84.94"},
        ],
        amount=amount,
        tax_rate=tax_rate,
    )
    line.MergeFrom(invoice_pb2.InvoiceLine(**fields))
    return line


def true_up() -> invoice_pb2.InvoiceLine:
    billed = [{"invoice_id": "inv_" + "b" * 32, "line_id": "lin_0", "amount": "84.94"}]
    line = usage("-0.14", kind=invoice_pb2.TRUE_UP, previously_billed=billed)
    line.rated_amount = "84.80"
    return line


def base_fee(amount: str = "15.97", *, plan_name: str = "Growth", tax_rate: str = "0") -> invoice_pb2.InvoiceLine:
    return invoice_pb2.InvoiceLine(
        id="lin_2",
        kind=invoice_pb2.BASE_FEE,
        period_start=moment(2026, 1),
        period_end=moment(2026, 2),
        rated_amount=amount,
        amount=amount,
        tax_rate=tax_rate,
        base_fee=invoice_pb2.BaseFee(
            plan_name=plan_name,
            interval=plan_pb2.MONTHLY,
            amount="99",
            seconds=5 * 86_400,
            interval_seconds=31 * 86_400,
        ),
    )


def invoice(*lines: invoice_pb2.InvoiceLine, currency: str = "USD", **fields: Any) -> invoice_pb2.Invoice:
    """An open invoice whose sums are right."""
    nets: dict[str, Decimal] = {}
    for line in lines:
        nets[line.tax_rate] = nets.get(line.tax_rate, Decimal(0)) + Decimal(line.amount)
    subtotal = sum(nets.values(), Decimal(0))
    tax = sum((tax_amount(net, Decimal(rate), currency) for rate, net in nets.items()), Decimal(0))
    total = subtotal + tax
    stated = {
        "id": INVOICE_ID,
        "number": 7,
        "tenant_id": "acme",
        "status": invoice_pb2.open,
        "currency": currency,
        "period_start": moment(2026, 1),
        "period_end": moment(2026, 2),
        "through_epoch": 3,
        "lines": lines,
        "subtotal": format_amount(subtotal, currency),
        "tax": format_amount(tax, currency),
        "total": format_amount(total, currency),
        "amount_due": format_amount(max(total, Decimal(0)), currency),
        "amount_paid": format_amount(Decimal(0), currency),
        "issued_at": moment(2026, 2, 2),
        "due_at": moment(2026, 3, 4),
    }
    return invoice_pb2.Invoice(**{**stated, **fields})


def draft() -> invoice_pb2.Invoice:
    made = invoice(usage("84.94"), status=invoice_pb2.draft, unpriced_event_types=["video"])
    for field in ("number", "issued_at", "due_at"):
        made.ClearField(field)
    return made


def document(made: invoice_pb2.Invoice, address: str = "", seller_name: str = "Seller Ltd.") -> Document:
    return document_of(made, parties=Parties(seller_name, address), root=ROOT)


def sums(made: invoice_pb2.Invoice) -> dict[str, str]:
    return {fact.name: fact.value for fact in document(made).sums}


def texts(value: Any) -> Iterator[str]:
    """Every text of a document, at any depth, but for its date."""
    if isinstance(value, str):
        yield from value.split()
    elif isinstance(value, dict):
        for name, each in value.items():
            if name not in ("dated", "name"):
                yield from texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts(each)


def words_of(made: Document) -> set[str]:
    return {word for word in texts(msgspec.to_builtins(made)) if word}


def pdf_text(pdf: bytes) -> str:
    return "\n".join(page.extract_text() for page in pypdf.PdfReader(io.BytesIO(pdf)).pages)


class Page(HTMLParser):
    """The tags of a page, and its texts without the style sheet."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.styles: list[str] = []
        self._within = ""
        self.feed(page.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within = tag

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        (self.styles if self._within == "style" else self.texts).append(data)


INVOICES = {
    "draft": draft(),
    "open": invoice(usage("84.94")),
    "paid": invoice(usage("84.94"), status=invoice_pb2.paid, amount_due="0.00", amount_paid="80.00"),
    "void": invoice(usage("84.94"), status=invoice_pb2.void, amount_due="0.00", voided_at=moment(2026, 2, 3)),
    "credit": invoice(true_up(), status=invoice_pb2.paid, paid_at=moment(2026, 2, 2)),
    "three rates": invoice(usage("100.03", tax_rate="19"), usage("7.07", tax_rate="7.7"), base_fee()),
    "yen": invoice(usage("12345", tax_rate="10"), currency="JPY"),
    "dinar": invoice(usage("1234567.891", tax_rate="5"), currency="KWD"),
    "fee": invoice(base_fee(tax_rate="7"), base_fee("-3.20", plan_name="Starter", tax_rate="19")),
}
everyone = pytest.mark.parametrize("made", INVOICES.values(), ids=INVOICES)


@everyone
async def test_the_pdf_says_all_that_the_document_says(made: invoice_pb2.Invoice) -> None:
    said = "".join(pdf_text(await PdfPrinter().print(document(made, "ACME Inc.\n1 Main Street"))).split())
    for word in words_of(document(made, "ACME Inc.\n1 Main Street")):
        assert word in said


@everyone
def test_the_page_says_all_that_the_document_says(made: invoice_pb2.Invoice) -> None:
    page = Page(HtmlRenderer().render(document(made, "ACME Inc.\n1 Main Street")))
    said = set(" ".join(page.texts).split())
    assert words_of(document(made, "ACME Inc.\n1 Main Street")) <= said


@everyone
async def test_every_amount_of_the_json_is_on_paper(made: invoice_pb2.Invoice) -> None:
    amounts = [made.subtotal, made.total, made.amount_due]
    for line in made.lines:
        amounts += [line.amount, *(part.amount for part in line.breakdown), *([line.quantity] if line.quantity else [])]
    said = set(pdf_text(await PdfPrinter().print(document(made))).replace(",", "").split())
    assert {amount for amount in amounts if amount not in said} == set()


async def test_a_document_has_the_same_bytes_every_time_and_in_every_process() -> None:
    made = document(invoice(usage("84.94")), "ACME Inc.")
    printer = PdfPrinter()
    pdf = await printer.print(made)
    assert pdf == await printer.print(made)
    assert await asyncio.to_thread(printed_elsewhere, made) == pdf + HtmlRenderer().render(made)


def printed_elsewhere(made: Document) -> bytes:
    """The PDF and the page that another interpreter makes of a document."""
    other = (
        "import asyncio, sys, msgspec;"
        "from usameter_billing.documents.model import Document;"
        "from usameter_billing.documents.html import HtmlRenderer;"
        "from usameter_billing.documents.pdf import PdfPrinter;"
        "made = msgspec.json.decode(sys.stdin.buffer.read(), type=Document);"
        "sys.stdout.buffer.write(asyncio.run(PdfPrinter().print(made)) + HtmlRenderer().render(made))"
    )
    command = [sys.executable, "-c", other]
    return subprocess.run(command, input=msgspec.json.encode(made), capture_output=True, check=True).stdout


async def test_the_pdf_is_dated_by_the_invoice_and_by_nothing_else() -> None:
    metadata = pypdf.PdfReader(io.BytesIO(await PdfPrinter().print(document(invoice(usage("84.94")))))).metadata
    assert metadata is not None
    assert (metadata.title, metadata["/CreationDate"]) == ("Invoice 7", "D:20260202000000Z")
    undated = pypdf.PdfReader(io.BytesIO(await PdfPrinter().print(document(draft())))).metadata
    assert undated is not None
    assert "/CreationDate" not in undated


@pytest.mark.parametrize("text", HOSTILE)
async def test_a_strangers_text_is_text(text: str) -> None:
    made = invoice(usage("84.94"), base_fee(plan_name=text), tenant_id=text)
    page = Page(HtmlRenderer().render(document(made, f"{text}\n{text}", text)))
    plain = Page(HtmlRenderer().render(document(invoice(usage("84.94"), base_fee()), "a\nb")))
    assert page.tags == plain.tags
    assert page.texts.count(text) == 4
    said = pdf_text(await PdfPrinter().print(document(made, f"{text}\n{text}", text)))
    assert "84.94" in said
    if text.isascii():
        compact = "".join(said.split())
        assert compact.count("".join(text.split())) == 5
    (_, first, _) = csv.reader(io.StringIO(lines_csv(made).decode(), newline=""))
    tenant_id = dict(zip(COLUMNS, first, strict=True))["tenant_id"]
    assert tenant_id == (f"'{text}" if text.startswith("=") else text)


def test_the_page_runs_nothing_and_loads_nothing() -> None:
    page = HtmlRenderer().render(document(invoice(usage("84.94"))))
    parsed = Page(page)
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "img", "iframe", "object", "form", "a"}
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert all("url(" not in style and "@import" not in style for style in parsed.styles)
    assert (
        "meta",
        {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"},
    ) in parsed.tags


def test_heads_of_columns_and_rows_are_named_to_those_who_hear_the_page() -> None:
    scopes = [
        a.get("scope") for tag, a in Page(HtmlRenderer().render(document(invoice(usage("84.94"))))).tags if tag == "th"
    ]
    assert scopes.count("col") == 6
    assert None not in scopes


async def test_a_draft_and_a_void_invoice_are_stamped() -> None:
    for name, stamp in (("draft", "DRAFT"), ("void", "VOID"), ("open", None)):
        made = document(INVOICES[name])
        assert made.stamp == stamp
        said = pdf_text(await PdfPrinter().print(made)) + "".join(Page(HtmlRenderer().render(made)).texts)
        assert [word in said for word in ("DRAFT", "VOID")] == [stamp == "DRAFT", stamp == "VOID"]


def test_a_period_is_told_by_its_days() -> None:
    made = document(invoice(usage("84.94")))
    assert made.lines[0].period == "2026-01-01 to 2026-01-31"
    assert [(fact.name, fact.value) for fact in made.facts][1:4] == [
        ("Billing period", "2026-01-01 to 2026-01-31"),
        ("Issued", "2026-02-02"),
        ("Due", "2026-03-04"),
    ]


def test_tiers_say_where_they_begin_and_end() -> None:
    (line,) = document(invoice(usage("84.94"))).lines
    assert [(part.description, part.quantity, part.unit_amount, part.amount) for part in line.parts] == [
        ("up to 1,000", "1,000", "0", "0"),
        ("above 1,000", "4,247", "0.02", "84.94"),
    ]


def test_a_true_up_names_what_was_billed_before() -> None:
    made = document(invoice(true_up()))
    (line,) = made.lines
    assert line.title == "image, graduated: true-up"
    assert [(part.description, part.amount) for part in line.parts[2:]] == [
        ("charge for the whole period", "84.80"),
        (f"billed by inv_{'b' * 32}", "-84.94"),
    ]
    assert any("true-up" in remark for remark in made.remarks)


def test_a_base_fee_says_for_how_much_of_the_interval_it_is() -> None:
    (line,) = document(invoice(base_fee())).lines
    assert (line.title, line.quantity) == ("Growth, monthly base fee", "")
    assert [(part.description, part.unit_amount, part.amount) for part in line.parts] == [
        ("5 of 31 days", "99", "15.97")
    ]


def test_tax_is_told_for_each_rate() -> None:
    assert sums(INVOICES["three rates"]) == {
        "Subtotal": "123.07",
        "Tax 0 % on 15.97": "0.00",
        "Tax 7.7 % on 7.07": "0.54",
        "Tax 19 % on 100.03": "19.01",
        "Total": "142.62",
        "Amount due": "142.62",
    }


def test_currencies_keep_their_decimals() -> None:
    assert sums(INVOICES["yen"])["Total"] == "13,580"
    assert sums(INVOICES["dinar"])["Total"] == "1,296,296.286"


def test_what_was_credited_and_paid_lies_between_total_and_amount_due() -> None:
    assert list(sums(INVOICES["paid"]).items())[-4:] == [
        ("Total", "84.94"),
        ("Credited", "-4.94"),
        ("Paid", "-80.00"),
        ("Amount due", "0.00"),
    ]
    assert list(sums(INVOICES["credit"]).items())[-3:] == [
        ("Total", "-0.14"),
        ("Added to your credit", "0.14"),
        ("Amount due", "0.00"),
    ]
    assert list(sums(INVOICES["void"]).items())[-2:] == [("Total", "84.94"), ("Amount due", "0.00")]


@pytest.mark.parametrize("wrong", [{"subtotal": "84.95"}, {"tax": "0.01"}])
def test_an_invoice_that_does_not_add_up_is_not_printed(wrong: dict[str, str]) -> None:
    with pytest.raises(Internal):
        document(invoice(usage("84.94"), **wrong))


def test_without_a_sealed_epoch_there_is_no_proof() -> None:
    made = document_of(invoice(base_fee(), through_epoch=0), parties=Parties("Seller Ltd.", ""), root=None)
    assert made.proof == ()
    assert "Proof" not in "".join(Page(HtmlRenderer().render(made)).texts)


async def test_a_long_table_repeats_its_heads_on_every_page() -> None:
    made = document(invoice(*(usage("84.94", event_type=f"type.{number}") for number in range(100))))
    pages = pypdf.PdfReader(io.BytesIO(await PdfPrinter().print(made))).pages
    assert len(pages) > 3
    assert all("Description" in page.extract_text() for page in pages[:-1])
    assert all(f"Page {number} of {len(pages)}" in page.extract_text() for number, page in enumerate(pages, start=1))


def test_csv_has_a_row_a_line_in_the_words_of_the_api() -> None:
    head, first, second, third = csv.reader(io.StringIO(lines_csv(INVOICES["three rates"]).decode(), newline=""))
    assert tuple(head) == COLUMNS
    row = dict(zip(COLUMNS, first, strict=True))
    assert (row["invoice_id"], row["invoice_number"], row["kind"], row["event_type"]) == (
        INVOICE_ID,
        "7",
        "USAGE",
        "image",
    )
    assert (row["period_start"], row["period_end"]) == ("2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z")
    assert (row["quantity"], row["amount"], row["currency"], row["tax_rate"]) == ("5247", "100.03", "USD", "19")
    assert dict(zip(COLUMNS, second, strict=True))["tax_rate"] == "7.7"
    fee = dict(zip(COLUMNS, third, strict=True))
    assert (fee["kind"], fee["plan_name"], fee["quantity"], fee["amount"]) == ("BASE_FEE", "Growth", "", "15.97")
    billed = dict(zip(COLUMNS, list(csv.reader(io.StringIO(lines_csv(INVOICES["credit"]).decode())))[1], strict=True))
    assert (billed["rated_amount"], billed["previously_billed"], billed["amount"]) == ("84.80", "84.94", "-0.14")


def test_a_draft_has_no_number_in_csv() -> None:
    row = list(csv.reader(io.StringIO(lines_csv(draft()).decode())))[1]
    assert dict(zip(COLUMNS, row, strict=True))["invoice_number"] == ""

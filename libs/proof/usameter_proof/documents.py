"""The documents that a customer checks, as values: an invoice's proof, and the entries behind it.

They are the REST API's own JSON (docs/proofs.md). Hashes are 64 hex digits, decimals are text; what has another
form is no such document.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from usameter_proof.ledger_format import microseconds
from usameter_proof.pricing import PriceTerms

FORMAT = "usameter.invoice-proof.v1"

Hash = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
# Bounds with which whatever is computed keeps below the 60 digits of `usameter_core.decimals.CONTEXT`.
DecimalText = Annotated[str, Meta(pattern=r"\A-?(0|[1-9][0-9]{0,23})(\.[0-9]{1,18})?\Z")]
QuantityText = Annotated[str, Meta(pattern=r"\A-?(0|[1-9][0-9]{0,23})(\.[0-9]{1,6})?\Z")]
PercentText = Annotated[str, Meta(pattern=r"\A(0|[1-9][0-9]{0,2})(\.[0-9]{1,12})?\Z")]
EventId = Annotated[str, Meta(pattern=r"\Aevt_[0-9a-f]{32}\Z")]
SnapshotId = Annotated[str, Meta(pattern=r"\Asnp_[0-9a-f]{32}\Z")]
OrgIdText = Annotated[str, Meta(pattern=r"\A[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]
CurrencyCode = Annotated[str, Meta(pattern=r"\A[A-Z]{3}\Z")]
Moment = Annotated[datetime, Meta(tz=True)]
Natural = Annotated[int, Meta(ge=0, lt=2**53)]
EpochNumber = Annotated[int, Meta(ge=1, lt=2**53)]

Document = TypeVar("Document")


_DAY_0 = date(1970, 1, 1).toordinal()
DAY_MICROSECONDS = 86_400_000_000


def day_number(moment: datetime) -> int:
    """The UTC day of a moment, in days since 1970: where a calendar ends, counting goes on."""
    return microseconds(moment) // DAY_MICROSECONDS


class UnusableDocument(ValueError):
    """What was given is no such document; `str()` says where it is not."""


class PriceVersion(Struct, frozen=True):
    """The price that a line is pinned to; with `plan_id` that of a plan."""

    id: str
    event_type: str
    price: PriceTerms
    tenant_id: str | None = None
    plan_id: str | None = None


class BaseFee(Struct, frozen=True):
    """The part of a plan's fee that an interval is charged: amount × seconds / interval_seconds."""

    subscription_id: str
    plan_id: str
    amount: DecimalText
    seconds: Natural
    interval_seconds: EpochNumber


class Component(Struct, frozen=True):
    """What one tier or bound contributed to a line."""

    quantity: DecimalText
    unit_amount: DecimalText
    flat_amount: DecimalText
    amount: DecimalText
    up_to: DecimalText | None = None
    bound: str | None = None


class BilledLine(Struct, frozen=True):
    """What another invoice billed of the same subject before."""

    invoice_id: str
    line_id: str
    amount: DecimalText


class LineSnapshot(Struct, frozen=True):
    """A snapshot that a line is the first to cover."""

    id: SnapshotId
    epoch: EpochNumber
    total: QuantityText
    root: Hash


class Line(Struct, frozen=True):
    """What is owed for the use of an event type (`price`, `quantity`), or for a plan's `base_fee`."""

    id: str
    kind: str
    period_start: Moment
    period_end: Moment
    rated_amount: DecimalText
    amount: DecimalText
    tax_rate: PercentText
    event_type: str | None = None
    price: PriceVersion | None = None
    quantity: QuantityText | None = None
    base_fee: BaseFee | None = None
    breakdown: tuple[Component, ...] = ()
    previously_billed: tuple[BilledLine, ...] = ()
    snapshots: tuple[LineSnapshot, ...] = ()


class Invoice(Struct, frozen=True):
    """What a tenant owes for a period."""

    id: str
    tenant_id: str
    currency: CurrencyCode
    period_start: Moment
    period_end: Moment
    through_epoch: Natural
    subtotal: DecimalText
    tax: DecimalText
    total: DecimalText
    amount_due: DecimalText
    lines: tuple[Line, ...] = ()


class Head(Struct, frozen=True):
    """The end of an organization's chain."""

    org_id: OrgIdText
    epoch: EpochNumber
    root: Hash


class Snapshot(Struct, frozen=True):
    """A snapshot, and its place and audit path in its epoch's tree."""

    id: SnapshotId
    epoch: EpochNumber
    tenant_id: str
    event_type: str
    day: date
    entry_count: Natural
    total: QuantityText
    root: Hash
    index: Natural
    path: tuple[Hash, ...]

    @property
    def day_number(self) -> int:
        """Its day, counted as `day_number` does."""
        return self.day.toordinal() - _DAY_0


class Epoch(Struct, frozen=True):
    """A link of the chain."""

    epoch: EpochNumber
    snapshot_count: Natural
    snapshots_root: Hash
    previous_root: Hash
    root: Hash


class InvoiceProof(Struct, frozen=True):
    """Everything but the entries that checking an invoice needs."""

    format: str
    invoice: Invoice
    head: Head | None = None
    snapshots: tuple[Snapshot, ...] = ()
    epochs: tuple[Epoch, ...] = ()
    # Only where a page was taken for the whole.
    next_page_token: str | None = None


class EventEntry(Struct, frozen=True):
    """An event, as it was recorded; `metadata` is the text that was hashed."""

    id: EventId
    tenant_id: str
    event_type: str
    quantity_decimal: QuantityText
    metadata: str
    timestamp: Moment
    timestamp_given: bool
    idempotency_key: str | None = None


class CorrectionEntry(Struct, frozen=True):
    """A correction; tenant, type and timestamp are its event's."""

    event_id: EventId
    tenant_id: str
    event_type: str
    kind: str
    quantity_delta: QuantityText
    reason: str
    timestamp: Moment


class Entry(Struct, frozen=True):
    """A leaf of a snapshot, and what it covers: an event or a correction."""

    snapshot_id: SnapshotId
    epoch: EpochNumber
    ingested_at: Moment
    leaf: Hash
    event: EventEntry | None = None
    correction: CorrectionEntry | None = None

    def __post_init__(self) -> None:
        if (self.event is None) == (self.correction is None):
            raise ValueError("an entry is either an event or a correction")

    @property
    def content(self) -> EventEntry | CorrectionEntry:
        """The one that it is."""
        content = self.event or self.correction
        assert content is not None
        return content

    @property
    def event_id(self) -> str:
        """Of the event, or of the one that is corrected."""
        return self.content.id if isinstance(self.content, EventEntry) else self.content.event_id


class EntryProof(Struct, frozen=True):
    """An entry, and its place and audit path in its snapshot's tree."""

    entry: Entry
    index: Natural
    path: tuple[Hash, ...]
    snapshot: Snapshot
    epoch: Epoch


class EventProof(Struct, frozen=True):
    """The way of an event, and of its correction where one is sealed, to the chain of an organization."""

    org_id: OrgIdText
    event: EntryProof
    correction: EntryProof | None = None

    def __post_init__(self) -> None:
        if self.event.entry.event is None or (self.correction and self.correction.entry.correction is None):
            raise ValueError("an event is proven, and its correction")


_decode_proof = msgspec.json.Decoder(InvoiceProof).decode
_decode_entry = msgspec.json.Decoder(Entry).decode
_decode_event_proof = msgspec.json.Decoder(EventProof).decode


def proof_from_json(text: bytes) -> InvoiceProof:
    """The proof that a document is.

    Raises:
        UnusableDocument: It is none, or a part of one.
    """
    proof = _decoded(_decode_proof, text)
    if proof.format != FORMAT:
        raise UnusableDocument(f'`$.format` is "{proof.format}", not "{FORMAT}"')
    if proof.next_page_token is not None:
        raise UnusableDocument("is the first page of several: append the lists of the others to it")
    return proof


def entry_from_json(text: bytes) -> Entry:
    """The entry that a line is.

    Raises:
        UnusableDocument: It is none.
    """
    return _decoded(_decode_entry, text)


def event_proof_from_json(text: bytes) -> EventProof:
    """The proof of an event that a document is.

    Raises:
        UnusableDocument: It is none.
    """
    return _decoded(_decode_event_proof, text)


def _decoded(decode: Callable[[bytes], Document], text: bytes) -> Document:
    try:
        return decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnusableDocument(str(error)) from None

"""What is a document that can be checked, and what is not, and where it is not."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from usameter_proof.chain import NotedHead, check_ledger
from usameter_proof.documents import UnusableDocument, day_number, entry_from_json, proof_from_json
from usameter_proof.ledger_format import ZERO_ROOT

EVENT = {
    "id": "evt_" + "1" * 32,
    "tenant_id": "acme",
    "event_type": "call",
    "quantity_decimal": "1.5",
    "metadata": "{}",
    "timestamp": "2026-01-15T10:30:00Z",
    "timestamp_given": True,
    "idempotency_key": None,
}
ENTRY: dict[str, Any] = {
    "snapshot_id": "snp_" + "2" * 32,
    "epoch": 1,
    "ingested_at": "2026-01-15T10:30:01.000001Z",
    "leaf": "3" * 64,
    "event": EVENT,
}
INVOICE = {
    "id": "inv_1",
    "tenant_id": "acme",
    "currency": "USD",
    "period_start": "2026-01-01T00:00:00Z",
    "period_end": "2026-02-01T00:00:00Z",
    "through_epoch": 1,
    "subtotal": "0.00",
    "tax": "0.00",
    "total": "0.00",
    "amount_due": "0.00",
}
PROOF: dict[str, Any] = {"format": "usameter.invoice-proof.v1", "invoice": INVOICE}


def test_an_entry_is_an_event_or_a_correction() -> None:
    entry = entry_from_json(json.dumps(ENTRY).encode())
    assert entry.event is not None and entry.event.timestamp == datetime(2026, 1, 15, 10, 30, tzinfo=UTC)
    neither = {key: value for key, value in ENTRY.items() if key != "event"}
    with pytest.raises(UnusableDocument, match="either an event or a correction"):
        entry_from_json(json.dumps(neither).encode())


@pytest.mark.parametrize(
    ("field", "value", "where"),
    [
        ("quantity_decimal", "1e5", "$.event.quantity_decimal"),
        ("quantity_decimal", "01", "$.event.quantity_decimal"),
        ("quantity_decimal", "1\n", "$.event.quantity_decimal"),
        ("quantity_decimal", 1, "$.event.quantity_decimal"),
        ("id", "evt_" + "G" * 32, "$.event.id"),
        ("timestamp", "2026-01-15T10:30:00", "$.event.timestamp"),
        ("timestamp_given", None, "$.event.timestamp_given"),
    ],
)
def test_what_has_another_form_is_named(field: str, value: object, where: str) -> None:
    with pytest.raises(UnusableDocument) as caught:
        entry_from_json(json.dumps({**ENTRY, "event": {**EVENT, field: value}}).encode())
    assert where in str(caught.value)


def test_a_page_is_not_taken_for_the_whole_proof() -> None:
    assert proof_from_json(json.dumps(PROOF).encode()).snapshots == ()
    with pytest.raises(UnusableDocument, match="first page of several"):
        proof_from_json(json.dumps({**PROOF, "next_page_token": "x"}).encode())
    with pytest.raises(UnusableDocument, match="format"):
        proof_from_json(json.dumps({**PROOF, "format": "usameter.invoice-proof.v2"}).encode())
    with pytest.raises(UnusableDocument):
        proof_from_json(b'{"format": "\xff"}')


def test_an_invoice_without_use_needs_no_chain_unless_it_is_to_be_compared() -> None:
    proof = proof_from_json(json.dumps(PROOF).encode())
    assert list(check_ledger(proof, noted=None)) == []
    with pytest.raises(UnusableDocument, match="it has no chain"):
        list(check_ledger(proof, noted=NotedHead(1, ZERO_ROOT.hex())))


@pytest.mark.parametrize(
    ("moment", "day"),
    [
        (datetime(1970, 1, 1, tzinfo=UTC), 0),
        (datetime(1969, 12, 31, 23, 59, 59, 999_999, UTC), -1),
        (datetime(1970, 1, 1, 23, 59, 59, 999_999, UTC), 0),
        (datetime.fromisoformat("1970-01-02T00:30:00+01:00"), 0),
        (datetime.fromisoformat("0001-01-01T00:00:00+01:00"), -719_163),
    ],
)
def test_days_are_utc_and_have_no_end(moment: datetime, day: int) -> None:
    assert day_number(moment) == day

"""Corrections that correct nothing, in a file whose every hash is right."""

from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from usameter_proof.documents import Entry, entry_from_json, proof_from_json
from usameter_proof.leaves import EntryCheck, leaf_of
from usameter_proof.ledger_format import event_id_of_key, snapshot_id_of
from usameter_proof.merkle import MerkleRoot

ORG = UUID(int=7)
MOMENT = "2026-01-05T10:00:00Z"
SNAPSHOT = snapshot_id_of(org_id=ORG, epoch=1, tenant_id="acme", event_type="call", day=date(2026, 1, 5))
OF_SUBJECT = {"tenant_id": "acme", "event_type": "call", "timestamp": MOMENT}


def entry(**content: Any) -> Entry:
    """Of the one snapshot, with the leaf that follows from it."""
    written = {"snapshot_id": f"snp_{SNAPSHOT.hex}", "epoch": 1, "ingested_at": MOMENT, **content}
    leaf = leaf_of(ORG, entry_from_json(json.dumps({**written, "leaf": "0" * 64}).encode()))
    return entry_from_json(json.dumps({**written, "leaf": leaf.hex()}).encode())


def event(key: str, quantity: str) -> Entry:
    known = {"id": f"evt_{event_id_of_key(ORG, key).hex}", "idempotency_key": key, "timestamp_given": True}
    return entry(event={**OF_SUBJECT, **known, "quantity_decimal": quantity, "metadata": "{}"})


def correction(key: str, kind: str, delta: str) -> Entry:
    of_event = {"event_id": f"evt_{event_id_of_key(ORG, key).hex}"}
    return entry(correction={**OF_SUBJECT, **of_event, "kind": kind, "quantity_delta": delta, "reason": "wrong"})


def findings(*entries: Entry, total: str) -> list[str]:
    """What is found wrong with a document of one snapshot of these entries."""
    tree = MerkleRoot()
    tree.add(b"".join(bytes.fromhex(each.leaf) for each in entries))
    snapshot = {
        "id": f"snp_{SNAPSHOT.hex}",
        "epoch": 1,
        "tenant_id": "acme",
        "event_type": "call",
        "day": "2026-01-05",
        "entry_count": len(entries),
        "total": str(Decimal(total)),
        "root": tree.root().hex(),
        "index": 0,
        "path": [],
    }
    sums = dict.fromkeys(("subtotal", "tax", "total", "amount_due"), "0.00")
    invoice = {"id": "inv_1", "tenant_id": "acme", "currency": "USD", "through_epoch": 1, **sums}
    head = {"org_id": str(ORG), "epoch": 1, "root": "0" * 64}
    document = {"format": "usameter.invoice-proof.v1", "invoice": invoice, "head": head, "snapshots": [snapshot]}
    check = EntryCheck(proof_from_json(json.dumps(document).encode()))
    found = [str(finding) for each in entries for finding in check.add(each)]
    return found + [str(finding) for finding in check.finish()]


def test_a_correction_of_an_event_that_is_there_is_fine() -> None:
    assert findings(event("a", "7"), correction("a", "VOID", "-7"), total="0") == []
    assert findings(event("a", "7"), correction("a", "AMEND", "2"), total="9") == []


def test_a_correction_without_its_event_is_named() -> None:
    first, second = sorted("ab", key=lambda key: event_id_of_key(ORG, key).hex)
    (found,) = findings(event(first, "7"), correction(second, "AMEND", "5"), total="12")
    assert found == f"correction of evt_{event_id_of_key(ORG, second).hex}: corrects an event that is not here"


@pytest.mark.parametrize("delta", ["7", "0"])
def test_a_void_takes_away(delta: str) -> None:
    (found,) = findings(event("a", "7"), correction("a", "VOID", delta), total=str(7 + int(delta)))
    assert "voids its event" in found

"""Corrections that correct nothing, in a file whose every hash is right."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
OF_SUBJECT = {"tenant_id": "acme", "event_type": "call", "timestamp": MOMENT}


def snapshot_id(epoch: int) -> str:
    of_key = snapshot_id_of(org_id=ORG, epoch=epoch, tenant_id="acme", event_type="call", day=date(2026, 1, 5))
    return f"snp_{of_key.hex}"


def entry(epoch: int, **content: Any) -> Entry:
    """Of the epoch's one snapshot, with the leaf that follows from it."""
    written = {"snapshot_id": snapshot_id(epoch), "epoch": epoch, "ingested_at": MOMENT, **content}
    leaf = leaf_of(ORG, entry_from_json(json.dumps({**written, "leaf": "0" * 64}).encode()))
    return entry_from_json(json.dumps({**written, "leaf": leaf.hex()}).encode())


def event(key: str, quantity: str) -> Entry:
    known = {"id": f"evt_{event_id_of_key(ORG, key).hex}", "idempotency_key": key, "timestamp_given": True}
    return entry(1, event={**OF_SUBJECT, **known, "quantity_decimal": quantity, "metadata": "{}"})


def correction(key: str, kind: str, delta: str, *, epoch: int = 1) -> Entry:
    of_event = {"event_id": f"evt_{event_id_of_key(ORG, key).hex}"}
    return entry(epoch, correction={**OF_SUBJECT, **of_event, "kind": kind, "quantity_delta": delta, "reason": "wrong"})


def snapshot(entries: Sequence[Entry], total: str) -> dict[str, Any]:
    tree = MerkleRoot()
    tree.add(b"".join(bytes.fromhex(each.leaf) for each in entries))
    return {
        "id": entries[0].snapshot_id,
        "epoch": entries[0].epoch,
        "tenant_id": "acme",
        "event_type": "call",
        "day": "2026-01-05",
        "entry_count": len(entries),
        "total": str(Decimal(total)),
        "root": tree.root().hex(),
        "index": 0,
        "path": [],
    }


def findings(*entries: Entry, total: str) -> list[str]:
    """What is found wrong with a document of one snapshot of these entries."""
    return findings_in(snapshot(entries, total), entries=entries)


def findings_in(*snapshots: dict[str, Any], entries: Sequence[Entry]) -> list[str]:
    sums = dict.fromkeys(("subtotal", "tax", "total", "amount_due"), "0.00")
    period = {"period_start": "2026-01-01T00:00:00Z", "period_end": "2026-02-01T00:00:00Z"}
    invoice = {"id": "inv_1", "tenant_id": "acme", "currency": "USD", "through_epoch": 1, **period, **sums}
    head = {"org_id": str(ORG), "epoch": 1, "root": "0" * 64}
    document = {"format": "usameter.invoice-proof.v1", "invoice": invoice, "head": head, "snapshots": snapshots}
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


@pytest.mark.parametrize("delta", ["7", "0", "-1", "-6.999999"])
def test_a_void_takes_all_of_its_event_away(delta: str) -> None:
    (found,) = findings(event("a", "7"), correction("a", "VOID", delta), total=str(7 + Decimal(delta)))
    assert found.endswith(f": voids its event of 7, and adds {delta} to it")


@pytest.mark.parametrize("kind", ["VOID", "AMEND"])
def test_a_correction_takes_no_more_away_than_there_is(kind: str) -> None:
    assert findings(event("a", "7"), correction("a", kind, "-7"), total="0") == []
    (found,) = findings(event("a", "7"), correction("a", kind, "-7.000001"), total="-0.000001")
    assert found.endswith(": takes 7.000001 away from its event, which has 7")


@pytest.mark.parametrize(
    ("delta", "named"), [("-7", []), ("-1", ["voids its event of 7, and adds -1"]), ("-9", ["takes 9 away"])]
)
def test_an_event_and_its_void_are_compared_across_epochs(delta: str, named: list[str]) -> None:
    events = sorted((event("a", "7"), event("b", "9")), key=lambda each: each.event_id)
    void = correction("a", "VOID", delta, epoch=2)
    found = findings_in(snapshot(events, "16"), snapshot([void], delta), entries=[*events, void])
    assert len(found) == len(named)
    assert all(expected in what for expected, what in zip(named, found, strict=True))


def test_an_event_has_a_quantity_and_a_correction_one_of_two_kinds() -> None:
    for quantity in ("0", "-3"):
        (found,) = findings(event("a", quantity), total=quantity)
        assert found.endswith(f"its quantity is {quantity}, not above 0")
    (found,) = findings(event("a", "7"), correction("a", "VOIDED", "-1"), total="6")
    assert found.endswith('is of the kind "VOIDED", which there is not')

"""An event's own proof: what is touched in it is named, and what leads elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from datetime import date
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from usameter_proof.chain import NotedHead
from usameter_proof.documents import UnusableDocument, entry_from_json, event_proof_from_json
from usameter_proof.event_proofs import verify_event
from usameter_proof.inclusion import AuditPaths
from usameter_proof.leaves import leaf_of
from usameter_proof.ledger_format import ZERO_ROOT, epoch_root, event_id_of_key, snapshot_id_of, snapshot_leaf

ORG = UUID(int=7)
MOMENT = "2026-01-05T10:00:00Z"
EVENT_ID = f"evt_{event_id_of_key(ORG, 'job-1').hex}"
OF_SUBJECT = {"tenant_id": "acme", "event_type": "call", "timestamp": MOMENT}
EVENT = {
    **OF_SUBJECT,
    "id": EVENT_ID,
    "quantity_decimal": "7",
    "metadata": "{}",
    "timestamp_given": True,
    "idempotency_key": "job-1",
}
VOID = {**OF_SUBJECT, "event_id": EVENT_ID, "kind": "VOID", "quantity_delta": "-7", "reason": "twice"}


def part(epoch: int, previous_root: bytes, total: str, **content: Any) -> dict[str, Any]:
    """An entry as the fourth of five in the second of three snapshots."""
    key = {"org_id": ORG, "epoch": epoch, "tenant_id": "acme", "event_type": "call", "day": date(2026, 1, 5)}
    snapshot_id = f"snp_{snapshot_id_of(**key).hex}"  # type: ignore[arg-type]
    written = {"snapshot_id": snapshot_id, "epoch": epoch, "ingested_at": MOMENT, **content}
    leaf = leaf_of(ORG, entry_from_json(json.dumps({**written, "leaf": "0" * 64}).encode()))
    entries = AuditPaths([3], size=5)
    entries.add(b"\x01" * 32 * 3 + leaf + b"\x02" * 32)
    root = entries.root()
    of_snapshot = snapshot_leaf(**key, entry_count=5, quantity=Decimal(total), root=root)  # type: ignore[arg-type]
    snapshots = AuditPaths([1], size=3)
    snapshots.add(b"\x03" * 32 + of_snapshot + b"\x04" * 32)
    chained = epoch_root(org_id=ORG, epoch=epoch, previous_root=previous_root, snapshots_root=snapshots.root())
    return {
        "entry": {**written, "leaf": leaf.hex()},
        "index": 3,
        "path": [each.hex() for each in entries.path(3)],
        "snapshot": {
            "id": snapshot_id,
            "epoch": epoch,
            "tenant_id": "acme",
            "event_type": "call",
            "day": "2026-01-05",
            "entry_count": 5,
            "total": total,
            "root": root.hex(),
            "index": 1,
            "path": [each.hex() for each in snapshots.path(1)],
            "invoice_id": None,
        },
        "epoch": {
            "epoch": epoch,
            "snapshot_count": 3,
            "snapshots_root": snapshots.root().hex(),
            "previous_root": previous_root.hex(),
            "root": chained.hex(),
        },
    }


FIRST = part(1, ZERO_ROOT, "12", event=EVENT)
SECOND = part(2, bytes.fromhex(FIRST["epoch"]["root"]), "-7", correction=VOID)
PROOF: dict[str, Any] = {"org_id": str(ORG), "event": FIRST, "correction": SECOND}


def findings(document: dict[str, Any], *, noted: NotedHead | None = None) -> list[str]:
    proof = event_proof_from_json(json.dumps({"org_id": str(ORG), **document}).encode())
    return [str(each) for each in verify_event(proof, noted=noted)]


def test_an_event_leads_to_the_chain_with_and_without_its_correction() -> None:
    assert findings(PROOF) == []
    assert findings({"event": FIRST, "correction": None}) == []
    assert findings({"event": part(1, ZERO_ROOT, "12", event={**EVENT, "id": EVENT_ID})}) == []


def leaves_of(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    return [path] if items is None else [each for key, below in items for each in leaves_of(below, (*path, key))]


# The invoice lags, and an epoch's count is hashed nowhere: it says what form a path has, which others may share.
UNPROVEN = {"invoice_id", "snapshot_count"}


@pytest.mark.parametrize(
    "path", [path for path in leaves_of(PROOF) if path[-1] not in UNPROVEN], ids=lambda path: ".".join(map(str, path))
)
def test_whatever_is_changed_is_found(path: tuple[str | int, ...]) -> None:
    touched = deepcopy(PROOF)
    *way, last = path
    place: Any = touched
    for key in way:
        place = place[key]
    place[last] = changed(place[last])
    try:
        assert findings(touched) != []
    except UnusableDocument:
        assert isinstance(place[last], str)


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    ends: dict[str, Callable[[str], str]] = {
        "Z": lambda text: text.replace("10:00", "10:01"),
        "5": lambda text: text[:-1] + "6",
    }
    return ends.get(value[-1], lambda text: text[:-1] + ("1" if text[-1] != "1" else "2"))(value)


def test_the_ledger_of_another_organization_is_not_this_one() -> None:
    """Each entry, snapshot and link of the chain that the document shows says so by itself."""
    found = findings({**PROOF, "org_id": str(UUID(int=8))})
    for place in (f"event {EVENT_ID}", f"correction of {EVENT_ID}", "snapshot snp_", "epoch 1", "epoch 2"):
        assert any(each.startswith(f"{place}") for each in found), place


def test_a_proof_that_does_not_say_whose_it_is_cannot_be_used() -> None:
    for document in ({"event": FIRST}, {"event": FIRST, "org_id": "acme"}, {"event": FIRST, "org_id": None}):
        with pytest.raises(UnusableDocument, match="org_id"):
            event_proof_from_json(json.dumps(document).encode())


def test_a_noted_head_is_one_of_the_roots_shown() -> None:
    first, second = FIRST["epoch"]["root"], SECOND["epoch"]["root"]
    for epoch, root in ((0, ZERO_ROOT.hex()), (1, first), (2, second)):
        assert findings(PROOF, noted=NotedHead(epoch, root)) == []
        (found,) = findings(PROOF, noted=NotedHead(epoch, "a" * 64))
        assert found == f"epoch {epoch}: has the root {root}, and {'a' * 64} was noted"
    with pytest.raises(UnusableDocument, match=r"no root of epoch 3 .* epochs 0, 1, 2"):
        findings(PROOF, noted=NotedHead(3, first))


@pytest.mark.parametrize(
    ("correction", "named"),
    [
        (VOID | {"quantity_delta": "-1"}, "voids its event of 7, and adds -1"),
        (VOID | {"kind": "AMEND", "quantity_delta": "-8"}, "takes 8 away"),
        (VOID | {"event_id": "evt_" + "1" * 32}, f"is not of event {EVENT_ID}"),
        (VOID | {"timestamp": "2026-01-05T10:00:01Z"}, f"is not of event {EVENT_ID}"),
    ],
)
def test_a_correction_that_is_sealed_is_still_compared_with_its_event(correction: dict[str, Any], named: str) -> None:
    sealed = part(2, bytes.fromhex(FIRST["epoch"]["root"]), "-7", correction=correction)
    (found,) = findings({"event": FIRST, "correction": sealed})
    assert found.startswith(f"correction of {correction['event_id']}: {named}")


def test_event_and_correction_are_of_one_chain() -> None:
    (found,) = findings({"event": FIRST, "correction": part(2, b"\x09" * 32, "-7", correction=VOID)})
    assert found.startswith("epoch 1: has the root")
    early = part(1, ZERO_ROOT, "-7", correction=VOID)
    late = part(2, bytes.fromhex(early["epoch"]["root"]), "12", event=EVENT)
    (found,) = findings({"event": late, "correction": early})
    assert found.endswith("is of epoch 1, before its event's 2")


def test_an_event_is_no_correction_of_itself() -> None:
    for document in ({"event": SECOND}, {"event": FIRST, "correction": FIRST}, {}):
        with pytest.raises(UnusableDocument):
            findings(document)

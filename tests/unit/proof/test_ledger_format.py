"""The bytes of docs/ledger-format.md: the vectors on that page are what these tests read."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usameter_proof import ledger_format
from usameter_proof.merkle import MerkleRoot

PAGE = Path(__file__).parents[3] / "docs" / "ledger-format.md"


@pytest.fixture(scope="module")
def vector() -> dict[str, Any]:
    match = re.search(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert match is not None
    loaded: dict[str, Any] = json.loads(match[1])
    return loaded


@pytest.fixture(scope="module")
def org_id(vector: dict[str, Any]) -> UUID:
    return UUID(vector["org_id"])


@pytest.fixture(scope="module")
def event_id(vector: dict[str, Any]) -> UUID:
    return UUID(vector["event_id"])


def test_event_id_is_derived_from_organization_and_key(vector: dict[str, Any], org_id: UUID, event_id: UUID) -> None:
    assert ledger_format.event_id_of_key(org_id, vector["idempotency_key"]) == event_id


def test_request_hash_matches_the_vector(vector: dict[str, Any]) -> None:
    found = ledger_format.request_hash(
        vector["tenant_id"], vector["event_type"], vector["quantity"], vector["metadata"].encode()
    )
    assert found.hex() == vector["request_hash"]


def test_event_leaf_matches_the_vector(vector: dict[str, Any], org_id: UUID, event_id: UUID) -> None:
    prefix = ledger_format.event_leaf_prefix(
        org_id=org_id,
        event_id=event_id,
        content_hash=bytes.fromhex(vector["request_hash"]),
        occurred_at=datetime.fromisoformat(vector["occurred_at"]),
        timestamp_given=vector["timestamp_given"],
        idempotency_key=vector["idempotency_key"],
    )
    assert prefix.hex() == vector["event_leaf_prefix"]
    ingested_at = datetime.fromisoformat(vector["ingested_at"])
    leaf = ledger_format.leaf_hash(prefix, epoch=vector["epoch"], ingested_at=ingested_at)
    assert leaf.hex() == vector["event_leaf"]


def test_correction_leaf_matches_the_vector(vector: dict[str, Any], org_id: UUID, event_id: UUID) -> None:
    prefix = ledger_format.correction_leaf_prefix(
        org_id=org_id,
        event_id=event_id,
        kind=vector["correction_kind"],
        quantity_delta=Decimal(vector["correction_quantity_delta"]),
        reason=vector["correction_reason"],
        occurred_at=datetime.fromisoformat(vector["occurred_at"]),
    )
    assert prefix.hex() == vector["correction_leaf_prefix"]
    ingested_at = datetime.fromisoformat(vector["correction_ingested_at"])
    leaf = ledger_format.leaf_hash(prefix, epoch=vector["epoch"], ingested_at=ingested_at)
    assert leaf.hex() == vector["correction_leaf"]


def test_snapshot_and_epoch_match_the_vector(vector: dict[str, Any], org_id: UUID) -> None:
    tree = MerkleRoot()
    tree.add(bytes.fromhex(vector["event_leaf"]))
    tree.add(bytes.fromhex(vector["correction_leaf"]))
    assert tree.root().hex() == vector["snapshot_root"]
    day = date.fromisoformat(vector["day"])
    snapshot_id = ledger_format.snapshot_id_of(
        org_id=org_id, epoch=1, tenant_id=vector["tenant_id"], event_type=vector["event_type"], day=day
    )
    assert snapshot_id.hex == vector["snapshot_id"]
    leaf = ledger_format.snapshot_leaf(
        org_id=org_id,
        epoch=1,
        tenant_id=vector["tenant_id"],
        event_type=vector["event_type"],
        day=day,
        entry_count=vector["entry_count"],
        quantity=Decimal(vector["total"]),
        root=tree.root(),
    )
    assert leaf.hex() == vector["snapshot_leaf"]
    snapshots = MerkleRoot()
    snapshots.add(leaf)
    root = ledger_format.epoch_root(
        org_id=org_id, epoch=1, previous_root=ledger_format.ZERO_ROOT, snapshots_root=snapshots.root()
    )
    assert root.hex() == vector["epoch_root"]


def test_other_fields_of_the_same_bytes_hash_differently() -> None:
    assert ledger_format.request_hash("ab", "c", "1", b"{}") != ledger_format.request_hash("a", "bc", "1", b"{}")


@given(st.lists(st.lists(st.binary(min_size=32, max_size=32), max_size=40), max_size=8))
def test_streamed_root_is_the_tree_of_rfc_6962(pieces: list[list[bytes]]) -> None:
    leaves = [leaf for piece in pieces for leaf in piece]
    one_by_one, packed = MerkleRoot(), MerkleRoot()
    for leaf in leaves:
        one_by_one.add(leaf)
    for piece in pieces:
        packed.add(b"".join(piece))
    for tree in (one_by_one, packed):
        assert tree.root() == _tree_hash(leaves)
        assert tree.count == len(leaves)


def _tree_hash(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, as it is written there; leaves are hashes already."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + _tree_hash(leaves[:split]) + _tree_hash(leaves[split:])).digest()

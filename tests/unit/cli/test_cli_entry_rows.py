"""Entries as rows of CSV."""

from __future__ import annotations

import pytest

from usameter_cli.entry_rows import COLUMNS, row_of

CORRECTION = {
    "snapshot_id": "snp_1",
    "epoch": "3",
    "ingested_at": "2026-01-02T00:00:00Z",
    "leaf": "00",
    "correction": {
        "event_id": "evt_1",
        "tenant_id": "acme",
        "event_type": "image",
        "kind": "VOID",
        "quantity_delta": "-2.5",
        "reason": "=1+1",
        "timestamp": "2026-01-01T00:00:00Z",
    },
}


@pytest.mark.parametrize("reason", ["=1+1", "+1", "-1", "@x", "\t=1"])
def test_what_a_customer_wrote_is_no_formula_and_a_quantity_stays_a_number(reason: str) -> None:
    entry = CORRECTION | {"correction": CORRECTION["correction"] | {"reason": reason}}  # type: ignore[operator]
    row = dict(zip(COLUMNS, row_of(entry), strict=True))
    assert row["correction_reason"] == f"'{reason}"
    assert (row["event_id"], row["quantity"], row["correction_kind"]) == ("evt_1", "-2.5", "VOID")
    assert row["idempotency_key"] == row["metadata"] == ""

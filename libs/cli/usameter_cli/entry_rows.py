"""Entries of the ledger as rows of CSV, for spreadsheets and programs."""

from __future__ import annotations

from typing import Any

COLUMNS = (
    "snapshot_id",
    "epoch",
    "event_id",
    "tenant_id",
    "event_type",
    "quantity",
    "timestamp",
    "ingested_at",
    "idempotency_key",
    "metadata",
    "correction_kind",
    "correction_reason",
)


def row_of(entry: dict[str, Any]) -> list[str]:
    """The cells of an event, or of a correction, whose quantity is signed; by `COLUMNS`.

    Args:
        entry: As the API lists it.
    """
    event, correction = entry.get("event") or {}, entry.get("correction") or {}
    either = event or correction
    return [
        entry["snapshot_id"],
        str(entry["epoch"]),
        event.get("id") or correction["event_id"],
        _text(either["tenant_id"]),
        _text(either["event_type"]),
        event.get("quantity_decimal") or correction["quantity_delta"],
        either["timestamp"],
        entry["ingested_at"],
        _text(event.get("idempotency_key") or ""),
        _text(event.get("metadata") or ""),
        correction.get("kind", ""),
        _text(correction.get("reason", "")),
    ]


def _text(value: str) -> str:
    """What a customer wrote, so that no spreadsheet takes it for a formula."""
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value

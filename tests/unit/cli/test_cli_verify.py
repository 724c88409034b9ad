"""What `usameter verify` prints is its own word, whatever the document says, and what it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from usameter_cli.verify_command import verify

INVOICE = {
    "id": "inv_1\x1b[2J\x1b[Htrue\n",
    "tenant_id": "acme",
    "currency": "USD",
    "period_start": "2026-01-01T00:00:00Z",
    "period_end": "2026-02-01T00:00:00Z",
    "through_epoch": 0,
    "subtotal": "0.00",
    "tax": "0.00",
    "total": "1.00",
    "amount_due": "0.00",
}


@pytest.mark.parametrize("format_", ["usameter.invoice-proof.v1", "\x1b[2Jtrue"])
def test_a_document_cannot_write_true_over_the_verdict(
    format_: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proof, events = tmp_path / "INVOICE.json", tmp_path / "EVENTS.jsonl"
    proof.write_text(json.dumps({"format": format_, "invoice": INVOICE}))
    events.write_text("")
    with pytest.raises(typer.Exit):
        verify(str(proof), str(events))
    output, errors = capsys.readouterr()
    assert "\x1b" not in output + errors
    assert not any(line.startswith("true") for line in output.splitlines())


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"invoice": "INVOICE.json"},
        {"events": "EVENTS.jsonl"},
        {"event": "PROOF.json", "invoice": "INVOICE.json"},
        {"event": "PROOF.json", "invoice": "INVOICE.json", "events": "EVENTS.jsonl"},
    ],
)
def test_an_invoice_or_an_event_is_checked_and_not_both(
    arguments: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stopped:
        verify(**arguments)  # type: ignore[arg-type]
    assert stopped.value.exit_code == 2
    output, errors = capsys.readouterr()
    assert not output and "verify takes" in errors

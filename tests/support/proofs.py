"""What a customer is given to check an invoice by: how the two files are made, read and verified."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.stack import RunningStack
from usameter_cli.main import main

PRICE = {
    "model": "graduated",
    "currency": "USD",
    "tiers": [{"up_to": "1000", "unit_amount": "0.10"}, {"up_to": None, "unit_amount": "0.08"}],
}


@dataclass(frozen=True, slots=True)
class Billed:
    """A tenant's March: billed, corrected, late, and trued up."""

    tenant_id: str
    first: dict[str, Any]
    true_up: dict[str, Any]
    voided: str


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def bill(client: httpx.Client, tenant_id: str, start: str = "2025-03-01", end: str = "2025-04-01") -> dict[str, Any]:
    period = {"period_start": f"{start}T00:00:00Z", "period_end": f"{end}T00:00:00Z"}
    draft = post(client, "/api/v1/invoices", {"tenant_id": tenant_id, **period})
    final: dict[str, Any] = post(client, f"/api/v1/invoices/{draft['id']}:finalize", {})
    return final


def use(tenant_id: str, event_type: str, day: int, count: int, *, note: str = "") -> list[dict[str, Any]]:
    return [
        {
            "tenant_id": tenant_id,
            "event_type": event_type,
            "quantity_decimal": f"{number + 1}.25",
            "idempotency_key": f"{tenant_id}/{event_type}/{day}/{note}{number}",
            "timestamp": f"2025-03-{day:02}T10:{number % 60:02}:00.000001Z",
            "metadata": {"path": f"/é/{number}", "n": number},
        }
        for number in range(count)
    ]


def billed_march(stack: RunningStack) -> Billed:
    """The March of "proven é", and pages of somebody else's between."""
    client, tenant_id = stack.client(), "proven é"
    for event_type in ("proven_call", "proven_gb"):
        body = {"event_type": event_type, "effective_from": "2025-01-01T00:00:00Z", "price": PRICE}
        post(client, "/api/v1/prices", body)
    post(client, "/api/v1/events", {"events": use(tenant_id, "proven_call", 3, 70)})
    post(client, "/api/v1/events", {"events": use("somebody else", "proven_call", 3, 5)})
    stack.seal()
    post(client, "/api/v1/events", {"events": use(tenant_id, "proven_call", 4, 3) + use(tenant_id, "proven_gb", 4, 2)})
    voided = post(client, "/api/v1/events", use(tenant_id, "proven_gb", 5, 1)[0])["event_id"]
    stack.seal()
    first = bill(client, tenant_id)
    # A page of others between, a late event, and a correction of what was billed.
    post(client, "/api/v1/events", {"events": use("somebody else", "proven_call", 9, 5)})
    stack.seal()
    post(client, f"/api/v1/events/{voided}:void", {"reason": "measured “twice”"})
    post(client, "/api/v1/events", {"events": use(tenant_id, "proven_call", 3, 2, note="late")})
    stack.seal()
    true_up = bill(client, tenant_id)
    assert {line["kind"] for line in true_up["lines"]} == {"TRUE_UP"}
    return Billed(tenant_id, first, true_up, voided)


def fetch(stack: RunningStack, invoice_id: str, folder: Path) -> tuple[Path, Path]:
    """The two files, as the commands write them."""
    written = []
    for what, name in (("proof", "INVOICE.json"), ("events", "EVENTS.jsonl")):
        process = stack.command("invoices", what, invoice_id)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
        (folder / name).write_bytes(output)
        written.append(folder / name)
    return written[0], written[1]


def verify(*arguments: str | Path) -> tuple[int, str]:
    """Far from any server and any environment of one."""
    process = subprocess.run(
        [sys.executable, "-m", "usameter_cli", "verify", *map(str, arguments)],
        env={"PATH": "/nowhere", "HOME": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return process.returncode, process.stdout + process.stderr


@dataclass(slots=True)
class Files:
    """The two files as values, to be touched and checked."""

    document: dict[str, Any]
    entries: list[dict[str, Any]]
    folder: Path

    def check(self, *options: str) -> tuple[int, list[str]]:
        """The exit code, and what was found."""
        proof, events = self.folder / "INVOICE.json", self.folder / "EVENTS.jsonl"
        proof.write_text(json.dumps(self.document))
        events.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries))
        return check(proof, events, *options)

    def event(self, number: int) -> dict[str, Any]:
        event: dict[str, Any] = self.entries[number]["event"]
        return event

    def snapshot_of(self, number: int) -> dict[str, Any]:
        (found,) = [each for each in self.document["snapshots"] if each["id"] == self.entries[number]["snapshot_id"]]
        snapshot: dict[str, Any] = found
        return snapshot

    @property
    def correction(self) -> dict[str, Any]:
        (found,) = [entry["correction"] for entry in self.entries if "correction" in entry]
        correction: dict[str, Any] = found
        return correction

    @property
    def line(self) -> dict[str, Any]:
        line: dict[str, Any] = self.document["invoice"]["lines"][0]
        return line


def check(*arguments: str | Path) -> tuple[int, list[str]]:
    """`usameter verify` with --json, in this process: its exit code, and what it found or complained of."""
    output, errors = StringIO(), StringIO()
    with redirect_stdout(output), redirect_stderr(errors), pytest.raises(SystemExit) as stopped:
        main(["verify", *map(str, arguments), "--json"])
    code = stopped.value.code or 0
    assert isinstance(code, int)
    if code == 2:
        return code, [errors.getvalue()]
    verdict = json.loads(output.getvalue())
    assert verdict["valid"] == (code == 0) == (verdict["finding_count"] == 0)
    return code, [f"{each['where']}: {each['what']}" for each in verdict["findings"]]


def fetch_by_rest(stack: RunningStack, invoice_id: str, folder: Path, *, limit: int = 1000) -> Files:
    """The two files, put together from pages."""
    with stack.client() as client:
        first, *others = pages(client, f"/api/v1/invoices/{invoice_id}/proof", limit)
        entries = [
            entry for page in pages(client, f"/api/v1/invoices/{invoice_id}/events", limit) for entry in page["events"]
        ]
    for page in others:
        assert page.keys() <= {"format", "snapshots", "epochs", "next_page_token"}
        first["snapshots"] += page["snapshots"]
        first["epochs"] += page["epochs"]
    first.pop("next_page_token", None)
    return Files(first, entries, folder)


def pages(client: httpx.Client, path: str, limit: int) -> Iterator[dict[str, Any]]:
    token: str | None = ""
    while token is not None:
        answer = client.get(path, params={"limit": limit, "page_token": token})
        assert answer.status_code == 200, answer.text
        page = answer.json()
        token = page.get("next_page_token")
        yield page


def flip(digits: str) -> str:
    """With one bit changed."""
    return f"{int(digits, 16) ^ 1:064x}"

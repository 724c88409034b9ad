"""An invoice is proven by its document and its events alone."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from tests.support.proofs import Billed, Files, bill, check, fetch, fetch_by_rest, flip, pages, post, use, verify
from tests.support.stack import RunningStack

MARCH = {"period_start": "2025-03-01T00:00:00Z", "period_end": "2025-04-01T00:00:00Z"}


def test_an_invoice_and_its_true_up_are_proven(stack: RunningStack, billed: Billed, tmp_path: Path) -> None:
    client = stack.client()
    head = client.get("/api/v1/ledger/head").json()
    for final in (billed.first, billed.true_up):
        proof, events = fetch(stack, final["id"], tmp_path)
        document = json.loads(proof.read_bytes())
        shown = client.get(f"/api/v1/invoices/{final['id']}").json()
        assert document["invoice"] == shown
        code, output = verify(proof, events, "--head", f"{head['epoch']}:{head['root']}")
        assert (code, output.splitlines()[0]) == (0, "true"), output
        # What earlier invoices cover is there too, and says so.
        own = {snapshot["id"] for line in shown["lines"] for snapshot in line["snapshots"]}
        for snapshot in document["snapshots"]:
            assert (snapshot["invoice_id"] == final["id"]) == (snapshot["id"] in own)
            assert snapshot["invoice_id"] in {billed.first["id"], billed.true_up["id"]}
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    assert sum("correction" in line for line in lines) == 1
    assert len(lines) == 70 + 3 + 2 + 1 + 1 + 2
    # The same entries for a spreadsheet; a correction's quantity is signed.
    output, errors = stack.command("invoices", "events", billed.true_up["id"], "--csv").communicate(timeout=60)
    rows = list(csv.DictReader(io.StringIO(output.decode())))
    assert [row["snapshot_id"] for row in rows] == [line["snapshot_id"] for line in lines], errors
    quantities = [
        line["event"]["quantity_decimal"] if "event" in line else line["correction"]["quantity_delta"] for line in lines
    ]
    assert [row["quantity"] for row in rows] == quantities
    assert {row["metadata"] for row in rows if not row["correction_kind"]} == {
        line["event"]["metadata"] for line in lines if "event" in line
    }


def test_a_noted_head_must_be_in_the_chain(files: Files) -> None:
    links = files.document["epochs"]
    first = links[0]
    for link in links:
        noted = f"{link['epoch']}:{link['root']}"
        assert files.check("--head", noted) == (0, [])
        code, findings = files.check("--head", f"{link['epoch']}:{flip(link['root'])}")
        assert code == 1 and findings[0].startswith(f"epoch {link['epoch']}: has the root {link['root']}, and ")
    if first["epoch"] > 1:
        assert files.check("--head", f"{first['epoch'] - 1}:{first['previous_root']}") == (0, [])
    code, complaints = files.check("--head", f"{links[-1]['epoch'] + 1}:{first['root']}")
    assert code == 2 and "its chain goes from epoch" in complaints[0]
    code, complaints = files.check("--head", "3:abc")
    assert code == 2 and "--head must be" in complaints[0]


def test_what_cannot_be_used_says_where_and_exits_with_2(
    files: Files, fetched: tuple[bytes, bytes], tmp_path: Path
) -> None:
    files.check()
    proof, events = tmp_path / "INVOICE.json", tmp_path / "EVENTS.jsonl"
    assert check(tmp_path / "none.json", events)[0] == 2
    assert check(proof, tmp_path / "none.jsonl")[0] == 2
    events.write_bytes(fetched[1].replace(b'"epoch"', b'"Epoch"', 3).replace(b'"Epoch"', b'"epoch"', 2))
    code, complaints = check(proof, events)
    assert code == 2 and "EVENTS.jsonl, line 3, is not an entry" in " ".join(complaints[0].split("\n"))
    files.document["epochs"][1]["root"] = "xyz"
    code, complaints = files.check()
    assert (code == 2 and "$.epochs[1].root" in complaints[0]) or "$.epochs[...].root" in complaints[0]
    files.document["format"] = "something else"
    assert files.check()[0] == 2


@pytest.mark.parametrize("limit", [1, 2, 7, 70])
def test_pages_of_any_size_make_the_same_files(stack: RunningStack, billed: Billed, files: Files, limit: int) -> None:
    assert fetch_by_rest(stack, billed.true_up["id"], files.folder, limit=limit) == files


def test_a_snapshot_and_an_event_lead_to_the_same_ledger(stack: RunningStack, billed: Billed, files: Files) -> None:
    with stack.client() as client:
        snapshot = files.document["snapshots"][0]
        (page,) = pages(client, f"/api/v1/snapshots/{snapshot['id']}/events", 1000)
        assert page["events"] == [entry for entry in files.entries if entry["snapshot_id"] == snapshot["id"]]
        proof = client.get(f"/api/v1/events/{billed.voided}/proof").json()
        missing = client.get(f"/api/v1/events/evt_{'0' * 32}/proof")
        assert (missing.status_code, missing.json()["code"]) == (404, "NOT_FOUND")
    links = {link["epoch"]: link for link in files.document["epochs"]}
    for part, kind in ((proof["event"], "event"), (proof["correction"], "correction")):
        assert part["entry"] in files.entries and kind in part["entry"]
        assert part["epoch"] == links[part["entry"]["epoch"]]
        # All but the invoice, of which ingest learns some seconds later.
        (proven,) = [each for each in files.document["snapshots"] if each["id"] == part["snapshot"]["id"]]
        assert part["snapshot"] | {"invoice_id": None} == proven | {"invoice_id": None}


def test_an_event_is_checked_by_its_own_proof(stack: RunningStack, billed: Billed, files: Files) -> None:
    with stack.client() as client:
        proof = client.get(f"/api/v1/events/{billed.voided}/proof").json()
    document = files.folder / "PROOF.json"
    assert proof["org_id"] == files.document["head"]["org_id"]
    document.write_text(json.dumps(proof))
    code, output = verify("--event", document)
    assert (code, output.splitlines()[0]) == (0, "true"), output
    # The roots that it prints are those of the invoice's chain.
    roots = re.findall(r"root of the ledger (\d+:[0-9a-f]{64})", output)
    assert len(roots) == 2
    for root in roots:
        assert files.check("--head", root) == (0, [])
        assert verify("--event", document, "--head", root)[0] == 0
    proof["event"]["entry"]["event"]["quantity_decimal"] = "1"
    document.write_text(json.dumps(proof))
    code, output = verify("--event", document)
    assert code == 1 and output.startswith(f"false\nevent {billed.voided}: its fields make the leaf ")
    document.write_text("{}")
    code, output = verify("--event", document)
    assert code == 2 and "is not the proof of an event" in output


def test_a_draft_shows_its_events_and_proves_nothing(stack: RunningStack, billed: Billed) -> None:
    with stack.client() as client:
        post(client, "/api/v1/events", use("draft only", "proven_call", 3, 2)[0])
        stack.seal()
        draft = post(client, "/api/v1/invoices", {"tenant_id": "draft only", **MARCH})
        (page,) = pages(client, f"/api/v1/invoices/{draft['id']}/events", 100)
        assert [entry["event"]["tenant_id"] for entry in page["events"]] == ["draft only"]
        refused = client.get(f"/api/v1/invoices/{draft['id']}/proof")
        assert refused.status_code == 409
        assert refused.json()["details"] == {"condition": "NOT_FINALIZED"}
        for path in ("proof", "events"):
            missing = client.get(f"/api/v1/invoices/inv_{'0' * 32}/{path}")
            assert (missing.status_code, missing.json()["code"]) == (404, "NOT_FOUND")


def test_the_page_checks_them_without_our_code(files: Files) -> None:
    """docs/proofs.md, By hand: the program there runs as it stands."""
    page = (Path(__file__).parents[2] / "docs" / "proofs.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    files.check()
    run = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        program,
        str(files.folder / "INVOICE.json"),
        str(files.folder / "EVENTS.jsonl"),
    ]
    totals = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    quantities = {line["event_type"]: Decimal(line["quantity"]) for line in files.document["invoice"]["lines"]}
    assert {name: Decimal(total) for name, _, total in map(str.split, totals)} == quantities
    files.event(1)["metadata"] = "{}"
    files.check()
    assert subprocess.run(run, capture_output=True, timeout=60, check=False).returncode == 1


def test_base_fees_and_tax_are_checked(stack: RunningStack, tmp_path: Path) -> None:
    """A plan with a fee, a price that charges for no use, a change within the month, and 19.25 % of tax."""
    tenant_id = "proven subscriber"
    minimum = {"model": "per_unit", "currency": "USD", "unit_amount": "0.01", "minimum_amount": "5"}
    price = {"event_type": "proven_minimum", "price": minimum}
    with stack.client() as client:
        small, large = (
            post(client, "/api/v1/plans", {"name": name, "base_fee": fee, "currency": "USD", "prices": [price]})
            for name, fee in (("Proven small", "29.99"), ("Proven large", "99.99"))
        )
        assert client.put(f"/api/v1/billing-settings/{tenant_id}", json={"tax_rate": "19.25"}).status_code == 200
        subscription = post(
            client,
            "/api/v1/subscriptions",
            {"tenant_id": tenant_id, "plan_id": small["id"], "start_at": "2025-01-15T00:00:00Z"},
        )
        post(client, "/api/v1/events", {"events": use(tenant_id, "proven_minimum", 20, 3)})
        stack.seal()
        first = bill(client, tenant_id, "2025-03-15", "2025-04-15")
        change = {"plan_id": large["id"], "at": "2025-04-25T00:00:00Z"}
        post(client, f"/api/v1/subscriptions/{subscription['id']}:changePlan", change)
        second = bill(client, tenant_id, "2025-04-15", "2025-04-25")
    kinds = [{line["kind"] for line in invoice["lines"]} for invoice in (first, second)]
    assert {"BASE_FEE", "USAGE"} <= kinds[0] and {"BASE_FEE", "TRUE_UP"} <= kinds[1]
    assert first["tax"] != "0.00" != second["tax"]
    for invoice in (first, second):
        files = fetch_by_rest(stack, invoice["id"], tmp_path)
        assert files.check() == (0, [])
        (fee, *_) = [line for line in files.document["invoice"]["lines"] if "base_fee" in line]
        (used, *_) = [line for line in files.document["invoice"]["lines"] if "price" in line]
        part = f"line {fee['id']}: the part of its base fee is"
        for touched, field, value, named in (
            (fee["base_fee"], "seconds", fee["base_fee"]["seconds"] - 86_400, part),
            (fee["base_fee"], "amount", "40", part),
            (fee["base_fee"], "interval_seconds", 1, f"line {fee['id']}: its interval has"),
            (fee, "tax_rate", "7", f"invoice {invoice['id']}: the tax on its lines is"),
            (used["price"]["price"], "minimum_amount", "6", f"line {used['id']}: its price makes"),
        ):
            kept = touched[field]
            touched[field] = value
            code, findings = files.check()
            assert code == 1 and any(each.startswith(named) for each in findings), findings
            touched[field] = kept
        files.document["invoice"]["lines"].append(fee | {"id": "lin_twice"})
        assert f"line lin_twice: bills the same as line {fee['id']}" in files.check()[1]
    # Without a use, what the plan charges all the same.
    assert {line["quantity"] for line in second["lines"] if line["kind"] == "USAGE"} == {"0"}


def test_voided_and_billed_again_every_invoice_is_proven(stack: RunningStack, tmp_path: Path) -> None:
    tenant_id = "proven again"
    with stack.client() as client:
        price = {"model": "per_unit", "currency": "USD", "unit_amount": "0.50"}
        body = {"event_type": "proven_again", "effective_from": "2025-01-01T00:00:00Z", "price": price}
        post(client, "/api/v1/prices", body)
        post(client, "/api/v1/events", {"events": use(tenant_id, "proven_again", 3, 3)})
        stack.seal()
        first = bill(client, tenant_id)
        post(client, "/api/v1/events", {"events": use(tenant_id, "proven_again", 3, 1, note="late")})
        stack.seal()
        second = bill(client, tenant_id)
        post(client, f"/api/v1/invoices/{first['id']}:void", {"reason": "wrong address"})
        third = bill(client, tenant_id)
    covers = {}
    for invoice in (first, second, third):
        files = fetch_by_rest(stack, invoice["id"], tmp_path)
        assert files.check() == (0, [])
        covers[invoice["id"]] = [snapshot["invoice_id"] for snapshot in files.document["snapshots"]]
    assert covers[first["id"]] == [first["id"]]
    assert covers[second["id"]] == covers[third["id"]] == [third["id"], second["id"]]

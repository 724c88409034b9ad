"""An invoice is proven by its document and its events alone, and whatever is touched in them is named."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest

from tests.support.stack import RunningStack
from usameter_cli.main import main
from usameter_proof.documents import Entry, entry_from_json
from usameter_proof.leaves import leaf_of

MARCH = {"period_start": "2025-03-01T00:00:00Z", "period_end": "2025-04-01T00:00:00Z"}
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


@pytest.fixture(scope="module")
def billed(stack: RunningStack) -> Billed:
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


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


def test_an_invoice_and_its_true_up_are_proven(stack: RunningStack, billed: Billed, folder: Path) -> None:
    client = stack.client()
    head = client.get("/api/v1/ledger/head").json()
    for final in (billed.first, billed.true_up):
        proof, events = fetch(stack, final["id"], folder)
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


@pytest.fixture(scope="module")
def fetched(stack: RunningStack, billed: Billed, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    proof, events = fetch(stack, billed.true_up["id"], tmp_path_factory.mktemp("fetched"))
    return proof.read_bytes(), events.read_bytes()


@pytest.fixture
def files(fetched: tuple[bytes, bytes], tmp_path: Path) -> Files:
    proof, events = fetched
    return Files(json.loads(proof), [json.loads(line) for line in events.splitlines()], tmp_path)


def test_untouched_they_are_true(files: Files) -> None:
    assert files.check() == (0, [])


# What is done to the files, and what must be named: the first findings begin so.
Touch = Callable[[Files], list[str]]


def change_metadata(files: Files) -> list[str]:
    event = files.event(1)
    event["metadata"] = event["metadata"].replace("é", "è")
    return [
        f"event {event['id']}: its fields make the leaf",
        f"snapshot {files.snapshot_of(1)['id']}: its entries make root",
    ]


def change_quantity(files: Files) -> list[str]:
    event = files.event(2)
    event["quantity_decimal"] = event["quantity_decimal"].replace(".25", ".26")
    return [f"event {event['id']}: its fields", f"snapshot {files.snapshot_of(2)['id']}: its entries make total"]


def change_time(files: Files) -> list[str]:
    event = files.event(3)
    event["timestamp"] = event["timestamp"].replace("000001Z", "000002Z")
    return [f"event {event['id']}: its fields", f"snapshot {files.snapshot_of(3)['id']}: "]


def change_day(files: Files) -> list[str]:
    event = files.event(3)
    event["timestamp"] = event["timestamp"].replace("2025-03-03", "2025-03-05")
    return [f"event {event['id']}: is not of the tenant, event type, day and epoch", f"event {event['id']}: its fields"]


def change_key(files: Files) -> list[str]:
    event = files.event(4)
    event["idempotency_key"] += "!"
    return [f"event {event['id']}: its idempotency key is that of evt_", f"event {event['id']}: its fields"]


def change_whether_time_was_given(files: Files) -> list[str]:
    event = files.event(5)
    event["timestamp_given"] = False
    return [f"event {event['id']}: its fields"]


def change_commit_time(files: Files) -> list[str]:
    entry = files.entries[6]
    moment = datetime.fromisoformat(entry["ingested_at"]) + timedelta(microseconds=1)
    entry["ingested_at"] = moment.isoformat()
    return [f"event {entry['event']['id']}: its fields"]


def change_correction(files: Files) -> list[str]:
    files.correction["reason"] = "measured twice"
    return [f"correction of {files.correction['event_id']}: its fields"]


def change_leaf_with_event(files: Files) -> list[str]:
    """Whoever makes the leaf anew as well is found by the snapshot's root."""
    entry = files.entries[7]
    entry["event"]["metadata"] = "{}"
    org_id = UUID(files.document["head"]["org_id"])
    entry["leaf"] = leaf_of(org_id, entry_from_json(json.dumps(entry).encode())).hex()
    return [f"snapshot {entry['snapshot_id']}: its entries make root"]


def remove_event(files: Files) -> list[str]:
    snapshot = files.snapshot_of(8)
    del files.entries[8]
    return [f"snapshot {snapshot['id']}: its entries make count 69 instead of 70, total "]


def add_event(files: Files) -> list[str]:
    entry = json.loads(json.dumps(files.entries[9]))
    event_id = f"evt_{int(entry['event']['id'][4:], 16) + 1:032x}"
    entry["event"] |= {"id": event_id, "idempotency_key": None}
    files.entries.insert(10, entry)
    return [
        f"event {event_id}: its fields",
        f"snapshot {entry['snapshot_id']}: its entries make count 71 instead of 70",
    ]


def repeat_event(files: Files) -> list[str]:
    entry = files.entries[9]
    files.entries.insert(10, entry)
    return [
        f"event {entry['event']['id']}: does not come after",
        f"snapshot {entry['snapshot_id']}: its entries make count",
    ]


def count_event_twice(files: Files) -> list[str]:
    """In another snapshot, where nothing else would tell it from a new one but its leaf."""
    entry = json.loads(json.dumps(files.entries[0]))
    entry["snapshot_id"] = files.entries[-1]["snapshot_id"]
    files.entries.append(entry)
    return [f"event {entry['event']['id']}: is counted more than once"]


def swap_events(files: Files) -> list[str]:
    files.entries[10:12] = files.entries[11:9:-1]
    return [f"event {files.event(11)['id']}: does not come after", f"snapshot {files.snapshot_of(10)['id']}: "]


def move_event_to_another_snapshot(files: Files) -> list[str]:
    other = files.document["snapshots"][1]["id"]
    files.entries[0]["snapshot_id"] = other
    return [
        f"snapshot {files.document['snapshots'][0]['id']}: its entries make count 0 instead of 70",
        f"event {files.event(0)['id']}: is not of the tenant",
        f"event {files.event(1)['id']}: comes after entries of later snapshots",
    ]


def put_event_into_no_snapshot(files: Files) -> list[str]:
    files.entries[0]["snapshot_id"] = "snp_" + "0" * 32
    return [f"event {files.event(0)['id']}: is of snapshot snp_00000000000000000000000000000000, which is not in"]


def change_snapshot_total(files: Files) -> list[str]:
    (own,) = files.line["snapshots"]
    (snapshot,) = [each for each in files.document["snapshots"] if each["id"] == own["id"]]
    snapshot["total"] = "1"
    return [f"snapshot {snapshot['id']}: its fields and its path do not lead to", f"line {files.line['id']}: states"]


def change_snapshot_root(files: Files) -> list[str]:
    snapshot = files.document["snapshots"][1]
    snapshot["root"] = flip(snapshot["root"])
    return [f"snapshot {snapshot['id']}: its fields and its path do not lead to"]


def change_snapshot_count(files: Files) -> list[str]:
    snapshot = files.document["snapshots"][0]
    snapshot["entry_count"] += 1
    return [f"snapshot {snapshot['id']}: its fields and its path do not lead to"]


def change_snapshot_day(files: Files) -> list[str]:
    snapshot = files.document["snapshots"][0]
    snapshot["day"] = "2025-03-02"
    return [f"snapshot {snapshot['id']}: is not the id of its epoch, tenant, event type and day"]


def change_path(files: Files) -> list[str]:
    snapshot = next(each for each in files.document["snapshots"] if each["path"])
    snapshot["path"][0] = flip(snapshot["path"][0])
    return [f"snapshot {snapshot['id']}: its fields and its path do not lead to"]


def remove_snapshot_with_its_events(files: Files) -> list[str]:
    snapshot = files.document["snapshots"].pop(0)
    files.entries = [entry for entry in files.entries if entry["snapshot_id"] != snapshot["id"]]
    line = next(each for each in files.document["invoice"]["lines"] if each["event_type"] == snapshot["event_type"])
    return [f"line {line['id']}: its snapshots add up to"]


def remove_snapshots_of_a_line(files: Files) -> list[str]:
    (own,) = files.line["snapshots"]
    files.document["snapshots"] = [each for each in files.document["snapshots"] if each["id"] != own["id"]]
    files.entries = [entry for entry in files.entries if entry["snapshot_id"] != own["id"]]
    return [f"line {files.line['id']}: covers snapshot {own['id']}, which the proof has not"]


def remove_epoch(files: Files) -> list[str]:
    links = files.document["epochs"]
    gone = links.pop(2)["epoch"]
    return [f"epoch {gone}: is missing: epoch {gone + 1} comes after {gone - 1}"]


def remove_epoch_of_a_snapshot(files: Files) -> list[str]:
    gone = files.document["epochs"].pop(1)["epoch"]
    return [f"epoch {gone}: is missing"]


def change_epoch_tree(files: Files) -> list[str]:
    link = files.document["epochs"][2]
    link["snapshots_root"] = flip(link["snapshots_root"])
    return [f"epoch {link['epoch']}: its snapshots_root and previous_root make the root"]


def change_epoch_root(files: Files) -> list[str]:
    link = files.document["epochs"][2]
    link["root"] = flip(link["root"])
    return [f"epoch {link['epoch']}: its snapshots_root", f"epoch {link['epoch'] + 1}: its previous_root is not"]


def change_head(files: Files) -> list[str]:
    head = files.document["head"]
    head["root"] = flip(head["root"])
    return [f"epoch {head['epoch']}: is the head with the root {head['root']}"]


def cut_the_chain_short(files: Files) -> list[str]:
    del files.document["epochs"][-1]
    return [f"epoch {files.document['head']['epoch']}: is the head, and the chain does not end with it"]


def change_line_amount(files: Files) -> list[str]:
    files.line["amount"] = "0.01"
    return [f"line {files.line['id']}: rated", f"invoice {files.document['invoice']['id']}: its lines add up to"]


def change_line_quantity(files: Files) -> list[str]:
    files.line["quantity"] = "1"
    return [f"line {files.line['id']}: its snapshots add up to", f"line {files.line['id']}: its price makes 1 cost"]


def change_line_rating(files: Files) -> list[str]:
    files.line["rated_amount"] = "1.00"
    return [f"line {files.line['id']}: its price makes", f"line {files.line['id']}: rated 1.00 less"]


def change_line_snapshot(files: Files) -> list[str]:
    own = files.line["snapshots"][0]
    own["root"] = flip(own["root"])
    return [f"line {files.line['id']}: states snapshot {own['id']} otherwise"]


def change_previously_billed(files: Files) -> list[str]:
    billed = files.line["previously_billed"][0]
    billed["amount"] = "0.01"
    return [f"line {files.line['id']}: rated"]


def swap_price(files: Files) -> list[str]:
    files.line["price"]["price"] = {"model": "per_unit", "currency": "USD", "unit_amount": "0.10"}
    return [f"line {files.line['id']}: its price makes"]


def change_price_amount(files: Files) -> list[str]:
    files.line["price"]["price"]["tiers"][0]["unit_amount"] = "0.11"
    return [f"line {files.line['id']}: its price makes"]


def spoil_price(files: Files) -> list[str]:
    files.line["price"]["price"]["tiers"][1]["up_to"] = "5000"
    return [f"line {files.line['id']}: its price is none: price.tiers[1].up_to"]


def change_breakdown(files: Files) -> list[str]:
    files.line["breakdown"][0]["quantity"] = "1"
    return [f"line {files.line['id']}: its breakdown"]


def remove_line(files: Files) -> list[str]:
    line = files.document["invoice"]["lines"].pop(0)
    snapshot = next(each for each in files.document["snapshots"] if each["event_type"] == line["event_type"])
    return [f"snapshot {snapshot['id']}: belongs to 0 lines"]


def repeat_line(files: Files) -> list[str]:
    lines = files.document["invoice"]["lines"]
    lines.append(lines[0] | {"id": "lin_" + "0" * 32})
    (snapshot, *_) = [each for each in files.document["snapshots"] if each["event_type"] == lines[0]["event_type"]]
    return [
        f"line {lines[-1]['id']}: bills the same as line {lines[0]['id']}",
        f"snapshot {snapshot['id']}: belongs to 2 lines",
    ]


def change_total(files: Files) -> list[str]:
    invoice = files.document["invoice"]
    invoice["total"] = "1.00"
    return [f"invoice {invoice['id']}: subtotal and tax are"]


def change_tax(files: Files) -> list[str]:
    invoice = files.document["invoice"]
    invoice["tax"] = "0.01"
    return [f"invoice {invoice['id']}: the tax on its lines is"]


def flip(digits: str) -> str:
    """With one bit changed."""
    return f"{int(digits, 16) ^ 1:064x}"


@pytest.mark.parametrize("touch", [
    change_metadata, change_quantity, change_time, change_day, change_key, change_whether_time_was_given,
    change_commit_time, change_correction, change_leaf_with_event, remove_event, add_event, repeat_event,
    count_event_twice, swap_events,
    move_event_to_another_snapshot, put_event_into_no_snapshot, change_snapshot_total, change_snapshot_root,
    change_snapshot_count, change_snapshot_day, change_path, remove_snapshot_with_its_events,
    remove_snapshots_of_a_line, remove_epoch, remove_epoch_of_a_snapshot, change_epoch_tree, change_epoch_root,
    change_head, cut_the_chain_short, change_line_amount, change_line_quantity, change_line_rating,
    change_line_snapshot, change_previously_billed, swap_price, change_price_amount, spoil_price, change_breakdown,
    remove_line, repeat_line, change_total, change_tax,
])  # fmt: skip
def test_what_is_touched_is_named(files: Files, touch: Touch) -> None:
    expected = touch(files)
    code, findings = files.check()
    assert code == 1
    for start in expected:
        assert any(finding.startswith(start) for finding in findings), (start, findings)


def test_no_byte_of_the_events_can_be_changed_unnoticed(fetched: tuple[bytes, bytes], tmp_path: Path) -> None:
    proof, events = fetched
    (tmp_path / "INVOICE.json").write_bytes(proof)
    seed = time.time_ns()
    random = Random(seed)
    for _ in range(150):
        position = random.randrange(len(events) - 1)
        touched = bytearray(events)
        touched[position] ^= 1 << random.randrange(8)
        (tmp_path / "EVENTS.jsonl").write_bytes(touched)
        code, _ = check(tmp_path / "INVOICE.json", tmp_path / "EVENTS.jsonl")
        # "t" for "T" is the same moment: RFC 3339 lets both pass.
        noticed = code in {1, 2} or entries_in(bytes(touched)) == entries_in(events)
        assert noticed, (seed, position, bytes(touched[position - 40 : position + 40]))


def entries_in(events: bytes) -> list[Entry]:
    return [entry_from_json(line) for line in events.splitlines()]


def test_whatever_byte_of_the_proof_is_changed_there_is_a_verdict(fetched: tuple[bytes, bytes], tmp_path: Path) -> None:
    """Some of it is stated and not proven, such as dates: but nothing that is touched makes the check itself fail."""
    proof, events = fetched
    (tmp_path / "EVENTS.jsonl").write_bytes(events)
    seed = time.time_ns()
    random = Random(seed)
    codes = set()
    for _ in range(150):
        position = random.randrange(len(proof))
        touched = bytearray(proof)
        touched[position] ^= 1 << random.randrange(8)
        (tmp_path / "INVOICE.json").write_bytes(touched)
        code, findings = check(tmp_path / "INVOICE.json", tmp_path / "EVENTS.jsonl")
        assert (code == 0) == (not findings), (seed, position)
        codes.add(code)
    assert codes >= {1, 2}, seed


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


@dataclass(frozen=True, slots=True)
class Stored:
    """A change of stored rows behind the service's back: an assignment, or None to delete them."""

    table: str
    key: str
    where: str
    assignment: str | None
    named: str


EVENT = ("ingest.usage_event", "event_id", "event_id = '{event}'")
SNAPSHOT = ("ingest.snapshot", "snapshot_id", "snapshot_id = '{snapshot}'")
EPOCH = ("ingest.epoch", "epoch", "epoch = {unused_epoch}")
LINE = ("billing.invoice_line", "line_id", "line_id = '{line}'")
STORED = {
    "metadata": Stored(*EVENT, "metadata = '{{}}'", "event evt_{event}: its fields make the leaf"),
    "quantity": Stored(*EVENT, "quantity = quantity + 0.000001", "event evt_{event}: its fields make the leaf"),
    "time": Stored(
        *EVENT, "occurred_at = occurred_at + interval '1 us'", "event evt_{event}: its fields make the leaf"
    ),
    "leaf": Stored(*EVENT, "leaf_hash = sha256(leaf_hash)", "event evt_{event}: its fields make the leaf"),
    "event type": Stored(*EVENT, "event_type = 'proven_gb'", "snapshot snp_{snapshot}: its entries make count 69"),
    "removed event": Stored(*EVENT, None, "snapshot snp_{snapshot}: its entries make count 69 instead of 70"),
    "total": Stored(*SNAPSHOT, "quantity = quantity + 1", "snapshot snp_{snapshot}: its fields and its path"),
    "count": Stored(*SNAPSHOT, "entry_count = entry_count + 1", "snapshot snp_{snapshot}: its fields and its path"),
    "root": Stored(*SNAPSHOT, "root = sha256(root)", "snapshot snp_{snapshot}: its fields and its path"),
    "neighbour": Stored(
        "ingest.snapshot",
        "snapshot_id",
        "epoch = {epoch} AND tenant_id = 'somebody else'",
        "leaf_hash = sha256(leaf_hash)",
        "snapshot snp_{snapshot}: its fields and its path",
    ),
    "epoch's root": Stored(*EPOCH, "root = sha256(root)", "epoch {unused_epoch}: its snapshots_root"),
    "epoch's tree": Stored(*EPOCH, "snapshots_root = sha256(root)", "epoch {unused_epoch}: its snapshots_root"),
    "removed epoch": Stored(*EPOCH, None, "epoch {unused_epoch}: is missing"),
    "line's amount": Stored(*LINE, "amount = amount + 0.01", "line lin_{line}: rated"),
    "line's quantity": Stored(*LINE, "quantity = quantity + 1", "line lin_{line}: its snapshots add up to"),
    "line's rating": Stored(*LINE, "rated_amount = rated_amount + 1", "line lin_{line}: its price makes"),
    "price": Stored(
        "billing.price",
        "price_id",
        "price_id = '{price}'",
        """terms = jsonb_set(terms, '{{tiers,0,unit_amount}}', '"0.11"')""",
        "line lin_{line}: its price makes",
    ),
}


@pytest.mark.parametrize("what", STORED)
async def test_what_is_changed_in_the_database_is_named(
    stack: RunningStack, billed: Billed, files: Files, what: str
) -> None:
    stored, line = STORED[what], files.line
    used = {snapshot["epoch"] for snapshot in files.document["snapshots"]}
    names = {
        "org_id": files.document["head"]["org_id"],
        "event": files.event(20)["id"][4:],
        "snapshot": files.entries[20]["snapshot_id"][4:],
        "epoch": files.entries[20]["epoch"],
        "unused_epoch": next(link["epoch"] for link in files.document["epochs"] if link["epoch"] not in used),
        "line": line["id"][4:],
        "price": line["price"]["id"][4:],
    }
    async with changed(stack.environment["USAMETER_DATABASE_URL"], stored, names):
        touched = await asyncio.to_thread(fetch_by_rest, stack, billed.true_up["id"], files.folder)
    code, findings = touched.check()
    assert code == 1
    assert any(finding.startswith(stored.named.format(**names)) for finding in findings), findings
    restored = await asyncio.to_thread(fetch_by_rest, stack, billed.true_up["id"], files.folder)
    assert restored == files and restored.check() == (0, [])


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


@asynccontextmanager
async def changed(database_url: str, stored: Stored, names: dict[str, Any]) -> AsyncIterator[None]:
    """The rows are other ones inside, and the same again after it."""
    connection = await asyncpg.connect(database_url)
    where = f"org_id = '{names['org_id']}' AND {stored.where.format(**names)}"
    try:
        # As a superuser may: foreign keys are not asked.
        await connection.execute("SET session_replication_role = replica")
        await connection.execute(f"CREATE TEMP TABLE kept AS SELECT * FROM {stored.table} WHERE {where}")
        assert await connection.fetchval("SELECT count(*) FROM kept") == 1
        if stored.assignment is None:
            await connection.execute(f"DELETE FROM {stored.table} WHERE {where}")
        else:
            assignment = stored.assignment.format(**names)
            await connection.execute(f"UPDATE {stored.table} SET {assignment} WHERE {where}")
        try:
            yield
        finally:
            await connection.execute(
                f"""
                DELETE FROM {stored.table}
                WHERE org_id = '{names["org_id"]}' AND {stored.key} = (SELECT {stored.key} FROM kept);
                INSERT INTO {stored.table} SELECT * FROM kept
                """
            )
    finally:
        await connection.close()


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
    change_metadata(files)
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

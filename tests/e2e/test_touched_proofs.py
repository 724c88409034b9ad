"""Whatever is touched in the two files of a proof is named by `usameter verify`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from uuid import UUID

import pytest

from tests.support.proofs import Files, check, flip
from usameter_proof.documents import Entry, entry_from_json
from usameter_proof.leaves import leaf_of


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

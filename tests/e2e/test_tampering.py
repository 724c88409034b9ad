"""What is changed in the database behind the services' backs is named, by the audit and by who checks an invoice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.support.proofs import Billed, Files, fetch, fetch_by_rest, verify
from tests.support.stack import RunningStack


@dataclass(frozen=True, slots=True)
class Stored:
    """A change of a stored row behind the service's back: an assignment, or None to delete it; and what verify says."""

    table: str
    key: str
    where: str
    assignment: str | None
    named: str


@dataclass(frozen=True, slots=True)
class Tampering:
    """A change, and what the audit says of it, with the ids that it names it by."""

    stored: Stored
    invariant: str
    problem: str
    place: dict[str, str]


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


EVENT_PLACE = {"event_id": "evt_{event}"}
SNAPSHOT_PLACE = {"snapshot_id": "snp_{snapshot}", "epoch": "{epoch}"}
SCENARIO = (
    Tampering(
        Stored(
            *EVENT,
            "metadata = replace(metadata::text, 'é', 'è')::json",
            "event evt_{event}: its fields make the leaf",
        ),
        "I1",
        "an event's request hash is not that of what is stored",
        EVENT_PLACE,
    ),
    Tampering(
        Stored(
            *SNAPSHOT,
            "root = set_byte(root, 5, get_byte(root, 5) # 1)",
            "snapshot snp_{snapshot}: its fields and its path",
        ),
        "I3",
        "a snapshot's leaf is not that of what it holds",
        SNAPSHOT_PLACE,
    ),
    Tampering(
        Stored(*LINE, "amount = amount + 0.01", "line lin_{line}: rated"),
        "I7",
        "a line's amount is not what is due less what was billed",
        {"line_id": "lin_{line}", "invoice_id": "{invoice}"},
    ),
    Tampering(
        Stored(*EVENT, None, "snapshot snp_{snapshot}: its entries make count 69 instead of 70"),
        "I3",
        "a snapshot's root does not follow from its entries",
        SNAPSHOT_PLACE,
    ),
    Tampering(
        Stored(*EPOCH, None, "epoch {unused_epoch}: is missing"),
        "I9",
        "an epoch is missing",
        {"epoch": "{unused_epoch}"},
    ),
)


async def test_each_tampering_is_named_by_the_audit_and_by_verify_and_nothing_is_once_it_is_undone(
    stack: RunningStack, billed: Billed, files: Files, tmp_path: Path
) -> None:
    """One byte of an event, of a snapshot and of a line; an event removed, and an epoch."""
    names = names_in(files)

    def findings() -> tuple[list[dict[str, Any]], list[str]]:
        return audited(stack), verified(stack, billed.true_up["id"], tmp_path)

    assert await asyncio.to_thread(findings) == ([], [])
    for tampering in SCENARIO:
        async with changed(stack.environment["USAMETER_DATABASE_URL"], tampering.stored, names):
            violations, found = await asyncio.to_thread(findings)
        place = {name: value.format(**names) for name, value in tampering.place.items()}
        assert any(
            (each["invariant"], each["problem"]) == (tampering.invariant, tampering.problem)
            and {name: str(each["place"].get(name)) for name in place} == place
            for each in violations
        ), violations
        assert any(each.startswith(tampering.stored.named.format(**names)) for each in found), found
    assert await asyncio.to_thread(findings) == ([], [])


def audited(stack: RunningStack) -> list[dict[str, Any]]:
    """The violations that `usameter audit` prints."""
    process = stack.command("audit", "--json")
    output, errors = process.communicate(timeout=120)
    assert process.returncode in {0, 1}, errors.decode()
    violations: list[dict[str, Any]] = json.loads(output)["violations"]
    assert (process.returncode == 0) == (not violations)
    return violations


def verified(stack: RunningStack, invoice_id: str, folder: Path) -> list[str]:
    """What `usameter verify` finds in the files that the commands write now."""
    code, output = verify(*fetch(stack, invoice_id, folder), "--json")
    findings = [f"{each['where']}: {each['what']}" for each in json.loads(output)["findings"]]
    assert (code == 0) == (not findings)
    return findings


def names_in(files: Files) -> dict[str, Any]:
    """What is changed: an event, its snapshot and epoch, an epoch that no snapshot of the invoice is of, a line."""
    used = {snapshot["epoch"] for snapshot in files.document["snapshots"]}
    return {
        "org_id": files.document["head"]["org_id"],
        "invoice": files.document["invoice"]["id"],
        "event": files.event(20)["id"][4:],
        "snapshot": files.entries[20]["snapshot_id"][4:],
        "epoch": files.entries[20]["epoch"],
        "unused_epoch": next(link["epoch"] for link in files.document["epochs"] if link["epoch"] not in used),
        "line": files.line["id"][4:],
        "price": files.line["price"]["id"][4:],
    }


@pytest.mark.parametrize("what", STORED)
async def test_what_is_changed_in_the_database_is_named(
    stack: RunningStack, billed: Billed, files: Files, what: str
) -> None:
    stored, names = STORED[what], names_in(files)
    async with changed(stack.environment["USAMETER_DATABASE_URL"], stored, names):
        touched = await asyncio.to_thread(fetch_by_rest, stack, billed.true_up["id"], files.folder)
    code, findings = touched.check()
    assert code == 1
    assert any(finding.startswith(stored.named.format(**names)) for finding in findings), findings
    restored = await asyncio.to_thread(fetch_by_rest, stack, billed.true_up["id"], files.folder)
    assert restored == files and restored.check() == (0, [])


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

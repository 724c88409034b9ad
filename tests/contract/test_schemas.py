"""The schemas: everything tenant-owned is keyed by organization, and roles see only their own."""

from __future__ import annotations

import pytest

from tests.conftest import SCHEMAS, Database
from tests.support.sql import fetch_rows

# Registers of the whole deployment: an organization itself, what was migrated, and operators' jobs.
WITHOUT_ORGANIZATION = {"schema_migration"}


async def test_every_table_and_every_unique_key_leads_with_the_organization(database: Database) -> None:
    """So that the whole shards by organization (design, Growing)."""
    rows = await fetch_rows(
        database,
        """
        SELECT c.relnamespace::regnamespace::text AS schema, c.relname AS table, i.indexrelid::regclass::text AS key,
               (SELECT a.attname FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum = i.indkey[0]) AS leads
        FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
        WHERE i.indisunique AND c.relnamespace::regnamespace::text = ANY($1::text[])
        """,
        list(SCHEMAS),
    )
    tables = {(row["schema"], row["table"]) for row in rows}
    assert len(tables) > 10
    wrong = [row for row in rows if row["table"] not in WITHOUT_ORGANIZATION and row["leads"] != "org_id"]
    assert wrong == []


async def test_every_table_has_a_primary_key(database: Database) -> None:
    rows = await fetch_rows(
        database,
        """
        SELECT t.table_schema, t.table_name FROM information_schema.tables t
        WHERE t.table_schema = ANY($1::text[]) AND t.table_type = 'BASE TABLE' AND NOT EXISTS (
            SELECT FROM pg_constraint k WHERE k.contype = 'p'
            AND k.conrelid = format('%I.%I', t.table_schema, t.table_name)::regclass)
        """,
        list(SCHEMAS),
    )
    assert rows == []


@pytest.mark.parametrize("table", ["ingest.usage_day", "ingest.usage_hour"])
async def test_what_is_added_to_a_rollup_is_in_no_index(database: Database, table: str) -> None:
    """So that an addition rewrites the row within its page and touches no index (HOT)."""
    rows = await fetch_rows(
        database,
        """
        SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
        WHERE i.indrelid = $1::text::regclass
        """,
        table,
    )
    assert {"org_id", "slot"} <= {row["attname"] for row in rows}
    assert {row["attname"] for row in rows} & {"event_count", "correction_count", "quantity"} == set()


@pytest.mark.parametrize("schema", SCHEMAS)
async def test_a_service_role_has_no_rights_outside_its_schema(database: Database, schema: str) -> None:
    rows = await fetch_rows(
        database,
        """
        SELECT nspname FROM pg_namespace
        WHERE nspname = ANY($1::text[]) AND has_schema_privilege($2, nspname, 'USAGE')
        """,
        list(SCHEMAS),
        f"usameter_{schema}",
    )
    assert [row["nspname"] for row in rows] == [schema]

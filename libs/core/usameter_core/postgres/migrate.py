"""Migrations: plain SQL files, applied once each, in order, under a lock.

A service's files are `migrations/NNNN_what.sql` in its package. Each runs in a transaction of
its own and is recorded with its SHA-256 in `<schema>.schema_migration`; a file that was applied
and has changed since is refused. Old code runs on the new schema: expand, backfill, contract.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import asyncpg

from usameter_core.logging import get_logger

if TYPE_CHECKING:
    from asyncpg import Connection, Record

log = get_logger()

_FILE_NAME = re.compile(r"^(\d{4})_[a-z0-9_]+\.sql$")
# First key of the advisory lock; the second is the schema's hash.
_LOCK_CLASS = 0x75736D  # "usm"


class MigrationError(Exception):
    """The files and the database do not fit together; nothing further was applied."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file."""

    version: int
    name: str
    sql: str

    @property
    def sha256(self) -> bytes:
        """What is recorded, so that an edited file is noticed."""
        return hashlib.sha256(self.sql.encode()).digest()


def load_migrations(package: str) -> list[Migration]:
    """The migrations of a service's package, in order.

    Raises:
        MigrationError: A name has not the form NNNN_what.sql, or the numbers have a gap.
    """
    found = []
    for file in (importlib.resources.files(package) / "migrations").iterdir():
        if not file.name.endswith(".sql"):
            continue
        match = _FILE_NAME.match(file.name)
        if match is None:
            raise MigrationError(f"{package}: {file.name} is not named NNNN_what.sql")
        found.append(Migration(int(match[1]), file.name, file.read_text("utf-8")))
    found.sort(key=lambda migration: migration.version)
    if [migration.version for migration in found] != list(range(1, len(found) + 1)):
        raise MigrationError(f"{package}: migrations are not numbered 0001, 0002, … without a gap")
    return found


async def migrate(dsn: str, *, schema: str, package: str, role_password: str | None = None) -> int:
    """Bring `schema` up to date and return how many files were applied.

    Makes the schema and the service's role `usameter_<schema>` where they are missing; the role
    gets what the files grant it and no more. Safe to run from several places at once.

    Raises:
        MigrationError: An applied file is missing or has changed, or one failed.
    """
    migrations = load_migrations(package)
    connection = await asyncpg.connect(dsn, timeout=10)
    try:
        await connection.execute("SELECT pg_advisory_lock($1, hashtext($2))", _LOCK_CLASS, schema)
        await _ensure_schema_and_role(connection, schema, role_password)
        applied = await _applied(connection, schema, migrations)
        for migration in migrations[applied:]:
            await _apply(connection, schema, migration)
            log.info("migration_applied", schema=schema, migration=migration.name)
        return len(migrations) - applied
    finally:
        await connection.close()


async def _ensure_schema_and_role(connection: Connection[Record], schema: str, password: str | None) -> None:
    role = f"usameter_{schema}"
    async with connection.transaction():
        # Roles are of the whole cluster: two databases migrated at once must not both create one.
        await connection.execute("SELECT pg_advisory_xact_lock($1, hashtext('role'))", _LOCK_CLASS)
        if not await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", role):
            await connection.execute(f"CREATE ROLE {role} LOGIN")
        if password is not None:
            quoted = await connection.fetchval("SELECT quote_literal($1::text)", password)
            await connection.execute(f"ALTER ROLE {role} PASSWORD {quoted}")
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
        await connection.execute(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
        await connection.execute(f"""
            CREATE TABLE IF NOT EXISTS {schema}.schema_migration (
                version     integer     PRIMARY KEY,
                name        text        NOT NULL,
                sha256      bytea       NOT NULL,
                applied_at  timestamptz NOT NULL DEFAULT now()
            )""")


async def _applied(connection: Connection[Record], schema: str, migrations: list[Migration]) -> int:
    rows = await connection.fetch(f"SELECT version, name, sha256 FROM {schema}.schema_migration ORDER BY version")
    for row, migration in zip(rows, migrations, strict=False):
        if row["name"] != migration.name or row["sha256"] != migration.sha256:
            raise MigrationError(
                f"{schema}: {row['name']} was applied and has changed since; restore it, add a new file"
            )
    if len(rows) > len(migrations):
        raise MigrationError(f"{schema}: the database is at {rows[-1]['name']}, which this release does not know")
    return len(rows)


async def _apply(connection: Connection[Record], schema: str, migration: Migration) -> None:
    try:
        async with connection.transaction():
            await connection.execute("SET LOCAL lock_timeout = '5s'")
            await connection.execute(migration.sql)
            await connection.execute(
                f"INSERT INTO {schema}.schema_migration (version, name, sha256) VALUES ($1, $2, $3)",
                migration.version,
                migration.name,
                migration.sha256,
            )
    except asyncpg.PostgresError as error:
        raise MigrationError(f"{schema}: {migration.name}: {error}") from error

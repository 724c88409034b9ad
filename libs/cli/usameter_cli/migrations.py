"""Brings the schemas of all services up to date, from their own migration files."""

from __future__ import annotations

import asyncpg

from usameter_cli.errors import CliError
from usameter_core.logging import configure_logging
from usameter_core.postgres.migrate import MigrationError, migrate

SCHEMAS = ("identity", "quota", "ingest", "billing")


async def migrate_all(dsn: str, *, role_password: str | None) -> dict[str, int]:
    """Migrate every schema; how many files each still needed. Safe to run again, and at once elsewhere.

    Args:
        dsn: Of a role that may make schemas and roles.
        role_password: Becomes the password of the services' roles; None leaves it as it is.

    Raises:
        CliError: The database cannot be reached, or does not fit the files. Schemas before stay migrated.
    """
    configure_logging(service="cli", log_format="console", level="WARNING")
    try:
        return {
            schema: await migrate(dsn, schema=schema, package=f"usameter_{schema}", role_password=role_password)
            for schema in SCHEMAS
        }
    except (MigrationError, OSError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        # The text of none of these holds the URL, which may hold a password.
        raise CliError(f"The database could not be migrated: {error}") from error

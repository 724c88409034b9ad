"""Looking into a test's database as superuser."""

from __future__ import annotations

from typing import Any

import asyncpg

from tests.conftest import Database


async def fetch_value(database: Database, query: str, *arguments: object) -> Any:
    """The first column of the first row."""
    connection = await asyncpg.connect(database.admin_url)
    try:
        return await connection.fetchval(query, *arguments)
    finally:
        await connection.close()


async def fetch_rows(database: Database, query: str, *arguments: object) -> list[dict[str, Any]]:
    """All rows."""
    connection = await asyncpg.connect(database.admin_url)
    try:
        return [dict(row) for row in await connection.fetch(query, *arguments)]
    finally:
        await connection.close()


async def execute(database: Database, statement: str, *arguments: object) -> None:
    """Run a statement."""
    connection = await asyncpg.connect(database.admin_url)
    try:
        await connection.execute(statement, *arguments)
    finally:
        await connection.close()

"""All SQL of identity."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from usameter_core.errors import NotFound
from usameter_core.grpc.context import Principal, remaining_seconds
from usameter_core.ids import OrgId, format_id
from usameter_core.postgres.pool import unavailable_without_postgres
from usameter_core.postgres.transaction import run_transaction
from usameter_identity.domain.values import API_KEY_ID_PREFIX, ApiKey, ApiKeyId, Organization, Tenant

if TYPE_CHECKING:
    from asyncpg import Record

    from usameter_core.postgres.pool import Connection, Pool

_STATEMENT_SECONDS_MAX = 10.0
_API_KEY_COLUMNS = "api_key_id, name, prefix, scopes, created_at, revoked_at"
# First key of the advisory lock under which organizations are made.
_LOCK_CLASS = 0x75736D  # "usm"


class IdentityStore:
    """Reads and writes the schema `identity`. Every method raises Unavailable without the database."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def find_principal(self, key_sha256: bytes) -> Principal | None:
        """The holder of a key that is in force."""
        row = await self._fetchrow(
            """
            SELECT org_id, api_key_id, scopes
            FROM identity.api_key
            WHERE key_sha256 = $1 AND revoked_at IS NULL
            """,
            key_sha256,
        )
        if row is None:
            return None
        return Principal(
            OrgId(row["org_id"]), format_id(API_KEY_ID_PREFIX, row["api_key_id"]), frozenset(row["scopes"])
        )

    async def insert_api_key(
        self,
        org_id: OrgId,
        api_key_id: ApiKeyId,
        *,
        name: str,
        prefix: str,
        key_sha256: bytes,
        scopes: frozenset[str],
    ) -> ApiKey:
        """Keep a new key of an organization that exists."""
        row = await self._fetchrow(
            f"""
            INSERT INTO identity.api_key (org_id, api_key_id, name, prefix, key_sha256, scopes)
            VALUES ($1, $2, $3, $4, $5, $6)
            RETURNING {_API_KEY_COLUMNS}
            """,
            org_id,
            api_key_id,
            name,
            prefix,
            key_sha256,
            sorted(scopes),
        )
        assert row is not None
        return api_key_from_row(row)

    async def find_api_key(self, org_id: OrgId, api_key_id: ApiKeyId) -> ApiKey | None:
        """The organization's key of that id, revoked or not."""
        row = await self._fetchrow(
            f"SELECT {_API_KEY_COLUMNS} FROM identity.api_key WHERE org_id = $1 AND api_key_id = $2",
            org_id,
            api_key_id,
        )
        return None if row is None else api_key_from_row(row)

    async def list_api_keys(self, org_id: OrgId, *, after: UUID | None, limit: int) -> list[ApiKey]:
        """Up to `limit` keys with ids above `after`, oldest first, the revoked ones too."""
        rows = await self._fetch(
            f"""
            SELECT {_API_KEY_COLUMNS}
            FROM identity.api_key
            WHERE org_id = $1 AND ($2::uuid IS NULL OR api_key_id > $2)
            ORDER BY api_key_id
            LIMIT $3
            """,
            org_id,
            after,
            limit,
        )
        return [api_key_from_row(row) for row in rows]

    async def revoke_api_key(self, org_id: OrgId, api_key_id: ApiKeyId) -> ApiKey | None:
        """Revoke the key, once: a second time keeps the first moment. None where there is no such key."""
        row = await self._fetchrow(
            f"""
            UPDATE identity.api_key
            SET revoked_at = COALESCE(revoked_at, now())
            WHERE org_id = $1 AND api_key_id = $2
            RETURNING {_API_KEY_COLUMNS}
            """,
            org_id,
            api_key_id,
        )
        return None if row is None else api_key_from_row(row)

    async def find_organization(self, org_id: OrgId) -> Organization | None:
        """The organization of that id."""
        row = await self._fetchrow(
            "SELECT org_id, name, created_at FROM identity.organization WHERE org_id = $1", org_id
        )
        return None if row is None else organization_from_row(row)

    async def ensure_organization(self, name: str, *, org_id: OrgId) -> Organization:
        """The organization of that name; made with `org_id` where there is none."""

        async def ensure(connection: Connection) -> Organization:
            # The lock stands in for UNIQUE (name), which would not lead with org_id. The look-up is a
            # statement of its own: a snapshot taken with the lock would be older than the lock.
            await connection.execute("SELECT pg_advisory_xact_lock($1, hashtext('organization'))", _LOCK_CLASS)
            row = await connection.fetchrow(
                "SELECT org_id, name, created_at FROM identity.organization WHERE name = $1", name
            )
            if row is None:
                row = await connection.fetchrow(
                    """
                    INSERT INTO identity.organization (org_id, name)
                    VALUES ($1, $2)
                    RETURNING org_id, name, created_at
                    """,
                    org_id,
                    name,
                )
                assert row is not None
            return organization_from_row(row)

        return await run_transaction(self._pool, ensure)

    async def find_tenant(self, org_id: OrgId, tenant_id: str) -> Tenant | None:
        """The organization's tenant of that id."""
        row = await self._fetchrow(
            "SELECT tenant_id, created_at FROM identity.tenant WHERE org_id = $1 AND tenant_id = $2",
            org_id,
            tenant_id,
        )
        return None if row is None else tenant_from_row(row)

    async def list_tenants(self, org_id: OrgId, *, after: str | None, limit: int) -> list[Tenant]:
        """Up to `limit` tenants with ids above `after`, ascending by code point."""
        rows = await self._fetch(
            """
            SELECT tenant_id, created_at
            FROM identity.tenant
            WHERE org_id = $1 AND ($2::text IS NULL OR tenant_id > $2)
            ORDER BY tenant_id
            LIMIT $3
            """,
            org_id,
            after,
            limit,
        )
        return [tenant_from_row(row) for row in rows]

    async def ensure_tenants(self, org_id: OrgId, tenant_ids: Sequence[str]) -> int:
        """Make the tenants that are missing; how many that were.

        Args:
            org_id: Of an organization that exists, else NotFound.
            tenant_ids: Distinct and ascending: two calls that lock equal keys in opposite order deadlock.
        """

        async def ensure(connection: Connection) -> int:
            created: int = await connection.fetchval(
                """
                WITH created AS (
                    INSERT INTO identity.tenant (org_id, tenant_id)
                    SELECT $1, wanted.tenant_id
                    FROM unnest($2::text[]) WITH ORDINALITY AS wanted (tenant_id, position)
                    ORDER BY wanted.position
                    ON CONFLICT ON CONSTRAINT tenant_pkey DO NOTHING
                    RETURNING 1
                )
                SELECT count(*) FROM created
                """,
                org_id,
                tenant_ids,
                timeout=_statement_seconds(),
            )
            return created

        try:
            return await run_transaction(self._pool, ensure)
        except asyncpg.ForeignKeyViolationError as error:
            if error.constraint_name != "tenant_organization_fkey":
                raise
            raise NotFound("organization", str(org_id)) from None

    async def _fetchrow(self, query: str, *arguments: object) -> Record | None:
        async with self._connection() as connection:
            return await connection.fetchrow(query, *arguments, timeout=_statement_seconds())

    async def _fetch(self, query: str, *arguments: object) -> list[Record]:
        async with self._connection() as connection:
            return await connection.fetch(query, *arguments, timeout=_statement_seconds())

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        # The pool's own shortcuts wait for a free connection without a deadline.
        with unavailable_without_postgres():
            async with self._pool.acquire(timeout=_statement_seconds()) as connection:
                yield connection


def _statement_seconds() -> float:
    return remaining_seconds(_STATEMENT_SECONDS_MAX)


def api_key_from_row(row: Record) -> ApiKey:
    """A row of identity.api_key."""
    return ApiKey(
        api_key_id=ApiKeyId(row["api_key_id"]),
        name=row["name"],
        prefix=row["prefix"],
        scopes=frozenset(row["scopes"]),
        created_at=row["created_at"],
        revoked_at=row["revoked_at"],
    )


def organization_from_row(row: Record) -> Organization:
    """A row of identity.organization."""
    return Organization(OrgId(row["org_id"]), row["name"], row["created_at"])


def tenant_from_row(row: Record) -> Tenant:
    """A row of identity.tenant."""
    return Tenant(row["tenant_id"], row["created_at"])

"""Webhook endpoints and what is sent to them, in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import groupby
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_core.ids import OrgId
from usameter_core.postgres.transaction import run_transaction
from usameter_quota.domain.quota_events import QuotaEventType
from usameter_quota.domain.webhooks import (
    Attempt,
    Delivery,
    DeliveryState,
    DueDelivery,
    WebhookEndpoint,
    WebhookEndpointId,
)
from usameter_quota.store.quota_events import event_from_row
from usameter_quota.store.statement import fetch

if TYPE_CHECKING:
    from asyncpg import Record

    from usameter_core.postgres.pool import Connection, Pool

_ENDPOINT_COLUMNS = "endpoint_id, url, types, description, created_at, disabled_at"


class WebhookEndpointStore:
    """Endpoints of organizations, and the log of their deliveries.

    Every method raises Unavailable without the database.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def insert_endpoint(
        self, org_id: OrgId, endpoint: WebhookEndpoint, *, secret: bytes, endpoints_max: int
    ) -> bool:
        """Keep a new endpoint, which is sent what happens from now on; False where there are as many as there may be.

        Two at once may both be the last one: the number is there to be bounded, not exact.
        """
        rows = await fetch(
            self._pool,
            """
            INSERT INTO quota.webhook_endpoint (
                org_id, endpoint_id, url, types, description, secret, position, created_at
            )
            SELECT $1, $2, $3, $4, $5, $6,
                (SELECT coalesce(max(e.position), 0) FROM quota.quota_event AS e WHERE e.org_id = $1), $7
            WHERE (SELECT count(*) FROM quota.webhook_endpoint AS w WHERE w.org_id = $1) < $8
            RETURNING endpoint_id
            """,
            org_id,
            endpoint.endpoint_id,
            endpoint.url,
            [each.value for each in endpoint.types],
            endpoint.description,
            secret,
            endpoint.created_at,
            endpoints_max,
        )
        return bool(rows)

    async def find_endpoint(self, org_id: OrgId, endpoint_id: WebhookEndpointId) -> WebhookEndpoint | None:
        """The organization's endpoint of that id."""
        rows = await fetch(
            self._pool,
            f"SELECT {_ENDPOINT_COLUMNS} FROM quota.webhook_endpoint WHERE org_id = $1 AND endpoint_id = $2",
            org_id,
            endpoint_id,
        )
        return endpoint_from_row(rows[0]) if rows else None

    async def list_endpoints(self, org_id: OrgId, *, after: UUID | None, limit: int) -> list[WebhookEndpoint]:
        """Up to `limit` endpoints with ids above `after`, the oldest first."""
        rows = await fetch(
            self._pool,
            f"""
            SELECT {_ENDPOINT_COLUMNS}
            FROM quota.webhook_endpoint
            WHERE org_id = $1 AND ($2::uuid IS NULL OR endpoint_id > $2)
            ORDER BY endpoint_id
            LIMIT $3
            """,
            org_id,
            after,
            limit,
        )
        return [endpoint_from_row(row) for row in rows]

    async def delete_endpoint(self, org_id: OrgId, endpoint_id: WebhookEndpointId) -> bool:
        """Remove the endpoint with its deliveries; False where there was none."""
        rows = await fetch(
            self._pool,
            "DELETE FROM quota.webhook_endpoint WHERE org_id = $1 AND endpoint_id = $2 RETURNING endpoint_id",
            org_id,
            endpoint_id,
        )
        return bool(rows)

    async def replace_secret(
        self, org_id: OrgId, endpoint_id: WebhookEndpointId, secret: bytes, *, previous_until: datetime
    ) -> WebhookEndpoint | None:
        """Sign with `secret`, until `previous_until` also with the one it replaces; None without such an endpoint."""
        rows = await fetch(
            self._pool,
            f"""
            UPDATE quota.webhook_endpoint
            SET secret = $3, previous_secret = secret, previous_secret_until = $4
            WHERE org_id = $1 AND endpoint_id = $2
            RETURNING {_ENDPOINT_COLUMNS}
            """,
            org_id,
            endpoint_id,
            secret,
            previous_until,
        )
        return endpoint_from_row(rows[0]) if rows else None

    async def list_deliveries(
        self, org_id: OrgId, endpoint_id: WebhookEndpointId, *, before: int | None, limit: int
    ) -> list[Delivery]:
        """Up to `limit` deliveries below the position `before` (None: any), descending."""
        rows = await fetch(
            self._pool,
            """
            WITH delivery AS (
                SELECT org_id, endpoint_id, position, state, created_at, attempt_after
                FROM quota.webhook_delivery
                WHERE org_id = $1 AND endpoint_id = $2 AND ($3::bigint IS NULL OR position < $3)
                ORDER BY position DESC
                LIMIT $4
            )
            SELECT d.position, e.type, d.state, d.created_at, d.attempt_after,
                a.attempted_at, a.duration_ms, a.status_code, a.error
            FROM delivery AS d
            JOIN quota.quota_event AS e ON e.org_id = d.org_id AND e.position = d.position
            LEFT JOIN quota.webhook_attempt AS a
                ON a.org_id = d.org_id AND a.endpoint_id = d.endpoint_id AND a.position = d.position
            ORDER BY d.position DESC, a.number
            """,
            org_id,
            endpoint_id,
            before,
            limit,
        )
        return [delivery_from_rows(list(of_one)) for _, of_one in groupby(rows, key=lambda row: row["position"])]


class WebhookDeliveryStore:
    """Deliveries of all organizations, as workers see them; any number of workers may share them.

    Every method raises Unavailable without the database.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def add_deliveries(self, *, now: datetime, endpoints_max: int, events_max: int) -> bool:
        """Give quota events that endpoints have not seen their deliveries; whether there may be more.

        Args:
            endpoints_max: How many endpoints, at most, take part.
            events_max: How many positions each moves on, at most.
        """
        rows = await fetch(
            self._pool,
            """
            WITH behind AS MATERIALIZED (
                SELECT w.org_id, w.endpoint_id, w.types, w.position AS seen,
                    least(last.position, w.position + $3) AS through
                FROM quota.webhook_endpoint AS w
                CROSS JOIN LATERAL (
                    -- Positions become visible in order: up to the last that is visible, none is missing.
                    SELECT max(e.position) AS position
                    FROM quota.quota_event AS e
                    WHERE e.org_id = w.org_id
                ) AS last
                WHERE w.disabled_at IS NULL AND w.position < last.position
                LIMIT $2
                -- Who moves a cursor holds its row, so nobody makes the same deliveries.
                FOR UPDATE OF w SKIP LOCKED
            ),
            added AS (
                INSERT INTO quota.webhook_delivery (
                    org_id, endpoint_id, position, state, attempt_count, attempt_after, created_at
                )
                SELECT b.org_id, b.endpoint_id, e.position, 'PENDING', 0, $1, $1
                FROM behind AS b
                JOIN quota.quota_event AS e
                    ON e.org_id = b.org_id AND e.position > b.seen AND e.position <= b.through
                WHERE cardinality(b.types) = 0 OR e.type = ANY (b.types)
            )
            UPDATE quota.webhook_endpoint AS w
            SET position = b.through
            FROM behind AS b
            WHERE w.org_id = b.org_id AND w.endpoint_id = b.endpoint_id
            RETURNING w.endpoint_id
            """,
            now,
            endpoints_max,
            events_max,
        )
        return bool(rows)

    async def claim_deliveries(
        self,
        *,
        now: datetime,
        leased_until: datetime,
        busy: Sequence[WebhookEndpointId],
        endpoints_max: int,
        deliveries_max: int,
    ) -> list[DueDelivery]:
        """What is due, of those endpoints first that have waited longest; nobody else gets it before `leased_until`.

        Args:
            busy: Endpoints that are left out.
            endpoints_max: Of how many endpoints, at most.
            deliveries_max: How many of each, at most.
        """
        rows = await fetch(
            self._pool,
            """
            WITH endpoint AS MATERIALIZED (
                SELECT w.org_id, w.endpoint_id, w.url, w.secret, w.previous_secret, w.previous_secret_until
                FROM quota.webhook_endpoint AS w
                CROSS JOIN LATERAL (
                    SELECT d.attempt_after
                    FROM quota.webhook_delivery AS d
                    WHERE d.org_id = w.org_id AND d.endpoint_id = w.endpoint_id AND d.state = 'PENDING'
                        AND d.attempt_after <= $1
                    ORDER BY d.attempt_after
                    LIMIT 1
                ) AS oldest
                WHERE w.endpoint_id <> ALL ($3::uuid[])
                ORDER BY oldest.attempt_after
                LIMIT $4
            ),
            due AS MATERIALIZED (
                SELECT w.*, d.position
                FROM endpoint AS w
                CROSS JOIN LATERAL (
                    SELECT d.position
                    FROM quota.webhook_delivery AS d
                    WHERE d.org_id = w.org_id AND d.endpoint_id = w.endpoint_id AND d.state = 'PENDING'
                        AND d.attempt_after <= $1
                    ORDER BY d.attempt_after
                    LIMIT $5
                    FOR UPDATE SKIP LOCKED
                ) AS d
            ),
            claimed AS (
                UPDATE quota.webhook_delivery AS d
                SET attempt_after = $2
                FROM due
                WHERE d.org_id = due.org_id AND d.endpoint_id = due.endpoint_id AND d.position = due.position
                RETURNING d.org_id, d.endpoint_id, d.position, d.attempt_count
            )
            SELECT c.org_id, c.endpoint_id, c.attempt_count, due.url, due.secret,
                CASE WHEN due.previous_secret_until > $1 THEN due.previous_secret END AS previous_secret,
                e.position, e.type, e.tenant_id, e.event_type, e.occurred_at, e.limit_value, e.enforcement_mode,
                e.period, e.soft_limit_percent, e.period_start, e.period_end, e.stored, e.grace_ends_at
            FROM claimed AS c
            JOIN due USING (org_id, endpoint_id, position)
            JOIN quota.quota_event AS e ON e.org_id = c.org_id AND e.position = c.position
            ORDER BY c.org_id, c.endpoint_id, c.position
            """,
            now,
            leased_until,
            busy,
            endpoints_max,
            deliveries_max,
        )
        return [due_delivery_from_row(row) for row in rows]

    async def record_attempt(
        self, due: DueDelivery, attempt: Attempt, *, now: datetime, next_attempt_at: datetime | None
    ) -> None:
        """Keep an attempt and what follows from it: a success is final, a failure is not where another succeeded.

        Nothing is kept of an endpoint that was deleted meanwhile.

        Args:
            next_attempt_at: After a failure; None to give the message up.
        """
        await fetch(
            self._pool,
            """
            WITH attempted AS (
                UPDATE quota.webhook_delivery
                SET attempt_count = attempt_count + 1,
                    state = CASE
                        WHEN $5 THEN 'DELIVERED'
                        WHEN state = 'PENDING' AND $6::timestamptz IS NULL THEN 'FAILED'
                        ELSE state
                    END,
                    attempt_after = CASE WHEN state = 'PENDING' AND NOT $5 THEN $6 END,
                    closed_at = CASE WHEN $5 OR $6 IS NULL THEN coalesce(closed_at, $4) ELSE closed_at END
                WHERE org_id = $1 AND endpoint_id = $2 AND position = $3
                RETURNING org_id, endpoint_id, position, attempt_count
            )
            INSERT INTO quota.webhook_attempt (
                org_id, endpoint_id, position, number, attempted_at, duration_ms, status_code, error
            )
            SELECT org_id, endpoint_id, position, attempt_count, $7, $8, $9, $10
            FROM attempted
            """,
            due.org_id,
            due.endpoint_id,
            due.event.position,
            now,
            attempt.is_success,
            next_attempt_at,
            attempt.attempted_at,
            attempt.duration_ms,
            attempt.status_code,
            attempt.error,
        )

    async def disable_endpoint(self, org_id: OrgId, endpoint_id: WebhookEndpointId, *, now: datetime) -> None:
        """Send nothing more there, and give up what was to be sent."""

        async def disable(connection: Connection) -> None:
            await connection.execute(
                """
                UPDATE quota.webhook_endpoint
                SET disabled_at = $3
                WHERE org_id = $1 AND endpoint_id = $2 AND disabled_at IS NULL
                """,
                org_id,
                endpoint_id,
                now,
            )
            # A statement of its own: it sees what was added before the endpoint was locked.
            await connection.execute(
                """
                UPDATE quota.webhook_delivery
                SET state = 'FAILED', attempt_after = NULL, closed_at = $3
                WHERE org_id = $1 AND endpoint_id = $2 AND state = 'PENDING'
                """,
                org_id,
                endpoint_id,
                now,
            )

        await run_transaction(self._pool, disable)

    async def delete_closed_deliveries(self, *, closed_before: datetime, limit: int) -> int:
        """Forget up to `limit` deliveries that were closed before; how many that were."""
        rows = await fetch(
            self._pool,
            """
            DELETE FROM quota.webhook_delivery
            WHERE (org_id, endpoint_id, position) IN (
                SELECT org_id, endpoint_id, position
                FROM quota.webhook_delivery
                WHERE state <> 'PENDING' AND closed_at < $1
                ORDER BY closed_at
                LIMIT $2
            )
            RETURNING position
            """,
            closed_before,
            limit,
        )
        return len(rows)


def endpoint_from_row(row: Record) -> WebhookEndpoint:
    """An endpoint from `_ENDPOINT_COLUMNS`."""
    return WebhookEndpoint(
        endpoint_id=WebhookEndpointId(row["endpoint_id"]),
        url=row["url"],
        types=tuple(QuotaEventType(each) for each in row["types"]),
        description=row["description"],
        created_at=row["created_at"],
        disabled_at=row["disabled_at"],
    )


def delivery_from_rows(rows: Sequence[Record]) -> Delivery:
    """A delivery from a row for each of its attempts, or one without."""
    first = rows[0]
    return Delivery(
        position=first["position"],
        type=QuotaEventType(first["type"]),
        state=DeliveryState(first["state"]),
        created_at=first["created_at"],
        next_attempt_at=first["attempt_after"],
        attempts=tuple(
            Attempt(row["attempted_at"], row["duration_ms"], row["status_code"], row["error"])
            for row in rows
            if row["attempted_at"] is not None
        ),
    )


def due_delivery_from_row(row: Record) -> DueDelivery:
    """What is to be sent, from the columns of `claim_deliveries`."""
    secrets = (row["secret"], row["previous_secret"])
    return DueDelivery(
        org_id=OrgId(row["org_id"]),
        endpoint_id=WebhookEndpointId(row["endpoint_id"]),
        url=row["url"],
        secrets=tuple(secret for secret in secrets if secret is not None),
        attempt_count=row["attempt_count"],
        event=event_from_row(row),
    )

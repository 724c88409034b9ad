"""An organization with tenants to be billed at once, and what must be true when they are."""

from __future__ import annotations

import grpc.aio

from tests.support.billing import Organization, World
from usameter.billing.v1 import invoice_pb2
from usameter.common.v1 import job_pb2


async def new_seller(world: World, channel: grpc.aio.Channel, *, tenants: int) -> Organization:
    """Tenant 0 has used 1 call and 1 image in January, tenant 1 two of each, and so on: 1.02 for each."""
    org = world.organization(channel)
    await org.set_price("call", "0.02")
    await org.set_price("image", "1")
    org.seal(
        *((f"tenant_{n:04}", kind, "2026-01-10", str(n + 1)) for n in range(tenants) for kind in ("call", "image"))
    )
    return org


async def assert_billed_once(world: World, org: Organization, *, tenants: int) -> None:
    """I5, I6 and I7 over the whole organization."""
    row = await world.admin.fetchrow(
        """
        SELECT count(*) AS invoices, count(DISTINCT tenant_id) AS tenants, max(number) AS last_number,
               sum(total) AS total, (SELECT count(*) FROM billing.snapshot_cover WHERE org_id = $1) AS covered,
               (SELECT count(*) FROM billing.pending_use WHERE org_id = $1) AS pending,
               (SELECT sum(amount) FROM billing.invoice_line WHERE org_id = $1) AS lines
        FROM billing.invoice WHERE org_id = $1
        """,
        org.org_id,
    )
    assert row is not None
    assert (row["invoices"], row["tenants"], row["last_number"]) == (tenants, tenants, tenants)
    assert (row["covered"], row["pending"]) == (2 * tenants, 0)
    units = tenants * (tenants + 1) // 2
    assert row["total"] == row["lines"]
    assert row["total"] * 100 == units * 102


async def show(org: Organization, job: job_pb2.Job) -> job_pb2.Job:
    """The job as it is now."""
    shown: job_pb2.Job = await org.invoices.GetJob(invoice_pb2.GetJobRequest(job_id=job.id), metadata=org.metadata)
    return shown

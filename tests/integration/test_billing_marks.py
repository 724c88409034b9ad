"""Telling ingest which invoices cover which snapshots."""

from __future__ import annotations

from tests.conftest import Database
from tests.support.billing import open_world, until


async def test_an_organization_that_ingest_refuses_does_not_keep_the_others_waiting(database: Database) -> None:
    async with open_world(database) as world:
        world.ledger.refuses_marks = True
        async with world.open_service() as channel:
            # Marks are delivered in the order of their invoices, so the refused ones come first.
            refused, served = world.organization(channel), world.organization(channel)
            sealed = []
            for org in (refused, served):
                await org.set_price("call", "0.02")
                sealed.append(org.seal(("acme", "call", "2026-01-10", "100")))
                await org.bill("acme")
        world.ledger.refuses_marks = False
        world.ledger.refused_org_ids.add(str(refused.org_id))
        await world.admin.execute("UPDATE billing.mark_outbox SET attempt_after = now()")
        async with world.open_service():
            await until(
                lambda: world.admin.fetchval(
                    "SELECT array_agg(org_id) = ARRAY[$1::uuid] FROM billing.mark_outbox", refused.org_id
                )
            )
        assert list(world.ledger.marks) == sealed[1]

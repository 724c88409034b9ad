"""Reconciling as a caller does it, and what must hold once it is done (invariant I4)."""

from __future__ import annotations

from datetime import UTC
from typing import Any

from tests.support.services import Services
from usameter.ingest.v1 import reconciliation_pb2, reconciliation_pb2_grpc

# Counters, in both units, that are not what is stored, once no reservation is open and the outbox is empty.
WRONG = """
    SELECT * FROM (SELECT org_id, tenant_id, event_type, hour, sum(quantity) AS quantity
                   FROM ingest.usage_hour GROUP BY 1, 2, 3, 4) AS stored
    FULL JOIN quota.usage_hour AS counted USING (org_id, tenant_id, event_type, hour)
    WHERE coalesce(stored.quantity, 0) <> coalesce(counted.quantity, 0)
    """
WRONG_DAYS = """
    SELECT * FROM (SELECT org_id, tenant_id, event_type, day, sum(quantity) AS quantity
                   FROM ingest.usage_day GROUP BY 1, 2, 3, 4) AS stored
    FULL JOIN quota.usage_day AS counted USING (org_id, tenant_id, event_type, day)
    WHERE coalesce(stored.quantity, 0) <> coalesce(counted.quantity, 0)
    """


async def reconcile(
    services: Services, *, fix: bool = False
) -> tuple[int, list[Any], list[reconciliation_pb2.StuckReservation]]:
    """The number compared; of what differs (tenant, unit, start, counter, expected, fixed); what is stuck."""
    stub: Any = reconciliation_pb2_grpc.ReconciliationServiceStub(services.ingest)
    compared, differences, stuck, token = 0, [], [], ""
    while True:
        request = reconciliation_pb2.ReconcileQuotasRequest(fix=fix, page_token=token)
        page = await stub.ReconcileQuotas(request, metadata=services.metadata, timeout=30)
        compared += page.compared
        differences += [
            (
                each.tenant_id,
                reconciliation_pb2.CounterUnit.Name(each.unit),
                each.start.ToDatetime(UTC),
                each.counter,
                each.expected,
                each.fixed,
            )
            for each in page.differences
        ]
        stuck += page.stuck_reservations
        token = page.next_page_token
        if not token:
            return compared, differences, stuck

"""What billing charges of base fees is never taken for charged twice."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import UUID, uuid4

from hypothesis import given
from hypothesis import strategies as st

from usameter_billing.domain.base_fees import BilledFee, due_fee_lines
from usameter_billing.domain.invoice import BilledLine, DueLine, FeeCharge
from usameter_billing.domain.plan import Plan, PlanInterval
from usameter_billing.domain.subscription import Phase, Subscription
from usameter_proof.amounts import check_amounts
from usameter_proof.documents import proof_from_json

START = datetime(2026, 1, 31, tzinfo=UTC)
PLANS = tuple(
    Plan(UUID(int=number), "Plan", Decimal(fee), "USD", interval, (), START)
    for number, (fee, interval) in enumerate(
        (("29", PlanInterval.MONTHLY), ("99.99", PlanInterval.MONTHLY), ("365", PlanInterval.YEARLY)), start=1
    )
)


def document(lines: list[DueLine]) -> bytes:
    """The proof of an invoice of these lines."""
    total = f"{sum((line.amount for line in lines), Decimal(0)):.2f}"
    return json.dumps(
        {
            "format": "usameter.invoice-proof.v1",
            "invoice": {
                "id": "inv_1",
                "tenant_id": "acme",
                "currency": "USD",
                "period_start": "2026-01-01T00:00:00Z",
                "period_end": "2026-02-01T00:00:00Z",
                "through_epoch": 0,
                "subtotal": total,
                "tax": "0.00",
                "total": total,
                "amount_due": "0.00",
                "lines": [written(line) for line in lines],
            },
        }
    ).encode()


def written(line: DueLine) -> dict[str, object]:
    assert isinstance(line.charge, FeeCharge)
    return {
        "id": f"lin_{uuid4().hex}",
        "kind": line.kind.value,
        "period_start": line.period.start.isoformat(),
        "period_end": line.period.end.isoformat(),
        "base_fee": {
            "subscription_id": f"sub_{line.charge.subscription_id.hex}",
            "plan_id": f"pln_{line.charge.plan.plan_id.hex}",
            "amount": f"{line.charge.plan.base_fee}",
            "seconds": line.charge.seconds,
            "interval_seconds": line.period.seconds,
        },
        "rated_amount": f"{line.rated_amount:.2f}",
        "amount": f"{line.amount:.2f}",
        "tax_rate": "0",
        "previously_billed": [
            {
                "invoice_id": f"inv_{each.invoice_id.hex}",
                "line_id": f"lin_{each.line_id.hex}",
                "amount": f"{each.amount}",
            }
            for each in line.previously_billed
        ],
    }


changes = st.lists(st.tuples(st.integers(0, 200), st.sampled_from(PLANS), st.integers(0, 400)), max_size=6)


@given(st.sampled_from(PLANS), changes, st.none() | st.integers(0, 400), st.booleans())
def test_no_fee_is_found_however_plans_are_changed_and_invoices_voided(
    first: Plan, steps: list[tuple[int, Plan, int]], end: int | None, voids: bool
) -> None:
    subscription = Subscription(uuid4(), "acme", START, None, (Phase(START, first),), START)
    billed: dict[tuple[UUID, UUID, datetime], BilledFee] = {}
    moments = [*steps, (0, first, 400)]
    for number, (after, plan, until) in enumerate(moments):
        lines = due_fee_lines(
            [subscription], list(billed.values()), until=START + timedelta(days=until), tax_rate=Decimal(0)
        )
        assert [str(each) for each in check_amounts(proof_from_json(document(lines)))] == []
        # Every other invoice is voided, and its fees are due again.
        if not (voids and number % 2):
            bill(billed, lines)
        subscription = subscription.changed(plan, START + timedelta(days=after))
    if end is not None:
        subscription = subscription.ended(START + timedelta(days=end))
    lines = due_fee_lines([subscription], list(billed.values()), until=START + timedelta(days=800), tax_rate=Decimal(0))
    assert [str(each) for each in check_amounts(proof_from_json(document(lines)))] == []


def bill(billed: dict[tuple[UUID, UUID, datetime], BilledFee], lines: list[DueLine]) -> None:
    for line in lines:
        assert isinstance(line.charge, FeeCharge)
        subject = (line.charge.subscription_id, line.charge.plan.plan_id, line.period.start)
        paid = (*line.previously_billed, BilledLine(uuid4(), uuid4(), line.amount))
        billed[subject] = BilledFee(line.charge.subscription_id, line.charge.plan, line.period, paid, Decimal(0))

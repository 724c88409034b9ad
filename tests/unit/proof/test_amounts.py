"""Invoices that would charge twice where no snapshot shows it, or have lines of two kinds."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usameter_proof.amounts import check_amounts
from usameter_proof.documents import UnusableDocument, proof_from_json

JANUARY, FEBRUARY = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"
DAYS = 31 * 86_400


def standing(start: str, end: str, **changes: Any) -> dict[str, Any]:
    """A line of no use, for which the price of a plan charges 100 all the same."""
    price = {"model": "flat", "currency": "USD", "flat_amount": "100"}
    return {
        "id": f"lin_{start}",
        "kind": "USAGE" if (start, end) == (JANUARY, FEBRUARY) and "previously_billed" not in changes else "TRUE_UP",
        "event_type": "call",
        "period_start": start,
        "period_end": end,
        "price": {"id": "prc_1", "event_type": "call", "plan_id": "pln_1", "price": price},
        "quantity": "0",
        "rated_amount": "100.00",
        "breakdown": [{"quantity": "0", "unit_amount": "0", "flat_amount": "100", "amount": "100"}],
        "amount": "100.00",
        "tax_rate": "0",
        **changes,
    }


def fee(start: str, end: str, **changes: Any) -> dict[str, Any]:
    """A whole base fee of 29 for an interval of 31 days."""
    return {
        "id": f"lin_{start}",
        "kind": "BASE_FEE",
        "period_start": start,
        "period_end": end,
        "base_fee": {
            "subscription_id": "sub_1",
            "plan_id": "pln_1",
            "amount": "29",
            "seconds": DAYS,
            "interval_seconds": DAYS,
        },
        "rated_amount": "29.00",
        "amount": "29.00",
        "tax_rate": "0",
        **changes,
    }


def findings(*lines: dict[str, Any], **changes: Any) -> list[str]:
    """What is found wrong with an invoice of January with these lines, whose sums are right."""
    total = f"{sum(Decimal(line['amount']) for line in lines):.2f}"
    sums = {"subtotal": total, "tax": "0.00", "total": total, "amount_due": total}
    period = {"period_start": JANUARY, "period_end": FEBRUARY}
    of_tenant = {"id": "inv_1", "tenant_id": "acme", "currency": "USD", "through_epoch": 0}
    invoice = {**of_tenant, **period, "lines": lines, **sums}
    document = {"format": "usameter.invoice-proof.v1", "invoice": {**invoice, **changes}}
    return [str(each) for each in check_amounts(proof_from_json(json.dumps(document).encode()))]


def test_periods_and_intervals_that_follow_each_other_are_fine() -> None:
    march = "2026-03-01T00:00:00Z"
    assert findings(standing(JANUARY, FEBRUARY), standing(FEBRUARY, march), fee(JANUARY, FEBRUARY)) == []
    assert findings(fee("2025-12-01T00:00:00Z", JANUARY), fee(JANUARY, FEBRUARY)) == []


@pytest.mark.parametrize(
    "lines",
    [
        (standing(JANUARY, FEBRUARY), standing("2026-01-02T00:00:00Z", FEBRUARY)),
        (standing("2026-01-31T00:00:00Z", FEBRUARY), standing(JANUARY, FEBRUARY)),
        (fee(JANUARY, FEBRUARY), fee("2026-01-31T00:00:00Z", "2026-03-03T00:00:00Z")),
    ],
)
def test_no_time_is_billed_by_two_lines(lines: tuple[dict[str, Any], ...]) -> None:
    found, *_ = findings(*lines)
    assert "bills the same as line" in found


def charged(plan_id: str, start: str, end: str, days: int, **changes: Any) -> dict[str, Any]:
    """A base fee of 1 a day, of which `days` are charged."""
    interval = (datetime.fromisoformat(end) - datetime.fromisoformat(start)).days
    base_fee = {
        "subscription_id": "sub_1",
        "plan_id": plan_id,
        "amount": f"{interval}",
        "seconds": days * 86_400,
        "interval_seconds": interval * 86_400,
        **changes,
    }
    amount = f"{days}.00"
    return fee(start, end, id=f"lin_{plan_id}_{start}", base_fee=base_fee, rated_amount=amount, amount=amount)


NEXT_YEAR, MARCH = "2027-01-01T00:00:00Z", "2026-03-01T00:00:00Z"


@pytest.mark.parametrize(
    "lines",
    [
        # A whole year, and a month of it.
        (charged("yearly", JANUARY, NEXT_YEAR, 365), charged("monthly", JANUARY, FEBRUARY, 31)),
        (charged("yearly", JANUARY, NEXT_YEAR, 335), charged("monthly", JANUARY, FEBRUARY, 31)),
        # Two whole intervals that overlap.
        (charged("one", JANUARY, FEBRUARY, 31), charged("two", "2026-01-15T00:00:00Z", "2026-02-15T00:00:00Z", 31)),
        # Less than the year together, and twice the January.
        (
            charged("yearly", JANUARY, NEXT_YEAR, 1),
            charged("one", JANUARY, FEBRUARY, 31),
            charged("two", JANUARY, FEBRUARY, 31),
        ),
    ],
)
def test_no_second_of_a_subscription_is_charged_by_two_plans(lines: tuple[dict[str, Any], ...]) -> None:
    (found,) = findings(*lines)
    assert "more of its interval" in found
    assert len(findings(*reversed(lines))) == 1


def test_plans_of_different_intervals_share_a_year() -> None:
    months = charged("monthly", JANUARY, FEBRUARY, 31), charged("monthly", FEBRUARY, MARCH, 10)
    assert findings(charged("yearly", JANUARY, NEXT_YEAR, 365 - 41), *months) == []
    assert len(findings(charged("yearly", JANUARY, NEXT_YEAR, 365 - 40), *months)) == 1
    # Other subscriptions have a time of their own, and a fee that is given back charges none.
    other = charged("yearly", JANUARY, NEXT_YEAR, 365, subscription_id="sub_2")
    assert findings(charged("yearly", JANUARY, NEXT_YEAR, 0), *months, other) == []


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 7), st.integers(0, 7)), max_size=5))
def test_fees_are_fine_exactly_where_each_line_can_have_days_of_its_own(shares: list[tuple[int, int, int]]) -> None:
    jobs = [(start, start + length, min(days, length)) for start, length, days in shares]
    lines = [
        charged(f"plan {number}", f"2026-01-{start + 1:02}T00:00:00Z", f"2026-01-{end + 1:02}T00:00:00Z", days)
        for number, (start, end, days) in enumerate(jobs)
    ]
    # Hall's theorem: no stretch of time is asked for more days than it has by the intervals within it.
    fits = all(
        sum(days for start, end, days in jobs if first <= start and end <= last) <= last - first
        for first in range(14)
        for last in range(first + 1, 14)
    )
    assert (findings(*lines) == []) == fits


def test_two_plans_share_an_interval() -> None:
    def part(plan_id: str, days: int) -> dict[str, Any]:
        charged = {**fee(JANUARY, FEBRUARY)["base_fee"], "plan_id": plan_id, "amount": "31", "seconds": days * 86_400}
        return fee(JANUARY, FEBRUARY, id=plan_id, base_fee=charged, rated_amount=f"{days}", amount=f"{days}")

    assert findings(part("pln_1", 10), part("pln_2", 21)) == []
    (found,) = findings(part("pln_1", 10), part("pln_2", 22))
    assert "more of its interval" in found


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (JANUARY, JANUARY),
        (FEBRUARY, JANUARY),
        (JANUARY, "2026-01-31T12:00:00Z"),
        ("2026-01-01T00:00:00.000001Z", FEBRUARY),
        ("2026-01-01T00:00:00+01:00", FEBRUARY),
    ],
)
def test_a_period_is_of_whole_days_and_at_least_one(start: str, end: str) -> None:
    (found,) = findings(standing(start, end))
    assert "whole UTC days" in found


def test_a_base_fee_has_no_event_type_whose_snapshots_it_would_swallow() -> None:
    (found,) = findings(fee(JANUARY, FEBRUARY, event_type="call"))
    assert "is neither of use" in found


@pytest.mark.parametrize("billed", [[("inv_0", "lin_0"), ("inv_0", "lin_0")], [("inv_1", "lin_x")]])
def test_a_line_was_billed_before_once_and_by_another_invoice(billed: list[tuple[str, str]]) -> None:
    credits = [{"invoice_id": invoice, "line_id": line, "amount": "-50.00"} for invoice, line in billed]
    amount = f"{100 + 50 * len(billed)}.00"
    (found,) = findings(standing(JANUARY, FEBRUARY, amount=amount, previously_billed=credits))
    assert "billed before" in found


BEFORE: dict[str, Any] = {"previously_billed": [{"invoice_id": "inv_0", "line_id": "lin_0", "amount": "0.00"}]}


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (standing(JANUARY, FEBRUARY), "USAGE"),
        (standing(JANUARY, FEBRUARY, **BEFORE), "TRUE_UP"),
        (standing("2025-12-01T00:00:00Z", JANUARY), "TRUE_UP"),
        (standing(JANUARY, "2026-01-31T00:00:00Z"), "TRUE_UP"),
        (fee(JANUARY, FEBRUARY), "BASE_FEE"),
        (fee("2025-12-01T00:00:00Z", JANUARY), "BASE_FEE"),
        (fee(JANUARY, FEBRUARY, **BEFORE), "TRUE_UP"),
    ],
)
def test_a_kind_is_what_the_rest_of_the_line_makes_it(line: dict[str, Any], kind: str) -> None:
    for said in ("USAGE", "TRUE_UP", "BASE_FEE", "NONSENSE"):
        found = findings({**line, "kind": said})
        assert [each.partition(": ")[2] for each in found] == (
            [] if said == kind else [f'is of the kind "{said}", and what else it says makes it {kind}']
        )


def test_a_currency_is_a_code() -> None:
    assert findings(fee(JANUARY, FEBRUARY), currency="EUR") == []
    with pytest.raises(UnusableDocument, match="currency"):
        findings(fee(JANUARY, FEBRUARY), currency="usd")

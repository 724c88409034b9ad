"""The billing report: sums by currency over invoices of every state."""

from __future__ import annotations

from typing import Any

import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.billing import FEBRUARY, JANUARY, Organization, open_world
from tests.support.services import reason_of
from usameter.billing.v1 import invoice_pb2, report_pb2
from usameter_core.grpc.timestamps import datetime_in, timestamp_from_datetime
from usameter_core.period import Period

SUMS = ("billed", "paid", "pending", "overdue", "uncollectible", "credited", "credit_drawn", "void", "draft")


async def report(org: Organization, period: Period) -> dict[str, dict[str, tuple[str, int]]]:
    request = report_pb2.GetBillingReportRequest(
        period_start=timestamp_from_datetime(period.start), period_end=timestamp_from_datetime(period.end)
    )
    answer: Any = await org.reports.GetBillingReport(request, metadata=org.metadata)
    return {
        each.currency: {name: (getattr(each, name).amount, getattr(each, name).count) for name in SUMS}
        for each in answer.currencies
    }


async def test_every_invoice_is_summed_where_it_stands(database: Database) -> None:
    async with open_world(database) as world, world.open_service() as channel:
        org = world.organization(channel)
        await org.set_price("image", "1")
        await org.set_price("film", "7", currency="JPY")
        states = ("paid", "open", "uncollectible", "void", "credited")
        org.seal(*((state, "image", "2026-01-10", "10") for state in states), ("open", "film", "2026-01-10", "3"))
        bills = {state: await org.bill(state) for state in states if state != "open"}
        await org.draft("open")
        for draft in await org.list(tenant_id="open"):
            bills[draft.currency] = await org.finalize(draft.id)
        await org.mark_paid(bills["paid"].id)
        await org.mark_uncollectible(bills["uncollectible"].id)
        await org.void(bills["void"].id)
        await org.credit(bills["credited"].id, "3")
        # A credit of 4, on which the draft below does not draw, and February's invoice does.
        org.seal(("paid", "image", "2026-01-10", "-4"))
        assert (await org.bill("paid")).total == "-4.00"
        org.seal(("paid", "image", "2026-02-10", "5"), ("late", "image", "2026-01-10", "2"))
        await org.bill("paid", FEBRUARY)
        await org.draft("late")

        due_at = datetime_in(bills["USD"], "due_at")
        assert due_at is not None
        expected = {
            "billed": ("36.00", 5),
            "paid": ("10.00", 1),
            "pending": ("17.00", 2),
            "overdue": ("0.00", 0),
            "uncollectible": ("10.00", 1),
            "credited": ("3.00", 1),
            "credit_drawn": ("0.00", 0),
            "void": ("10.00", 1),
            "draft": ("2.00", 1),
        }
        january = await report(org, JANUARY)
        assert january["USD"] == expected
        assert list(january) == ["JPY", "USD"]
        assert (january["JPY"]["billed"], january["JPY"]["pending"]) == (("21", 1), ("21", 1))
        february = (await report(org, FEBRUARY))["USD"]
        assert (february["billed"], february["credit_drawn"]) == (("5.00", 1), ("4.00", 1))
        assert (await report(org, Period(JANUARY.start, FEBRUARY.end)))["USD"]["billed"] == ("41.00", 6)
        # Periods are counted where they start.
        assert await report(org, Period(JANUARY.end, FEBRUARY.start + (JANUARY.end - JANUARY.start))) == {
            "USD": february
        }
        world.clock.set(due_at)
        assert (await report(org, JANUARY))["USD"] == expected | {"overdue": ("17.00", 2)}
        assert [each.status for each in await org.list(overdue=True)].count(invoice_pb2.open) == 4


async def test_bounds_in_the_wrong_order_are_refused(database: Database) -> None:
    async with open_world(database) as world, world.open_service() as channel:
        org = world.organization(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await report(org, Period(JANUARY.start, JANUARY.start))
        assert reason_of(caught.value) == "INVALID_ARGUMENT"
        assert await report(org, JANUARY) == {}

"""Groups as tables, findings as verdicts, and what is left of a quota."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

from usameter_quota.domain.admission import (
    Finding,
    FindingKind,
    UsageItem,
    tabulate_usage,
    verdicts_from_findings,
)
from usameter_quota.domain.limits import EnforcementMode, LimitPeriod, LimitTerms, Quota

TEN = datetime(2026, 1, 15, 10, tzinfo=UTC)
ELEVEN = datetime(2026, 1, 15, 11, tzinfo=UTC)


def finding(request: int, kind: FindingKind) -> Finding:
    return Finding(request, kind, "t", "e", Decimal(10), Decimal(9), Decimal(2), None)


def quota(*, limit: str, current: str) -> Quota:
    terms = LimitTerms(Decimal(limit), EnforcementMode.HARD, LimitPeriod.MONTHLY, 80, None)
    return Quota("t", "e", terms, False, Decimal(current), Decimal(0), ELEVEN, None, TEN)


def test_cells_are_distinct_and_hold_the_totals_of_all_requests() -> None:
    table = tabulate_usage(
        [
            [UsageItem("a", "x", TEN, Decimal("1.5")), UsageItem("a", "x", ELEVEN, Decimal(1))],
            [UsageItem("b", "x", TEN, Decimal(4)), UsageItem("a", "x", TEN, Decimal("0.25"))],
        ]
    )
    cells = list(zip(table.tenant_ids, table.event_types, table.hours, table.totals, strict=True))
    assert cells == [
        ("a", "x", TEN, Decimal("1.75")),
        ("a", "x", ELEVEN, Decimal(1)),
        ("b", "x", TEN, Decimal(4)),
    ]


def test_items_name_their_request_from_0_and_their_cell_from_1() -> None:
    item = UsageItem("a", "x", TEN, Decimal("2.5"))
    table = tabulate_usage([[item], [], [item, UsageItem("a", "y", TEN, Decimal(1))]])
    assert table.request_numbers == [0, 2, 2]
    assert table.cell_numbers == [1, 1, 2]
    assert table.quantities == ["2.5", "2.5", "1"]


def test_requests_that_nothing_was_found_on_are_admitted() -> None:
    refused, plain, warned = verdicts_from_findings(
        3, [finding(0, FindingKind.REFUSED), finding(2, FindingKind.QUOTA_SOFT_LIMIT)]
    )
    assert not refused.admitted
    assert [each.kind for each in refused.violations] == [FindingKind.REFUSED]
    assert plain.admitted
    assert not plain.warnings
    assert warned.admitted
    assert [each.kind for each in warned.warnings] == [FindingKind.QUOTA_SOFT_LIMIT]


def test_what_remains_is_never_below_zero() -> None:
    assert quota(limit="10", current="9.999999").remaining == Decimal("0.000001")
    assert quota(limit="10", current="10").remaining == 0
    assert quota(limit="10", current="12").remaining == 0

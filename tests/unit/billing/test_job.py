"""What becomes of a part of a bulk run that fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from usameter_billing.domain.job import Attempt, GivingUp, Part, PartState, Retry, after_failure, retry_after
from usameter_core.ids import OrgId, new_uuid
from usameter_core.period import month_of

FIVE_MINUTES = timedelta(minutes=5)
NEW = Part(
    org_id=OrgId(new_uuid()),
    job_id=new_uuid(),
    number=1,
    period=month_of(datetime(2026, 1, 5, tzinfo=UTC)),
    finalize=True,
    seller_name="Demo Inc.",
    after_tenant="",
    through_tenant="z",
    state=PartState.OPEN,
    problems=(),
    given_up=(),
    failures=0,
    alone_tenant=None,
)
TENANTS = tuple(f"tenant_{number:04}" for number in range(200))


def fail(part: Part, tenant_ids: tuple[str, ...] = TENANTS, *, is_lasting: bool = False) -> Retry | GivingUp:
    return after_failure(Attempt(part, tenant_ids[: part.batch_tenants]), is_lasting=is_lasting)


def after(part: Part, retry: Retry) -> Part:
    return replace(part, failures=retry.failures, alone_tenant=retry.alone_tenant)


def failing(part: Part, tenant_ids: tuple[str, ...] = TENANTS) -> Iterator[tuple[Part, timedelta]]:
    """The part at each attempt at the tenants up to the one that gives one up, and how long after it the next is."""
    while isinstance(verdict := fail(part, tenant_ids), Retry):
        yield part, verdict.after
        part = after(part, verdict)
    yield part, timedelta()


def test_what_fails_becomes_smaller_until_it_is_alone_and_then_is_given_up() -> None:
    attempts = list(failing(NEW))
    assert [part.batch_tenants for part, _ in attempts] == [200, 100, 50, 25, 12, 6, 3, *[1] * 11]
    assert [wait.total_seconds() for _, wait in attempts] == [1, 2, 4, 8, 16, *[32] * 12, 0]
    last, _ = attempts[-1]
    assert fail(last) == GivingUp("tenant_0000", PartState.OPEN, failures=7)
    assert after_failure(Attempt(last, TENANTS[:1], is_last=True), is_lasting=False) == GivingUp(
        "tenant_0000", PartState.DONE, failures=7
    )


@pytest.mark.parametrize("failures", range(40))
@pytest.mark.parametrize("alone_tenant", [None, "of_another"])
def test_nobody_is_given_up_whose_own_attempts_failed_for_less_than_five_minutes(
    failures: int, alone_tenant: str | None
) -> None:
    """Whatever failed before, of others or with others."""
    part = replace(NEW, failures=failures, alone_tenant=alone_tenant)
    attempts = list(failing(part, TENANTS[:1]))
    assert attempts[0][0] == part
    assert sum((wait for _, wait in attempts), timedelta()) >= FIVE_MINUTES


@pytest.mark.parametrize("failures", [0, 17, 10_000])
def test_an_attempt_that_has_named_nobody_gives_up_nobody(failures: int) -> None:
    part = replace(NEW, failures=failures, given_up=("a: Internal error",))
    for is_lasting in (False, True):
        verdict = fail(part, (), is_lasting=is_lasting)
        assert verdict == Retry(timedelta(seconds=1 if failures == 0 else 32), failures + 1, None)


def test_lasting_failures_are_not_waited_for_but_others_are() -> None:
    part = NEW
    tried = []
    while isinstance(verdict := fail(part, is_lasting=True), Retry):
        tried.append(verdict.after)
        part = after(part, verdict)
    assert (tried, verdict.tenant_id) == ([timedelta()] * 7, "tenant_0000")
    # As many failures as that took say nothing of how long the database has been away.
    waits = [wait for _, wait in failing(part)]
    assert sum(waits, timedelta()) >= FIVE_MINUTES


def test_a_job_that_cannot_be_cut_is_tried_for_five_minutes() -> None:
    waits = [retry_after(failures) for failures in range(15)]
    assert waits[14] is None
    assert [wait.total_seconds() for wait in waits if wait] == [1, 2, 4, 8, 16, *[32] * 9]

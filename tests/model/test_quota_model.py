"""Random histories of limits, reservations and holds, against a model that keeps everything in dictionaries."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.quota_history import TENANTS, Recorder, Subject
from usameter_core.postgres.pool import Pool, open_pool
from usameter_quota.domain.admission import Outcome
from usameter_quota.domain.limits import EVERY_TENANT, EnforcementMode, LimitPeriod, LimitTerms

# Mostly of a few, so that use often comes to a limit exactly.
quantities = st.sampled_from([Decimal(1), Decimal(2), Decimal(5), Decimal("0.1"), Decimal("5.9")])
tenants = st.sampled_from(TENANTS)
hours_ago = st.sampled_from([0, 0, 0, 0, 0, -1, 1, 3, 24, 48, 24 * 29, 24 * 30])
hold_names = st.sampled_from("qrstuvwxyz")
request = st.lists(
    st.tuples(tenants, hours_ago, quantities, st.one_of(st.none(), st.none(), hold_names)), min_size=0, max_size=3
)
# Mostly of one tenant, whose events may name them.
hold = st.tuples(
    *(st.just("hold"), hold_names, st.sampled_from("aaab"), quantities),
    st.sampled_from([timedelta(minutes=15), timedelta(hours=3), timedelta(days=1)]),
)
terms = st.builds(
    lambda limit, mode, period, percent, grace: LimitTerms(
        limit, mode, period, percent, grace if mode is EnforcementMode.SOFT else None
    ),
    st.sampled_from([0, 2, 5, 10, 15]).map(Decimal),
    st.sampled_from([*EnforcementMode, EnforcementMode.HARD, EnforcementMode.SOFT, EnforcementMode.SOFT]),
    st.sampled_from(LimitPeriod),
    st.sampled_from([1, 50, 80, 100]),
    st.sampled_from([None, 1, 1, 30, 744]),
)
limited = st.sampled_from([*TENANTS, EVERY_TENANT])
reserve = st.tuples(st.just("reserve"), st.lists(request, min_size=1, max_size=4))
settle = st.tuples(
    st.just("settle"), st.integers(0, 50), st.sampled_from([Outcome.COMMITTED, Outcome.COMMITTED, Outcome.ABORTED])
)
claim = st.tuples(st.just("claim"), st.integers(0, 50), hours_ago, quantities, st.sampled_from([1, 1, 2]))
spans = st.sampled_from(
    [timedelta(minutes=30), timedelta(hours=1), timedelta(hours=2), timedelta(days=1), timedelta(days=15)]
)
step = st.one_of(
    st.tuples(st.just("set"), limited, terms),
    st.tuples(st.just("delete"), limited),
    reserve,
    reserve,
    reserve,
    st.tuples(st.just("repeat"), st.integers(0, 50)),
    settle,
    settle,
    settle,
    st.tuples(st.just("adjust"), tenants, hours_ago, st.integers(-30, 30).map(lambda tenths: Decimal(tenths) / 10)),
    hold,
    hold,
    claim,
    st.tuples(st.just("cancel"), hold_names),
    st.tuples(st.just("expire_holds")),
    st.tuples(st.just("advance"), spans),
    st.tuples(st.just("end_periods")),
)
# Little else than holds and what becomes of them, which is rare among all steps.
settle_last = st.tuples(st.just("settle"), st.just(-1), st.sampled_from(Outcome))
hold_step = st.one_of(
    st.tuples(st.just("set"), st.just("a"), terms),
    *(hold, hold, hold, claim, claim, claim, claim, settle_last, settle_last, settle_last, settle, reserve),
    st.tuples(st.just("cancel"), hold_names),
    st.tuples(st.just("expire_holds")),
    st.tuples(st.just("advance"), st.sampled_from([timedelta(minutes=30), timedelta(hours=2), timedelta(days=30)])),
)
# What takes quota, and all that may become of whoever took it.
any_of_them = st.integers(0, 50)
crash_step = st.one_of(
    st.tuples(st.just("set"), st.just("a"), terms),
    *(reserve, reserve, hold, claim, claim),
    st.tuples(st.just("lose"), st.lists(request, min_size=1, max_size=2), st.booleans()),
    st.tuples(st.just("repeat"), any_of_them),
    *[st.tuples(st.just("persist"), any_of_them)] * 4,
    st.tuples(st.just("give_up"), any_of_them),
    *[st.tuples(st.just("deliver"))] * 2,
    st.tuples(st.just("die")),
    *[st.tuples(st.just("janitor"), st.sampled_from([timedelta(0), timedelta(seconds=30), timedelta(hours=2)]))] * 3,
    st.tuples(st.just("expire_holds")),
    st.tuples(st.just("end_periods")),
)


@pytest.fixture
async def pool(database: Any) -> AsyncIterator[Pool]:
    async with open_pool(database.role_url("quota"), application_name="test") as opened:
        yield opened


@pytest.fixture
async def ledger(database: Any) -> AsyncIterator[Pool]:
    async with open_pool(database.role_url("ingest"), application_name="test") as opened:
        yield opened


# Derandomized: what fails today fails tomorrow. Every history has an organization of its own, so
# they can share a database.
of_histories = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@of_histories
@given(steps=st.lists(step, min_size=5, max_size=25))
async def test_random_histories_agree_with_a_model(pool: Pool, steps: list[tuple[Any, ...]]) -> None:
    """I4: counters are entries and unconsumed reservations, and every verdict, status and event follows from them."""
    await live_through(Subject(pool), steps)


@of_histories
@given(steps=st.lists(hold_step, min_size=10, max_size=30))
async def test_random_histories_of_holds_agree_with_a_model(pool: Pool, steps: list[tuple[Any, ...]]) -> None:
    """I4: as above; an unconsumed hold counts once, and so does what consumed it."""
    await live_through(Subject(pool), steps)


@of_histories
@given(steps=st.lists(crash_step, min_size=10, max_size=30))
async def test_random_histories_of_crashes_agree_with_a_model_and_end_as_the_ledger(
    pool: Pool, ledger: Pool, steps: list[tuple[Any, ...]]
) -> None:
    """I4: as above; wherever whoever reserved dies, and however late it comes back."""
    subject = Recorder(pool, ledger=ledger)
    await live_through(subject, steps)
    await subject.recover()


async def live_through(subject: Subject, steps: list[tuple[Any, ...]]) -> None:
    for taken in steps:
        await subject.take(*taken)
        await subject.compare()

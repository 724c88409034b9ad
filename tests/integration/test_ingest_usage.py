"""Sums over any span, read from days, hours and entries, against the entries themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Database
from usameter_core.ids import OrgId, ReservationId, new_uuid
from usameter_core.period import Period
from usameter_core.postgres.pool import Pool, open_pool
from usameter_ingest.domain.event import CorrectionKind, UsageEvent, new_event
from usameter_ingest.store.entries import EntryStore
from usameter_ingest.store.epochs import EpochStore
from usameter_ingest.store.usage import Grouping, UsageStore

START = datetime(2026, 2, 27, tzinfo=UTC)
TENANTS = ("acme", "Bolt", "bolt")
EVENT_TYPES = ("req", "mb")


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    async with open_pool(database.role_url("ingest"), application_name="test") as opened:
        yield opened


@dataclass(slots=True)
class Ledger:
    """A new organization's, and what it should say."""

    pool: Pool
    org_id: OrgId = field(default_factory=lambda: OrgId(new_uuid()))
    events: list[UsageEvent] = field(default_factory=list)
    deltas: dict[int, Decimal] = field(default_factory=dict)

    async def record(self, slot: int, entries: list[tuple[str, str, Decimal, datetime]]) -> None:
        """One transaction of a writer."""
        made = [
            new_event(
                org_id=self.org_id,
                tenant_id=tenant_id,
                event_type=event_type,
                quantity=quantity,
                metadata=b"{}",
                idempotency_key=None,
                timestamp=moment,
                now=moment,
            )
            for tenant_id, event_type, quantity, moment in entries
        ]
        await EntryStore(self.pool, slot=slot).record_events(self.org_id, ReservationId(new_uuid()), made)
        self.events += made

    async def amend(self, slot: int, number: int, delta: Decimal) -> None:
        """Correct one of the events, if there are any, once."""
        if not self.events or number % len(self.events) in self.deltas:
            return
        number %= len(self.events)
        self.deltas[number] = delta
        await EntryStore(self.pool, slot=slot).record_correction(
            self.org_id,
            ReservationId(new_uuid()),
            event_id=self.events[number].event_id,
            kind=CorrectionKind.AMEND,
            quantity_delta=delta,
            reason="measured again",
            leaf_prefix=b"",
        )

    async def close(self) -> None:
        """What comes now lands in another epoch."""
        await EpochStore(self.pool).close(
            self.org_id, ingested_before=datetime.max.replace(tzinfo=UTC), job_id=new_uuid()
        )

    def expected(
        self, span: Period, tenant_id: str | None, event_type: str | None, grouping: Grouping
    ) -> dict[Any, tuple[Decimal, int]]:
        sums: defaultdict[Any, list[Decimal]] = defaultdict(list)
        counts: defaultdict[Any, int] = defaultdict(int)
        for number, event in enumerate(self.events):
            if not span.start <= event.occurred_at < span.end:
                continue
            if tenant_id not in (None, event.tenant_id) or event_type not in (None, event.event_type):
                continue
            keys: dict[Grouping, Any] = {
                Grouping.EVENT_TYPE: event.event_type,
                Grouping.TENANT: event.tenant_id,
                Grouping.DAY: event.occurred_at.date(),
                Grouping.HOUR: event.occurred_at.replace(minute=0, second=0, microsecond=0),
            }
            sums[keys[grouping]] += [event.quantity, self.deltas.get(number, Decimal(0))]
            counts[keys[grouping]] += 1
        return {key: (sum(quantities, Decimal(0)), counts[key]) for key, quantities in sorted(sums.items())}


# Crowded at the bounds of hours and days, where sums go wrong.
moments = st.builds(
    lambda day, hour, second, microsecond: (
        START + timedelta(days=day, hours=hour, seconds=second, microseconds=microsecond)
    ),
    st.integers(0, 4),
    st.sampled_from((0, 1, 12, 22, 23)),
    st.sampled_from((0, 1_800, 3_599)),
    st.sampled_from((0, 0, 1, 999_999)),
)
quantities = st.decimals(min_value="0.000001", max_value="99999999999999", places=6)
entries = st.tuples(st.sampled_from(TENANTS), st.sampled_from(EVENT_TYPES), quantities, moments)
slots = st.integers(0, 1)
steps = st.one_of(
    st.tuples(st.just("record"), slots, st.lists(entries, min_size=1, max_size=8)),
    st.tuples(st.just("record"), slots, st.lists(entries, min_size=1, max_size=8)),
    st.tuples(st.just("amend"), slots, st.integers(0, 99), quantities),
    st.tuples(st.just("close")),
)
spans = st.tuples(moments, moments).filter(lambda pair: pair[0] != pair[1]).map(lambda pair: Period(*sorted(pair)))
questions = st.tuples(
    spans,
    st.sampled_from((None, *TENANTS)),
    st.sampled_from((None, *EVENT_TYPES)),
    st.sampled_from(Grouping),
)


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(history=st.lists(steps, min_size=1, max_size=10), asked=st.lists(questions, min_size=5, max_size=10))
async def test_use_of_any_span_is_the_sum_of_its_entries(
    pool: Pool, history: list[tuple[Any, ...]], asked: list[tuple[Any, ...]]
) -> None:
    """I2: the sums by day and by hour are those of the entries, whoever wrote them, in whatever epoch."""
    ledger = Ledger(pool)
    for name, *arguments in history:
        await getattr(ledger, name)(*arguments)
    for span, tenant_id, event_type, grouping in asked:
        found = await UsageStore(pool).sum_usage(
            ledger.org_id, span, tenant_id=tenant_id, event_type=event_type, grouping=grouping
        )
        expected = ledger.expected(span, tenant_id, event_type, grouping)
        assert [(each.key, (each.quantity, each.event_count)) for each in found] == list(expected.items())


async def test_another_organizations_use_is_not_summed(pool: Pool) -> None:
    ledger, other = Ledger(pool), Ledger(pool)
    for each in (ledger, other):
        await each.record(0, [("acme", "req", Decimal(1), START + timedelta(hours=hours)) for hours in range(30)])
    span = Period(START, START + timedelta(hours=25, minutes=30))
    for grouping in Grouping:
        found = await UsageStore(pool).sum_usage(
            ledger.org_id, span, tenant_id=None, event_type=None, grouping=grouping
        )
        assert sum(each.event_count for each in found) == 26

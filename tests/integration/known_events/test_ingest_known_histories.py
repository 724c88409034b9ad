"""Known events: random histories have the answers of a service without a cache."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from redis.asyncio import Redis

from tests.conftest import Database
from tests.support.known_events import Seconds, correct, event, patient_cache, record, stored
from usameter_core.ids import OrgId, new_uuid
from usameter_ingest.counters.known import KnownEventCache
from usameter_ingest.domain.event import CorrectionKind, StoredEvent
from usameter_ingest.metrics import KNOWN_EVENTS
from usameter_ingest.service.known import KnownEvents
from usameter_ingest.store import entries as entries_module
from usameter_ingest.store.entries import GENERATION_SECONDS, EntryStore, EventAlreadyStored


@dataclass(slots=True)
class Subject:
    """Two replicas with one cache, and what each event is."""

    admin: asyncpg.Connection[asyncpg.Record]
    entries: EntryStore
    redis: Redis
    clock: Seconds = field(default_factory=Seconds)
    org_id: OrgId = field(default_factory=lambda: OrgId(new_uuid()))
    model: dict[UUID, StoredEvent] = field(default_factory=dict)
    corrected: set[UUID] = field(default_factory=set)
    cache: KnownEventCache = field(init=False)
    replicas: list[KnownEvents] = field(init=False)

    def __post_init__(self) -> None:
        self.cache = patient_cache(self.redis)
        self.replicas = [
            KnownEvents(entries=self.entries, cache=self.cache, monotonic_seconds=self.clock) for _ in range(2)
        ]

    def id(self, key: str) -> UUID:
        return event(self.org_id, key).event_id

    async def take(self, action: str, *arguments: Any) -> None:
        await getattr(self, f"_{action}")(*arguments)
        await self.cache.flush()

    async def _record(self, key: str, replica: int) -> None:
        sent = event(self.org_id, key, quantity=len(self.model) + 1)
        if sent.event_id in self.model:
            with pytest.raises(EventAlreadyStored):
                await record(self.entries, self.org_id, sent)
            return
        self.replicas[replica].add(self.org_id, await record(self.entries, self.org_id, sent), [sent])
        self.model[sent.event_id] = stored(sent)

    async def _find(self, keys: list[str], replica: int) -> None:
        ids = [self.id(key) for key in keys]
        found = await self.replicas[replica].find(self.org_id, ids)
        assert found == {each: self.model[each] for each in ids if each in self.model}

    async def _void(self, key: str) -> None:
        await self._correct(key, CorrectionKind.VOID)
        # The time that the void waits before it is answered.
        self.clock.value += GENERATION_SECONDS

    async def _amend(self, key: str) -> None:
        await self._correct(key, CorrectionKind.AMEND)

    async def _correct(self, key: str, kind: CorrectionKind) -> None:
        event_id = self.id(key)
        if event_id not in self.model or event_id in self.corrected:
            return
        await correct(self.entries, self.org_id, event_id, kind)
        self.corrected.add(event_id)
        if kind is CorrectionKind.VOID:
            known = self.model[event_id]
            self.model[event_id] = StoredEvent(
                event_id, known.request_hash, known.occurred_at, known.timestamp_given, True
            )

    async def _forget(self, key: str) -> None:
        """Restore the database from before the event, which takes longer than a generation is trusted."""
        event_id = self.id(key)
        for table in ("quota_outbox", "correction", "usage_event"):
            await self.admin.execute(f"DELETE FROM ingest.{table} WHERE event_id = $1", event_id)
        await self.admin.execute("VACUUM FULL ingest.usage_event")
        self.model.pop(event_id, None)
        self.corrected.discard(event_id)
        self.clock.value += GENERATION_SECONDS

    async def _lose(self, key: str) -> None:
        async for each in self.redis.scan_iter(f"usameter:known:{{{self.org_id}}}:*"):
            await self.redis.hdel(each, self.id(key).bytes)

    async def _empty(self) -> None:
        async for each in self.redis.scan_iter(f"usameter:known:{{{self.org_id}}}:*"):
            await self.redis.delete(each)

    async def _wait(self, seconds: float) -> None:
        self.clock.value += seconds


ACTIONS = {"find": 16, "record": 4, "void": 1, "amend": 1, "forget": 1, "lose": 1, "empty": 0.2, "wait": 1}


def history(source: random.Random, steps: int) -> Iterator[tuple[Any, ...]]:
    """Steps of two replicas with five keys at a time: an event is voided once, so the keys change."""
    for number in range(steps):
        keys = [f"k{number // 25 + nth}" for nth in range(5)]
        (action,) = source.choices(list(ACTIONS), list(ACTIONS.values()))
        match action:
            case "find":
                yield action, source.sample(keys, source.randint(1, 3)), source.randrange(2)
            case "record":
                yield action, source.choice(keys), source.randrange(2)
            case "wait":
                yield action, source.choice([0.2, 0.5, 60.0])
            case "empty":
                yield (action,)
            case _:
                yield action, source.choice(keys)


@pytest.mark.parametrize("seed", range(4))
async def test_random_histories_have_the_answers_of_a_service_without_a_cache(
    database: Database, entries: EntryStore, redis: Redis, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """I1: whatever the cache holds, lacks or loses, and whatever the database forgets."""
    monkeypatch.setattr(entries_module, "GENERATION_SECONDS", 0)
    from_cache = KNOWN_EVENTS.labels("cache")._value.get
    before = from_cache()
    admin = await asyncpg.connect(database.admin_url)
    subject = Subject(admin, entries, redis)
    for taken in history(random.Random(seed), 400):
        await subject.take(*taken)
    await admin.close()
    assert from_cache() > before + 100, "the cache was asked"

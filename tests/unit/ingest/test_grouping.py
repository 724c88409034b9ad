"""Groups: how large, how long, and that every request is answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from usameter_core.errors import Unavailable
from usameter_core.ids import OrgId, new_uuid
from usameter_core.tasks import background_tasks
from usameter_ingest.domain.event import new_event
from usameter_ingest.service.grouping import GroupCommitter
from usameter_ingest.service.recording import GroupRecorder, Recorded, RecordRequest

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
ORG = OrgId(new_uuid())


class HeldRecorder(GroupRecorder):
    """Stores nothing: notes each group, and answers it when it is let go."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.let_go = asyncio.Event()

    async def record(
        self, org_id: OrgId, requests: Sequence[RecordRequest], *, reserving: asyncio.Lock, until: float
    ) -> None:
        self.groups.append([str(request.events[0].idempotency_key) for request in requests])
        await self.let_go.wait()
        for request in requests:
            if not request.answer.done():
                request.answer.set_result(Recorded([], []))


def request(key: str | None, *, events: int = 1, metadata_bytes: int = 2) -> RecordRequest:
    made = [
        new_event(
            org_id=ORG,
            tenant_id="acme",
            event_type="req",
            quantity=Decimal(1),
            metadata=b"m" * metadata_bytes,
            idempotency_key=key if number == 0 or key is None else f"{key}.{number}",
            timestamp=None,
            now=NOW,
        )
        for number in range(events)
    ]
    return RecordRequest(made, batch=True)


@asynccontextmanager
async def open_committer(**bounds: Any) -> AsyncIterator[tuple[GroupCommitter, HeldRecorder]]:
    recorder = HeldRecorder()
    async with background_tasks() as tasks:
        yield GroupCommitter(recorder, tasks=tasks, **{"next_group_events_enough": 1, **bounds}), recorder


async def turns() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def refusal(answer: asyncio.Future[Recorded]) -> Unavailable:
    with pytest.raises(Unavailable) as caught:
        await asyncio.wait_for(answer, 5)
    return caught.value


async def test_a_group_has_at_most_so_many_events() -> None:
    async with open_committer(group_events_max=5, groups_in_flight_max=3) as (committer, recorder):
        for key, events in (("a", 2), ("b", 3), ("c", 1), ("large", 7), ("d", 1)):
            committer.submit(ORG, request(key, events=events))
        await turns()
        assert recorder.groups == [["a", "b"], ["c"], ["large"]]
        recorder.let_go.set()
        await turns()
        assert recorder.groups[3:] == [["d"]]


async def test_a_group_has_at_most_so_many_bytes_of_metadata_and_keys() -> None:
    async with open_committer(group_bytes_max=100, groups_in_flight_max=3) as (committer, recorder):
        for key, size in (("a", 49), ("b", 49), ("c", 1), ("large", 500), ("d", 1)):
            committer.submit(ORG, request(key, metadata_bytes=size))
        await turns()
        assert recorder.groups == [["a", "b"], ["c"], ["large"]]


@pytest.mark.parametrize(("under_way", "enough"), [(3, 200), (100, 3)])
async def test_few_events_wait_until_they_are_as_many_as_those_under_way_or_enough(under_way: int, enough: int) -> None:
    async with open_committer(next_group_events_enough=enough) as (committer, recorder):
        for key, events in (("first", under_way), ("second", 1), ("third", 1)):
            committer.submit(ORG, request(key, events=events))
            await turns()
        assert recorder.groups == [["first"]]
        committer.submit(ORG, request("fourth"))
        await turns()
        assert recorder.groups[1:] == [["second", "third", "fourth"]]


@pytest.mark.parametrize("bounds", [{"held_events_max": 8}, {"held_bytes_max": 8 * 11}])
async def test_beyond_the_bound_requests_are_refused_at_once(bounds: dict[str, int]) -> None:
    async with open_committer(**bounds, groups_in_flight_max=1) as (committer, recorder):
        for number in range(4):
            committer.submit(ORG, request(f"k{number}", metadata_bytes=9))
            await turns()
        refused = committer.submit(ORG, request("k4", metadata_bytes=9))
        assert refused.done() and (await refusal(refused)).retry_safe
        # One organization may hold half, so there is room for a second, and none for a third.
        others = [committer.submit(OrgId(new_uuid()), request("k", events=4, metadata_bytes=1)) for _ in range(2)]
        assert [other.done() for other in others] == [False, "held_events_max" in bounds]
        recorder.let_go.set()
        await turns()
        assert (await committer.submit(ORG, request("k5", metadata_bytes=9))) is not None


async def test_who_goes_away_makes_room_and_is_not_recorded() -> None:
    """However long a group takes, memory holds no more than those who still wait."""
    async with open_committer(held_events_max=10, groups_in_flight_max=1) as (committer, recorder):
        committer.submit(ORG, request("first"))
        await turns()
        for number in range(100):
            answer = committer.submit(ORG, request(f"k{number}", events=4))
            assert not answer.done()
            answer.cancel()
            await turns()
        last = committer.submit(ORG, request("last", events=4))
        recorder.let_go.set()
        await asyncio.wait_for(last, 5)
        assert recorder.groups == [["first"], ["last"]]


async def test_who_goes_away_in_the_turn_of_its_group_is_not_recorded() -> None:
    async with open_committer() as (committer, recorder):
        committer.submit(ORG, request("k")).cancel()
        await turns()
        assert recorder.groups == []
        recorder.let_go.set()
        await asyncio.wait_for(committer.submit(ORG, request("k")), 5)


async def test_a_request_that_has_waited_too_long_is_refused_and_not_recorded() -> None:
    async with open_committer(waiting_seconds_max=0.1, groups_in_flight_max=1) as (committer, recorder):
        begun = committer.submit(ORG, request("begun"))
        await turns()
        waiting = [committer.submit(ORG, request("waiting"))]
        await asyncio.sleep(0.05)
        waiting.append(committer.submit(ORG, request("later")))
        for answer in waiting:
            assert (await refusal(answer)).retry_safe
        assert not begun.done()
        recorder.let_go.set()
        await asyncio.wait_for(begun, 5)
        await asyncio.wait_for(committer.submit(ORG, request("again")), 5)
        assert recorder.groups == [["begun"], ["again"]]


async def test_who_waits_too_long_for_others_to_reserve_or_goes_away_meanwhile_is_not_recorded() -> None:
    # Without keys nothing is looked up, so that nothing is asked of anybody before the lock is to be had.
    absent: Any = None
    recorder = GroupRecorder(
        entries=absent, known=absent, outcomes=absent, quota=absent, tenants=absent, settler=absent, live=absent
    )
    reserving = asyncio.Lock()
    await reserving.acquire()
    late, gone = (request(None) for _ in range(2))
    now = asyncio.get_running_loop().time()
    await recorder.record(ORG, [late], reserving=reserving, until=now + 0.05)
    assert (await refusal(late.answer)).retry_safe
    recording = asyncio.create_task(recorder.record(ORG, [gone], reserving=reserving, until=now + 60))
    await turns()
    gone.answer.cancel()
    reserving.release()
    await recording
    assert gone.answer.cancelled() and not reserving.locked()


async def test_only_requests_of_the_same_key_wait_for_each_other() -> None:
    async with open_committer(groups_in_flight_max=2) as (committer, recorder):
        committer.submit(ORG, request("same"))
        await turns()
        committer.submit(ORG, request("same"))
        await turns()
        committer.submit(ORG, request("other"))
        await turns()
        assert recorder.groups == [["same"], ["other"]]
        recorder.let_go.set()
        await turns()
        assert recorder.groups[2:] == [["same"]]


async def test_the_end_of_the_tasks_answers_everybody() -> None:
    """In a group, in one whose task has not run yet, waiting, and coming afterwards."""
    async with open_committer(group_events_max=1, groups_in_flight_max=2) as (committer, recorder):
        in_group = committer.submit(ORG, request("in group"))
        await turns()
        assert recorder.groups == [["in group"]]
        # Its task is made in this turn of the loop, and cancelled before it has run.
        fresh = committer.submit(ORG, request("fresh"))
        waiting = [committer.submit(ORG, request(f"k{number}")) for number in range(2_000)]
        await asyncio.sleep(0)
    assert (await refusal(in_group)).retry_safe is None
    assert (await refusal(fresh)).retry_safe is None
    for answer in waiting:
        assert (await refusal(answer)).retry_safe
    assert (await refusal(committer.submit(ORG, request("late")))).retry_safe
    assert recorder.groups == [["in group"]]

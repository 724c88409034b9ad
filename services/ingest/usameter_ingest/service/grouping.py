"""Grouping: requests that arrive while others are being committed share the next commit.

A commit costs the same for one event as for thousands. A request that shares an event id with a
group under way is parked until that ends, and then finds the event stored or not.

Whatever happens, every request is answered: its group ends, or it has waited too long, or its
caller has gone, or the service stops.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

from usameter_core.errors import Unavailable
from usameter_core.ids import OrgId
from usameter_ingest.service.recording import GroupRecorder, Recorded, RecordRequest, fail_all, not_begun

_MIB = 1024 * 1024


class GroupCommitter:
    """Gathers requests into groups: while some commit, the next group fills.

    Args:
        recorder: Records a group.
        tasks: Runs the groups. Where it ends first, all that wait are refused.
        group_events_max: A group has at most this many events,
        group_bytes_max: and at most this many bytes of metadata and keys, but for a single request that has more.
        groups_in_flight_max: Groups of one organization that may be under way at once. They reserve one after the
            other: while one is inserted, the next is reserved.
        next_group_events_enough: While a group is under way, the next begins once as many events wait as that has,
            or this many: a group costs some milliseconds of all services, whatever is in it.
        held_events_max: Beyond this many events that wait or are under way, or half as many of one
            organization, requests are refused at once;
        held_bytes_max: and likewise for their bytes.
        waiting_seconds_max: A request for which no quota is being reserved by then is refused.
    """

    def __init__(
        self,
        recorder: GroupRecorder,
        *,
        tasks: asyncio.TaskGroup,
        group_events_max: int = 5_000,
        group_bytes_max: int = 8 * _MIB,
        groups_in_flight_max: int = 2,
        next_group_events_enough: int = 200,
        held_events_max: int = 100_000,
        held_bytes_max: int = 256 * _MIB,
        waiting_seconds_max: float = 10,
    ) -> None:
        self._recorder = recorder
        self._tasks = tasks
        self._group_max = _Load(group_events_max, group_bytes_max)
        self._groups_in_flight_max = groups_in_flight_max
        self._next_group_events_enough = next_group_events_enough
        self._held_max = _Load(held_events_max, held_bytes_max)
        self._lane_held_max = _Load(held_events_max // 2, held_bytes_max // 2)
        self._waiting_seconds_max = waiting_seconds_max
        self._held = _Load()
        self._lanes: dict[OrgId, _Lane] = {}

    def submit(self, org_id: OrgId, request: RecordRequest) -> asyncio.Future[Recorded]:
        """Have the request's events stored, together or not at all; the answer says what became of them.

        Requests submitted in one turn of the event loop share a group. Of a request whose answer is
        cancelled before its group begins nothing is stored. The answer raises:
            IdempotencyConflict, QuotaExceeded: Nothing was stored.
            Unavailable: Nothing was stored where it says that a retry is safe; else that is
                unknown, and events with keys can be sent again.
        """
        lane = self._lanes.get(org_id) or _Lane()
        size = _load_of(request)
        if not (self._held.has_room(size, self._held_max) and lane.held.has_room(size, self._lane_held_max)):
            fail_all([request], not_begun("Too many events are waiting to be recorded"))
            return request.answer
        self._lanes[org_id] = lane
        loop = asyncio.get_running_loop()
        waiting = _Waiting(
            request,
            frozenset([event.event_id for event in request.events]),
            size,
            loop.time() + self._waiting_seconds_max,
        )
        lane.add(waiting)
        self._held.add(size)
        lane.held.add(size)
        request.answer.add_done_callback(lambda _: self._forget(lane, waiting))
        if not lane.start_due:
            lane.start_due = True
            loop.call_soon(self._start_groups, org_id, lane)
        if lane.refusal is None:
            lane.refusal = loop.call_at(waiting.until, self._refuse_late, lane)
        return request.answer

    def _start_groups(self, org_id: OrgId, lane: _Lane) -> None:
        lane.start_due = False
        while self._is_group_due(lane) and (group := self._next_group(lane)):
            lane.groups_in_flight += 1
            lane.events_in_flight += _events_of(group)
            recording = self._recorder.record(
                org_id,
                [waiting.request for waiting in group],
                reserving=lane.reserving,
                until=min([waiting.until for waiting in group]),
            )
            try:
                # A context of its own: the deadline of whoever happened to start the group is not the group's.
                task = self._tasks.create_task(recording, context=contextvars.Context())
            except RuntimeError:  # the task group is ending, and takes no more
                recording.close()
                self._end_group(lane, group, not_begun("The service is stopping"))
            else:
                # A callback, since a task that is cancelled before its first step never gets to a `finally`.
                task.add_done_callback(partial(self._group_ended, org_id, lane, group))
        if not lane.waiting and not lane.groups_in_flight:
            if lane.refusal is not None:
                lane.refusal.cancel()
            if self._lanes.get(org_id) is lane:
                del self._lanes[org_id]

    def _is_group_due(self, lane: _Lane) -> bool:
        return lane.groups_in_flight == 0 or (
            lane.groups_in_flight < self._groups_in_flight_max
            and lane.waiting_events >= min(lane.events_in_flight, self._next_group_events_enough)
        )

    def _next_group(self, lane: _Lane) -> list[_Waiting]:
        """The next requests that share no event id with a group in flight; those that do are parked."""
        group: list[_Waiting] = []
        load = _Load()
        while lane.waiting:
            waiting = next(iter(lane.waiting))
            if group and not load.has_room(waiting.size, self._group_max):
                break
            if waiting.request.answer.done():
                self._forget(lane, waiting)  # its caller has gone away in this very turn
                continue
            lane.remove(waiting)
            if not lane.ids_in_flight.isdisjoint(waiting.event_ids):
                lane.park(waiting)
                continue
            load.add(waiting.size)
            group.append(waiting)
        for waiting in group:
            lane.ids_in_flight |= waiting.event_ids
        return group

    def _group_ended(self, org_id: OrgId, lane: _Lane, group: Sequence[_Waiting], _: asyncio.Task[None]) -> None:
        # All are answered, unless the group was cut off.
        stopping = Unavailable("The service is stopping; whether the events were recorded is unknown")
        self._end_group(lane, group, stopping)
        self._start_groups(org_id, lane)

    def _end_group(self, lane: _Lane, group: Sequence[_Waiting], unanswered: Unavailable) -> None:
        lane.groups_in_flight -= 1
        lane.events_in_flight -= _events_of(group)
        for waiting in group:
            lane.ids_in_flight -= waiting.event_ids
            self._let_go(lane, waiting)
        lane.unpark(waiting.event_ids for waiting in group)
        fail_all([waiting.request for waiting in group], unanswered)

    def _refuse_late(self, lane: _Lane) -> None:
        """Refuse what has waited too long, and look again when that is so of the next."""
        loop = asyncio.get_running_loop()
        late = []
        earliest: float | None = None
        for queue in (lane.waiting, *lane.parked.values()):
            for waiting in queue:
                if waiting.until > loop.time():
                    earliest = waiting.until if earliest is None else min(earliest, waiting.until)
                    break
                late.append(waiting)
        lane.refusal = None if earliest is None else loop.call_at(earliest, self._refuse_late, lane)
        for waiting in late:
            self._forget(lane, waiting)
        fail_all([waiting.request for waiting in late], not_begun("The events waited too long to be recorded"))

    def _forget(self, lane: _Lane, waiting: _Waiting) -> None:
        """Wait no longer with a request; nothing happens where its group has begun."""
        if waiting in lane.waiting:
            lane.remove(waiting)
        elif not lane.remove_parked(waiting):
            return
        self._let_go(lane, waiting)

    def _let_go(self, lane: _Lane, waiting: _Waiting) -> None:
        self._held.subtract(waiting.size)
        lane.held.subtract(waiting.size)


@dataclass(slots=True)
class _Load:
    """How much events weigh."""

    events: int = 0
    # Of metadata and keys, which callers can make long.
    size_bytes: int = 0

    def has_room(self, more: _Load, at_most: _Load) -> bool:
        return self.events + more.events <= at_most.events and self.size_bytes + more.size_bytes <= at_most.size_bytes

    def add(self, other: _Load) -> None:
        self.events += other.events
        self.size_bytes += other.size_bytes

    def subtract(self, other: _Load) -> None:
        self.events -= other.events
        self.size_bytes -= other.size_bytes


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that waits for its group, or is in it."""

    request: RecordRequest
    event_ids: frozenset[UUID]
    size: _Load
    # On the loop's clock.
    until: float
    # The event id for which it is parked.
    parked_for: UUID | None = None


@dataclass(slots=True)
class _Lane:
    """The requests of one organization."""

    # In the order they came; a dict, since those in the middle may go away.
    waiting: OrderedDict[_Waiting, None] = field(default_factory=OrderedDict)
    waiting_events: int = 0
    # By one event id that is in flight.
    parked: dict[UUID, dict[_Waiting, None]] = field(default_factory=dict)
    ids_in_flight: set[UUID] = field(default_factory=set)
    groups_in_flight: int = 0
    events_in_flight: int = 0
    # Groups reserve one after the other.
    reserving: asyncio.Lock = field(default_factory=asyncio.Lock)
    held: _Load = field(default_factory=_Load)
    start_due: bool = False
    refusal: asyncio.TimerHandle | None = None

    def add(self, waiting: _Waiting) -> None:
        self.waiting[waiting] = None
        self.waiting_events += waiting.size.events

    def remove(self, waiting: _Waiting) -> None:
        del self.waiting[waiting]
        self.waiting_events -= waiting.size.events

    def park(self, waiting: _Waiting) -> None:
        waiting.parked_for = next(iter(waiting.event_ids & self.ids_in_flight))
        self.parked.setdefault(waiting.parked_for, {})[waiting] = None

    def remove_parked(self, waiting: _Waiting) -> bool:
        """Whether it was parked."""
        if waiting.parked_for is None:
            return False
        fellows = self.parked[waiting.parked_for]
        del fellows[waiting]
        if not fellows:
            del self.parked[waiting.parked_for]
        waiting.parked_for = None
        return True

    def unpark(self, event_ids: Iterable[Iterable[UUID]]) -> None:
        """Put what was parked for events before what came later."""
        parked = (
            [waiting for ids in event_ids for event_id in ids for waiting in self.parked.pop(event_id, ())]
            if self.parked
            else []
        )
        for waiting in reversed(parked):
            waiting.parked_for = None
            self.add(waiting)
            self.waiting.move_to_end(waiting, last=False)


def _events_of(group: Sequence[_Waiting]) -> int:
    return sum([waiting.size.events for waiting in group])


def _load_of(request: RecordRequest) -> _Load:
    return _Load(
        len(request.events),
        sum([len(event.metadata) + len(event.idempotency_key or "") for event in request.events]),
    )

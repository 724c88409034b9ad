"""Recording: look up, reserve, persist, settle — for groups of requests of one organization.

A request is stored whole or not at all, and one that fails, fails alone. Groups are made by `grouping`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from uuid import UUID

import msgspec

from usameter_core.errors import IdempotencyConflict, InvalidArgument, QuotaExceeded, Unavailable
from usameter_core.ids import OrgId, ReservationId, format_id, new_uuid
from usameter_core.logging import get_logger
from usameter_core.period import hour_start
from usameter_ingest.clients import LimitWarning, QuotaClient, TenantRegistry, Usage, Verdict
from usameter_ingest.counters.live import LiveCounters
from usameter_ingest.domain.event import StoredEvent, UsageEvent, is_same_event
from usameter_ingest.metrics import EVENTS
from usameter_ingest.service.known import KnownEvents
from usameter_ingest.service.settling import Settler
from usameter_ingest.store.entries import EntriesRefused, EntryStore, EventAlreadyStored, Found, ReservationGivenAway
from usameter_ingest.store.outcomes import Outcome, OutcomeStore

log = get_logger()

# Somebody else storing our events between look-up and insert is rare, and each time means that
# they are found at the next look-up; more than a few in a row is a fault.
_ATTEMPTS_IN_VAIN_MAX = 5
# In each of the others somebody was answered. Only requests that share an event, want different things of
# quota and are all refused need many.
_ATTEMPTS_MAX = 100
_ZERO = Decimal(0)
# Finding the series of a label takes longer than adding to it.
_NEW_EVENTS = EVENTS.labels("new")
_DUPLICATE_EVENTS = EVENTS.labels("duplicate")


class EventResult(msgspec.Struct, frozen=True):
    """What became of one event of a request. A struct for the reason that `UsageEvent` is one."""

    event_id: UUID
    deduplicated: bool
    voided: bool


@dataclass(frozen=True, slots=True)
class Recorded:
    """The answer to a request whose events are all stored."""

    # In request order.
    results: Sequence[EventResult]
    warnings: Sequence[LimitWarning]


@dataclass(slots=True)
class RecordRequest:
    """Events that are stored together or not at all.

    Args:
        events: In request order.
        batch: Whether errors name an event by its place.
    """

    events: Sequence[UsageEvent]
    batch: bool
    answer: asyncio.Future[Recorded] = field(default_factory=asyncio.Future)


@dataclass(slots=True)
class _Candidate:
    """A request of a group after the look-up."""

    request: RecordRequest
    stored: dict[UUID, StoredEvent]
    # The first of each id that is not stored yet.
    new: list[UsageEvent]
    warnings: Sequence[LimitWarning] = ()


class GroupRecorder:
    """Records a group of requests of one organization in one commit."""

    def __init__(
        self,
        *,
        entries: EntryStore,
        known: KnownEvents,
        outcomes: OutcomeStore,
        quota: QuotaClient,
        tenants: TenantRegistry,
        settler: Settler,
        live: LiveCounters,
    ) -> None:
        self._entries = entries
        self._known = known
        self._outcomes = outcomes
        self._quota = quota
        self._tenants = tenants
        self._settler = settler
        self._live = live

    async def record(
        self, org_id: OrgId, requests: Sequence[RecordRequest], *, reserving: asyncio.Lock, until: float
    ) -> None:
        """Answer each request of a group.

        Args:
            org_id: Whose requests they are.
            requests: The group. Whose answer is cancelled before it is reserved is not recorded.
            reserving: Held while the group's quota is taken; all else goes on beside other groups.
            until: On the loop's clock: where the lock is not to be had by then, nothing is recorded.
        """
        left = list(requests)
        in_vain = 0
        for _ in range(_ATTEMPTS_MAX):
            try:
                await self._attempt(org_id, left, reserving, until)
            except (EventAlreadyStored, ReservationGivenAway):
                pass  # the next look-up knows more
            except (EntriesRefused, InvalidArgument) as error:
                # Of one request, and its half of the group finds out of which. Nothing was written.
                if len(left) == 1:
                    fail_all(left, error)
                else:
                    for half in (left[: len(left) // 2], left[len(left) // 2 :]):
                        await self.record(org_id, half, reserving=reserving, until=until)
            except Exception as error:
                # Whoever waits for an answer has to get one, whatever went wrong.
                fail_all(left, error)
            still = [request for request in left if not request.answer.done()]
            in_vain = in_vain + 1 if len(still) == len(left) else 0
            left = still
            if not left or in_vain == _ATTEMPTS_IN_VAIN_MAX:
                break
        fail_all(left, Unavailable("The same events are being recorded elsewhere; try again"))

    async def _attempt(
        self, org_id: OrgId, requests: Sequence[RecordRequest], reserving: asyncio.Lock, until: float
    ) -> None:
        """Answer the requests, but for those that turn out to need another look-up."""
        candidates = []
        for candidate in await self._look_up(org_id, requests):
            if candidate.new:
                candidates.append(candidate)
            else:
                _succeed(candidate)
        if not candidates:
            return
        async with _hold(reserving, until):
            owners = _owners(candidate for candidate in candidates if not candidate.request.answer.done())
            if not owners:
                return
            reservation_id = ReservationId(new_uuid())
            admitted, refused = await self._reserve(org_id, reservation_id, owners)
        if admitted:
            await self._persist(org_id, reservation_id, admitted)
        else:
            self._settler.settle(org_id, reservation_id, Outcome.ABORTED)
        for candidate in admitted:
            _succeed(candidate)
        await self._refuse(org_id, refused, candidates)

    async def _look_up(self, org_id: OrgId, requests: Sequence[RecordRequest]) -> list[_Candidate]:
        """The requests that do not contradict what is stored; the others are refused, or have an answer already."""
        # An event without a key has a new id, which nobody can have stored.
        ids = [
            event.event_id
            for request in requests
            for event in request.events
            if event.idempotency_key is not None and not request.answer.done()
        ]
        stored = await self._known.find(org_id, ids) if ids else {}
        candidates = []
        for request in requests:
            if request.answer.done():
                continue  # its caller has gone away
            try:
                candidates.append(_Candidate(request, stored, _new_events(request, stored)))
            except IdempotencyConflict as conflict:
                EVENTS.labels("conflict").inc(len(request.events))
                _fail(request, conflict)
        return candidates

    async def _reserve(
        self, org_id: OrgId, reservation_id: ReservationId, candidates: Sequence[_Candidate]
    ) -> tuple[list[_Candidate], list[tuple[_Candidate, Verdict]]]:
        """The requests whose quota is taken, and those that are refused."""
        try:
            verdicts = await self._quota.reserve(
                org_id, reservation_id, [_usage_of(candidate.new) for candidate in candidates]
            )
        except Exception:
            # It may have been taken all the same: nothing will come of it.
            self._settler.settle(org_id, reservation_id, Outcome.ABORTED)
            raise
        admitted, refused = [], []
        for candidate, verdict in zip(candidates, verdicts, strict=True):
            if verdict.violations:
                refused.append((candidate, verdict))
            else:
                candidate.warnings = verdict.warnings
                admitted.append(candidate)
        return admitted, refused

    async def _refuse(
        self, org_id: OrgId, refused: Sequence[tuple[_Candidate, Verdict]], candidates: Sequence[_Candidate]
    ) -> None:
        """Refuse requests over quota, but for those whose events somebody else has stored meanwhile.

        A retry of a stored event is a duplicate even when the quota is full, also where another
        replica stored it after our look-up: such a request stays unanswered and is looked up again.

        With a request all candidates are refused that want the same of quota for the same events: one that
        asks next is told the same, and of a thousand that would be a thousand calls.
        """
        keyed = [event.event_id for candidate, _ in refused for event in candidate.new if event.idempotency_key]
        found = await self._entries.find_stored(org_id, keyed) if keyed else Found()
        # None of them shares an event with another, or with one that was admitted.
        refusals = {
            _ids_of(candidate.new): (_usage_of(candidate.new), verdict)
            for candidate, verdict in refused
            if not any(event.event_id in found.events for event in candidate.new)
        }
        for candidate in candidates if refusals else ():
            refusal = refusals.get(_ids_of(candidate.new))
            if refusal is None or refusal[0] != _usage_of(candidate.new):
                continue
            EVENTS.labels("over_quota").inc(len(candidate.new))
            _fail(candidate.request, QuotaExceeded(refusal[1].violations, batch=candidate.request.batch))

    async def _persist(self, org_id: OrgId, reservation_id: ReservationId, candidates: Sequence[_Candidate]) -> None:
        events = [event for candidate in candidates for event in candidate.new]
        try:
            await self._tenants.ensure(org_id, {event.tenant_id for event in events})
            generation = await self._entries.record_events(org_id, reservation_id, events)
        except (EventAlreadyStored, ReservationGivenAway, EntriesRefused):
            # Now and not soon: the next attempt would be refused for the sake of what this one still holds.
            await self._settler.settle_now(org_id, reservation_id, Outcome.ABORTED)
            raise
        except Exception:
            # The commit may have succeeded all the same; the outcome row knows, and decides.
            outcome = await self._outcomes.decide(org_id, reservation_id)
            self._settler.settle(org_id, reservation_id, outcome)
            if outcome is Outcome.ABORTED:
                raise
        else:
            self._settler.settle(org_id, reservation_id, Outcome.COMMITTED)
            self._known.add(org_id, generation, events)
        self._live.add(org_id, Counter(event.tenant_id for event in events))
        log.info("events_recorded", org_id=str(org_id), requests=len(candidates), events=len(events))


@asynccontextmanager
async def _hold(lock: asyncio.Lock, until: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(until):
            await lock.acquire()
    except TimeoutError:
        raise not_begun("The events waited too long to be recorded") from None
    try:
        yield
    finally:
        lock.release()


def not_begun(why: str) -> Unavailable:
    """For a request of which nothing was sent anywhere."""
    return Unavailable(f"{why}; try again", retry_safe=True)


def fail_all(requests: Sequence[RecordRequest], error: Exception) -> None:
    """Answer all that have no answer yet with an error."""
    for request in requests:
        _fail(request, error)


def _new_events(request: RecordRequest, stored: dict[UUID, StoredEvent]) -> list[UsageEvent]:
    """The first of each id of a request that is not stored.

    Raises:
        IdempotencyConflict: An id stands for other content, stored or earlier in the request.
    """
    first: dict[UUID, UsageEvent | StoredEvent] = {}
    new = []
    for index, event in enumerate(request.events):
        known = first.get(event.event_id) or stored.get(event.event_id)
        if known is None:
            new.append(event)
            first[event.event_id] = event
        elif not is_same_event(event, known):
            raise IdempotencyConflict(
                field=f"events[{index}]" if request.batch else "",
                idempotency_key=event.idempotency_key or "",
                event_id=format_id("evt", event.event_id),
            )
    return new


def _owners(candidates: Iterable[_Candidate]) -> list[_Candidate]:
    """The first of those that share a new event; the others find it stored afterwards, or own it then."""
    owned: set[UUID] = set()
    owners = []
    for candidate in candidates:
        ids = _ids_of(candidate.new)
        if owned.isdisjoint(ids):
            owned |= ids
            owners.append(candidate)
    return owners


def _ids_of(events: Sequence[UsageEvent]) -> frozenset[UUID]:
    return frozenset([event.event_id for event in events])


def _usage_of(events: Sequence[UsageEvent]) -> list[Usage]:
    """What events use, summed by tenant, event type and hour: quota counts no finer.

    An event that names a reservation stands alone, since only the first of those that name one has it.
    """
    sums: dict[tuple[str, str, datetime], Decimal] = {}
    reserved: list[Usage] = []
    for event in events:
        hour = hour_start(event.occurred_at)
        if event.reservation_id is not None:
            reserved.append(Usage(event.tenant_id, event.event_type, hour, event.quantity, event.reservation_id))
            continue
        key = (event.tenant_id, event.event_type, hour)
        sums[key] = sums.get(key, _ZERO) + event.quantity
    return [
        *[Usage(tenant_id, event_type, hour, quantity) for (tenant_id, event_type, hour), quantity in sums.items()],
        *reserved,
    ]


def _succeed(candidate: _Candidate) -> None:
    request = candidate.request
    if request.answer.done():
        return
    new_ids = {event.event_id for event in candidate.new}
    results = []
    for event in request.events:
        deduplicated = event.event_id not in new_ids
        new_ids.discard(event.event_id)  # the second of an id in one batch is a duplicate of the first
        stored = candidate.stored.get(event.event_id)
        results.append(EventResult(event.event_id, deduplicated, stored is not None and stored.voided))
    _NEW_EVENTS.inc(len(candidate.new))
    _DUPLICATE_EVENTS.inc(len(results) - len(candidate.new))
    request.answer.set_result(Recorded(results, candidate.warnings))


def _fail(request: RecordRequest, error: Exception) -> None:
    if not request.answer.done():
        request.answer.set_exception(error)

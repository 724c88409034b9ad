"""EventService: see usameter/ingest/v1/event.proto."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias, TypeGuard, TypeVar
from uuid import UUID

import grpc.aio
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from usameter.common.v1 import error_pb2
from usameter.ingest.v1 import event_pb2, event_pb2_grpc
from usameter_core.clock import Clock
from usameter_core.decimals import canonical
from usameter_core.errors import FieldViolation, IdempotencyConflict, Internal, InvalidArgument, UsameterError
from usameter_core.grpc.auth import AccessControl, access_of
from usameter_core.grpc.context import Principal, current_principal, current_request_id
from usameter_core.grpc.pages import fill_page
from usameter_core.grpc.status import internal_status, reason_and_details_of, status_of
from usameter_core.grpc.timestamps import datetime_in, timestamp_from_datetime
from usameter_core.ids import OrgId, format_id, parse_id
from usameter_core.logging import get_logger
from usameter_core.pages import DEFAULT_LIMIT, decode_page_token, encode_page_token
from usameter_core.period import format_timestamp
from usameter_core.ratelimit.standing import Standing
from usameter_ingest.clients import LimitWarning
from usameter_ingest.domain.event import InvalidQuantity, UsageEvent
from usameter_ingest.domain.metadata import decode_metadata
from usameter_ingest.service.correcting import CorrectingService
from usameter_ingest.service.grouping import GroupCommitter
from usameter_ingest.service.reading import ReadingService
from usameter_ingest.service.recording import EventResult, Recorded, RecordRequest
from usameter_ingest.servicer.event_input import RefusedEvent, events_from_proto, quantity_from_proto
from usameter_ingest.servicer.event_json import PlainRequest, answer_to_json, events_from_json
from usameter_ingest.store.entries import Correction, EventFilter, ListedEvent

log = get_logger()

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

# Of an item: None where it came as JSON that is left unread.
_Content: TypeAlias = PlainRequest | event_pb2.RecordEventsRequest | None

_Result = TypeVar("_Result")

_BATCHES_IN_FLIGHT_MAX = 16
_RECORD_SCOPE = access_of(event_pb2.DESCRIPTOR.services_by_name["EventService"].methods_by_name["RecordEvents"]).scope


class EventServicer(event_pb2_grpc.EventServiceServicer):
    """Records, reads and corrects events of the caller's organization."""

    # Their requests are checked by `event_input`, not by the general validator.
    VALIDATING_METHODS = tuple(
        f"/usameter.ingest.v1.EventService/{name}" for name in ("RecordEvents", "RecordMany", "StreamEvents")
    )

    def __init__(
        self,
        *,
        committer: GroupCommitter,
        reading: ReadingService,
        correcting: CorrectingService,
        control: AccessControl,
        clock: Clock,
    ) -> None:
        self._committer = committer
        self._reading = reading
        self._correcting = correcting
        self._control = control
        self._clock = clock

    async def RecordEvents(
        self, request: event_pb2.RecordEventsRequest, context: Context
    ) -> event_pb2.RecordEventsResponse:
        return await self._submit(current_principal().org_id, request, current_request_id())

    async def RecordMany(self, request: event_pb2.RecordManyRequest, context: Context) -> event_pb2.RecordManyResponse:
        keys = list({item.authorization for item in request.items})
        callers = dict(zip(keys, await _all(map(self._caller, keys)), strict=True))
        contents = [self._content_of(callers[item.authorization], item) for item in request.items]
        standings = await self._standings(callers, request.items, contents)
        # All are submitted before the first is waited for: what comes together is committed together.
        answers = [
            self._submit_item(callers[item.authorization], content, standing, item.request_id)
            for item, content, standing in zip(request.items, contents, standings, strict=True)
        ]
        return event_pb2.RecordManyResponse(outcomes=await asyncio.gather(*answers))

    async def StreamEvents(  # type: ignore[override]  # the stub knows only yielding
        self, requests: AsyncIterator[event_pb2.StreamEventsRequest], context: Context
    ) -> None:
        # Writes its answers instead of yielding them: a generator that is left at a yield, as by a
        # client that goes away, would leave its task group behind.
        # As the interceptor found it when it let the stream begin.
        authorization = str(dict(context.invocation_metadata() or ())["authorization"])
        places = asyncio.Semaphore(_BATCHES_IN_FLIGHT_MAX)
        writing = asyncio.Lock()

        async def record(message: event_pb2.StreamEventsRequest) -> None:
            # Of each message, as of each call: a revoked key must not record for as long as its stream lasts.
            caller = await self._caller(authorization)
            (standing,) = [None] if isinstance(caller, Exception) else await self._control.count(caller)
            outcome = await self._submit_item(caller, message.request, standing, current_request_id())
            async with writing:
                await context.write(event_pb2.StreamEventsResponse(sequence=message.sequence, outcome=outcome))
            places.release()  # not before: who does not read is not read either

        async with asyncio.TaskGroup() as recording:
            async for message in requests:
                await places.acquire()
                recording.create_task(record(message))

    async def _caller(self, authorization: str) -> Principal | Exception:
        try:
            return await self._control.authenticate(authorization, _RECORD_SCOPE)
        except Exception as error:
            # Of one caller among many: it is the answer to this one's items alone.
            return error

    def _content_of(self, caller: Principal | Exception, item: event_pb2.RecordManyItem) -> _Content:
        if isinstance(caller, Exception) or item.WhichOneof("content") != "json":
            return item.request
        try:
            return events_from_json(caller.org_id, item.json, now=self._clock.now())
        except Exception as error:
            # As in `_submit_item`; transcoded, it may do better.
            log.error("request_unread", request_id=item.request_id, exc_info=error)
            return None

    async def _standings(
        self,
        callers: Mapping[str, Principal | Exception],
        items: Sequence[event_pb2.RecordManyItem],
        contents: Sequence[_Content],
    ) -> list[Standing | None]:
        """How each item fares with its caller's rate limits. What is left unread comes again, and is counted then."""
        counts = Counter(
            item.authorization for item, content in zip(items, contents, strict=True) if content is not None
        )

        async def count(authorization: str) -> Iterator[Standing | None]:
            caller, requests = callers[authorization], counts[authorization]
            # Who is not known is refused, and has no limits.
            return iter(
                [None] * requests if isinstance(caller, Exception) else await self._control.count(caller, requests)
            )

        left = dict(zip(counts, await _all(map(count, counts)), strict=True))
        return [
            None if content is None else next(left[item.authorization])
            for item, content in zip(items, contents, strict=True)
        ]

    def _submit_item(
        self, caller: Principal | Exception, content: _Content, standing: Standing | None, request_id: str
    ) -> Awaitable[event_pb2.RecordOutcome]:
        """What becomes of one of many requests; its events are submitted when this returns."""
        try:
            if isinstance(caller, Exception):
                raise caller
            if content is None:
                return _unread()
            if standing is not None:
                standing.require_admitted()
            if isinstance(content, PlainRequest):
                return _outcome_of(self._submit_plain(caller.org_id, content, request_id), standing, request_id)
            return _outcome_of(_as_outcome(self._submit(caller.org_id, content, request_id)), standing, request_id)
        except Exception as error:
            # One request's fault must not take the answers of the others with it.
            return _refused(error, standing, request_id)

    def _submit_plain(self, org_id: OrgId, plain: PlainRequest, request_id: str) -> Awaitable[event_pb2.RecordOutcome]:
        if plain.partial:
            return _as_outcome(self._submit_apart(org_id, plain.events, request_id))
        return _answer_json(self._committer.submit(org_id, RecordRequest(plain.events, plain.batch)), plain.batch)

    def _submit(
        self, org_id: OrgId, request: event_pb2.RecordEventsRequest, request_id: str
    ) -> Awaitable[event_pb2.RecordEventsResponse]:
        """The answer to a request; its events are submitted when this returns.

        Raises:
            InvalidArgument: They break a rule.
        """
        events = events_from_proto(org_id, request, now=self._clock.now())
        if request.partial:
            return self._submit_apart(org_id, events, request_id)
        whole = [event for event in events if isinstance(event, UsageEvent)]
        batch = bool(request.events)
        return _answer(self._committer.submit(org_id, RecordRequest(whole, batch)), batch)

    def _submit_apart(
        self, org_id: OrgId, events: Sequence[UsageEvent | RefusedEvent], request_id: str
    ) -> Awaitable[event_pb2.RecordEventsResponse]:
        """The answer to a partial batch: each event is a request of its own."""
        return _answer_apart(
            [
                self._committer.submit(org_id, RecordRequest([event], batch=False))
                if isinstance(event, UsageEvent)
                else event
                for event in events
            ],
            request_id,
        )

    async def ListEvents(self, request: event_pb2.ListEventsRequest, context: Context) -> event_pb2.ListEventsResponse:
        which = EventFilter(
            tenant_id=request.tenant_id or None,
            event_type=request.event_type or None,
            start=datetime_in(request, "start_date"),
            end=datetime_in(request, "end_date"),
        )
        limit = request.limit if request.HasField("limit") else DEFAULT_LIMIT
        before = decode_page_token(request.page_token, tuple[datetime, UUID])
        found = await self._reading.list_events(current_principal().org_id, which, before=before, limit=limit + 1)
        events, goes_on = fill_page(found, limit=limit, to_proto=event_to_proto)
        token = event_page_token(found[len(events) - 1]) if goes_on else None
        return event_pb2.ListEventsResponse(events=events, next_page_token=token)

    async def GetEvent(self, request: event_pb2.GetEventRequest, context: Context) -> event_pb2.Event:
        event_id = parse_id("evt", request.event_id, field="event_id")
        return event_to_proto(await self._reading.get_event(current_principal().org_id, event_id))

    async def VoidEvent(self, request: event_pb2.VoidEventRequest, context: Context) -> event_pb2.Correction:
        event_id = parse_id("evt", request.event_id, field="event_id")
        correction = await self._correcting.void(current_principal().org_id, event_id, reason=request.reason)
        return correction_to_proto(correction)

    async def AmendEvent(self, request: event_pb2.AmendEventRequest, context: Context) -> event_pb2.Correction:
        event_id = parse_id("evt", request.event_id, field="event_id")
        try:
            quantity = quantity_from_proto(request)
        except InvalidQuantity as error:
            raise InvalidArgument([FieldViolation("quantity", str(error))]) from None
        if quantity is None:
            raise InvalidArgument([FieldViolation("quantity", "is required, or quantity_decimal")])
        correction = await self._correcting.amend(
            current_principal().org_id, event_id, quantity=quantity, reason=request.reason
        )
        return correction_to_proto(correction)


async def _all(awaitables: Iterable[Awaitable[_Result]]) -> list[_Result]:
    """What comes of each, in order. One alone, as in most calls, is spared a task: two turns of the loop."""
    waiting = list(awaitables)
    return [await waiting[0]] if len(waiting) == 1 else await asyncio.gather(*waiting)


async def _outcome_of(
    answer: Awaitable[event_pb2.RecordOutcome], standing: Standing | None, request_id: str
) -> event_pb2.RecordOutcome:
    try:
        return _with_metadata(await answer, standing)
    except Exception as error:
        # As in `_submit_item`.
        return await _refused(error, standing, request_id)


async def _refused(error: Exception, standing: Standing | None, request_id: str) -> event_pb2.RecordOutcome:
    if _is_refusal(error):
        status = status_of(error)[1]
    else:
        log.error("request_failed", request_id=request_id, exc_info=error)
        status = internal_status(request_id)[1]
    return _with_metadata(event_pb2.RecordOutcome(status=status.SerializeToString()), standing)


def _is_refusal(error: Exception) -> TypeGuard[UsameterError]:
    """Whether the caller is told; whatever else went wrong is ours."""
    return isinstance(error, UsameterError) and not isinstance(error, Internal)


def _with_metadata(outcome: event_pb2.RecordOutcome, standing: Standing | None) -> event_pb2.RecordOutcome:
    if standing is not None:
        outcome.metadata.update(standing.metadata)
    return outcome


async def _unread() -> event_pb2.RecordOutcome:
    return event_pb2.RecordOutcome(unread=True)


async def _as_outcome(answer: Awaitable[event_pb2.RecordEventsResponse]) -> event_pb2.RecordOutcome:
    return event_pb2.RecordOutcome(response=await answer)


async def _answer(recording: Awaitable[Recorded], batch: bool) -> event_pb2.RecordEventsResponse:
    recorded = await recording
    return batch_to_proto(recorded) if batch else single_to_proto(recorded)


async def _answer_json(recording: Awaitable[Recorded], batch: bool) -> event_pb2.RecordOutcome:
    recorded = await recording
    text = answer_to_json(recorded, batch=batch)
    if text is not None:
        return event_pb2.RecordOutcome(json=text)
    return event_pb2.RecordOutcome(response=batch_to_proto(recorded) if batch else single_to_proto(recorded))


async def _answer_apart(
    answers: Sequence[asyncio.Future[Recorded] | RefusedEvent], request_id: str
) -> event_pb2.RecordEventsResponse:
    outcomes: list[Recorded | Exception] = []
    try:
        for index, answer in enumerate(answers):
            if isinstance(answer, RefusedEvent):
                outcomes.append(answer.error)
                continue
            try:
                outcomes.append(await answer)
            except IdempotencyConflict as conflict:
                outcomes.append(_conflict_at(index, conflict))
            except Exception as error:
                # Of one event: what became of the others is to be told all the same.
                outcomes.append(error)
    finally:
        # Whose caller has gone away is not recorded if its group has not begun.
        for answer in answers:
            if not isinstance(answer, RefusedEvent):
                answer.cancel()
    # Many events fail by one fault where their whole group does.
    for fault in {
        id(each): each for each in outcomes if isinstance(each, Exception) and not _is_refusal(each)
    }.values():
        log.error("event_failed", request_id=request_id, exc_info=fault)
    return partial_to_proto(outcomes, request_id)


def _conflict_at(index: int, conflict: IdempotencyConflict) -> IdempotencyConflict:
    """As a batch that is recorded whole or not at all names it."""
    return IdempotencyConflict(
        field=f"events[{index}]", idempotency_key=conflict.idempotency_key, event_id=conflict.event_id
    )


def single_to_proto(recorded: Recorded) -> event_pb2.RecordEventsResponse:
    """The answer to a single event."""
    (result,) = recorded.results
    return event_pb2.RecordEventsResponse(
        success=True,
        event_id=format_id("evt", result.event_id),
        deduplicated=result.deduplicated,
        voided=True if result.voided else None,
        warnings=[warning_to_proto(warning) for warning in recorded.warnings],
    )


def batch_to_proto(recorded: Recorded) -> event_pb2.RecordEventsResponse:
    """The answer to a batch."""
    duplicates = sum(result.deduplicated for result in recorded.results)
    return event_pb2.RecordEventsResponse(
        success=True,
        count=len(recorded.results),
        new_events=len(recorded.results) - duplicates,
        duplicate_events=duplicates,
        results=[result_to_proto(result) for result in recorded.results],
        warnings=[warning_to_proto(warning) for warning in recorded.warnings],
    )


def partial_to_proto(outcomes: Sequence[Recorded | Exception], request_id: str) -> event_pb2.RecordEventsResponse:
    """The answer to a partial batch: each event's result or error, in order."""
    recorded = [outcome for outcome in outcomes if isinstance(outcome, Recorded)]
    duplicates = sum(outcome.results[0].deduplicated for outcome in recorded)
    return event_pb2.RecordEventsResponse(
        success=True,
        count=len(outcomes),
        new_events=len(recorded) - duplicates,
        duplicate_events=duplicates,
        results=[
            result_to_proto(outcome.results[0])
            if isinstance(outcome, Recorded)
            else error_to_proto(outcome, request_id)
            for outcome in outcomes
        ],
        # The last word on each limit: its `current` includes all the events before.
        warnings=list(
            {
                (warning.tenant_id, warning.event_type): warning_to_proto(warning)
                for outcome in recorded
                for warning in outcome.warnings
            }.values()
        ),
    )


def error_to_proto(error: Exception, request_id: str) -> event_pb2.EventResult:
    """The error of one event of a partial batch; of a fault of ours it tells the request id and nothing else."""
    details: Message | None
    if _is_refusal(error):
        sentence, (code, details) = str(error), reason_and_details_of(error)
    else:
        sentence, code, details = "Internal error", "INTERNAL", error_pb2.InternalDetails(request_id=request_id)
    return event_pb2.EventResult(
        error=event_pb2.EventError(
            error=sentence,
            code=code,
            details=Struct() if details is None else ParseDict(_as_printed(details), Struct()),
        )
    )


def _as_printed(details: Message) -> dict[str, Any]:
    return MessageToDict(details, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def result_to_proto(result: EventResult) -> event_pb2.EventResult:
    """One event's part of a batch's answer."""
    return event_pb2.EventResult(
        event_id=format_id("evt", result.event_id),
        deduplicated=result.deduplicated,
        voided=True if result.voided else None,
    )


def warning_to_proto(warning: LimitWarning) -> event_pb2.Warning:
    """A limit that the request came near or went over."""
    return event_pb2.Warning(
        code=warning.code,
        tenant_id=warning.tenant_id,
        event_type=warning.event_type,
        limit=canonical(warning.limit),
        current=canonical(warning.current),
        reset_at=None if warning.reset_at is None else timestamp_from_datetime(warning.reset_at),
    )


def event_page_token(last: ListedEvent) -> str:
    """Where the list goes on behind an event."""
    return encode_page_token([format_timestamp(last.occurred_at), str(last.event_id)])


def event_to_proto(event: ListedEvent) -> event_pb2.Event:
    """An event as it is read."""
    return event_pb2.Event(
        id=format_id("evt", event.event_id),
        tenant_id=event.tenant_id,
        event_type=event.event_type,
        quantity=float(event.quantity),  # the published field; quantity_decimal is the exact one
        quantity_decimal=canonical(event.quantity),
        metadata=ParseDict(decode_metadata(event.metadata), Struct()),
        timestamp=timestamp_from_datetime(event.occurred_at),
        ingested_at=timestamp_from_datetime(event.ingested_at),
        idempotency_key=event.idempotency_key,
        invoice_id=event.invoice_id,
        billed_at=None if event.billed_at is None else timestamp_from_datetime(event.billed_at),
        correction=None if event.correction is None else correction_to_proto(event.correction),
    )


def correction_to_proto(correction: Correction) -> event_pb2.Correction:
    """The signed entry beside an event."""
    return event_pb2.Correction(
        event_id=format_id("evt", correction.event_id),
        kind=event_pb2.CorrectionKind.Value(correction.kind),
        quantity_delta=canonical(correction.quantity_delta),
        quantity_decimal=canonical(correction.quantity),
        reason=correction.reason,
        ingested_at=timestamp_from_datetime(correction.ingested_at),
    )

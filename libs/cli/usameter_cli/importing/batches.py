"""Events in batches, several on their way at once; each line is recorded once, however often it is sent.

Every event has an idempotency key, so a batch whose answer was lost is sent again as it was, and an import
that stopped midway is simply run again: what was stored then is a duplicate now.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import msgspec

from usameter_cli.api import ApiClient, read_as
from usameter_cli.errors import CliError, Refused, UsageError
from usameter_cli.importing.records import Record

BATCH_EVENTS_MAX = 1_000
# The API takes 4 MiB; 1,000 events with large metadata would be more.
BATCH_BYTES_MAX = 3_500_000
IN_FLIGHT_MAX = 4
REPORTED_FAULTS_MAX = 10
_EVENT_PATH = re.compile(r"^events\[(\d+)\]\.?")
_RERUN = "What was sent before is stored; running the import again is safe."


@dataclass(frozen=True, slots=True)
class Fault:
    """A line that was left out, and why."""

    line: int
    reason: str


@dataclass(slots=True)
class ImportTotals:
    """What has become of the input so far: lines read, and events as the server answered."""

    lines: int = 0
    new: int = 0
    duplicates: int = 0
    invalid: int = 0
    warnings: int = 0
    # The first of the invalid lines.
    faults: list[Fault] = field(default_factory=list)
    # The last line, where it may still be being written; no fault: it is imported once it is whole.
    cut_off_line: int | None = None

    @property
    def events(self) -> int:
        """Events that the server has stored, or knew."""
        return self.new + self.duplicates

    def add_fault(self, fault: Fault) -> None:
        """Count a line that was left out."""
        self.invalid += 1
        if len(self.faults) < REPORTED_FAULTS_MAX:
            self.faults.append(fault)


@dataclass(frozen=True, slots=True)
class _Batch:
    # The line of each event, beside it.
    lines: Sequence[int]
    events: Sequence[bytes]
    # Of the source, once these events were read.
    position: int

    def body(self) -> bytes:
        return b'{"events":[' + b",".join(self.events) + b"]}"

    def without(self, left_out: set[int]) -> _Batch:
        kept = [pair for pair in zip(self.lines, self.events, strict=True) if pair[0] not in left_out]
        return _Batch([line for line, _ in kept], [event for _, event in kept], self.position)


class _Answer(msgspec.Struct, frozen=True):
    new_events: int = 0
    duplicate_events: int = 0
    warnings: list[object] = []


@dataclass(frozen=True, slots=True)
class _Sent:
    answer: _Answer
    faults: Sequence[Fault]
    position: int


class Importer:
    """Sends the events of records, and counts what became of them.

    Args:
        api: Where they go.
        skip_invalid: Leave out lines with a fault; else the first ends the import.
        position: How much of the source has been read; for progress.
        on_progress: Told after each batch: the position of its end, and the totals so far.
    """

    def __init__(
        self,
        api: ApiClient,
        *,
        skip_invalid: bool,
        position: Callable[[], int] = lambda: 0,
        on_progress: Callable[[int, ImportTotals], None] = lambda _position, _totals: None,
    ) -> None:
        self._api = api
        self._skip_invalid = skip_invalid
        self._position = position
        self._on_progress = on_progress
        self.totals = ImportTotals()

    def run(self, records: Iterable[Record]) -> None:
        """Send everything. On an error nothing further is sent, and what is under way is waited for.

        Raises:
            UsageError: A line has a fault, found here or by the server; its batch was not stored.
            Refused, Unreachable: The server's error.
        """
        pending: set[Future[_Sent]] = set()
        with ThreadPoolExecutor(IN_FLIGHT_MAX, thread_name_prefix="import") as threads:
            try:
                for batch in self._batches(records):
                    if len(pending) == IN_FLIGHT_MAX:
                        done, pending = wait(pending, return_when=FIRST_COMPLETED)
                        self._account(done)
                    pending.add(threads.submit(self._send, batch))
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    self._account(done)
            except BaseException:
                self._api.give_up()
                stored, _ = wait(pending)
                self._account({future for future in stored if future.exception() is None})
                raise

    def _batches(self, records: Iterable[Record]) -> Iterator[_Batch]:
        lines: list[int] = []
        events: list[bytes] = []
        size = 0
        for record in records:
            self.totals.lines += 1
            if record.cut_off:
                self.totals.cut_off_line = record.line
                continue
            if record.fault is not None:
                fault = Fault(record.line, record.fault)
                if not self._skip_invalid:
                    raise _stopped(fault)
                self.totals.add_fault(fault)
                continue
            record_size = sum(len(event) + 1 for event in record.events)
            if events and (len(events) + len(record.events) > BATCH_EVENTS_MAX or size + record_size > BATCH_BYTES_MAX):
                yield _Batch(lines, events, self._position())
                lines, events, size = [], [], 0
            lines += [record.line] * len(record.events)
            events += record.events
            size += record_size
        if events:
            yield _Batch(lines, events, self._position())

    def _send(self, batch: _Batch) -> _Sent:
        faults: list[Fault] = []
        while batch.events:
            try:
                answer = self._api.post("/api/v1/events", batch.body())
            except Refused as error:
                found = _faults_of(error, batch)
                if not found:
                    raise _explained(error, batch) from error
                if not self._skip_invalid:
                    raise _stopped(found[0]) from error
                # The server is the judge of what an event may be, so only it can find these.
                faults += found
                batch = batch.without({fault.line for fault in found})
            else:
                return _Sent(read_as(_Answer, answer), faults, batch.position)
        return _Sent(_Answer(), faults, batch.position)

    def _account(self, done: Iterable[Future[_Sent]]) -> None:
        failure: BaseException | None = None
        for future in done:
            failure = future.exception() or failure
            if future.exception() is None:
                sent = future.result()
                self.totals.new += sent.answer.new_events
                self.totals.duplicates += sent.answer.duplicate_events
                self.totals.warnings += len(sent.answer.warnings)
                for fault in sent.faults:
                    self.totals.add_fault(fault)
                self._on_progress(sent.position, self.totals)
        if failure is not None:
            raise failure


def _stopped(fault: Fault) -> UsageError:
    return UsageError(
        f"Line {fault.line}: {fault.reason}. Nothing of its batch was stored. {_RERUN} "
        "With --skip-invalid such lines are left out."
    )


def _faults_of(error: Refused, batch: _Batch) -> list[Fault]:
    """The lines that the server calls invalid, each once; none where the error is of another kind."""
    faults: dict[int, Fault] = {}
    violations = error.details.get("violations", ()) if error.code == "INVALID_ARGUMENT" else ()
    for violation in violations:
        place = _place_of(violation.get("field"), batch)
        if place is not None:
            line, name = place
            faults.setdefault(line, Fault(line, f"{name} {violation.get('description', 'is invalid')}".strip()))
    return list(faults.values())


def _explained(error: Refused, batch: _Batch) -> CliError:
    match error.code:
        case "IDEMPOTENCY_CONFLICT":
            place = _place_of(error.details.get("field"), batch)
            where = f"Line {place[0]}" if place else "An event"
            return Refused(
                f"{where}: its key {error.details.get('idempotency_key')} belongs to an event with other content. "
                f"Another file of the same name needs another --source. {_RERUN}",
                code=error.code,
                details=error.details,
            )
        case "QUOTA_EXCEEDED":
            violations = error.details.get("violations") or [{}]
            first = violations[0]
            return Refused(
                f"Quota exceeded: tenant {first.get('tenant_id')}, {first.get('event_type')}, "
                f"limit {first.get('limit')}, current {first.get('current')}. {_RERUN}",
                code=error.code,
                details=error.details,
            )
    return error


def _place_of(path: object, batch: _Batch) -> tuple[int, str] | None:
    """The line and the field that a path such as "events[3].quantity" means."""
    match = _EVENT_PATH.match(path) if isinstance(path, str) else None
    if match is None or not isinstance(path, str) or int(match[1]) >= len(batch.lines):
        return None
    return batch.lines[int(match[1])], path[match.end() :]

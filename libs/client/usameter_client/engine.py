"""What both recorders are: a buffer, and a task that sends what is in it, in one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from usameter_client.buffer import Buffer, BufferedEvent
from usameter_client.delivery import Delivery, OnRejected
from usameter_client.errors import BufferFull, RecorderClosed, Undelivered
from usameter_client.events import Json, UsageEvent, usage_event
from usameter_client.transport import Transport
from usameter_core.clock import SystemClock

API_BATCH_EVENTS_MAX = 1_000
# Batches on their way at once: while one waits for its commit, others are on the wire. More gain
# nothing, since the server commits what waits as one group.
IN_FLIGHT_MAX = 4


@dataclass(frozen=True, slots=True)
class Options:
    """How a recorder buffers.

    Args:
        linger_seconds: How long an event may wait for others to share its request.
        batch_events_max: Events of a request, 1 to 1,000; 3.5 MB end one earlier.
        events_max: Unconfirmed events it holds, encoded: with 32 KiB an event at most, its bound of memory.
        wait_seconds: How long record() waits for room at that bound; 0: not at all.
        close_seconds: How long close() goes on trying.
    """

    linger_seconds: float = 0.2
    batch_events_max: int = API_BATCH_EVENTS_MAX
    events_max: int = 10_000
    wait_seconds: float = 30.0
    close_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 1 <= self.batch_events_max <= API_BATCH_EVENTS_MAX:
            raise ValueError(f"batch_events_max must be 1 to {API_BATCH_EVENTS_MAX}")
        if self.events_max < self.batch_events_max:
            raise ValueError("events_max must hold at least one batch: batch_events_max")


DEFAULT_OPTIONS = Options()


class Engine:
    """Runs in one event loop; `new_event`, `encode` and `offer` may be called in any thread."""

    def __init__(self, transport: Transport, *, on_rejected: OnRejected, options: Options) -> None:
        self._transport = transport
        self._options = options
        self._clock = SystemClock()
        self._delivery = Delivery(transport, on_rejected=on_rejected, on_settled=self._settle)
        self._buffer = Buffer(
            events_max=options.events_max, batch_events_max=options.batch_events_max, on_ready=self._call_dispatcher
        )
        self._flush_through = 0
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._dispatcher: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start sending."""
        self._loop = asyncio.get_running_loop()
        await self._transport.open()
        self._dispatcher = asyncio.create_task(self._run(), name="usameter-recorder")

    def new_event(
        self,
        event_type: str,
        *,
        tenant_id: str,
        quantity: int | float | Decimal,
        idempotency_key: str | None,
        timestamp: datetime | None,
        metadata: Mapping[str, Json] | None,
        reservation_id: str | None,
    ) -> UsageEvent:
        """See `usage_event`."""
        return usage_event(
            event_type,
            tenant_id=tenant_id,
            quantity=quantity,
            idempotency_key=idempotency_key,
            timestamp=timestamp,
            metadata=metadata,
            reservation_id=reservation_id,
            now=self._clock.now(),
        )

    def encode(self, event: UsageEvent) -> bytes:
        """The event as the buffer takes it.

        Raises:
            InvalidEvent: It cannot be encoded.
        """
        return self._transport.encode(event)

    def offer(self, body: bytes) -> bool:
        """Buffer an encoded event, or return False where there is no room.

        Raises:
            RecorderClosed: The recorder was closed, was never opened, or has failed.
        """
        if self._loop is None:
            raise _not_open()
        return self._buffer.put(body)

    async def put(self, body: bytes) -> None:
        """Buffer an encoded event, waiting for room.

        Raises:
            BufferFull: There was none for `wait_seconds`.
            RecorderClosed: As `offer`.
        """
        try:
            async with asyncio.timeout(self._options.wait_seconds):
                while True:
                    changed = self._changed
                    if self.offer(body):
                        return
                    await changed.wait()
        except TimeoutError:
            failure = self._delivery.last_failure
            reason = f"; last failure: {failure}" if failure is not None else ""
            raise BufferFull(f"{self._options.events_max} usage events wait to be delivered{reason}") from failure

    async def flush(self, timeout_seconds: float | None) -> None:
        """Return once everything recorded before is settled.

        Raises:
            TimeoutError: It took longer; the events stay in the buffer and are tried on.
            Undelivered: The recorder has failed.
            RecorderClosed: It was closed, or never opened.
        """
        if self._loop is None:
            raise _not_open()
        if self._dispatcher is None:
            raise RecorderClosed("The recorder is closed")
        await self._settle_recorded(timeout_seconds)

    async def close(self) -> None:
        """Deliver what is left, within `close_seconds`, and stop. Closing again does nothing.

        Raises:
            Undelivered: It could not all be delivered.
        """
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is None:
            return
        self._buffer.close(RecorderClosed("The recorder is closed"))
        try:
            await self._settle_recorded(self._options.close_seconds)
        except TimeoutError:
            failure = self._delivery.last_failure
            raise self._undelivered(failure) from failure
        finally:
            # Whoever still waits for a flush or for room is told that it is over.
            self._failure = self._failure or RecorderClosed("The recorder is closed")
            self._notify()
            dispatcher.cancel()
            await asyncio.gather(dispatcher, return_exceptions=True)
            await self._transport.close()

    async def _settle_recorded(self, timeout_seconds: float | None) -> None:
        number = self._buffer.last_number
        self._flush_through = max(self._flush_through, number)
        self._wake.set()
        async with asyncio.timeout(timeout_seconds):
            while True:
                changed = self._changed
                oldest = self._buffer.oldest()
                if oldest is None or oldest.number > number:
                    return
                if self._failure is not None:
                    raise self._undelivered(self._failure) from self._failure
                await changed.wait()

    def _undelivered(self, failure: BaseException | None) -> Undelivered:
        return Undelivered([self._transport.decode(body) for body in self._buffer.unsettled()], failure)

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as deliveries:
                await self._dispatch(deliveries)
        except* Exception as group:
            # CallRefused, or an exception of on_rejected: nothing further can be settled.
            self._failure = group.exceptions[0]
            closed = RecorderClosed(f"The recorder has stopped: {self._failure}")
            closed.__cause__ = self._failure
            self._buffer.close(closed)
            self._notify()

    async def _dispatch(self, deliveries: asyncio.TaskGroup) -> None:
        free = asyncio.Semaphore(IN_FLIGHT_MAX)
        while True:
            await free.acquire()
            batch = await self._next_batch()
            delivery = deliveries.create_task(self._delivery.deliver(batch))
            delivery.add_done_callback(lambda _: free.release())

    async def _next_batch(self) -> list[BufferedEvent]:
        while True:
            self._wake.clear()
            now = time.monotonic()
            batch = self._buffer.take(recorded_before=now - self._options.linger_seconds, through=self._flush_through)
            if batch:
                return batch
            oldest = self._buffer.oldest_waiting_seconds()
            patience = None if oldest is None else max(0.0, oldest + self._options.linger_seconds - now)
            try:
                async with asyncio.timeout(patience):
                    await self._wake.wait()
            except TimeoutError:
                pass  # the oldest event has lingered long enough

    def _settle(self, settled: Sequence[BufferedEvent]) -> None:
        self._buffer.settle(settled)
        self._notify()

    def _notify(self) -> None:
        """Wake whoever waits for room or for a flush."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _call_dispatcher(self) -> None:
        assert self._loop is not None, "nothing is buffered before the engine is open"
        self._loop.call_soon_threadsafe(self._wake.set)


def _not_open() -> RecorderClosed:
    return RecorderClosed("The recorder is not open yet; use it in a `with` statement")

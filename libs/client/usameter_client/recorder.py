"""The two recorders: one to await, and one for threads."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import CancelledError, Future
from datetime import datetime
from decimal import Decimal
from types import TracebackType
from typing import Any, Self, TypeVar

from usameter_client.delivery import OnRejected
from usameter_client.engine import DEFAULT_OPTIONS, Engine, Options
from usameter_client.errors import RecorderClosed
from usameter_client.events import Json, UsageEvent
from usameter_client.loop import RecorderLoop
from usameter_client.transport import Transport

Result = TypeVar("Result")


class AsyncRecorder:
    """Records usage in the background of an event loop; used as `async with`.

    A recorded event is in memory until the server has committed it: `flush()` says when.

    Args:
        transport: A `RestTransport` or `GrpcTransport`, for this recorder alone.
        on_rejected: Called in the event loop with each event that the server refuses, and why. What it
            raises stops the recorder, and the event is among those of `Undelivered`.
        options: How it buffers.
    """

    def __init__(self, transport: Transport, *, on_rejected: OnRejected, options: Options = DEFAULT_OPTIONS) -> None:
        self._engine = Engine(transport, on_rejected=on_rejected, options=options)

    async def __aenter__(self) -> Self:
        await self._engine.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def record(
        self,
        event_type: str,
        *,
        tenant_id: str,
        quantity: int | float | Decimal = 1,
        idempotency_key: str | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, Json] | None = None,
        reservation_id: str | None = None,
    ) -> UsageEvent:
        """Buffer an event, and return it as it will be sent; arguments as `usage_event` takes them.

        Raises:
            InvalidEvent: A value cannot be carried exactly.
            BufferFull: There was no room for `wait_seconds`.
            RecorderClosed: The recorder is closed, or a failure has stopped it.
        """
        event = self._engine.new_event(
            event_type,
            tenant_id=tenant_id,
            quantity=quantity,
            idempotency_key=idempotency_key,
            timestamp=timestamp,
            metadata=metadata,
            reservation_id=reservation_id,
        )
        await self.record_event(event)
        return event

    async def record_event(self, event: UsageEvent) -> None:
        """Buffer an event that was made before, such as one of `Undelivered`; raises as `record` does."""
        body = self._engine.encode(event)
        if not self._engine.offer(body):
            await self._engine.put(body)

    async def flush(self, *, timeout_seconds: float | None = None) -> None:
        """Return once everything recorded before is committed by the server, or reported to `on_rejected`.

        Raises:
            TimeoutError: It took longer; the events are still buffered and tried on.
            Undelivered: A failure has stopped the recorder.
            RecorderClosed: It is closed, or not open yet.
        """
        await self._engine.flush(timeout_seconds)

    async def close(self) -> None:
        """Deliver what is left, for at most `close_seconds`; takes no more events from the first moment on.

        Raises:
            Undelivered: Some events are not confirmed; it carries them.
        """
        await self._engine.close()


class Recorder:
    """Records usage from any number of threads, through one thread of its own; used as `with`.

    Starts its thread when it is made, so make it after a fork (in gunicorn: in `post_fork`). One
    that is not closed closes itself as the interpreter exits, and prints what it could not deliver.

    Args:
        transport: A `RestTransport` or `GrpcTransport`, for this recorder alone.
        on_rejected: As for `AsyncRecorder`, but called in the recorder's thread, where waiting for
            the recorder itself (flush, close) is an error.
        options: How it buffers.
    """

    def __init__(self, transport: Transport, *, on_rejected: OnRejected, options: Options = DEFAULT_OPTIONS) -> None:
        self._engine = Engine(transport, on_rejected=on_rejected, options=options)
        self._pid = os.getpid()
        self._closing = threading.Lock()
        # What is submitted under this lock is in the loop before it is told to stop.
        self._submitting = threading.Lock()
        self._is_stopped = False
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=_run_loop, args=(started,), name="usameter-recorder", daemon=True)
        self._thread.start()
        self._loop, self._stop = started.result()
        self._wait(self._engine.open())
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def record(
        self,
        event_type: str,
        *,
        tenant_id: str,
        quantity: int | float | Decimal = 1,
        idempotency_key: str | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, Json] | None = None,
        reservation_id: str | None = None,
    ) -> UsageEvent:
        """As `AsyncRecorder.record`; blocks where that waits."""
        event = self._engine.new_event(
            event_type,
            tenant_id=tenant_id,
            quantity=quantity,
            idempotency_key=idempotency_key,
            timestamp=timestamp,
            metadata=metadata,
            reservation_id=reservation_id,
        )
        self.record_event(event)
        return event

    def record_event(self, event: UsageEvent) -> None:
        """As `AsyncRecorder.record_event`."""
        self._refuse_forked()
        body = self._engine.encode(event)
        if not self._engine.offer(body):
            self._wait(self._engine.put(body))

    def flush(self, *, timeout_seconds: float | None = None) -> None:
        """As `AsyncRecorder.flush`."""
        self._wait(self._engine.flush(timeout_seconds))

    def close(self) -> None:
        """As `AsyncRecorder.close`. Closing again, from whatever thread, waits for the first and does nothing."""
        if os.getpid() != self._pid:
            # A forked child at its exit: the events are its parent's, and so is the thread.
            return
        self._refuse_own_thread()
        with self._closing:
            if self._is_stopped:
                return
            atexit.unregister(self.close)
            try:
                self._wait(self._engine.close())
            finally:
                with self._submitting:
                    self._is_stopped = True
                    self._loop.call_soon_threadsafe(self._stop.set)
                self._thread.join()

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        try:
            self._refuse_forked()
            self._refuse_own_thread()
            with self._submitting:
                if self._is_stopped:
                    raise RecorderClosed("The recorder is closed")
                future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except BaseException:
            work.close()
            raise
        try:
            return future.result()
        except CancelledError:
            raise RecorderClosed("The recorder was closed meanwhile") from None

    def _refuse_forked(self) -> None:
        # Before any lock is taken: another thread of the parent may have held it at the fork, and nobody
        # would ever release it here.
        if os.getpid() != self._pid:
            raise RecorderClosed("This recorder was made before a fork, and its thread is not here; make it after")

    def _refuse_own_thread(self) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError("on_rejected must not wait for its own recorder: nobody else would do the work")


def _run_loop(started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    async def serve() -> None:
        stop = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), stop))
        await stop.wait()

    # Cancels on its way out whatever was still waiting.
    with asyncio.Runner(loop_factory=RecorderLoop) as runner:
        runner.run(serve())

"""What is recorded and not yet settled, with a bound. May be used by several threads at once."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from usameter_client.errors import RecorderClosed

# The API takes 4 MiB a request; a comma, brackets and headers beside the events are in the rest.
BATCH_BYTES_MAX = 3_500_000


class BufferedEvent(NamedTuple):
    """An event on its way, encoded once for all attempts; only so does its size have a bound.

    `number` ascends in the order of recording; `at_seconds` is on the monotonic clock.
    """

    number: int
    at_seconds: float
    body: bytes


class Buffer:
    """Events from their recording until they are settled: confirmed, or refused and reported.

    Args:
        events_max: Unsettled events it holds, those under way included.
        batch_events_max: Events of a full batch.
        on_ready: Called, in the thread that recorded, when the first event waits and when a batch is full.
    """

    def __init__(self, *, events_max: int, batch_events_max: int, on_ready: Callable[[], None]) -> None:
        self._events_max = events_max
        self._batch_events_max = batch_events_max
        self._on_ready = on_ready
        self._lock = threading.Lock()
        self._waiting: deque[BufferedEvent] = deque()
        self._waiting_bytes = 0
        # By number, ascending, since batches are taken in order: the first is the oldest.
        self._under_way: dict[int, BufferedEvent] = {}
        self._last_number = 0
        self._closed: RecorderClosed | None = None

    def put(self, body: bytes) -> bool:
        """Take the event, or return False where there is no room.

        Raises:
            RecorderClosed: No more events are taken.
        """
        with self._lock:
            if self._closed is not None:
                raise RecorderClosed(str(self._closed)) from self._closed.__cause__
            if len(self._waiting) + len(self._under_way) >= self._events_max:
                return False
            was_full = self._is_full()
            self._last_number += 1
            self._waiting.append(BufferedEvent(self._last_number, time.monotonic(), body))
            self._waiting_bytes += len(body)
            if len(self._waiting) == 1 or self._is_full() != was_full:
                # Under the lock: whoever is told is then still there, for nobody goes before `close`.
                self._on_ready()
        return True

    def take(self, *, recorded_before: float, through: int) -> list[BufferedEvent]:
        """The next batch, if one is due: full, or begun before a moment or by a number; else nothing."""
        with self._lock:
            if not self._waiting:
                return []
            first = self._waiting[0]
            if not (self._is_full() or first.at_seconds <= recorded_before or first.number <= through):
                return []
            batch: list[BufferedEvent] = []
            size = 0
            while self._waiting and len(batch) < self._batch_events_max:
                size += len(self._waiting[0].body)
                if batch and size > BATCH_BYTES_MAX:
                    break
                taken = self._waiting.popleft()
                self._waiting_bytes -= len(taken.body)
                self._under_way[taken.number] = taken
                batch.append(taken)
            return batch

    def settle(self, settled: Iterable[BufferedEvent]) -> None:
        """Forget events that were taken: it is known, and reported, what became of them."""
        with self._lock:
            for each in settled:
                del self._under_way[each.number]

    def close(self, reason: RecorderClosed) -> None:
        """Take no more events; the first reason stays."""
        with self._lock:
            self._closed = self._closed or reason

    @property
    def last_number(self) -> int:
        """Of the event recorded last."""
        return self._last_number

    def oldest(self) -> BufferedEvent | None:
        """The unsettled event that was recorded first."""
        with self._lock:
            if self._under_way:
                return next(iter(self._under_way.values()))
            return self._waiting[0] if self._waiting else None

    def oldest_waiting_seconds(self) -> float | None:
        """When the first event was recorded of those that no batch has taken."""
        with self._lock:
            return self._waiting[0].at_seconds if self._waiting else None

    def unsettled(self) -> list[bytes]:
        """Every event, encoded, whose fate is not known, in the order of recording."""
        with self._lock:
            return [each.body for each in (*self._under_way.values(), *self._waiting)]

    def _is_full(self) -> bool:
        return len(self._waiting) >= self._batch_events_max or self._waiting_bytes >= BATCH_BYTES_MAX

"""One batch on its way to the server: tried until every event of it is settled."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from usameter_client.buffer import BufferedEvent
from usameter_client.errors import EventRefused, Unavailable
from usameter_client.events import UsageEvent
from usameter_client.transport import Transport

log = logging.getLogger("usameter_client")

OnRejected = Callable[[UsageEvent, EventRefused], None]

BACKOFF_SECONDS_FIRST = 0.1
BACKOFF_SECONDS_MAX = 5.0


class _Part(NamedTuple):
    """Events of a request. Whole first: for the server that is one request, with `partial` it is one an event."""

    events: Sequence[BufferedEvent]
    partial: bool


class Delivery:
    """Sends batches, again and again where it must; the keys make that safe.

    Args:
        transport: What carries them; opened.
        on_rejected: Told of each event that the server refuses.
        on_settled: Told of events that are confirmed, or refused and reported.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        on_rejected: OnRejected,
        on_settled: Callable[[Sequence[BufferedEvent]], None],
    ) -> None:
        self._transport = transport
        self._on_rejected = on_rejected
        self._on_settled = on_settled
        # Why the server did not take the last batch that was tried; None: it did.
        self.last_failure: Unavailable | None = None

    async def deliver(self, batch: Sequence[BufferedEvent]) -> None:
        """Return once every event of the batch is settled. Has no deadline: cancel it.

        Raises:
            CallRefused: The server refuses the caller; what was not settled never will be.
        """
        parts = [_Part(batch, partial=False)]
        bound_seconds = BACKOFF_SECONDS_FIRST
        failure: Unavailable | None
        while parts:
            part = parts.pop()
            try:
                results = await self._transport.send([each.body for each in part.events], partial=part.partial)
            except EventRefused as error:
                parts += self._narrowed(part, error)
                continue
            except Unavailable as error:
                again, failure = part.events, error
            else:
                again, failure = self._account(part.events, results)
            self._note(failure)
            if failure is None:
                bound_seconds = BACKOFF_SECONDS_FIRST
                continue
            parts.append(_Part(again, partial=part.partial))
            # Full jitter: batches that failed together do not come back together.
            pause_seconds = random.uniform(0, bound_seconds)  # noqa: S311 - jitter, not a secret
            await asyncio.sleep(failure.retry_after_seconds + pause_seconds)
            bound_seconds = min(BACKOFF_SECONDS_MAX, 2 * bound_seconds)

    def _narrowed(self, part: _Part, error: EventRefused) -> list[_Part]:
        """What to send instead of a part that was refused whole, so that its bad events are found."""
        if len(part.events) == 1:
            self._reject(part.events[0], error)
            return []
        if not part.partial:
            return [_Part(part.events, partial=True)]
        # Only what a server cannot read at all is refused whole even so. Halves find one bad event of a
        # thousand in some 20 requests.
        middle = len(part.events) // 2
        return [_Part(part.events[middle:], partial=True), _Part(part.events[:middle], partial=True)]

    def _account(
        self, part: Sequence[BufferedEvent], results: Sequence[EventRefused | Unavailable | None]
    ) -> tuple[Sequence[BufferedEvent], Unavailable | None]:
        """Settle what can be; returns the events to send again, and why."""
        again: list[BufferedEvent] = []
        recorded: list[BufferedEvent] = []
        failure: Unavailable | None = None
        for each, result in zip(part, results, strict=True):
            match result:
                case None:
                    recorded.append(each)
                case EventRefused():
                    self._reject(each, result)
                case Unavailable():
                    again.append(each)
                    failure = result
        self._on_settled(recorded)
        return again, failure

    def _reject(self, rejected: BufferedEvent, error: EventRefused) -> None:
        # Reported before it is settled: an exception of the callback must not lose the event.
        self._on_rejected(self._transport.decode(rejected.body), error)
        self._on_settled([rejected])

    def _note(self, failure: Unavailable | None) -> None:
        if failure is not None and self.last_failure is None:
            log.warning("Usage events are not delivered now; they are kept and tried again: %s", failure)
        elif failure is None and self.last_failure is not None:
            log.info("Usage events are delivered again")
        self.last_failure = failure

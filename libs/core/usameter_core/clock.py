"""The time, as a dependency."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Tells the time; injected wherever it is needed, so that tests can set it."""

    def now(self) -> datetime:
        """The current moment, aware, UTC, in microseconds."""
        ...


class SystemClock:
    """The clock of the machine. The only caller of `datetime.now`."""

    def now(self) -> datetime:
        """The current moment, aware, UTC."""
        return datetime.now(UTC)

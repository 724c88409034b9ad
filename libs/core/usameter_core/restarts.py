"""Processes that die: why, and whether they are started again."""

from __future__ import annotations

import signal
import time
from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How patient a parent is with a child that keeps dying."""

    first_pause_seconds: float = 0.25
    pause_max_seconds: float = 5.0
    deaths_max: int = 5
    window_seconds: float = 60.0


@dataclass(slots=True)
class Deaths:
    """The deaths of one child within the policy's window."""

    policy: RestartPolicy
    _times: deque[float] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self._times)

    def add(self) -> float | None:
        """Count one more, now; the pause in seconds before the next start, None after too many."""
        now = time.monotonic()
        self._times.append(now)
        while now - self._times[0] > self.policy.window_seconds:
            self._times.popleft()
        if len(self) > self.policy.deaths_max:
            return None
        return min(self.policy.first_pause_seconds * float(2 ** (len(self) - 1)), self.policy.pause_max_seconds)


def exit_reason(code: int) -> str:
    """How a process ended, by its return code: below 0, the signal that killed it."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"

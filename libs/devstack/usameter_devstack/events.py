"""What happens to the platform, as values: for a terminal, a log, or the pipe of a detached start.

No event holds a key or a secret. `Report` is any callable that takes an event; it is called from the event
loop and must not block.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import assert_never

import msgspec


class _Event(msgspec.Struct, frozen=True, tag=True):
    pass


class StepStarted(_Event, frozen=True):
    """A step of the start has begun: "postgres", "migrate", "gateway"… Steps overlap."""

    step: str


class StepFinished(_Event, frozen=True):
    """That step is done; a step that fails has no such event."""

    step: str
    seconds: float


class StackReady(_Event, frozen=True):
    """Everything is ready and `dev_env` is written; the key is in there."""

    url: str
    dev_env: str
    seconds: float


class StartAborted(_Event, frozen=True):
    """The start failed, and what was started has been stopped. The last event before exit code 1."""

    sentence: str


class ChildDied(_Event, frozen=True):
    """A child ended that nobody had asked to. It is started again after the pause, unless that is None."""

    name: str
    pid: int
    reason: str
    log_tail: str
    log_path: str
    restart_in_seconds: float | None


class ChildRestarted(_Event, frozen=True):
    """It is ready again."""

    name: str
    pid: int
    restarts: int


class GaveUp(_Event, frozen=True):
    """One child died too often; everything is stopped now and the exit code is 1."""

    name: str
    deaths: int
    seconds: float


class OrphanEnded(_Event, frozen=True):
    """A child of a supervisor that was killed still ran, and has been ended before the start."""

    name: str
    pid: int


class Stopping(_Event, frozen=True):
    """The stop has begun; children end in reverse order of their start."""


class Stopped(_Event, frozen=True):
    """Nothing of the platform runs any more; the data stays."""

    seconds: float


Event = (
    StepStarted
    | StepFinished
    | StackReady
    | StartAborted
    | ChildDied
    | ChildRestarted
    | GaveUp
    | OrphanEnded
    | Stopping
    | Stopped
)
Report = Callable[[Event], None]


def sentence(event: Event) -> str:
    """The event in words, without a line break at the end."""
    match event:
        case StepStarted(step):
            return f"{step}: starting"
        case StepFinished(step, seconds):
            return f"{step}: done in {seconds:.2f} s"
        case StackReady(url, dev_env, seconds):
            return f"Usameter is ready on {url} after {seconds:.1f} s; the API key is in {dev_env}"
        case StartAborted(text):
            return f"Usameter did not start: {text}"
        case ChildDied():
            return _obituary(event)
        case ChildRestarted(name, pid, restarts):
            return f"{name} is ready again (pid {pid}, restart {restarts})"
        case GaveUp(name, deaths, seconds):
            return f"{name} died {deaths} times within {seconds:.0f} s: stopping everything"
        case OrphanEnded(name, pid):
            return f"ended {name} (pid {pid}), left behind by a supervisor that was killed"
        case Stopping():
            return "stopping"
        case Stopped(seconds):
            return f"stopped after {seconds:.1f} s; the data stays"
        case _:
            assert_never(event)


def report_to_stderr(event: Event) -> None:
    """The report for when nothing better is at hand: one paragraph an event, on standard error."""
    sys.stderr.write(f"usameter: {sentence(event)}\n")
    sys.stderr.flush()


def _obituary(event: ChildDied) -> str:
    lines = [f"{event.name} (pid {event.pid}) {event.reason}"]
    if event.log_tail:
        lines += ["its last words:", *(f"  | {line}" for line in event.log_tail.splitlines())]
    lines.append(f"all of it: {Path(event.log_path)}")
    if event.restart_in_seconds is not None:
        lines.append(f"starting it again in {event.restart_in_seconds:g} s")
    return "\n".join(lines)

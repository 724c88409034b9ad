"""Processes by pid *and* start, so that a recycled pid is never taken for the process it once was."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

_POLL_SECONDS = 0.02


def process_start(pid: int) -> str | None:
    """A text that is the same for one process for ever, and for no other with its pid; None if it is gone.

    A zombie is gone: it holds no port, no file and no lock.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if sys.platform != "linux":
            return f"{process.create_time():.3f}"
        # psutil reckons the creation time from the wall clock, which may be set between two readings. The
        # ticks since boot (field 22; counted after the name, which may hold blanks) are never changed.
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError, IndexError):
        return None
    return f"{boot}:{ticks}"


def is_alive(pid: int, start: str) -> bool:
    """Whether exactly that process still runs."""
    return process_start(pid) == start


async def wait_gone(pid: int, start: str, *, timeout_seconds: float) -> bool:
    """Whether that process (not a child of ours) has ended within the time."""
    deadline = time.monotonic() + timeout_seconds
    while is_alive(pid, start):
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(_POLL_SECONDS)
    return True


async def end_process(pid: int, start: str, *, number: signal.Signals, timeout_seconds: float) -> bool:
    """End exactly that process, with `number` and then with SIGKILL; False if it may not be signalled."""
    if not is_alive(pid, start):
        return True
    try:
        os.kill(pid, number)
        if await wait_gone(pid, start, timeout_seconds=timeout_seconds):
            return True
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return await wait_gone(pid, start, timeout_seconds=5.0)


def pids_working_in(directory: Path) -> list[int]:
    """The pids of processes whose working directory is `directory`; those we may not look at are left out.

    A PostgreSQL server and all of its backends work in their data directory, and nothing else does.
    """
    found = []
    wanted = str(directory.resolve())
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == wanted:
                found.append(process.pid)
    return found

"""Running the platform from a command line: in the foreground, detached, its status, its end.

All functions are synchronous and own the event loop while they run; none may be called from within one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from usameter_devstack.config import StackConfig
from usameter_devstack.errors import DevstackError, StartFailed
from usameter_devstack.events import Event, Report, StackReady, StartAborted, Stopped, Stopping
from usameter_devstack.launch import prepare_home
from usameter_devstack.ports import LOOPBACK
from usameter_devstack.processes import is_alive, wait_gone
from usameter_devstack.state import HomeLock, StateRecord, read_state
from usameter_devstack.supervisor import end_orphans

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class ChildStatus:
    """One child, by the state file and by what the kernel says now."""

    name: str
    pid: int
    alive: bool
    port: int | None
    restarts: int


@dataclass(frozen=True, slots=True)
class StackStatus:
    """What runs in a home at this moment.

    `supervisor_pid` is None if no supervisor runs; children that are alive then are orphans, which the next
    start, or `stop`, ends. `ready` is False while starting and stopping. `url` is None unless it is ready.
    """

    home: Path
    supervisor_pid: int | None
    ready: bool
    url: str | None
    children: tuple[ChildStatus, ...]


def run_foreground(config: StackConfig, report: Report) -> int:
    """Start the platform and serve until Ctrl-C, SIGTERM or SIGHUP; the exit code.

    0 after a stop that was asked for, also during the start; 1 when it could not be started (the last event
    is then StartAborted, with the sentence to show) or a child died too often. A second signal during the
    stop ends the children by force; the data survives that too. Nothing runs any more on return.
    """
    # Imported here: the servers' client library costs 0.2 s that status and stop need not pay.
    from usameter_devstack.stack import Stack  # noqa: PLC0415

    async def serve() -> int:
        stack = Stack(config, report=report)
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, stack.supervisor.request_stop)
        try:
            return await stack.run()
        finally:
            for number in _STOP_SIGNALS:
                loop.remove_signal_handler(number)

    try:
        return asyncio.run(serve())
    except DevstackError as error:
        report(StartAborted(str(error)))
        return 1


def start_detached(config: StackConfig, report: Report) -> int:
    """Start the platform in the background; returns once it is ready (0) or could not be started (1).

    The events of the start are reported here; later ones go to `<home>/logs/supervisor.log`. Ctrl-C during
    the start stops it again. The background process has a session of its own and outlives this terminal.
    """
    try:
        prepare_home(config.home)
        process = _spawn_detached(config)
    except DevstackError as error:
        report(StartAborted(str(error)))
        return 1
    assert process.stdout is not None
    decoder = msgspec.json.Decoder(Event)
    try:
        for line in process.stdout:
            event: Event = decoder.decode(line)
            report(event)
            if isinstance(event, StackReady):
                return 0
            if isinstance(event, StartAborted):
                process.wait()
                return 1
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    finally:
        process.stdout.close()
    code = process.wait()
    report(StartAborted(f"the supervisor ended with code {code}; its log: {config.log_path('supervisor')}"))
    return 1


def status(config: StackConfig) -> StackStatus:
    """What runs in this home now; never fails, and changes nothing."""
    state = read_state(config.home)
    owner = state.supervisor
    owner_pid = owner.pid if owner is not None and is_alive(owner.pid, owner.start) else None
    ready = state.ready and owner_pid is not None
    return StackStatus(
        home=config.home,
        supervisor_pid=owner_pid,
        ready=ready,
        url=f"http://{LOOPBACK}:{state.ports['gateway']}" if ready and "gateway" in state.ports else None,
        children=tuple(
            ChildStatus(
                name=child.name,
                pid=child.process.pid,
                alive=is_alive(child.process.pid, child.process.start),
                port=child.port,
                restarts=child.restarts,
            )
            for child in state.children
        ),
    )


def stop(config: StackConfig, report: Report, *, timeout_seconds: float = 90.0) -> bool:
    """Stop whatever runs in this home, and wait until it is gone; False if nothing ran.

    Stopping twice is fine. The data stays.

    Raises:
        StartFailed: It still runs after the time, or belongs to another user.
        AlreadyRunning: A new supervisor has come up meanwhile; calling again stops that one.
    """
    state = read_state(config.home)
    began = time.monotonic()
    if not _anything_alive(state):
        return False
    report(Stopping())
    asyncio.run(_stop(config, state, report, timeout_seconds))
    report(Stopped(time.monotonic() - began))
    return True


async def _stop(config: StackConfig, state: StateRecord, report: Report, timeout_seconds: float) -> None:
    owner = state.supervisor
    if owner is not None and is_alive(owner.pid, owner.start):
        try:
            os.kill(owner.pid, signal.SIGTERM)
        except ProcessLookupError:
            return
        except PermissionError as error:
            raise StartFailed("the supervisor", f"(pid {owner.pid}) belongs to another user") from error
        if not await wait_gone(owner.pid, owner.start, timeout_seconds=timeout_seconds):
            raise StartFailed("the supervisor", f"(pid {owner.pid}) has not ended after {timeout_seconds:g} s")
        return
    with HomeLock(config.home):
        await end_orphans(state, report=report)


def _anything_alive(state: StateRecord) -> bool:
    processes = [child.process for child in state.children]
    if state.supervisor is not None:
        processes.append(state.supervisor)
    return any(is_alive(process.pid, process.start) for process in processes)


def _spawn_detached(config: StackConfig) -> subprocess.Popen[bytes]:
    log_path = config.log_path("supervisor")
    try:
        descriptor = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartFailed("the supervisor", f"cannot write its log {log_path} ({error.strerror})") from error
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "usameter_devstack"],
            env=os.environ | config.to_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=descriptor,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)

"""Keeps children running: starts them in order, restarts what dies, stops all in reverse order.

    async with Supervisor(home, report=report) as supervisor:   # sole owner of the home
        await supervisor.start(postgres, valkey)                # together; returns when both are ready
        await supervisor.start(ingest)                          # after them
        return await supervisor.run()                           # until asked to stop, or too many deaths

A child that dies before it was first ready fails `start`. One that dies later is reported with the reason
and started again after a pause. Nothing is ever killed by its name: only pids that were started here, or
that the state file names with the same start.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from usameter_core.restarts import Deaths, RestartPolicy
from usameter_devstack.child import Child, ChildSpec
from usameter_devstack.errors import AlreadyRunning, DevstackError, StartFailed
from usameter_devstack.events import (
    ChildDied,
    ChildRestarted,
    GaveUp,
    OrphanEnded,
    Report,
    StepFinished,
    StepStarted,
    Stopped,
    Stopping,
)
from usameter_devstack.launch import prepare_home
from usameter_devstack.processes import end_process, is_alive, process_start
from usameter_devstack.state import (
    ChildRecord,
    HomeLock,
    ProcessRecord,
    StateRecord,
    read_state,
    write_state,
)


@dataclass(slots=True)
class _Kept:
    """A child that is kept running, through all its lives."""

    child: Child
    start: str
    deaths: Deaths
    restarts: int = 0
    keeper: asyncio.Task[None] | None = None


class Supervisor:
    """The owner of a home and of everything that runs in it, while entered.

    Args:
        home: Made if missing.
        report: Is told every event; see `events`.
        policy: When to restart, and when to give up.

    Entering raises AlreadyRunning if another supervisor, of this or another process, owns the home, and ends
    what a killed one has left behind. Leaving, for whatever reason, stops all children.
    """

    def __init__(self, home: Path, *, report: Report, policy: RestartPolicy | None = None) -> None:
        self._home = home
        self._report = report
        self._policy = policy or RestartPolicy()
        self._kept: dict[str, _Kept] = {}
        self._ports: dict[str, int] = {}
        self._ready = False
        self._stop_asked = asyncio.Event()
        self._hurry = asyncio.Event()
        self._exit_code = 0
        self._own = ProcessRecord(pid=os.getpid(), start=process_start(os.getpid()) or "")
        self._resources = AsyncExitStack()

    async def __aenter__(self) -> Supervisor:
        prepare_home(self._home)
        async with AsyncExitStack() as resources:
            resources.enter_context(HomeLock(self._home))
            previous = read_state(self._home)
            await self._end_orphans(previous)
            self._ports = dict(previous.ports)
            self._save()
            resources.push_async_callback(self._stop_all)
            self._resources = resources.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._resources.aclose()

    @property
    def ports(self) -> dict[str, int]:
        """The ports used last, by name of child: also those of the run before."""
        return dict(self._ports)

    def pid(self, name: str) -> int:
        """The pid of a child as it runs now; raises KeyError for a name that was never started."""
        return self._kept[name].child.pid

    async def start(self, *specs: ChildSpec) -> None:
        """Start children together, and return when all are ready.

        They are stopped in the reverse of the order given, one after the other.

        Raises:
            StartFailed: One died or did not get ready; the others may run: leave the context to stop them.
        """
        started = [asyncio.create_task(self._start_one(spec)) for spec in specs]
        # Entered now, whatever is ready first, so that the order of the stop is the order given.
        try:
            await asyncio.gather(*started)
        except BaseException:
            for task in started:
                task.cancel()
            await asyncio.gather(*started, return_exceptions=True)
            raise
        finally:
            names = [spec.name for spec in specs if spec.name in self._kept]
            self._kept |= {name: self._kept.pop(name) for name in names}
            self._save()

    def mark_ready(self) -> None:
        """Write down that everything runs, for `status`."""
        self._ready = True
        self._save()

    def request_stop(self) -> None:
        """Let `run` return; a second call lets the stop use force. Safe to call from a signal handler."""
        if self._stop_asked.is_set():
            self._hurry.set()
        self._stop_asked.set()

    async def run(self) -> int:
        """Wait until a stop is requested, then return the exit code: 0, or 1 after giving up on a child."""
        await self._stop_asked.wait()
        return self._exit_code

    async def _start_one(self, spec: ChildSpec) -> None:
        began = time.monotonic()
        self._report(StepStarted(spec.name))
        child = await Child.start(spec)
        kept = _Kept(child=child, start=process_start(child.pid) or "", deaths=Deaths(self._policy))
        self._kept[spec.name] = kept
        if spec.port is not None:
            self._ports[spec.name] = spec.port
        self._save()
        await child.wait_ready()
        self._report(StepFinished(spec.name, time.monotonic() - began))
        kept.keeper = asyncio.create_task(self._keep(kept), name=f"keep {spec.name}")
        # A keeper ends only when it gives up; a defect in it must not leave a child unwatched in silence.
        kept.keeper.add_done_callback(self._keeper_ended)

    async def _keep(self, kept: _Kept) -> None:
        """Restart the child whenever it dies, until it dies too often."""
        spec = kept.child.spec
        reason = ""
        while True:
            exit_ = await kept.child.wait()
            kept.child.sweep()
            pause = kept.deaths.add()
            self._report(
                ChildDied(
                    name=spec.name,
                    pid=kept.child.pid,
                    reason=reason or exit_.reason,
                    log_tail=exit_.log_tail,
                    log_path=str(spec.log_path),
                    restart_in_seconds=pause,
                )
            )
            if pause is None:
                self._report(GaveUp(spec.name, len(kept.deaths), self._policy.window_seconds))
                self._exit_code = 1
                self._stop_asked.set()
                return
            await asyncio.sleep(pause)
            reason = await self._restart(kept)

    async def _restart(self, kept: _Kept) -> str:
        """Start it again; if that fails, why, and the child has ended."""
        try:
            kept.child = await Child.start(kept.child.spec)
            kept.start = process_start(kept.child.pid) or ""
            kept.restarts += 1
            self._save()
            await kept.child.wait_ready()
        except StartFailed as error:
            await kept.child.stop()
            return error.reason
        except DevstackError as error:
            return f"could not be restarted: {error}"
        self._report(ChildRestarted(kept.child.spec.name, kept.child.pid, kept.restarts))
        return ""

    def _keeper_ended(self, keeper: asyncio.Task[None]) -> None:
        if not keeper.cancelled() and keeper.exception() is not None:
            self._exit_code = 1
            self._stop_asked.set()

    async def _stop_all(self) -> None:
        began = time.monotonic()
        self._ready = False
        self._report(Stopping())
        keepers = [kept.keeper for kept in self._kept.values() if kept.keeper is not None]
        for keeper in keepers:
            keeper.cancel()
        outcomes = await asyncio.gather(*keepers, return_exceptions=True)
        while self._kept:
            name, kept = next(reversed(self._kept.items()))
            await kept.child.stop(self._hurry)
            del self._kept[name]
            self._save()
        write_state(self._home, StateRecord(ports=self._ports))
        self._report(Stopped(time.monotonic() - began))
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _end_orphans(self, previous: StateRecord) -> None:
        owner = previous.supervisor
        if owner is not None and owner != self._own and is_alive(owner.pid, owner.start):
            # Only where somebody removed the lock file under a running supervisor.
            raise AlreadyRunning(self._home, owner.pid)
        await end_orphans(previous, report=self._report)

    def _save(self) -> None:
        children = tuple(
            ChildRecord(
                name=name,
                process=ProcessRecord(pid=kept.child.pid, start=kept.start),
                port=kept.child.spec.port,
                restarts=kept.restarts,
                stop_signal=int(kept.child.spec.stop_signal),
                stop_timeout_seconds=kept.child.spec.stop_timeout_seconds,
            )
            for name, kept in self._kept.items()
        )
        write_state(
            self._home,
            StateRecord(supervisor=self._own, ready=self._ready, children=children, ports=self._ports),
        )


async def end_orphans(state: StateRecord, *, report: Report) -> None:
    """End the children that a dead supervisor's state names and that still run, last started first.

    Raises:
        StartFailed: One belongs to another user.
    """
    for record in reversed(state.children):
        process = record.process
        if not is_alive(process.pid, process.start):
            continue
        ended = await end_process(
            process.pid,
            process.start,
            number=signal.Signals(record.stop_signal),
            timeout_seconds=record.stop_timeout_seconds,
        )
        if not ended:
            raise StartFailed(
                record.name, f"still runs as pid {process.pid}, left behind by a supervisor that was killed"
            )
        report(OrphanEnded(record.name, process.pid))

"""One child process: started, waited for until it is ready, stopped, and asked why it died."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from usameter_core.restarts import exit_reason
from usameter_devstack.errors import StartFailed
from usameter_devstack.launch import Account, launch_argv

ReadyProbe = Callable[[], Awaitable[bool]]

_PROBE_PAUSE_SECONDS = 0.02
_PROBE_TIMEOUT_SECONDS = 2.0
_TAIL_LINES_MAX = 20
_TAIL_BYTES_MAX = 8_192
_LOG_BYTES_MAX = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How to start one child, know that it is ready, and stop it.

    `argv[0]` is an absolute path. `env` is the whole environment (but for LD_LIBRARY_PATH). `ready` answers
    False while it is not; it may raise nothing but OSError and TimeoutError (both mean no), and is given two
    seconds a call. `prepare` runs before every start, restarts included.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log_path: Path
    ready: ReadyProbe | None = None
    prepare: Callable[[], Awaitable[None]] | None = None
    port: int | None = None
    cwd: Path | None = None
    account: Account | None = None
    needs: Sequence[Path] = ()
    ready_timeout_seconds: float = 30.0
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout_seconds: float = 10.0
    # For the second Ctrl-C and after `stop_timeout_seconds`; PostgreSQL has a gentler one than SIGKILL.
    hurry_signal: signal.Signals = signal.SIGKILL


@dataclass(frozen=True, slots=True)
class Exit:
    """How a child ended, and the last lines it wrote."""

    code: int
    log_tail: str

    @property
    def reason(self) -> str:
        return exit_reason(self.code)


@dataclass(slots=True)
class Child:
    """A started child. Made by `Child.start`; its owner must `stop` it or see it end."""

    spec: ChildSpec
    process: asyncio.subprocess.Process
    log_offset: int
    _swept: bool = False

    @classmethod
    async def start(cls, spec: ChildSpec) -> Child:
        """Start the process, in a session of its own so that the terminal's Ctrl-C does not reach it.

        Call it from the main thread (see `launch_argv`).

        Raises:
            StartFailed: It could not be started at all.
        """
        if spec.prepare is not None:
            await spec.prepare()
        try:
            log, offset = _open_log(spec.log_path)
        except OSError as error:
            raise StartFailed(spec.name, f"cannot write its log {spec.log_path} ({error.strerror})") from error
        try:
            process = await asyncio.create_subprocess_exec(
                *_launch(spec),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env=_environment(spec),
                cwd=spec.cwd,
                start_new_session=True,
            )
        except OSError as error:
            raise StartFailed(spec.name, f"could not be started ({error})") from error
        finally:
            log.close()
        return cls(spec=spec, process=process, log_offset=offset)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def wait_ready(self) -> None:
        """Return once the ready probe has said yes.

        Raises:
            StartFailed: The child ended first, or was not ready in time (it is then still running).
        """
        ended = asyncio.create_task(self.wait())
        ready = asyncio.create_task(self._poll_ready())
        try:
            await asyncio.wait(
                {ended, ready},
                timeout=self.spec.ready_timeout_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            # Looked at first: a stranger on the same port may have answered the probe of a dead child.
            if ended.done():
                raise self._failure(ended.result().reason)
            if not ready.done():
                raise self._failure(f"was not ready after {self.spec.ready_timeout_seconds:g} s")
            ready.result()
        finally:
            for task in (ended, ready):
                task.cancel()
            await asyncio.gather(ended, ready, return_exceptions=True)

    async def wait(self) -> Exit:
        """How the child ended, once it has; may be awaited by several."""
        code = await self.process.wait()
        return Exit(code=code, log_tail=self.log_tail())

    async def stop(self, hurry: asyncio.Event | None = None) -> Exit:
        """End the child: its stop signal, then after its timeout, or once `hurry` is set, by force.

        A child that has ended already is fine. Processes that it left in its session's group are killed.
        """
        for number, patience in (
            (self.spec.stop_signal, self.spec.stop_timeout_seconds),
            (self.spec.hurry_signal, 3.0),
        ):
            self.send_signal(number)
            if await self._ended_within(patience, hurry if number == self.spec.stop_signal else None):
                break
        self.send_signal(signal.SIGKILL)
        exit_ = await self.wait()
        self.sweep()
        return exit_

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process; nothing happens if it has ended."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def sweep(self) -> None:
        """Kill what a child that has just ended left behind in its process group (a server's workers).

        Later calls do nothing: once the group is empty its number may go to another program.
        """
        if self._swept:
            return
        self._swept = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def log_tail(self) -> str:
        """The last lines this child wrote since it was started."""
        return read_tail(self.spec.log_path, self.log_offset)

    async def _poll_ready(self) -> None:
        probe = self.spec.ready
        while probe is not None:
            # One hung answer must not use up the whole time for getting ready.
            with suppress(TimeoutError, OSError):
                if await asyncio.wait_for(probe(), _PROBE_TIMEOUT_SECONDS):
                    return
            await asyncio.sleep(_PROBE_PAUSE_SECONDS)

    async def _ended_within(self, seconds: float, hurry: asyncio.Event | None) -> bool:
        ended = asyncio.create_task(self.process.wait())
        waits: set[asyncio.Task[object]] = {ended}
        if hurry is not None:
            waits.add(asyncio.create_task(hurry.wait()))
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        return self.process.returncode is not None

    def _failure(self, reason: str) -> StartFailed:
        return StartFailed(self.spec.name, reason, log_path=self.spec.log_path, log_tail=self.log_tail())


async def run_to_end(spec: ChildSpec, *, timeout_seconds: float = 120.0) -> bytes:
    """Run a child that ends by itself, and return its standard output (the rest goes to its log).

    Raises:
        StartFailed: It ended with another code than 0, or not in time.
    """
    if spec.prepare is not None:
        await spec.prepare()
    log, offset = _open_log(spec.log_path)
    try:
        process = await asyncio.create_subprocess_exec(
            *_launch(spec),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env=_environment(spec),
            cwd=spec.cwd,
            start_new_session=True,
        )
    except OSError as error:
        raise StartFailed(spec.name, f"could not be started ({error})") from error
    finally:
        log.close()
    try:
        output, _ = await asyncio.wait_for(process.communicate(), timeout_seconds)
    except TimeoutError:
        reason = f"was not done after {timeout_seconds:g} s"
    else:
        if process.returncode == 0:
            return output
        reason = Exit(code=process.returncode or 0, log_tail="").reason
    finally:
        await _end(process)
    tail = read_tail(spec.log_path, offset)
    raise StartFailed(spec.name, reason, log_path=spec.log_path, log_tail=tail)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def read_tail(path: Path, offset: int = 0) -> str:
    """The last lines (20 at most) of a log from `offset` on; empty if there are none."""
    try:
        with path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(offset, size - _TAIL_BYTES_MAX))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_TAIL_LINES_MAX:])


def _launch(spec: ChildSpec) -> list[str]:
    return launch_argv(spec.argv, death_signal=spec.stop_signal, account=spec.account, needs=spec.needs)


def _environment(spec: ChildSpec) -> dict[str, str]:
    # The launcher is Python, and some Pythons find their own library only by this.
    library_path = os.environ.get("LD_LIBRARY_PATH")
    return ({"LD_LIBRARY_PATH": library_path} if library_path else {}) | dict(spec.env)


def _open_log(path: Path) -> tuple[BinaryIO, int]:
    with suppress(FileNotFoundError):
        if path.stat().st_size > _LOG_BYTES_MAX:
            path.replace(path.with_suffix(".log.1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    log = os.fdopen(descriptor, "ab")
    return log, log.seek(0, os.SEEK_END)

"""Several processes of one service on one port, and the parent that keeps them running.

The kernel spreads connections, not calls, over the sockets that listen on a port with SO_REUSEPORT, so
whoever wants the work of all needs several connections (see `open_channel`). The parent serves nothing.

A worker's standard input is a pipe that only its parent holds open: when the parent is gone, however it
ended, the pipe ends and so does the worker.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping

from usameter_core.config import Address
from usameter_core.grpc.server import wait_for_stop
from usameter_core.listening import reserved_address
from usameter_core.logging import get_logger
from usameter_core.restarts import Deaths, RestartPolicy, exit_reason
from usameter_core.tasks import background_tasks

log = get_logger()

# What closing may take once the calls are drained: background work, the pool and the session locks.
_CLOSE_SECONDS = 15


class WorkerDiedTooOften(Exception):
    """A worker could not be kept running; the log says of every death why."""


async def run_workers(
    package: str, *, count: int, listen: Address, drain_seconds: int, policy: RestartPolicy | None = None
) -> None:
    """Keep `count` processes running until told to stop (SIGTERM or SIGINT), then drain them all.

    Each is a fresh interpreter, `python -m <package> worker <number>` with numbers from 0, whose
    USAMETER_LISTEN is the one port. One that dies is logged with why and started again after a pause;
    one that must be killed since it does not drain is logged too. None runs any more on return.

    Raises:
        ConfigError: The address cannot be listened on, or somebody does already.
        WorkerDiedTooOften: One died again and again.
    """
    with reserved_address(listen) as address:
        environment = os.environ | {"USAMETER_LISTEN": str(address)}
        stop_seconds = drain_seconds + _CLOSE_SECONDS
        policy = policy or RestartPolicy()
        log.info("workers_starting", address=str(address), workers=count)
        async with background_tasks() as tasks:
            for number in range(count):
                worker = _Worker(package, number, environment=environment, stop_seconds=stop_seconds)
                tasks.create_task(worker.keep(Deaths(policy)))
            await wait_for_stop()
        log.info("workers_stopped")


def stop_with_parent() -> None:
    """Have this worker told to stop (SIGTERM) when its parent is gone."""
    loop = asyncio.get_running_loop()
    parent = sys.stdin.fileno()

    def stop() -> None:
        # The end of a pipe stays readable for ever.
        loop.remove_reader(parent)
        signal.raise_signal(signal.SIGTERM)

    loop.add_reader(parent, stop)


class _Worker:
    """One of the processes, through all its lives."""

    def __init__(self, package: str, number: int, *, environment: Mapping[str, str], stop_seconds: int) -> None:
        # -P: a file of the working directory must not take the place of a module.
        self._command = (sys.executable, "-P", "-m", package, "worker", str(number))
        self._number = number
        self._environment = environment
        self._stop_seconds = stop_seconds

    async def keep(self, deaths: Deaths) -> None:
        """Run it, again whenever it dies; when cancelled, it is stopped first.

        Raises:
            WorkerDiedTooOften: By the policy of `deaths`.
        """
        while True:
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.PIPE, env=self._environment
            )
            log.info("worker_started", worker=self._number, pid=process.pid)
            try:
                reason = exit_reason(await process.wait())
            finally:
                await self._stop(process)
            pause = deaths.add()
            log.error("worker_died", worker=self._number, pid=process.pid, reason=reason, restart_in_seconds=pause)
            if pause is None:
                times = f"{len(deaths)} times within {deaths.policy.window_seconds:g} s"
                raise WorkerDiedTooOften(f"worker {self._number} {reason}; it has died {times}")
            await asyncio.sleep(pause)

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), self._stop_seconds)
        except TimeoutError:
            log.error("worker_killed", worker=self._number, pid=process.pid, waited_seconds=self._stop_seconds)
            process.kill()
            await process.wait()

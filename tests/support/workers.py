"""Ingest as processes of its own: a parent and its workers on one port."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from tests.conftest import Database
from tests.support.services import CRON_SECRET, INTERNAL_TOKEN, Services
from tests.support.wait import until
from usameter_core.config import Address
from usameter_devstack.ports import claim_port, free_port


@dataclass(slots=True)
class IngestProcesses:
    """A running `serve`, and what it and its workers have logged."""

    process: asyncio.subprocess.Process
    address: Address
    metrics_port: int
    count: int
    lines: list[dict[str, Any]] = field(default_factory=list)
    # What is no log line: the sentence of a failed start.
    text: str = ""

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The lines of an event, oldest first."""
        return [line for line in self.lines if line["event"] == event]

    async def wait_logged(self, event: str, count: int) -> list[dict[str, Any]]:
        """The lines of an event once there are so many."""

        async def enough() -> bool:
            assert self.process.returncode is None, self.text
            return len(self.logged(event)) >= count

        # Interpreters that start on a busy machine take their time.
        await until(enough, f"{event} is logged {count} times", seconds=60)
        return self.logged(event)

    async def wait_serving(self) -> None:
        """Return once every worker answers."""
        await self.wait_logged("server_started", self.count)

    def workers(self) -> list[psutil.Process]:
        """The workers as they run now, by number."""
        pids = {line["worker"]: line["pid"] for line in self.logged("worker_started")}
        return [psutil.Process(pid) for _, pid in sorted(pids.items())]

    async def read(self) -> None:
        """Take in what is logged, until all have ended."""
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            if line.startswith(b"{"):
                self.lines.append(json.loads(line))
            else:
                self.text += line.decode()


@asynccontextmanager
async def open_ingest_processes(
    database: Database, services: Services, *, workers: int, port: int | None = None
) -> AsyncIterator[IngestProcesses]:
    """`python -m usameter_ingest serve` beside running services, started; it and all its workers end at the exit."""
    address = Address("127.0.0.1", port or free_port())
    settings = {
        "listen": str(address),
        "database_url": database.role_url("ingest"),
        "redis_url": database.redis_url,
        "internal_token": INTERNAL_TOKEN,
        "cron_secret": CRON_SECRET,
        "identity_addr": str(services.identity),
        "quota_addr": str(services.quota_address),
        "metrics_port": str(_free_ports_in_a_row(workers)),
        "ingest_workers": str(workers),
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("USAMETER_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "usameter_ingest", "serve"),
        env=inherited | {f"USAMETER_{name.upper()}": value for name, value in settings.items()},
        stderr=asyncio.subprocess.PIPE,
    )
    running = IngestProcesses(process, address, int(settings["metrics_port"]), workers)
    reading = asyncio.create_task(running.read())
    try:
        yield running
    finally:
        if process.returncode is None:
            process.terminate()
            await asyncio.wait_for(process.wait(), 30)
        # The pipe ends with the last of those that log into it.
        await asyncio.wait_for(reading, 30)


def _free_ports_in_a_row(count: int) -> int:
    while True:
        first = free_port()
        if all(claim_port(first + number) for number in range(1, count)):
            return first

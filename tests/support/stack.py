"""The whole platform as `make run` starts it, in processes of its own, used through its public doors only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from usameter_devstack.credentials import read_dev_env

START_SECONDS_MAX = 60


@dataclass(slots=True)
class RunningStack:
    """A stack under a home of its own."""

    home: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, home: Path, *, http_port: int) -> RunningStack:
        """Start, and wait until a key is there and the API is ready."""
        environment = {**os.environ, "USAMETER_HOME": str(home), "USAMETER_HTTP_PORT": str(http_port)}
        home.parent.mkdir(parents=True, exist_ok=True)
        ready_before = _ready_mark(home)
        with (home.parent / f"{home.name}.out").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "usameter_cli", "up"],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS_MAX
        while _ready_mark(home) == ready_before or not _answers(home):
            assert process.poll() is None, (home.parent / f"{home.name}.out").read_text()
            assert time.monotonic() < deadline, (home.parent / f"{home.name}.out").read_text()
            time.sleep(0.05)
        return cls(home, process)

    @property
    def environment(self) -> dict[str, str]:
        """What dev.env says."""
        return read_dev_env(self.home / "dev.env")

    @property
    def url(self) -> str:
        return self.environment["USAMETER_URL"]

    def client(self) -> httpx.Client:
        """HTTP with the organization's key."""
        key = self.environment["USAMETER_API_KEY"]
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=30)

    def seal(self) -> list[dict[str, Any]]:
        """The scheduler's call."""
        secret = self.environment["USAMETER_CRON_SECRET"]
        answer = httpx.post(f"{self.url}/api/cron/snapshots", headers={"Authorization": f"Bearer {secret}"}, timeout=30)
        assert answer.status_code == 200, answer.text
        sealed: list[dict[str, Any]] = answer.json()["sealed"]
        return sealed

    def command(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A `usameter` command against this stack, started."""
        return subprocess.Popen(
            [sys.executable, "-m", "usameter_cli", *arguments],
            env={**os.environ, "USAMETER_HOME": str(self.home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def json(self, *arguments: str) -> Any:
        """What a command prints with --json."""
        process = self.command(*arguments, "--json")
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
        return json.loads(output)

    def tree(self) -> list[psutil.Process]:
        """Every process of the stack."""
        supervisor = psutil.Process(self.process.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def kill(self) -> None:
        """`kill -9` of the whole tree."""
        tree = self.tree()
        for process in tree:
            # Of a child that has seen its supervisor die, and is gone by now.
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(tree, timeout=10)

    def stop(self) -> int:
        """Ctrl-C; returns the exit code."""
        self.process.send_signal(2)
        return self.process.wait(timeout=60)


def _ready_mark(home: Path) -> Sequence[int]:
    """Changes when dev.env is written, which is the last thing a start does."""
    try:
        status = (home / "dev.env").stat()
    except FileNotFoundError:
        return ()
    return (status.st_ino, status.st_mtime_ns)


def _answers(home: Path) -> bool:
    try:
        return httpx.get(read_dev_env(home / "dev.env")["USAMETER_URL"] + "/readyz").status_code == 200
    except (httpx.TransportError, FileNotFoundError):
        return False

"""The supervisor, with trivial children: what dies is reported and restarted, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from usameter_core.restarts import RestartPolicy
from usameter_devstack.child import ChildSpec
from usameter_devstack.errors import AlreadyRunning, HomeUnusable, StartFailed
from usameter_devstack.events import (
    ChildDied,
    ChildRestarted,
    Event,
    GaveUp,
    OrphanEnded,
    Stopped,
    Stopping,
    sentence,
)
from usameter_devstack.launch import prepare_home
from usameter_devstack.processes import process_start
from usameter_devstack.state import ChildRecord, ProcessRecord, StateRecord, read_state, write_state
from usameter_devstack.supervisor import Supervisor

QUICK = RestartPolicy(first_pause_seconds=0.01, pause_max_seconds=0.02)
# Says when it is ready, and writes its end down, so that the order of a stop can be read.
POLITE = """
import pathlib, signal, sys, threading
name, home = sys.argv[1], pathlib.Path(sys.argv[2])
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
print("I am", name, flush=True)
(home / f"{name}.ready").touch()
stop.wait()
with (home / "ends").open("a") as ends:
    ends.write(name + "\\n")
"""
STUBBORN = POLITE.replace("lambda *_: stop.set()", "signal.SIG_IGN")


def child(home: Path, name: str, script: str = POLITE, *, stop_timeout_seconds: float = 5.0) -> ChildSpec:
    flag = home / f"{name}.ready"

    async def ready() -> bool:
        return flag.exists()

    async def prepare() -> None:
        flag.unlink(missing_ok=True)

    return ChildSpec(
        name=name,
        argv=[sys.executable, "-I", "-S", "-c", script, name, str(home)],
        env={"PATH": os.defpath},
        log_path=home / "logs" / f"{name}.log",
        ready=ready,
        prepare=prepare,
        stop_timeout_seconds=stop_timeout_seconds,
    )


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in other processes
            await asyncio.sleep(0.01)


def gone(pid: int) -> bool:
    return process_start(pid) is None


async def test_children_stop_in_reverse_order_of_their_start(tmp_path: Path) -> None:
    events: list[Event] = []
    async with Supervisor(tmp_path, report=events.append) as supervisor:
        await supervisor.start(child(tmp_path, "first"), child(tmp_path, "second"))
        await supervisor.start(child(tmp_path, "third"))
        pids = [supervisor.pid(name) for name in ("first", "second", "third")]
        state = read_state(tmp_path)
        assert state.supervisor is not None
        assert state.supervisor.pid == os.getpid()
        assert [record.process.pid for record in state.children] == pids
        assert (tmp_path / "logs" / "third.log").read_text() == "I am third\n"
        supervisor.request_stop()
        assert await supervisor.run() == 0
    assert (tmp_path / "ends").read_text().split() == ["third", "second", "first"]
    assert all(gone(pid) for pid in pids)
    assert read_state(tmp_path) == StateRecord()
    assert [type(event) for event in events[-2:]] == [Stopping, Stopped]


async def test_dead_child_is_reported_with_the_reason_and_restarted(tmp_path: Path) -> None:
    events: list[Event] = []
    async with Supervisor(tmp_path, report=events.append, policy=QUICK) as supervisor:
        await supervisor.start(child(tmp_path, "worker"))
        first = supervisor.pid("worker")
        os.kill(first, signal.SIGKILL)
        await until(lambda: any(isinstance(event, ChildRestarted) for event in events))
        assert supervisor.pid("worker") != first
        assert read_state(tmp_path).children[0].restarts == 1
    died = next(event for event in events if isinstance(event, ChildDied))
    assert (died.name, died.pid, died.reason) == ("worker", first, "was killed by SIGKILL")
    assert died.log_tail == "I am worker"
    told = sentence(died)
    assert "worker (pid" in told
    assert str(tmp_path / "logs" / "worker.log") in told


async def test_workers_of_a_dead_child_die_before_it_is_restarted(tmp_path: Path) -> None:
    script = "import os, pathlib, sys\npid = os.fork()\nif pid: print(pid, flush=True)\n" + POLITE
    events: list[Event] = []
    async with Supervisor(tmp_path, report=events.append, policy=QUICK) as supervisor:
        await supervisor.start(child(tmp_path, "server", script))
        log = tmp_path / "logs" / "server.log"
        await until(lambda: log.read_text().count("I am") == 2)
        worker = next(int(line) for line in log.read_text().splitlines() if line.isdigit())
        os.kill(supervisor.pid("server"), signal.SIGKILL)
        await until(lambda: any(isinstance(event, ChildRestarted) for event in events))
        assert gone(worker)


async def test_too_many_deaths_stop_everything_with_exit_code_1(tmp_path: Path) -> None:
    events: list[Event] = []
    script = POLITE.replace("stop.wait()", "stop.wait(0.05); sys.exit('out of ideas')")
    async with Supervisor(tmp_path, report=events.append, policy=QUICK) as supervisor:
        await supervisor.start(child(tmp_path, "steady"), child(tmp_path, "moody", script))
        assert await asyncio.wait_for(supervisor.run(), 10) == 1
    deaths = [event for event in events if isinstance(event, ChildDied)]
    assert [death.reason for death in deaths] == ["exited with code 1"] * 6
    assert deaths[-1].log_tail.endswith("out of ideas")
    assert deaths[-1].restart_in_seconds is None
    assert [event for event in events if isinstance(event, GaveUp)] == [GaveUp("moody", 6, 60.0)]
    assert (tmp_path / "ends").read_text().split()[-1] == "steady"


async def test_child_that_dies_at_start_up_is_fatal_and_its_reason_is_told(tmp_path: Path) -> None:
    events: list[Event] = []
    steady = child(tmp_path, "steady")
    broken = child(tmp_path, "broken", "import sys; sys.exit('no such table: invoice')")
    with pytest.raises(StartFailed, match=r"broken exited with code 1.\n.*\nno such table: invoice\n.*broken.log"):
        async with Supervisor(tmp_path, report=events.append) as supervisor:
            await supervisor.start(steady)
            await supervisor.start(broken)
    assert (tmp_path / "ends").read_text().split() == ["steady"]
    assert not any(isinstance(event, ChildDied) for event in events)


async def test_child_that_ignores_its_stop_signal_is_killed_after_its_time_or_at_once_in_a_hurry(
    tmp_path: Path,
) -> None:
    events: list[Event] = []
    async with Supervisor(tmp_path, report=events.append) as supervisor:
        await supervisor.start(child(tmp_path, "slow", STUBBORN, stop_timeout_seconds=0.1))
        slow = supervisor.pid("slow")
    assert gone(slow)
    began = time.monotonic()
    async with Supervisor(tmp_path, report=events.append) as supervisor:
        await supervisor.start(child(tmp_path, "slow", STUBBORN, stop_timeout_seconds=60))
        slow = supervisor.pid("slow")
        supervisor.request_stop()
        asyncio.get_running_loop().call_later(0.1, supervisor.request_stop)
    assert gone(slow)
    assert time.monotonic() - began < 10


async def test_second_supervisor_of_one_home_is_refused(tmp_path: Path) -> None:
    async with Supervisor(tmp_path, report=lambda _: None) as supervisor:
        await supervisor.start(child(tmp_path, "worker"))
        with pytest.raises(AlreadyRunning, match=rf"already running \(pid {os.getpid()}\)"):
            async with Supervisor(tmp_path, report=lambda _: None):
                pass
        assert not gone(supervisor.pid("worker"))
    async with Supervisor(tmp_path, report=lambda _: None):
        pass


async def test_home_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HomeUnusable, match=r"Cannot write to .*file/home.*USAMETER_HOME"):
        async with Supervisor(tmp_path / "file" / "home", report=lambda _: None):
            pass


SUPERVISED = """
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_devstack_supervisor import Supervisor, child
from usameter_devstack.events import report_to_stderr

async def main():
    home = Path(sys.argv[1])
    async with Supervisor(home, report=report_to_stderr) as supervisor:
        await supervisor.start(child(home, "first"), child(home, "second"))
        supervisor.mark_ready()
        await supervisor.run()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
async def test_killed_supervisor_leaves_nothing_running(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    supervisor = await asyncio.create_subprocess_exec(sys.executable, "-c", SUPERVISED, str(tmp_path), here)
    try:
        await until(lambda: read_state(tmp_path).ready)
    finally:
        supervisor.kill()
        await supervisor.wait()
    children = read_state(tmp_path).children
    assert [record.name for record in children] == ["first", "second"]
    await until(lambda: all(gone(record.process.pid) for record in children), seconds=5)
    # They were told to stop, not killed.
    assert sorted((tmp_path / "ends").read_text().split()) == ["first", "second"]


async def test_orphans_of_a_dead_supervisor_are_ended_and_strangers_are_not(tmp_path: Path) -> None:
    prepare_home(tmp_path)
    sleep = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
    orphan, stranger = [await asyncio.create_subprocess_exec(*sleep) for _ in range(2)]
    try:
        start = process_start(orphan.pid)
        assert start is not None
        records = [
            ChildRecord("orphan", ProcessRecord(orphan.pid, start), None, 0, int(signal.SIGTERM), 5.0),
            # Its pid was once a child's, by another start.
            ChildRecord("old", ProcessRecord(stranger.pid, "earlier"), None, 0, int(signal.SIGTERM), 5.0),
        ]
        owner = ProcessRecord(pid=os.getppid(), start="earlier")
        write_state(tmp_path, StateRecord(supervisor=owner, children=tuple(records)))
        events: list[Event] = []
        async with Supervisor(tmp_path, report=events.append):
            pass
        assert [event for event in events if isinstance(event, OrphanEnded)] == [OrphanEnded("orphan", orphan.pid)]
        assert await asyncio.wait_for(orphan.wait(), 5) == -signal.SIGTERM
        assert not gone(stranger.pid)
    finally:
        for process in (orphan, stranger):
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

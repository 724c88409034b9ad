"""Background tasks and what ends them; loops that go on, and the bell that wakes them."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from usameter_core.tasks import Doorbell, background_tasks, repeat

NEVER_SECONDS = 3600.0


async def test_work_that_fails_is_done_again() -> None:
    done = asyncio.Event()
    failures = [ValueError("a fault"), OSError("away")]

    async def work() -> None:
        if failures:
            raise failures.pop()
        done.set()

    async with asyncio.timeout(10), background_tasks() as tasks:
        tasks.create_task(repeat(work, every_seconds=0.001, name="test"))
        await done.wait()


async def test_a_ring_ends_the_pause_and_one_during_the_work_is_remembered() -> None:
    bell = Doorbell()
    rounds: asyncio.Queue[int] = asyncio.Queue()
    count = 0

    async def work() -> None:
        nonlocal count
        count += 1
        if count == 2:
            bell.ring()
        rounds.put_nowait(count)

    async with asyncio.timeout(10), background_tasks() as tasks:
        tasks.create_task(repeat(work, every_seconds=NEVER_SECONDS, name="test", bell=bell))
        assert await rounds.get() == 1
        bell.ring()
        assert [await rounds.get(), await rounds.get()] == [2, 3]
        bell.ring()
        assert await rounds.get() == 4


async def test_a_ring_wakes_every_loop_and_is_remembered_for_those_that_work() -> None:
    bell = Doorbell()
    rounds = [asyncio.Queue[None]() for _ in range(3)]
    is_free = asyncio.Event()

    async def work(number: int) -> None:
        rounds[number].put_nowait(None)
        if number == 2:
            await is_free.wait()

    async with asyncio.timeout(10), background_tasks() as tasks:
        for number in range(3):
            tasks.create_task(repeat(partial(work, number), every_seconds=NEVER_SECONDS, name="test", bell=bell))
        for each in rounds:
            await each.get()
        bell.ring()
        for each in rounds[:2]:
            await each.get()
        # The third has worked all the time, and hears it after the others have.
        assert rounds[2].empty()
        is_free.set()
        await rounds[2].get()


async def test_without_a_ring_the_pause_ends_by_itself() -> None:
    rounds: asyncio.Queue[None] = asyncio.Queue()

    async def work() -> None:
        rounds.put_nowait(None)

    async with asyncio.timeout(10), background_tasks() as tasks:
        tasks.create_task(repeat(work, every_seconds=0.001, name="test", bell=Doorbell()))
        await rounds.get()
        await rounds.get()


async def test_a_task_that_fails_ends_what_it_runs_beside_and_is_raised_as_itself() -> None:
    async def fail() -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        async with asyncio.timeout(10), background_tasks() as tasks:
            tasks.create_task(fail())
            await asyncio.Event().wait()


async def test_a_failure_beside_tasks_cancels_them_and_is_raised_as_itself() -> None:
    cancelled = asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(OSError, match="taken"):
        async with background_tasks() as tasks:
            tasks.create_task(wait())
            await asyncio.sleep(0)
            raise OSError("taken")
    assert cancelled.is_set()

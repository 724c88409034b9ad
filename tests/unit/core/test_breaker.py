"""The circuit breaker, on a clock that the test sets."""

from __future__ import annotations

import asyncio

import pytest

from usameter_core.metrics import CIRCUIT_OPEN
from usameter_core.redis.breaker import CircuitBreaker, CircuitOpen, CircuitState


class Dependency:
    """Fails, hangs or answers, and counts how often it was tried; `seconds` is the breaker's clock."""

    def __init__(self, *, timeout_seconds: float = 60) -> None:
        self.seconds = 100.0
        self.calls = 0
        self.failing: Exception | None = None
        self.answers = asyncio.Event()
        self.answers.set()
        self.breaker = CircuitBreaker(
            dependency="test",
            failure_types=(ConnectionError,),
            failures_max=3,
            timeout_seconds=timeout_seconds,
            open_seconds=1.0,
            monotonic_seconds=lambda: self.seconds,
        )

    async def work(self) -> str:
        self.calls += 1
        await self.answers.wait()
        if self.failing is not None:
            raise self.failing
        return "answer"

    async def call(self) -> str:
        return await self.breaker.call(self.work)

    async def fail(self, times: int) -> None:
        self.failing = ConnectionError("away")
        for _ in range(times):
            with pytest.raises(CircuitOpen):
                await self.call()

    @property
    def gauge(self) -> float:
        return CIRCUIT_OPEN.labels("test")._value.get()


@pytest.fixture
async def dependency() -> Dependency:
    return Dependency()


async def test_two_failures_in_a_row_leave_it_closed_and_the_third_opens_it(dependency: Dependency) -> None:
    await dependency.fail(2)
    assert (dependency.breaker.state, dependency.gauge) == (CircuitState.CLOSED, 0)
    await dependency.fail(1)
    assert (dependency.breaker.state, dependency.gauge) == (CircuitState.OPEN, 1)


async def test_a_success_between_failures_starts_the_count_anew(dependency: Dependency) -> None:
    await dependency.fail(2)
    dependency.failing = None
    assert await dependency.call() == "answer"
    await dependency.fail(2)
    assert dependency.breaker.state is CircuitState.CLOSED


async def test_while_open_nothing_is_tried(dependency: Dependency) -> None:
    await dependency.fail(3)
    dependency.failing = None
    dependency.seconds += 0.999
    with pytest.raises(CircuitOpen) as caught:
        await dependency.call()
    assert dependency.calls == 3
    assert caught.value.__cause__ is None, "a call that was tried carries its cause"


async def test_time_outs_count_as_failures() -> None:
    dependency = Dependency(timeout_seconds=0.01)
    dependency.answers.clear()
    for _ in range(3):
        with pytest.raises(CircuitOpen) as caught:
            await dependency.call()
        assert isinstance(caught.value.__cause__, TimeoutError)
    assert dependency.breaker.state is CircuitState.OPEN


async def test_other_exceptions_say_nothing_about_the_dependency(dependency: Dependency) -> None:
    dependency.failing = ValueError("ours")
    for _ in range(5):
        with pytest.raises(ValueError, match="ours"):
            await dependency.call()
    assert dependency.breaker.state is CircuitState.CLOSED


async def test_after_a_while_one_probe_passes_alone_and_its_success_closes(dependency: Dependency) -> None:
    await dependency.fail(3)
    dependency.failing = None
    dependency.seconds += 1.0
    dependency.answers.clear()
    probe = asyncio.create_task(dependency.call())
    await asyncio.sleep(0)
    assert dependency.breaker.state is CircuitState.HALF_OPEN
    with pytest.raises(CircuitOpen):
        await dependency.call()
    assert dependency.calls == 4, "only the probe was tried"
    dependency.answers.set()
    assert await probe == "answer"
    assert (dependency.breaker.state, dependency.gauge) == (CircuitState.CLOSED, 0)
    await dependency.fail(2)
    assert dependency.breaker.state is CircuitState.CLOSED, "the failures before it are forgotten"


async def test_a_failed_probe_opens_it_for_the_whole_time_again(dependency: Dependency) -> None:
    await dependency.fail(3)
    dependency.seconds += 1.0
    await dependency.fail(1)
    assert (dependency.breaker.state, dependency.calls) == (CircuitState.OPEN, 4)
    dependency.seconds += 0.999
    await dependency.fail(1)
    assert dependency.calls == 4
    dependency.seconds += 0.001
    await dependency.fail(1)
    assert dependency.calls == 5


async def test_a_cancelled_probe_frees_its_place(dependency: Dependency) -> None:
    await dependency.fail(3)
    dependency.failing = None
    dependency.seconds += 1.0
    dependency.answers.clear()
    probe = asyncio.create_task(dependency.call())
    await asyncio.sleep(0)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    dependency.answers.set()
    assert await dependency.call() == "answer"
    assert dependency.breaker.state is CircuitState.CLOSED

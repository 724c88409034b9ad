"""A circuit breaker: after some failures in a row nobody waits for what is down.

CLOSED    calls pass; `failures_max` failures in a row open it.
OPEN      calls are refused at once, for `open_seconds`.
HALF_OPEN one call passes as a probe; its success closes the circuit, its failure opens it again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import TypeVar

from usameter_core.logging import get_logger
from usameter_core.metrics import CIRCUIT_OPEN

log = get_logger()
Result = TypeVar("Result")


class CircuitState(StrEnum):
    """See the module's text."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitOpen(Exception):
    """The dependency was not even tried: use the way that does without it."""


class CircuitBreaker:
    """Guards calls to one dependency, within one process and event loop.

    Args:
        dependency: Its name, for logs and metrics.
        failures_max: Failures in a row that open the circuit.
        timeout_seconds: A call that takes longer has failed.
        open_seconds: How long after opening the probe is let through.
        failure_types: What counts as a failure of the dependency, beside a timeout.
        monotonic_seconds: The clock.
    """

    def __init__(
        self,
        *,
        dependency: str,
        failure_types: tuple[type[Exception], ...],
        failures_max: int = 3,
        timeout_seconds: float = 0.05,
        open_seconds: float = 1.0,
        monotonic_seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dependency = dependency
        self._failure_types: tuple[type[Exception], ...] = (*failure_types, TimeoutError)
        self._failures_max = failures_max
        self._timeout_seconds = timeout_seconds
        self._open_seconds = open_seconds
        self._monotonic_seconds = monotonic_seconds
        self._failures = 0
        self._opened_at = 0.0
        self._state = CircuitState.CLOSED
        CIRCUIT_OPEN.labels(dependency).set(0)

    @property
    def state(self) -> CircuitState:
        """The state as the last call left it."""
        return self._state

    async def call(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Run `work` within the timeout, or not at all.

        Raises:
            CircuitOpen: The circuit is open, or this very call failed.
        """
        if not self._admits():
            raise CircuitOpen(self._dependency)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                result = await work()
        except self._failure_types as error:
            self._failed(error)
            raise CircuitOpen(self._dependency) from error
        except BaseException:
            # Cancelled, or a fault of ours: it says nothing about the dependency, and the
            # probe's place must not stay taken.
            if self._state is CircuitState.HALF_OPEN:
                self._state = CircuitState.OPEN
            raise
        self._succeeded()
        return result

    def _admits(self) -> bool:
        if self._state is CircuitState.CLOSED:
            return True
        if self._state is CircuitState.OPEN and self._monotonic_seconds() - self._opened_at >= self._open_seconds:
            self._state = CircuitState.HALF_OPEN
            return True
        return False

    def _succeeded(self) -> None:
        self._failures = 0
        if self._state is not CircuitState.CLOSED:
            self._state = CircuitState.CLOSED
            CIRCUIT_OPEN.labels(self._dependency).set(0)
            log.info("circuit_closed", dependency=self._dependency)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._state is CircuitState.HALF_OPEN or self._failures >= self._failures_max:
            if self._state is CircuitState.CLOSED:
                log.warning("circuit_opened", dependency=self._dependency, error=type(error).__name__)
            self._state = CircuitState.OPEN
            self._opened_at = self._monotonic_seconds()
            CIRCUIT_OPEN.labels(self._dependency).set(1)

"""What all tests share: one PostgreSQL and one Valkey a session, and a database of its own for each test that asks.

Databases are cloned from a template that has every service's migrations: a clone takes some 50 ms.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
import structlog
from hypothesis import settings

from usameter_core.logging import configure_logging
from usameter_core.postgres.migrate import migrate
from usameter_devstack.ports import free_port
from usameter_devstack.postgres import EmbeddedPostgres
from usameter_devstack.valkey import EmbeddedValkey

SCHEMAS = ("identity", "ingest", "quota", "billing")
TEMPLATE = "usameter_template"
_numbers = itertools.count(1)
# Longer than any test takes, shorter than pytest's own timeout, which ends the event loop and with it all tests.
_TEST_SECONDS_MAX = 120

_START_PLATFORMS = re.compile(
    r"^tests/e2e/|/test_(devstack|gateway_process|hard_limit|ingest_workers|kill|postgres_gone|worker_killed)"
)

# How long an example takes says nothing on a machine that runs servers beside it.
settings.register_profile("usameter", deadline=None, print_blob=True)
settings.load_profile("usameter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests stay together where several processes share them.

    Give every asynchronous test a time limit of its own, at which it says what it and all others wait for.
    """
    for item in items:
        # Two platforms would fill a small machine, and many of these tests share one; those of a module share fixtures.
        group = "platforms" if _START_PLATFORMS.search(item.nodeid) else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
        if (
            isinstance(item, pytest.Function)
            and inspect.iscoroutinefunction(item.obj)
            and item.get_closest_marker("timeout") is None
        ):
            item.obj = _limited(item.obj)


def _limited(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def run(*args: Any, **kwargs: Any) -> None:
        running = asyncio.create_task(test(*args, **kwargs))
        done, _ = await asyncio.wait([running], timeout=_TEST_SECONDS_MAX)
        if not done:
            waiting = "\n".join(sorted(_where(task) for task in asyncio.all_tasks()))
            running.cancel()
            await asyncio.wait([running], timeout=10)
            pytest.fail(f"not done after {_TEST_SECONDS_MAX} s; tasks wait at:\n{waiting}", pytrace=False)
        await running

    return run


def _where(task: asyncio.Task[Any]) -> str:
    """Whose lines a task stands at, outermost first."""
    lines = []
    awaited: Any = task.get_coro()
    while awaited is not None:
        frame = next((frame for kind in ("cr", "ag", "gi") if (frame := getattr(awaited, f"{kind}_frame", None))), None)
        if frame is not None:
            lines.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        awaited = next(
            (each for name in ("cr_await", "ag_await", "gi_yieldfrom") if (each := getattr(awaited, name, None))), None
        )
    return " > ".join(lines)


def _configure_logging() -> None:
    """As services do, but for what `capture_logs` cannot see: loggers that keep what they were configured with first.

    Unconfigured, structlog prints every exception with the locals of all its frames, which takes seconds.
    """
    configure_logging(service="tests", log_format="console", level="INFO")
    structlog.configure(cache_logger_on_first_use=False)


_configure_logging()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Undo what commands that ran inside a test have configured for themselves.

    Last, when nothing captures its output any more: a logger would keep what is closed then.
    """
    _configure_logging()


@dataclass(frozen=True, slots=True)
class Database:
    """A migrated database that nobody else uses."""

    server: EmbeddedPostgres
    name: str
    # Of the Valkey that all tests share: its keys are led by organization.
    redis_url: str = ""

    @property
    def admin_url(self) -> str:
        """As superuser."""
        return self.server.url(self.name)

    def role_url(self, schema: str) -> str:
        """As the service's own role, which sees its own schema only."""
        return self.server.url(self.name, user=f"usameter_{schema}")


@pytest.fixture(scope="session")
async def postgres(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedPostgres]:
    """A PostgreSQL server, not durable: tests that pull the plug start their own."""
    async with EmbeddedPostgres(tmp_path_factory.mktemp("postgres"), free_port(), durable=False) as server:
        yield server


@pytest.fixture(scope="session")
async def valkey(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedValkey]:
    """A Valkey server."""
    async with EmbeddedValkey(tmp_path_factory.mktemp("valkey"), free_port()) as server:
        yield server


@pytest.fixture(scope="session")
async def template(postgres: EmbeddedPostgres) -> EmbeddedPostgres:
    """The server, with the database that the others are cloned from."""
    await postgres.ensure_database(TEMPLATE)
    for schema in SCHEMAS:
        await migrate(postgres.url(TEMPLATE), schema=schema, package=f"usameter_{schema}")
    return postgres


@pytest.fixture
async def database(template: EmbeddedPostgres, valkey: EmbeddedValkey) -> AsyncIterator[Database]:
    """An empty, migrated database for one test."""
    async with new_database(template, valkey) as made:
        yield made


@asynccontextmanager
async def new_database(template: EmbeddedPostgres, valkey: EmbeddedValkey) -> AsyncIterator[Database]:
    """An empty, migrated database, for fixtures that several tests share."""
    name = f"test_{next(_numbers)}"
    admin = await asyncpg.connect(template.url())
    try:
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY file_copy")
        yield Database(template, name, valkey.url())
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()

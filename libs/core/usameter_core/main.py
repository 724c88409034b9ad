"""The command line that every service has: `python -m usameter_<service> serve | migrate`."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import asyncpg
import uvloop

from usameter_core.config import ConfigError, MigrationSettings
from usameter_core.errors import UsameterError
from usameter_core.logging import configure_logging
from usameter_core.postgres.migrate import MigrationError, migrate
from usameter_core.workers import WorkerDiedTooOften

Command = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class CommandWithArguments:
    """A subcommand that takes arguments of its own; `add_arguments` declares what `run` is given."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Awaitable[None]]


def run_service(
    name: str,
    *,
    serve: Command,
    schema: str | None = None,
    commands: dict[str, Command | CommandWithArguments] | None = None,
) -> None:
    """Run the subcommand that the process was started with, and exit.

    Args:
        name: Of the service; its package is `usameter_<name>`.
        serve: Serves until the process is told to stop.
        schema: The PostgreSQL schema it owns, for `migrate`; None: it has none.
        commands: Further subcommands.
    """
    known: dict[str, Command | CommandWithArguments] = {"serve": serve, **(commands or {})}
    if schema is not None:
        known["migrate"] = lambda: _migrate(schema, package=f"usameter_{name}")
    parser = argparse.ArgumentParser(prog=f"python -m usameter_{name}")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command_name, command in sorted(known.items()):
        subparser = subparsers.add_parser(command_name)
        if isinstance(command, CommandWithArguments):
            command.add_arguments(subparser)
    arguments = parser.parse_args()
    configure_logging(service=name, log_format="json", level="INFO")
    # What was imported stays: looking through it again and again for garbage takes tens of milliseconds each time.
    gc.collect()
    gc.freeze()
    # A group of a thousand events is tens of thousands of objects that are soon gone: with the default of 700 the
    # collector looks at the youngest some hundred times a group, in vain.
    gc.set_threshold(10_000)
    try:
        uvloop.run(_run(known[arguments.command], arguments))
    except (ConfigError, MigrationError, UsameterError, WorkerDiedTooOften, OSError, asyncpg.PostgresError) as error:
        sys.exit(f"usameter {name}: {error}")


async def _run(command: Command | CommandWithArguments, arguments: argparse.Namespace) -> None:
    if isinstance(command, CommandWithArguments):
        await command.run(arguments)
    else:
        await command()


async def _migrate(schema: str, *, package: str) -> None:
    settings = MigrationSettings.from_environment()
    password = settings.role_password.get_secret_value() if settings.role_password else None
    await migrate(
        settings.migrate_database_url.get_secret_value(),
        schema=schema,
        package=package,
        role_password=password,
    )

"""`usameter up`, `down`, `status`, `migrate`: the platform on this machine."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated

import typer

from usameter_cli.connection import API_KEY_VARIABLE, local_environment
from usameter_cli.errors import CliError, UsageError
from usameter_cli.output import JsonOption, new_table, people, print_json, terminal
from usameter_devstack.config import StackConfig
from usameter_devstack.credentials import read_dev_env
from usameter_devstack.errors import DevstackError
from usameter_devstack.events import Event, StackReady, sentence

_DATABASE_VARIABLES = ("USAMETER_MIGRATE_DATABASE_URL", "DATABASE_URL")
_NOT_RUNNING = 1


def up(
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once it is ready; `usameter down` stops it.")
    ] = False,
) -> None:
    """Start PostgreSQL, Valkey and every service, and serve until Ctrl-C. Data stays."""
    config = _config()
    # Imported here: it needs packages that a client-only installation has not, and costs a tenth of a second.
    from usameter_devstack.control import run_foreground, start_detached  # noqa: PLC0415

    raise typer.Exit(start_detached(config, _report) if detach else run_foreground(config, _report))


def down() -> None:
    """Stop what `usameter up` started; data stays."""
    config = _config()
    from usameter_devstack.control import stop  # noqa: PLC0415

    try:
        stopped = stop(config, _report)
    except DevstackError as error:
        raise CliError(str(error)) from error
    if not stopped:
        terminal().print(f"Nothing runs in {config.home}.")


def status(as_json: JsonOption = False) -> None:
    """Show what runs; the exit code is 0 only if everything is ready."""
    config = _config()
    from usameter_devstack.control import status as stack_status  # noqa: PLC0415

    found = stack_status(config)
    if as_json:
        children = [
            {"name": each.name, "pid": each.pid, "alive": each.alive, "port": each.port, "restarts": each.restarts}
            for each in found.children
        ]
        print_json({"home": str(found.home), "ready": found.ready, "url": found.url, "children": children})
    else:
        console = people()
        console.print(f"ready on {found.url}" if found.ready else f"not running in {found.home}")
        if found.children:
            table = new_table("name", "pid", "state", "port", "restarts", right=("pid", "port", "restarts"))
            for each in found.children:
                state = "alive" if each.alive else "gone"
                table.add_row(each.name, str(each.pid), state, str(each.port or ""), str(each.restarts))
            console.print(table)
    if not found.ready:
        raise typer.Exit(_NOT_RUNNING)


def migrate_database() -> None:
    """Bring every schema up to date; `usameter up` does it by itself.

    The database is that of USAMETER_MIGRATE_DATABASE_URL, else DATABASE_URL, else the running local one;
    USAMETER_ROLE_PASSWORD, where set, becomes the password of the services' roles.
    """
    dsn = next((os.environ[name] for name in _DATABASE_VARIABLES if os.environ.get(name)), None)
    dsn = dsn or local_environment().get("USAMETER_DATABASE_URL")
    if not dsn:
        raise UsageError(f"No database: set {_DATABASE_VARIABLES[0]}, or start the local one with `usameter up`.")
    # Imported here: the database's client costs 0.1 s, which no other command should pay.
    from usameter_cli.migrations import migrate_all  # noqa: PLC0415

    table = new_table("schema", "migrations applied", right=("migrations applied",))
    password = os.environ.get("USAMETER_ROLE_PASSWORD") or None
    for schema, applied in asyncio.run(migrate_all(dsn, role_password=password)).items():
        table.add_row(schema, str(applied))
    people().print(table)


def _config() -> StackConfig:
    try:
        return StackConfig.from_environment()
    except DevstackError as error:
        raise UsageError(str(error)) from error


def _report(event: Event) -> None:
    terminal().print(sentence(event), soft_wrap=True)
    if isinstance(event, StackReady):
        api_key = read_dev_env(_config().dev_env_path).get(API_KEY_VARIABLE, "")
        people().print(_welcome(event.url, api_key), soft_wrap=True)


def _welcome(url: str, api_key: str) -> str:
    return f"""
URL      {url}
API key  {api_key}

curl -X POST {url}/api/v1/events -H 'Authorization: Bearer {api_key}' -H 'Content-Type: application/json' \
-d '{{"event_type":"api_request","tenant_id":"tenant_abc123","quantity":1,"idempotency_key":"req_1"}}'
"""

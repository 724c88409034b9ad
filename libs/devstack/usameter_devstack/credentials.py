"""Secrets of a home, made once, and the `dev.env` that tells clients how to reach the platform."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

import msgspec

from usameter_devstack.errors import HomeUnusable
from usameter_devstack.state import write_private_file


class Secrets(msgspec.Struct, frozen=True):
    """What `<home>/secrets.json` holds (mode 0600); lives as long as the home."""

    cron_secret: str
    internal_token: str
    # Of the services' roles in a PostgreSQL of the user's own; the embedded one asks for none.
    role_password: str


def load_or_make_secrets(home: Path) -> Secrets:
    """The secrets of this home; made on the first call.

    Raises:
        HomeUnusable: The file cannot be read. It is not replaced: roles of a database have their password.
    """
    path = home / "secrets.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Secrets)
    except FileNotFoundError:
        made = Secrets(*(secrets.token_urlsafe(32) for _ in range(3)))
        write_private_file(path, msgspec.json.encode(made))
        return made
    except (OSError, msgspec.DecodeError) as error:
        raise HomeUnusable(f"Cannot read {path}: {error}. Restore it, or remove it to make new ones.") from error


def write_dev_env(path: Path, values: Mapping[str, str]) -> None:
    """Replace the file in one step, mode 0600: one NAME=value a line, quoted so that a shell can source it."""
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in values.items()]
    write_private_file(path, "".join(lines).encode())


def read_dev_env(path: Path) -> dict[str, str]:
    """The variables of a file that `write_dev_env` wrote; none if there is no such file."""
    try:
        text = path.read_text()
    except OSError:
        return {}
    values = {}
    for line in text.splitlines():
        name, separator, value = line.partition("=")
        if separator:
            try:
                values[name] = "".join(shlex.split(value))
            except ValueError:
                continue  # edited by hand into something no shell would read either
    return values


def with_role(database_url: str, role: str, password: str | None) -> str:
    """The same database, as another role."""
    parts = urlsplit(database_url)
    address = parts.netloc.rpartition("@")[2]
    login = quote(role, safe="") if password is None else f"{quote(role, safe='')}:{quote(password, safe='')}"
    return urlunsplit(parts._replace(netloc=f"{login}@{address}"))

"""Which server the commands talk to, and with which key."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

import typer

from usameter_cli.errors import UsageError
from usameter_devstack.config import StackConfig
from usameter_devstack.credentials import read_dev_env
from usameter_devstack.errors import HOME_VARIABLE

URL_VARIABLE = "USAMETER_URL"
API_KEY_VARIABLE = "USAMETER_API_KEY"
CRON_SECRET_VARIABLE = "USAMETER_CRON_SECRET"  # noqa: S105 - where it is, not what

UrlOption = Annotated[
    str | None,
    typer.Option("--url", help=f"Of the server; default: {URL_VARIABLE}, else the local platform's."),
]
ApiKeyEnvOption = Annotated[
    str,
    typer.Option("--api-key-env", metavar="VARIABLE", help="The environment variable that holds the API key."),
]


@dataclass(frozen=True, slots=True)
class Connection:
    """A server and a key for it, or the scheduler's secret instead. Neither may appear in any output."""

    url: str
    api_key: str


def resolve_connection(url: str | None, api_key_env: str) -> Connection:
    """The server and key that were given, else those of the local platform (`dev.env`), each by itself.

    Raises:
        UsageError: Neither is there, or the URL is none.
    """
    local = local_environment()
    found_url = url or os.environ.get(URL_VARIABLE) or local.get(URL_VARIABLE)
    if not found_url:
        raise UsageError(f"No server: start one with `usameter up`, or set {URL_VARIABLE}.")
    parts = urlsplit(found_url)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise UsageError(f'The URL must begin with "http://" or "https://" and name a host, not {found_url!r}.')
    api_key = os.environ.get(api_key_env)
    if not api_key and api_key_env in {API_KEY_VARIABLE, CRON_SECRET_VARIABLE}:
        api_key = local.get(api_key_env)
    if not api_key:
        raise UsageError(f"No key: set {api_key_env}, or start the local platform with `usameter up`.")
    if not api_key.isascii() or not api_key.isprintable():
        # It would not travel in a header; the value is not repeated, since most of it may be right.
        raise UsageError(f"The API key in {api_key_env} has characters that no key has.")
    return Connection(found_url.rstrip("/"), api_key)


def local_environment() -> dict[str, str]:
    """What `dev.env` of the local platform holds; empty where there is none."""
    home = StackConfig.from_environment({HOME_VARIABLE: os.environ.get(HOME_VARIABLE, "")})
    return read_dev_env(home.dev_env_path)

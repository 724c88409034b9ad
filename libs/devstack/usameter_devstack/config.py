"""Where the platform keeps its data, and which servers it uses: read from the environment once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from usameter_devstack.errors import HOME_VARIABLE, HTTP_PORT_VARIABLE, ConfigInvalid

_HOME_DEFAULT = "./.usameter"
_HTTP_PORT_DEFAULT = 8080


@dataclass(frozen=True, slots=True)
class StackConfig:
    """How the whole platform is run on this machine.

    Args:
        home: Absolute; holds all data, logs and secrets.
        http_port: Of the REST API on 127.0.0.1; 0 picks a free one, and keeps it over restarts if it can.
        database_url: A PostgreSQL of the caller's own, as a role that may create roles and schemas; None
            starts the embedded one.
        redis_url: Likewise for Redis or Valkey.
        durable: False gives up fsync of the embedded PostgreSQL: for tests only.
        service_environment: Variables for every service, on top of the caller's environment and below what
            this package sets.
    """

    home: Path
    http_port: int = _HTTP_PORT_DEFAULT
    database_url: str | None = None
    redis_url: str | None = None
    durable: bool = True
    service_environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> StackConfig:
        """Read USAMETER_HOME, USAMETER_HTTP_PORT, DATABASE_URL and REDIS_URL; an empty one counts as unset.

        Raises:
            ConfigInvalid: The port is no number from 0 to 65535, or a URL has another scheme.
        """
        source = os.environ if environment is None else environment
        return cls(
            home=Path(source.get(HOME_VARIABLE) or _HOME_DEFAULT).expanduser().absolute(),
            http_port=_port(source.get(HTTP_PORT_VARIABLE) or str(_HTTP_PORT_DEFAULT)),
            database_url=_url(source, "DATABASE_URL", ("postgresql://", "postgres://")),
            redis_url=_url(source, "REDIS_URL", ("redis://", "rediss://")),
        )

    def to_environment(self) -> dict[str, str]:
        """The variables from which `from_environment` makes the same home, port and servers again."""
        return {
            HOME_VARIABLE: str(self.home),
            HTTP_PORT_VARIABLE: str(self.http_port),
            "DATABASE_URL": self.database_url or "",
            "REDIS_URL": self.redis_url or "",
        }

    @property
    def dev_env_path(self) -> Path:
        return self.home / "dev.env"

    def log_path(self, name: str) -> Path:
        return self.home / "logs" / f"{name}.log"


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65_535:
        raise ConfigInvalid(f"{HTTP_PORT_VARIABLE} must be a port number from 0 to 65535, not {text!r}.")
    return int(text)


def _url(source: Mapping[str, str], name: str, schemes: tuple[str, ...]) -> str | None:
    value = source.get(name)
    if not value:
        return None
    if not value.startswith(schemes):
        # The value is not repeated: it may hold a password.
        raise ConfigInvalid(f"{name} must begin with {' or '.join(schemes)}.")
    return value

"""Configuration: the environment, read once into a frozen, validated object."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Address(NamedTuple):
    """A host and a TCP port; port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _address_from_text(value: object) -> object:
    if not isinstance(value, str):
        return value
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65_535:
        raise ValueError('must be "host:port"')
    return Address(host.strip("[]"), int(port))


# NoDecode: the settings' source would take a tuple for JSON, and refuse "host:port".
AddressSetting = Annotated[Address, NoDecode, BeforeValidator(_address_from_text)]


class ConfigError(Exception):
    """The environment does not describe a service; the text names each variable."""


class Settings(BaseSettings):
    """Fields read from variables named USAMETER_<FIELD>."""

    model_config = SettingsConfigDict(env_prefix="USAMETER_", frozen=True, extra="ignore")

    @classmethod
    def from_environment(cls) -> Self:
        """Read the environment.

        Raises:
            ConfigError: A variable is missing or wrong. Values are not repeated: they may be secrets.
        """
        try:
            return cls()
        except ValidationError as error:
            faults = [
                f"USAMETER_{'_'.join(str(part) for part in fault['loc']).upper()}: {fault['msg']}"
                for fault in error.errors(include_input=False, include_url=False)
            ]
            raise ConfigError("; ".join(faults)) from None


class ServiceSettings(Settings):
    """What every service reads."""

    listen: AddressSetting = Address("127.0.0.1", 0)
    log_format: Literal["json", "console"] = "json"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    # Port of the Prometheus endpoint; 0: none.
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] = 0


class InternalSettings(ServiceSettings):
    """Settings of a service that serves gRPC to others of the deployment."""

    # Shared by the services of one deployment; they know each other by it.
    internal_token: Annotated[SecretStr, Field(min_length=32)]
    database_url: SecretStr
    # Rate limits and live usage only; nothing that is recorded depends on it.
    redis_url: SecretStr
    # Seconds that calls under way may take to finish once the service is told to stop.
    drain_seconds: Annotated[int, Field(ge=0, le=300)] = 10


class MigrationSettings(Settings):
    """What `migrate` reads: a role that may create schemas and roles."""

    migrate_database_url: SecretStr
    # Password of the service's own role, where the server asks for one.
    role_password: SecretStr | None = None

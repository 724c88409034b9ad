"""What the identity service reads from its environment."""

from __future__ import annotations

from pydantic import SecretStr

from usameter_core.config import InternalSettings, Settings


class IdentitySettings(InternalSettings):
    """Of `serve`. Identity calls no other service, so it needs nobody's address."""


class BootstrapSettings(Settings):
    """Of `bootstrap`, which serves nothing and so needs no internal token."""

    database_url: SecretStr

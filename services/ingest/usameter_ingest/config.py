"""Settings of the ingest service."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, SecretStr

from usameter_core.config import AddressSetting, InternalSettings


class IngestSettings(InternalSettings):
    """Read from the environment; see `usameter_core.config` for the shared ones."""

    identity_addr: AddressSetting
    quota_addr: AddressSetting
    # Processes that share `listen`; with 1 this process serves itself. More than there are slots
    # (`store.slots`) would wait for each other.
    ingest_workers: Annotated[int, Field(ge=1, le=16)] = 1
    # "HH:MM", UTC: when this service seals by itself, every day, what was recorded before. Unset: it waits to be told,
    # by the operator's scheduler.
    ingest_seal_at: Annotated[str | None, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")] = None
    # Bearer token of the operator's scheduler.
    cron_secret: Annotated[SecretStr, Field(min_length=16)]

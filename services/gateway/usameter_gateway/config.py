"""Configuration of the gateway: where it listens, and where the services are."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from usameter_core.config import Address, AddressSetting, ServiceSettings

# Each goes to a worker of the kernel's choice. With 4 a worker, of two one is left without in 1 of 128
# starts, of four in 1 of 25; and then only until the connections end by age, within some six minutes.
_CONNECTIONS_A_WORKER = 4


class GatewaySettings(ServiceSettings):
    """What the gateway reads from the environment."""

    identity_addr: AddressSetting
    ingest_addr: AddressSetting
    quota_addr: AddressSetting
    billing_addr: AddressSetting
    # Processes that share `ingest_addr`: what ingest itself was given.
    ingest_workers: Annotated[int, Field(ge=1)] = 1

    @property
    def services(self) -> dict[str, Address]:
        """The services by name: the second word of their packages."""
        return {
            "identity": self.identity_addr,
            "ingest": self.ingest_addr,
            "quota": self.quota_addr,
            "billing": self.billing_addr,
        }

    def connections_to(self, service: str) -> int:
        """How many connections the calls to a service are spread over: one does for one process."""
        if service == "ingest" and self.ingest_workers > 1:
            return _CONNECTIONS_A_WORKER * self.ingest_workers
        return 1

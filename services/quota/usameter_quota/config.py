"""What the quota service reads from its environment."""

from __future__ import annotations

from usameter_core.config import AddressSetting, InternalSettings


class QuotaSettings(InternalSettings):
    """Of `serve`."""

    # Knows the holders of API keys.
    identity_addr: AddressSetting
    # Webhooks may go to http:// and to private addresses, so that any customer can reach what we can: for development.
    webhook_allow_private: bool = False

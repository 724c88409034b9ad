"""What identity reads from its environment."""

from __future__ import annotations

import pytest

from usameter_core.config import Address, ConfigError
from usameter_identity.config import IdentitySettings

TOKEN = "x" * 32


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USAMETER_DATABASE_URL", "postgresql://nobody:password@127.0.0.1/none")
    monkeypatch.setenv("USAMETER_REDIS_URL", "redis://127.0.0.1:1")
    monkeypatch.setenv("USAMETER_INTERNAL_TOKEN", TOKEN)
    monkeypatch.setenv("USAMETER_LISTEN", "127.0.0.1:7001")


def test_an_address_is_read_as_host_and_port() -> None:
    assert IdentitySettings.from_environment().listen == Address("127.0.0.1", 7001)


@pytest.mark.parametrize("address", ["7001", "127.0.0.1:", ":7001", "127.0.0.1:65536"])
def test_what_is_no_address_is_named(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("USAMETER_LISTEN", address)
    with pytest.raises(ConfigError, match="USAMETER_LISTEN"):
        IdentitySettings.from_environment()


def test_a_short_token_is_refused_without_repeating_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USAMETER_INTERNAL_TOKEN", TOKEN[:-1])
    with pytest.raises(ConfigError) as caught:
        IdentitySettings.from_environment()
    assert "USAMETER_INTERNAL_TOKEN" in str(caught.value)
    assert TOKEN[:-1] not in str(caught.value)

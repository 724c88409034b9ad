"""The resources of identity, and what their names may be."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from datetime import datetime
from typing import NewType
from uuid import UUID

from usameter_core.ids import OrgId

ApiKeyId = NewType("ApiKeyId", UUID)

API_KEY_ID_PREFIX = "key"
NAME_CHARACTERS_MAX = 100
# "usa_" and eight of 43 characters: tells two keys apart, and leaves 208 bits to guess.
PREFIX_CHARACTERS = 12

# Control characters and line separators: what no name or id may hold (the same rule as an
# event's tenant_id). NUL, the first of them, PostgreSQL cannot even store.
_FORBIDDEN_CATEGORIES = frozenset({"Cc", "Zl", "Zp"})
# The embeddings, overrides and isolates U+202A to U+202E and U+2066 to U+2069: with them an invoice
# would show another seller's name than the one that it says.
_DIRECTING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


@dataclass(frozen=True, slots=True)
class Organization:
    """A company that runs its billing on Usameter."""

    org_id: OrgId
    name: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Tenant:
    """A customer of an organization, by the organization's own name for it."""

    tenant_id: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of an API key: everything but the key."""

    api_key_id: ApiKeyId
    name: str
    # The first characters of the secret, to recognise it by.
    prefix: str
    scopes: frozenset[str]
    created_at: datetime
    revoked_at: datetime | None


def is_name(text: str) -> bool:
    """Whether the text can be the name of a key or organization."""
    return is_tenant_id(text) and not any(unicodedata.bidirectional(character) in _DIRECTING for character in text)


def is_tenant_id(text: str) -> bool:
    """Whether the text can be a tenant's id: what an event can have."""
    return 1 <= len(text) <= NAME_CHARACTERS_MAX and not any(
        unicodedata.category(character) in _FORBIDDEN_CATEGORIES for character in text
    )

"""API keys: "usa_", 256 random bits, and a checksum that tells a typing error without a look-up."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import zlib

PREFIX = "usa_"
_SECRET_BYTES = 32
# 43 characters of secret and 6 of CRC-32, both base64url.
_FORM = re.compile(r"^usa_([A-Za-z0-9_-]{43})([A-Za-z0-9_-]{6})$")


def new_api_key() -> str:
    """A fresh key; whoever has it is its organization."""
    body = _base64url(secrets.token_bytes(_SECRET_BYTES))
    return f"{PREFIX}{body}{_checksum(body)}"


def is_well_formed(key: str) -> bool:
    """Whether the key's checksum holds. Says nothing about whether anybody issued it."""
    match = _FORM.match(key)
    return match is not None and _checksum(match[1]) == match[2]


def hash_api_key(key: str) -> bytes:
    """What is stored and looked up instead of the key: its SHA-256.

    A slow hash would protect guessable passwords; 256 random bits cannot be guessed.
    """
    return hashlib.sha256(key.encode()).digest()


def _checksum(body: str) -> str:
    return _base64url(zlib.crc32(body.encode()).to_bytes(4, "big"))


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")

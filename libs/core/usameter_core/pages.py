"""Page tokens: where a list goes on, opaque to the caller."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from usameter_core.errors import FieldViolation, InvalidArgument

Key = TypeVar("Key")

DEFAULT_LIMIT = 100


def encode_page_token(key: Sequence[object]) -> str:
    """A token that says: after the row with this sort key, of whatever JSON has a form for."""
    return base64.urlsafe_b64encode(msgspec.json.encode(list(key))).decode().rstrip("=")


def decode_page_token(token: str, shape: type[Key]) -> Key | None:
    """The sort key in a token; None for the empty token, which means the first page.

    Args:
        token: As `encode_page_token` wrote it.
        shape: The type of the key, e.g. `tuple[str, str]`.

    Raises:
        InvalidArgument: The token is not one of ours.
    """
    if not token:
        return None
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        return msgspec.json.decode(raw, type=shape)
    except (binascii.Error, ValueError, msgspec.DecodeError):
        raise InvalidArgument([FieldViolation("page_token", "is not a token that this list returned")]) from None

"""The bytes that are hashed: ids, request hashes, leaves, roots.

docs/ledger-format.md is the specification, with test vectors; nothing here can ever change,
since stored hashes and proofs in customers' hands depend on it. Integers are big-endian,
moments are microseconds since 1970 as signed 64-bit integers, texts are UTF-8.
"""

from __future__ import annotations

import functools
import hashlib
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from uuid import UUID

from usameter_core.decimals import canonical
from usameter_core.ids import uuid_of

ZERO_ROOT = bytes(32)

_EVENT_ID_DOMAIN = b"usameter.event.v1"
_REQUEST_DOMAIN = b"usameter.request.v1"
_SNAPSHOT_ID_DOMAIN = b"usameter.snapshot.v1"
_SNAPSHOT_LEAF_DOMAIN = b"usameter.snapshot-leaf.v1"
_EPOCH_DOMAIN = b"usameter.epoch.v1"
_EVENT_LEAF = b"\x01E"
_CORRECTION_LEAF = b"\x01C"
_EPOCH_START = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def event_id_of_key(org_id: UUID, idempotency_key: str) -> UUID:
    """The id of the event that has this key: the first 16 bytes of a SHA-256."""
    return uuid_of(hashlib.sha256(_event_id_prefix(org_id) + idempotency_key.encode()).digest()[:16])


@functools.lru_cache(maxsize=1_000)
def _event_id_prefix(org_id: UUID) -> bytes:
    return _EVENT_ID_DOMAIN + org_id.bytes


def request_hash(tenant_id: str, event_type: str, quantity: str, metadata: bytes) -> bytes:
    """What two requests with one key must share to be the same event.

    Args:
        tenant_id: As given.
        event_type: As given.
        quantity: Canonical decimal.
        metadata: Canonical JSON.
    """
    amount = quantity.encode()
    return hashlib.sha256(
        b"".join(
            (
                _request_prefix(tenant_id, event_type),
                len(amount).to_bytes(4, "big"),
                amount,
                len(metadata).to_bytes(4, "big"),
                metadata,
            )
        )
    ).digest()


@functools.lru_cache(maxsize=100_000)
def _request_prefix(tenant_id: str, event_type: str) -> bytes:
    return _REQUEST_DOMAIN + _sized(tenant_id) + _sized(event_type)


def event_leaf_prefix(
    *,
    org_id: UUID,
    event_id: UUID,
    content_hash: bytes,
    occurred_at: datetime,
    timestamp_given: bool,
    idempotency_key: str | None,
) -> bytes:
    """What an event's leaf hash covers, but for the suffix that only its transaction knows.

    Args:
        content_hash: The event's `request_hash`.
        idempotency_key: None is told apart from the empty key, which there is not.
    """
    key = (idempotency_key or "").encode()
    return b"".join(
        (
            _EVENT_LEAF,
            org_id.bytes,
            event_id.bytes,
            content_hash,
            microseconds(occurred_at).to_bytes(8, "big", signed=True),
            b"\x01" if timestamp_given else b"\x00",
            len(key).to_bytes(4, "big"),
            key,
        )
    )


def correction_leaf_prefix(
    *, org_id: UUID, event_id: UUID, kind: str, quantity_delta: Decimal, reason: str, occurred_at: datetime
) -> bytes:
    """What a correction's leaf hash covers, but for the suffix that only its transaction knows."""
    return b"".join(
        (
            _CORRECTION_LEAF,
            org_id.bytes,
            event_id.bytes,
            _sized(kind),
            _sized(canonical(quantity_delta)),
            _sized(reason),
            microseconds(occurred_at).to_bytes(8, "big", signed=True),
        )
    )


def leaf_hash(prefix: bytes, *, epoch: int, ingested_at: datetime) -> bytes:
    """A leaf of a snapshot's Merkle tree (RFC 6962: 0x00 before what is hashed).

    The database computes it when it writes the entry; this is for whoever checks it.
    """
    suffix = epoch.to_bytes(8, "big", signed=True) + microseconds(ingested_at).to_bytes(8, "big", signed=True)
    return hashlib.sha256(b"\x00" + prefix + suffix).digest()


def snapshot_id_of(*, org_id: UUID, epoch: int, tenant_id: str, event_type: str, day: date) -> UUID:
    """The id of the snapshot with this key: the first 16 bytes of a SHA-256."""
    key = _snapshot_key(org_id, epoch, tenant_id, event_type, day)
    return UUID(bytes=hashlib.sha256(_SNAPSHOT_ID_DOMAIN + key).digest()[:16])


def snapshot_leaf(
    *,
    org_id: UUID,
    epoch: int,
    tenant_id: str,
    event_type: str,
    day: date,
    entry_count: int,
    quantity: Decimal,
    root: bytes,
) -> bytes:
    """A leaf of an epoch's Merkle tree over its snapshots."""
    return hashlib.sha256(
        b"".join(
            (
                b"\x00",
                _SNAPSHOT_LEAF_DOMAIN,
                _snapshot_key(org_id, epoch, tenant_id, event_type, day),
                entry_count.to_bytes(8, "big"),
                _sized(canonical(quantity)),
                root,
            )
        )
    ).digest()


def epoch_root(*, org_id: UUID, epoch: int, previous_root: bytes, snapshots_root: bytes) -> bytes:
    """The head of the chain up to this epoch; the first follows on `ZERO_ROOT`."""
    return hashlib.sha256(
        _EPOCH_DOMAIN + org_id.bytes + epoch.to_bytes(8, "big") + previous_root + snapshots_root
    ).digest()


def microseconds(moment: datetime) -> int:
    """Microseconds since 1970, exact."""
    return (moment - _EPOCH_START) // _MICROSECOND


def _snapshot_key(org_id: UUID, epoch: int, tenant_id: str, event_type: str, day: date) -> bytes:
    return b"".join(
        (org_id.bytes, epoch.to_bytes(8, "big"), _sized(tenant_id), _sized(event_type), day.isoformat().encode())
    )


def _sized(text: str) -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(4, "big") + raw

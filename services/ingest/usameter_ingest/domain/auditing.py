"""What an audit of the ledger has compared, and where it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from uuid import UUID

from usameter_core.audit import Violation

_FIRST_MOMENT = datetime.min.replace(tzinfo=UTC)
_FIRST_EVENT = UUID(int=0)


class Stage(StrEnum):
    """What is compared, in this order.

    EPOCHS: the chain, and snapshots with rollups. DAYS: entries with rollups, and with the roots of
    snapshots. ENTRIES: each with its own hashes. Together they leave nothing out: each stage
    covers all there is of one side, and every side is in two of them.
    """

    EPOCHS = "epochs"
    DAYS = "days"
    ENTRIES = "entries"


@dataclass(frozen=True, slots=True)
class AuditPlace:
    """Where a page of the audit begins.

    Attributes:
        epoch: EPOCHS: those after this one.
        tenant_id: DAYS: those of this tenant from `moment` on, and of the tenants behind it.
        moment: The start of a UTC day; ENTRIES: those behind `event_id` at this moment, and later ones.
    """

    stage: Stage = Stage.EPOCHS
    epoch: int = 0
    tenant_id: str = ""
    moment: datetime = _FIRST_MOMENT
    event_id: UUID = _FIRST_EVENT


@dataclass(frozen=True, slots=True)
class Audited:
    """What a page came to; `next_place` is None once everything is compared."""

    checked: int
    violations: Sequence[Violation]
    next_place: AuditPlace | None

"""Requests for quota, what becomes of them, and what corrects the count afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from uuid import UUID

import msgspec

from usameter_core.ids import ReservationId


class UsageItem(msgspec.Struct, frozen=True):
    """Use of one tenant and event type within the UTC hour that starts at `hour`; quantity > 0.

    A struct of msgspec's and no dataclass: a thousand are made at once, and a frozen dataclass takes six times as long.
    """

    tenant_id: str
    event_type: str
    hour: datetime
    quantity: Decimal
    # The public reservation that it consumes.
    claims: ReservationId | None = None


@dataclass(slots=True)
class UsageTable:
    """A group of requests as the columns that `quota.reserve` takes.

    Cells are the distinct (tenant, event type, hour) of the group, numbered from 1 as PostgreSQL
    counts; `totals` has what all requests ask of each. Items say what a request, numbered from 0,
    asks of a cell. Their quantities are text: the driver needs 2 µs to encode a Decimal, which
    was half the time of a group of 1,000, and mostly nobody looks at them. Few items name a public
    reservation: `claim_items` are the numbers of those that do, from 1.
    """

    tenant_ids: list[str] = field(default_factory=list)
    event_types: list[str] = field(default_factory=list)
    hours: list[datetime] = field(default_factory=list)
    totals: list[Decimal] = field(default_factory=list)
    request_numbers: list[int] = field(default_factory=list)
    cell_numbers: list[int] = field(default_factory=list)
    quantities: list[str] = field(default_factory=list)
    claim_items: list[int] = field(default_factory=list)
    claim_ids: list[ReservationId] = field(default_factory=list)


def tabulate_usage(requests: Sequence[Sequence[UsageItem]]) -> UsageTable:
    """The group as a table; a request without items is in no row, and is always admitted."""
    table = UsageTable()
    cells: dict[tuple[str, str, datetime], int] = {}
    for request_number, items in enumerate(requests):
        for item in items:
            key = (item.tenant_id, item.event_type, item.hour)
            cell_number = cells.setdefault(key, len(cells) + 1)
            if cell_number > len(table.totals):
                table.totals.append(item.quantity)
            else:
                table.totals[cell_number - 1] += item.quantity
            table.request_numbers.append(request_number)
            table.cell_numbers.append(cell_number)
            table.quantities.append(str(item.quantity))
            if item.claims is not None:
                table.claim_items.append(len(table.quantities))
                table.claim_ids.append(item.claims)
    table.tenant_ids = [tenant_id for tenant_id, _, _ in cells]
    table.event_types = [event_type for _, event_type, _ in cells]
    table.hours = [hour for _, _, hour in cells]
    return table


class FindingKind(StrEnum):
    """What a limit says of a request. `REFUSED` is said by HARD limits, and by SOFT ones whose grace has ended."""

    REFUSED = "REFUSED"
    QUOTA_SOFT_LIMIT = "QUOTA_SOFT_LIMIT"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"


@dataclass(frozen=True, slots=True)
class Finding:
    """One limit in one of its periods, as a request met it. The form in which `quota.decide` answers.

    Attributes:
        request: Number of the request in its group, from 0.
        current: Use before the request: reservations, and requests of the group admitted before it, included.
        requested: What the request would add, all its items in that period together.
        reset_at: When the period ends; None where it has ended, since waiting cannot help then.
    """

    request: int
    kind: FindingKind
    tenant_id: str
    event_type: str
    limit: Decimal
    current: Decimal
    requested: Decimal
    reset_at: datetime | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one request; a refused one has violations and no warnings."""

    violations: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()

    @property
    def admitted(self) -> bool:
        """Whether its quantities were taken."""
        return not self.violations


_PLAIN = Verdict()


def verdicts_from_findings(request_count: int, findings: Iterable[Finding]) -> list[Verdict]:
    """One verdict for each request, in order; requests that nothing was found on are admitted."""
    found: dict[int, list[Finding]] = {}
    for finding in findings:
        found.setdefault(finding.request, []).append(finding)
    verdicts = [_PLAIN] * request_count
    for number, of_request in found.items():
        verdicts[number] = Verdict(
            violations=tuple(each for each in of_request if each.kind is FindingKind.REFUSED),
            warnings=tuple(each for each in of_request if each.kind is not FindingKind.REFUSED),
        )
    return verdicts


class Outcome(StrEnum):
    """What became of a reservation: its entries are stored, or never will be."""

    COMMITTED = "COMMITTED"
    ABORTED = "ABORTED"


@dataclass(frozen=True, slots=True)
class Adjustment:
    """A signed quantity to count in the UTC hour that starts at `hour`, once by its id."""

    adjustment_id: UUID
    tenant_id: str
    event_type: str
    hour: datetime
    quantity: Decimal


@dataclass(frozen=True, slots=True)
class OpenReservation:
    """A reservation that nobody has settled."""

    org_id: UUID
    reservation_id: ReservationId
    created_at: datetime

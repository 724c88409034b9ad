"""A bulk run, the parts into which it is cut, and what becomes of what fails."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from uuid import UUID

from usameter_core.ids import OrgId
from usameter_core.period import Period

PROBLEMS_MAX = 100
# The cost of a transaction is spread over this many; others wait for its accounts that long.
BATCH_TENANTS = 200
# After 1, 2, 4, 8, 16 seconds and then every 32: five minutes of a dependency that is away. Then the job says
# so and ends.
_FAILURES_MAX = 15
_BACK_OFF_DOUBLINGS_MAX = 5
# So many failures bring a batch down to a single tenant: 200, 100, 50, 25, 12, 6, 3, 1.
_HALVINGS = BATCH_TENANTS.bit_length() - 1
# Behind those are eleven attempts at that tenant, 32 seconds apart: five minutes of its own, whatever failed before.
_PART_FAILURES_MAX = _HALVINGS + 11


class JobState(StrEnum):
    """The names are those of usameter/common/v1/job.proto."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Job:
    """A bulk run: of a month, with all that its parts have done so far.

    `total` is None until it is cut into parts. `failures` are those of attempts to cut it, and
    `lease_id` is of the worker that is to.
    """

    org_id: OrgId
    job_id: UUID
    period: Period
    finalize: bool
    state: JobState
    done: int = 0
    total: int | None = None
    problems: tuple[str, ...] = ()
    failures: int = 0
    lease_id: UUID | None = None


class PartState(StrEnum):
    """What becomes of a part; the run ends when none is open."""

    OPEN = "open"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Part:
    """The tenants of a run that are still to be billed behind `after_tenant` up to `through_tenant`.

    With what is to be known of the run for that. `through_tenant` is None in the last part, which goes on to the end.
    `alone_tenant` is whom the last attempt held alone, if that failed; `given_up` says who was given up, and why.
    """

    org_id: OrgId
    job_id: UUID
    number: int
    period: Period
    finalize: bool
    seller_name: str
    after_tenant: str
    through_tenant: str | None
    state: PartState
    problems: tuple[str, ...]
    given_up: tuple[str, ...]
    failures: int
    alone_tenant: str | None

    @property
    def batch_tenants(self) -> int:
        """How many tenants the next attempt takes at most: what fails becomes smaller until it is alone."""
        return max(1, BATCH_TENANTS >> self.failures)


@dataclass(frozen=True, slots=True)
class Attempt:
    """At the next tenants of a claimed part; none where it has not come to know them.

    `is_last`: the part has no others behind them.
    """

    part: Part
    tenant_ids: tuple[str, ...] = ()
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class Retry:
    """The part is tried again after a while, with so many failures in a row, the last of `alone_tenant` alone."""

    after: timedelta
    failures: int
    alone_tenant: str | None


@dataclass(frozen=True, slots=True)
class GivingUp:
    """The part goes on behind this tenant, without it, at once; `failures` decide with how many."""

    tenant_id: str
    state: PartState
    failures: int


def retry_after(failures: int) -> timedelta | None:
    """How long a job waits that had failed `failures` times before; None: it is not tried again."""
    return None if failures + 1 >= _FAILURES_MAX else _back_off(failures)


def after_failure(attempt: Attempt, *, is_lasting: bool) -> Retry | GivingUp:
    """What becomes of a part after this attempt failed.

    A tenant is given up after it failed alone for five minutes, which no shorter outage can cause. A failure that
    `is_lasting` is not waited for: the tenant is given up as soon as it is alone.
    """
    part = attempt.part
    tenant_id = attempt.tenant_ids[0] if len(attempt.tenant_ids) == 1 else None
    # Failures with others around it, or of one that somebody else has billed meanwhile, are not its own.
    failures = part.failures if tenant_id == part.alone_tenant else min(part.failures, _HALVINGS)
    if tenant_id is not None and (is_lasting or failures + 1 >= _PART_FAILURES_MAX):
        # Whatever is wrong with it may be wrong with the next as well: that one is tried alone, and the batch is full
        # again after a success.
        return GivingUp(tenant_id, PartState.DONE if attempt.is_last else PartState.OPEN, failures=_HALVINGS)
    after = timedelta() if is_lasting and attempt.tenant_ids else _back_off(failures)
    return Retry(after, failures + 1, tenant_id)


def _back_off(failures: int) -> timedelta:
    return timedelta(seconds=2 ** min(failures, _BACK_OFF_DOUBLINGS_MAX))

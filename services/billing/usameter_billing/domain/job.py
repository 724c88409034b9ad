"""A bulk run, the parts into which it is cut, and how often what fails is tried again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from uuid import UUID

from usameter_core.ids import OrgId
from usameter_core.period import Period

PROBLEMS_MAX = 100
# After 1, 2, 4, 8, 16 seconds and then every 32: five minutes of a dependency that is away. Then the job says
# so and ends.
_FAILURES_MAX = 15
_RETRY_AFTER_MAX = timedelta(seconds=32)


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
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Part:
    """The tenants of a run that are still to be billed behind `after_tenant` up to `through_tenant`.

    With what is to be known of the run for that. `through_tenant` is None in the last part, which goes on to the end.
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
    failures: int

    def __str__(self) -> str:
        bounds = [f"after {self.after_tenant}"] if self.after_tenant else []
        bounds += [f"up to {self.through_tenant}"] if self.through_tenant is not None else []
        return f"tenants {' '.join(bounds)}" if bounds else "all tenants"


def retry_after(failures: int) -> timedelta | None:
    """How long what failed waits that had failed `failures` times before; None: it is not tried again."""
    if failures + 1 >= _FAILURES_MAX:
        return None
    return min(timedelta(seconds=2**failures), _RETRY_AFTER_MAX)

"""What an audit finds, and how it is answered, counted and logged: the same in every service."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from usameter.common.v1 import audit_pb2
from usameter_core.ids import OrgId
from usameter_core.logging import get_logger
from usameter_core.metrics import INVARIANT_VIOLATIONS, LAST_CLEAN_AUDIT
from usameter_core.pages import encode_page_token

log = get_logger()

# Of one part of an audit, or of one kind in it: a broken ledger must not become an answer without bound.
VIOLATIONS_MAX = 1_000


@dataclass(frozen=True, slots=True)
class Violation:
    """Two things that are stored and contradict each other.

    Attributes:
        invariant: "I1" to "I9".
        problem: What contradicts what, in a clause.
        expected: What the rest says should be stored. Like `found` without anything that customers sent but amounts.
        found: What is stored.
        place: Where, by the names of the contract's `ViolationPlace`.
    """

    invariant: str
    problem: str
    expected: str
    found: str
    place: Mapping[str, str | int] = field(default_factory=dict)


def report_violations(org_id: OrgId, violations: Sequence[Violation]) -> None:
    """Count and log each: an audit that nobody reads is still seen by whoever watches the metrics."""
    for each in violations:
        INVARIANT_VIOLATIONS.labels(each.invariant).inc()
        log.error(
            "invariant_violated",
            org_id=str(org_id),
            invariant=each.invariant,
            problem=each.problem,
            **each.place,
            expected=each.expected,
            found=each.found,
        )


def audit_page_to_proto(
    audited: str,
    *,
    checked: int,
    violations: Sequence[Violation],
    found_before: int,
    next_place: object | None,
) -> audit_pb2.AuditPage:
    """A page of an audit; the last of one that found nothing is noted in the metrics.

    Args:
        audited: What is audited, as the metric has it, e.g. "ledger".
        found_before: Violations on the pages before, which the token carries first.
        next_place: Where the next page begins, which the token carries as its second; None: this is the last.
    """
    found = found_before + len(violations)
    if next_place is None and not found:
        LAST_CLEAN_AUDIT.labels(audited).set(time.time())
    return audit_pb2.AuditPage(
        checked=checked,
        violations=[violation_to_proto(each) for each in violations],
        next_page_token=None if next_place is None else encode_page_token([found, next_place]),
    )


def violation_to_proto(violation: Violation) -> audit_pb2.Violation:
    """A violation as the organization sees it."""
    return audit_pb2.Violation(
        invariant=violation.invariant,
        problem=violation.problem,
        place=audit_pb2.ViolationPlace(**violation.place),  # type: ignore[arg-type]
        expected=violation.expected,
        found=violation.found,
    )


def violation_from_proto(message: audit_pb2.Violation) -> Violation:
    """A violation that another service has found."""
    place = {field.name: value for field, value in message.place.ListFields()}
    return Violation(message.invariant, message.problem, message.expected, message.found, place)

"""Checks of an invoice's arithmetic: quantities from snapshots, ratings from prices, totals from lines."""

from __future__ import annotations

import decimal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from heapq import heappop, heappush
from itertools import pairwise

from usameter_core.decimals import CONTEXT
from usameter_core.errors import InvalidArgument
from usameter_proof.documents import (
    DAY_MICROSECONDS,
    BaseFee,
    Component,
    Invoice,
    InvoiceProof,
    Line,
    PriceVersion,
    Snapshot,
    day_number,
)
from usameter_proof.findings import Finding
from usameter_proof.ledger_format import microseconds
from usameter_proof.pricing import price_from_terms
from usameter_proof.rating import due_amount, prorated_fee, rate, tax_amount


def check_amounts(proof: InvoiceProof) -> Iterator[Finding]:
    """What is wrong with the lines and sums of the document's invoice."""
    uses = [_Use(line, day_number(line.period_start), day_number(line.period_end), []) for line in proof.invoice.lines]
    with decimal.localcontext(CONTEXT):
        yield from _check_subjects(proof.invoice)
        yield from _check_fees(proof.invoice)
        yield from _share_out(proof, uses)
        yield from _check_covers(uses)
        for use in uses:
            for what in _faults_of_line(use.line, proof.invoice, use.snapshots):
                yield Finding(f"line {use.line.id}", what)
        yield from _check_sums(proof.invoice)


@dataclass(frozen=True, slots=True)
class _Use:
    """A line, the days that it is about, and the snapshots of its event type on these days."""

    line: Line
    first_day: int
    end_day: int
    snapshots: list[Snapshot]


def _check_subjects(invoice: Invoice) -> Iterator[Finding]:
    """No time of an event type's use, or of a plan's base fee, is billed by two lines, and no line is less twice."""
    lines: dict[tuple[str | None, ...], list[Line]] = defaultdict(list)
    for line in invoice.lines:
        of = (line.base_fee.subscription_id, line.base_fee.plan_id) if line.base_fee else (line.event_type,)
        lines[of].append(line)
    for of_subject in lines.values():
        # Also where nothing was used, and so no snapshot can show it: a plan's price charges for that.
        for before, line in pairwise(sorted(of_subject, key=lambda line: line.period_start)):
            if line.period_start < before.period_end:
                yield Finding(f"line {line.id}", f"bills the same as line {before.id}")
    billed: set[str] = set()
    for line in invoice.lines:
        for earlier in line.previously_billed:
            if earlier.line_id in billed or earlier.invoice_id == invoice.id:
                yield Finding(f"line {line.id}", f"line {earlier.line_id} cannot be billed before, or is named twice")
            billed.add(earlier.line_id)


def _check_fees(invoice: Invoice) -> Iterator[Finding]:
    """No second of a subscription is charged by two lines.

    A line says how many seconds of its interval it charges, not which. A tenant is on one plan of a subscription at a
    time, so there must be a way to give each line its seconds, none of them to two: where there is one, giving each
    second to the line whose interval ends first finds it.
    """
    fees: dict[str, list[tuple[Line, int]]] = defaultdict(list)
    for line in invoice.lines:
        # One that charges more than there is of its own interval is named for that.
        if line.base_fee is not None and line.base_fee.seconds:
            seconds = min(line.base_fee.seconds, line.base_fee.interval_seconds)
            fees[line.base_fee.subscription_id].append((line, seconds * 1_000_000))
    for of_subscription in fees.values():
        for line in _lines_without_time(sorted(of_subscription, key=lambda fee: fee[0].period_start)):
            yield Finding(f"line {line.id}", "charges more of its interval than other lines of its subscription leave")


def _lines_without_time(fees: Sequence[tuple[Line, int]]) -> Iterator[Line]:
    """Those that are not done by the end of their interval; `fees` are lines and microseconds, ascending by start."""
    waiting: list[tuple[int, int, int]] = []
    now = begun = 0
    while waiting or begun < len(fees):
        if not waiting:
            now = max(now, microseconds(fees[begun][0].period_start))
        while begun < len(fees) and microseconds(fees[begun][0].period_start) <= now:
            heappush(waiting, (microseconds(fees[begun][0].period_end), begun, fees[begun][1]))
            begun += 1
        end, number, left = heappop(waiting)
        line = fees[number][0]
        until = now + left
        if begun < len(fees):
            until = min(until, microseconds(fees[begun][0].period_start))
        if until > end:
            # Its time goes to the others, so that these are not named because of it.
            yield line
            now = max(now, end)
        else:
            if left > until - now:
                heappush(waiting, (end, number, left - (until - now)))
            now = until


def _share_out(proof: InvoiceProof, uses: Sequence[_Use]) -> Iterator[Finding]:
    """Give each line its snapshots; each must be of exactly one."""
    invoice = proof.invoice
    by_event_type: dict[str | None, list[_Use]] = defaultdict(list)
    for use in uses:
        by_event_type[use.line.event_type].append(use)
    for snapshot in proof.snapshots:
        where = f"snapshot {snapshot.id}"
        of = [use for use in by_event_type[snapshot.event_type] if use.first_day <= snapshot.day_number < use.end_day]
        for use in of:
            use.snapshots.append(snapshot)
        if snapshot.tenant_id != invoice.tenant_id:
            yield Finding(where, f'is of the tenant "{snapshot.tenant_id}"')
        if snapshot.epoch > invoice.through_epoch:
            yield Finding(where, f"is of epoch {snapshot.epoch}, after the invoice's {invoice.through_epoch}")
        if len(of) != 1:
            yield Finding(where, f"belongs to {len(of)} lines")


def _check_covers(uses: Sequence[_Use]) -> Iterator[Finding]:
    """What lines say that they are the first to cover must be among their snapshots, and said once."""
    for use in uses:
        proven = {snapshot.id: snapshot for snapshot in use.snapshots}
        said: set[str] = set()
        for own in use.line.snapshots:
            snapshot = proven.get(own.id)
            if snapshot is None:
                yield Finding(f"line {use.line.id}", f"covers snapshot {own.id}, which the proof has not for its use")
            elif (own.epoch, Decimal(own.total), own.root) != (
                snapshot.epoch,
                Decimal(snapshot.total),
                snapshot.root,
            ):
                yield Finding(f"line {use.line.id}", f"states snapshot {own.id} otherwise than the proof")
            if own.id in said:
                yield Finding(f"line {use.line.id}", f"covers snapshot {own.id} twice")
            said.add(own.id)


def _faults_of_line(line: Line, invoice: Invoice, snapshots: Sequence[Snapshot]) -> Iterator[str]:
    if line.price is not None and line.quantity is not None and line.base_fee is None:
        yield from _faults_of_use(line, line.price, Decimal(line.quantity), invoice, snapshots)
    elif line.base_fee is not None and line.event_type is None and line.price is None and line.quantity is None:
        yield from _faults_of_fee(line, line.base_fee, invoice.currency)
    else:
        yield "is neither of use, with a price and a quantity, nor of a base fee"
    kind = _kind_of(line, invoice)
    if line.kind != kind:
        yield f'is of the kind "{line.kind}", and what else it says makes it {kind}'
    if not _is_of_days(line):
        yield "its period is not one of whole UTC days"
    billed = sum((Decimal(each.amount) for each in line.previously_billed), Decimal(0))
    due = Decimal(line.rated_amount) - billed
    if due != Decimal(line.amount):
        yield f"rated {line.rated_amount} less previously billed {billed} is {due}, not {line.amount}"


def _kind_of(line: Line, invoice: Invoice) -> str:
    """The first line of a base fee's interval, or of use in the invoice's own period, is told from any other."""
    if line.base_fee is not None:
        return "TRUE_UP" if line.previously_billed else "BASE_FEE"
    is_of_period = (line.period_start, line.period_end) == (invoice.period_start, invoice.period_end)
    return "USAGE" if is_of_period and not line.previously_billed else "TRUE_UP"


def _is_of_days(line: Line) -> bool:
    midnights = all(microseconds(each) % DAY_MICROSECONDS == 0 for each in (line.period_start, line.period_end))
    return midnights and line.period_start < line.period_end


def _faults_of_use(
    line: Line, version: PriceVersion, quantity: Decimal, invoice: Invoice, snapshots: Sequence[Snapshot]
) -> Iterator[str]:
    total = sum((Decimal(each.total) for each in snapshots), Decimal(0))
    if total != quantity:
        yield f"its snapshots add up to {total}, not to the quantity {line.quantity}"
    if version.event_type != line.event_type:
        yield f'its price is of "{version.event_type}"'
    if version.tenant_id not in (None, invoice.tenant_id):
        yield f'its price is of the tenant "{version.tenant_id}"'
    if version.price.currency != invoice.currency:
        yield f"its price is in {version.price.currency}, the invoice in {invoice.currency}"
    try:
        price = price_from_terms(version.price)
    except InvalidArgument as error:
        yield f"its price is none: {error}"
        return
    subscribed = version.plan_id is not None
    due = due_amount(price, quantity, subscribed=subscribed)
    if due != Decimal(line.rated_amount):
        yield f"its price makes {quantity} cost {due}, not {line.rated_amount}"
    components = rate(price, quantity).components if quantity > 0 or subscribed else ()
    if [_values(each) for each in line.breakdown] != [
        (each.up_to, each.quantity, each.unit_amount, each.flat_amount, each.amount, each.bound) for each in components
    ]:
        yield "its breakdown is not what its price makes of the quantity"


def _values(component: Component) -> tuple[Decimal | str | None, ...]:
    return (
        None if component.up_to is None else Decimal(component.up_to),
        Decimal(component.quantity),
        Decimal(component.unit_amount),
        Decimal(component.flat_amount),
        Decimal(component.amount),
        component.bound,
    )


def _faults_of_fee(line: Line, fee: BaseFee, currency: str) -> Iterator[str]:
    length = (line.period_end - line.period_start).total_seconds()
    if fee.interval_seconds != length:
        yield f"its interval has {length:.0f} seconds, not {fee.interval_seconds}"
    if fee.seconds > fee.interval_seconds:
        yield f"charges {fee.seconds} of {fee.interval_seconds} seconds"
    due = prorated_fee(Decimal(fee.amount), currency, seconds=fee.seconds, interval_seconds=fee.interval_seconds)
    if due != Decimal(line.rated_amount):
        yield f"the part of its base fee is {due}, not {line.rated_amount}"


def _check_sums(invoice: Invoice) -> Iterator[Finding]:
    where = f"invoice {invoice.id}"
    subtotal, tax, total = Decimal(invoice.subtotal), Decimal(invoice.tax), Decimal(invoice.total)
    lines = sum((Decimal(line.amount) for line in invoice.lines), Decimal(0))
    if lines != subtotal:
        yield Finding(where, f"its lines add up to {lines}, not to the subtotal {invoice.subtotal}")
    by_rate: dict[Decimal, Decimal] = {}
    for line in invoice.lines:
        rate_of_line = Decimal(line.tax_rate)
        by_rate[rate_of_line] = by_rate.get(rate_of_line, Decimal(0)) + Decimal(line.amount)
    due = sum((tax_amount(amount, each, invoice.currency) for each, amount in by_rate.items()), Decimal(0))
    if due != tax:
        yield Finding(where, f"the tax on its lines is {due}, not {invoice.tax}")
    if subtotal + tax != total:
        yield Finding(where, f"subtotal and tax are {subtotal + tax}, not the total {invoice.total}")
    if not 0 <= Decimal(invoice.amount_due) <= max(total, Decimal(0)):
        yield Finding(where, f"its amount_due {invoice.amount_due} is not between 0 and the total")

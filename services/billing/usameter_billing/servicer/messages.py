"""Messages from and to values. `..._from_proto` may fail, `..._to_proto` cannot."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from usameter.billing.v1 import invoice_pb2, plan_pb2, price_pb2, subscription_pb2
from usameter.common.v1 import job_pb2
from usameter_billing.domain.invoice import FeeCharge, Invoice, InvoiceLine, InvoiceStatus, UseCharge
from usameter_billing.domain.job import Job
from usameter_billing.domain.plan import Plan
from usameter_billing.domain.subscription import Subscription
from usameter_core.decimals import canonical
from usameter_core.grpc.timestamps import datetime_from_timestamp, timestamp_from_datetime
from usameter_core.ids import format_id
from usameter_core.money import format_amount
from usameter_core.period import Period
from usameter_proof.pricing import PackageTerms, PriceModel, PriceTerms, PriceVersion, TierTerms
from usameter_proof.rating import Component, rate


def period_from_proto(start: Timestamp, end: Timestamp) -> Period:
    """The period with the bounds `period_start` and `period_end`; not checked to be one."""
    return Period(
        datetime_from_timestamp(start, field="period_start"), datetime_from_timestamp(end, field="period_end")
    )


def terms_from_proto(message: price_pb2.Price) -> PriceTerms:
    """The price as it was written; whether it is one is for the domain to say."""
    return PriceTerms(
        model=PriceModel(price_pb2.PriceModel.Name(message.model)),
        currency=message.currency,
        flat_amount=message.flat_amount if message.HasField("flat_amount") else None,
        unit_amount=message.unit_amount if message.HasField("unit_amount") else None,
        tiers=tuple(_tier_from_proto(tier) for tier in message.tiers),
        package=_package_from_proto(message.package) if message.HasField("package") else None,
        minimum_amount=message.minimum_amount if message.HasField("minimum_amount") else None,
        maximum_amount=message.maximum_amount if message.HasField("maximum_amount") else None,
    )


def _tier_from_proto(message: price_pb2.PriceTier) -> TierTerms:
    return TierTerms(
        up_to=message.up_to if message.HasField("up_to") else None,
        unit_amount=message.unit_amount if message.HasField("unit_amount") else None,
        flat_amount=message.flat_amount if message.HasField("flat_amount") else None,
    )


def _package_from_proto(message: price_pb2.PackageTerms) -> PackageTerms:
    free_units = message.free_units if message.HasField("free_units") else None
    return PackageTerms(size=message.size, amount=message.amount, free_units=free_units)


def price_to_proto(terms: PriceTerms) -> price_pb2.Price:
    """The price as it was written."""
    return price_pb2.Price(
        model=price_pb2.PriceModel.Value(terms.model.value),
        currency=terms.currency,
        flat_amount=terms.flat_amount,
        unit_amount=terms.unit_amount,
        tiers=[
            price_pb2.PriceTier(up_to=tier.up_to, unit_amount=tier.unit_amount, flat_amount=tier.flat_amount)
            for tier in terms.tiers
        ],
        package=None if terms.package is None else _package_to_proto(terms.package),
        minimum_amount=terms.minimum_amount,
        maximum_amount=terms.maximum_amount,
    )


def _package_to_proto(package: PackageTerms) -> price_pb2.PackageTerms:
    return price_pb2.PackageTerms(size=package.size, amount=package.amount, free_units=package.free_units)


def version_to_proto(version: PriceVersion, notices: Sequence[str] = ()) -> price_pb2.PriceVersion:
    """A price version; `notices` say what adding it did not change."""
    return price_pb2.PriceVersion(
        id=format_id("prc", version.price_id),
        event_type=version.event_type,
        tenant_id=version.tenant_id,
        effective_from=timestamp_from_datetime(version.effective_from),
        price=price_to_proto(version.terms),
        created_at=timestamp_from_datetime(version.created_at),
        notices=notices,
        plan_id=None if version.plan_id is None else format_id("pln", version.plan_id),
    )


def component_to_proto(component: Component) -> price_pb2.PriceComponent:
    """A part of a rating; all canonical decimals."""
    return price_pb2.PriceComponent(
        up_to=None if component.up_to is None else canonical(component.up_to),
        quantity=canonical(component.quantity),
        unit_amount=canonical(component.unit_amount),
        flat_amount=canonical(component.flat_amount),
        amount=canonical(component.amount),
        bound=component.bound,
    )


def status_from_proto(status: invoice_pb2.InvoiceStatus.ValueType) -> InvoiceStatus | None:
    """The status; None where it is unset."""
    if status == invoice_pb2.INVOICE_STATUS_UNSPECIFIED:
        return None
    return InvoiceStatus(invoice_pb2.InvoiceStatus.Name(status))


def invoice_to_proto(invoice: Invoice) -> invoice_pb2.Invoice:
    """A draft or an invoice, with the lines that were loaded."""
    currency = invoice.currency
    return invoice_pb2.Invoice(
        id=format_id("inv", invoice.invoice_id),
        number=invoice.number,
        tenant_id=invoice.tenant_id,
        status=invoice_pb2.InvoiceStatus.Value(invoice.status.value),
        currency=currency,
        period_start=timestamp_from_datetime(invoice.period.start),
        period_end=timestamp_from_datetime(invoice.period.end),
        through_epoch=invoice.through_epoch,
        lines=[_line_to_proto(line) for line in invoice.lines],
        subtotal=format_amount(invoice.subtotal, currency),
        tax=format_amount(invoice.tax, currency),
        total=format_amount(invoice.total, currency),
        amount_due=format_amount(invoice.amount_due, currency),
        issued_at=_optional_moment(invoice.issued_at),
        due_at=_optional_moment(invoice.due_at),
        paid_at=_optional_moment(invoice.paid_at),
        unpriced_event_types=invoice.unpriced_event_types,
        amount_paid=format_amount(invoice.amount_paid, currency),
        overdue=invoice.overdue,
        payment_reference=invoice.payment_reference,
        voided_at=_optional_moment(invoice.voided_at),
        void_reason=invoice.void_reason,
        uncollectible_at=_optional_moment(invoice.uncollectible_at),
        uncollectible_reason=invoice.uncollectible_reason,
        seller_name=None if invoice.parties is None else invoice.parties.seller_name,
        bill_to_address=None if invoice.parties is None else invoice.parties.bill_to_address,
    )


def _optional_moment(moment: datetime | None) -> Timestamp | None:
    return None if moment is None else timestamp_from_datetime(moment)


def _line_to_proto(line: InvoiceLine) -> invoice_pb2.InvoiceLine:
    due = line.due
    currency = due.charge.currency
    message = invoice_pb2.InvoiceLine(
        id=format_id("lin", line.line_id),
        kind=invoice_pb2.LineKind.Value(due.kind.value),
        period_start=timestamp_from_datetime(due.period.start),
        period_end=timestamp_from_datetime(due.period.end),
        rated_amount=format_amount(due.rated_amount, currency),
        previously_billed=[
            invoice_pb2.BilledLine(
                invoice_id=format_id("inv", billed.invoice_id),
                line_id=format_id("lin", billed.line_id),
                amount=format_amount(billed.amount, currency),
            )
            for billed in due.previously_billed
        ],
        amount=format_amount(due.amount, currency),
        tax_rate=canonical(due.tax_rate),
        snapshots=[
            invoice_pb2.LineSnapshot(
                id=format_id("snp", snapshot.snapshot_id),
                epoch=snapshot.epoch,
                total=canonical(snapshot.total),
                root=snapshot.root.hex(),
            )
            for snapshot in line.snapshots
        ],
    )
    match due.charge:
        case UseCharge(event_type, price, quantity):
            message.event_type = event_type
            message.price.CopyFrom(version_to_proto(price))
            message.quantity = canonical(quantity)
            # Not stored: the pinned price version and the quantity say it, and rating has one meaning.
            if quantity > 0 or price.plan_id is not None:
                message.breakdown.extend(component_to_proto(each) for each in rate(price.price, quantity).components)
        case FeeCharge() as fee:
            message.base_fee.CopyFrom(_fee_to_proto(fee, due.period))
    return message


def _fee_to_proto(fee: FeeCharge, interval: Period) -> invoice_pb2.BaseFee:
    return invoice_pb2.BaseFee(
        subscription_id=format_id("sub", fee.subscription_id),
        plan_id=format_id("pln", fee.plan.plan_id),
        plan_name=fee.plan.name,
        interval=plan_pb2.PlanInterval.Value(fee.plan.interval.value),
        amount=canonical(fee.plan.base_fee),
        seconds=fee.seconds,
        interval_seconds=interval.seconds,
    )


def plan_to_proto(plan: Plan) -> plan_pb2.Plan:
    """A plan with its prices."""
    return plan_pb2.Plan(
        id=format_id("pln", plan.plan_id),
        name=plan.name,
        base_fee=canonical(plan.base_fee),
        currency=plan.currency,
        interval=plan_pb2.PlanInterval.Value(plan.interval.value),
        prices=[
            plan_pb2.PlanPrice(event_type=price.event_type, price=price_to_proto(price.terms)) for price in plan.prices
        ],
        created_at=timestamp_from_datetime(plan.created_at),
    )


def subscription_to_proto(subscription: Subscription, *, now: datetime) -> subscription_pb2.Subscription:
    """A subscription, with the plan that it is on at `now`."""
    return subscription_pb2.Subscription(
        id=format_id("sub", subscription.subscription_id),
        tenant_id=subscription.tenant_id,
        plan_id=format_id("pln", subscription.plan_at(now).plan_id),
        start_at=timestamp_from_datetime(subscription.start),
        end_at=_optional_moment(subscription.end),
        phases=[
            subscription_pb2.SubscriptionPhase(
                start_at=timestamp_from_datetime(phase.start), plan_id=format_id("pln", phase.plan.plan_id)
            )
            for phase in subscription.phases
        ],
        created_at=timestamp_from_datetime(subscription.created_at),
    )


def job_to_proto(job: Job) -> job_pb2.Job:
    """A job; `total` is 0 until its tenants were counted."""
    return job_pb2.Job(
        id=format_id("job", job.job_id),
        state=job_pb2.JobState.Value(job.state.value),
        done=job.done,
        total=job.total or 0,
        problems=job.problems,
    )

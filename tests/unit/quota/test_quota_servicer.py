"""What the quota servicers accept, and how they name what they do not."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from uuid import uuid4

import protovalidate
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from usameter.quota.v1 import admission_pb2, quota_pb2
from usameter_core.errors import FieldViolation, InvalidArgument
from usameter_core.ids import OrgId
from usameter_quota.domain.admission import Outcome, UsageItem
from usameter_quota.domain.limits import EnforcementMode, LimitPeriod
from usameter_quota.servicer.admission import (
    adjustments_from_proto,
    requests_from_proto,
    require_well_formed,
    settlements_from_proto,
)
from usameter_quota.servicer.limits import terms_from_proto

ORG = OrgId(uuid4())


def stamp(moment: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


def request_of(
    quantity: str, moment: datetime | None = datetime(2026, 1, 15, 10, 30, tzinfo=UTC)
) -> list[admission_pb2.UsageRequest]:
    item = admission_pb2.UsageItem(
        tenant_id="t", event_type="e", quantity=quantity, timestamp=stamp(moment) if moment else None
    )
    return [admission_pb2.UsageRequest(), admission_pb2.UsageRequest(items=[item])]


@pytest.mark.parametrize(
    ("moment", "hour"),
    [
        (datetime(2026, 1, 15, 10, tzinfo=UTC), datetime(2026, 1, 15, 10, tzinfo=UTC)),
        (datetime(2026, 1, 15, 10, 59, 59, 999_999, tzinfo=UTC), datetime(2026, 1, 15, 10, tzinfo=UTC)),
        (datetime(1969, 12, 31, 23, 59, tzinfo=UTC), datetime(1969, 12, 31, 23, tzinfo=UTC)),
    ],
)
def test_an_item_counts_in_the_hour_of_its_timestamp(moment: datetime, hour: datetime) -> None:
    assert requests_from_proto(ORG, request_of("1.5", moment)) == [[], [UsageItem("t", "e", hour, Decimal("1.5"))]]


@pytest.mark.parametrize("quantity", ["0.000001", "99999999999999.999999", "1"])
def test_positive_quantities_with_up_to_six_decimals_are_accepted(quantity: str) -> None:
    assert requests_from_proto(ORG, request_of(quantity))[1][0].quantity == Decimal(quantity)


@pytest.mark.parametrize("quantity", ["", "0", "0.0", "-1", "0.0000001", "1e3", "NaN", " 1", "1\n", "1."])
def test_other_quantities_are_refused_by_path(quantity: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        requests_from_proto(ORG, request_of(quantity))
    assert caught.value.violations[0].field == "requests[1].items[0].quantity"


def test_an_item_without_timestamp_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        requests_from_proto(ORG, request_of("1", None))
    assert caught.value.violations[0].field == "requests[1].items[0].timestamp"


def test_a_group_without_requests_is_refused_as_the_contract_has_it() -> None:
    (stated,) = protovalidate.collect_violations(admission_pb2.ReserveRequest())
    with pytest.raises(InvalidArgument) as caught:
        require_well_formed(admission_pb2.ReserveRequest())
    assert caught.value.violations == [FieldViolation("requests", stated.proto.message)]
    require_well_formed(admission_pb2.ReserveRequest(requests=request_of("1")))


def test_settlements_are_gathered_by_organization() -> None:
    first, second, reservation = uuid4(), uuid4(), uuid4()
    settlements = [
        admission_pb2.Settlement(
            org_id=str(org_id), reservation_id=str(reservation), outcome=admission_pb2.OUTCOME_ABORTED
        )
        for org_id in (first, second, first)
    ]
    assert settlements_from_proto(settlements) == {
        first: {reservation: Outcome.ABORTED},
        second: {reservation: Outcome.ABORTED},
    }


def test_two_outcomes_of_one_reservation_in_one_call_are_refused() -> None:
    org_id, reservation = str(uuid4()), str(uuid4())
    settlements = [
        admission_pb2.Settlement(org_id=org_id, reservation_id=reservation, outcome=outcome)
        for outcome in (admission_pb2.OUTCOME_COMMITTED, admission_pb2.OUTCOME_ABORTED)
    ]
    with pytest.raises(InvalidArgument) as caught:
        settlements_from_proto(settlements)
    assert caught.value.violations[0].field == "settlements[1]"


def test_an_adjustment_may_be_negative() -> None:
    org_id, adjustment_id = uuid4(), uuid4()
    message = admission_pb2.Adjustment(
        org_id=str(org_id),
        adjustment_id=str(adjustment_id),
        tenant_id="t",
        event_type="e",
        timestamp=stamp(datetime(2026, 1, 15, 10, 30, tzinfo=UTC)),
        quantity="-1.5",
    )
    (adjustment,) = adjustments_from_proto([message])[org_id]  # type: ignore[index]
    assert adjustment.quantity == Decimal("-1.5")
    assert adjustment.adjustment_id == adjustment_id


def test_an_id_that_is_no_uuid_is_refused_by_path() -> None:
    with pytest.raises(InvalidArgument) as caught:
        settlements_from_proto([admission_pb2.Settlement(org_id="acme")])
    assert caught.value.violations[0].field == "settlements[0].org_id"


def test_warnings_start_at_80_percent_unless_said_otherwise() -> None:
    request = quota_pb2.SetQuotaRequest(
        limit_value="10.5", enforcement_mode=quota_pb2.SOFT, period=quota_pb2.ROLLING_30D
    )
    terms = terms_from_proto(request)
    assert terms.soft_limit_percent == 80
    assert (terms.limit_value, terms.enforcement_mode, terms.period) == (
        Decimal("10.5"),
        EnforcementMode.SOFT,
        LimitPeriod.ROLLING_30D,
    )
    request.soft_limit_percent = 100
    assert terms_from_proto(request).soft_limit_percent == 100

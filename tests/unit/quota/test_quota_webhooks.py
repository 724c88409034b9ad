"""What webhook messages say, how they are signed, when they are sent again, and to which addresses."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from uuid import UUID

import pytest

from usameter_quota.domain.addresses import is_public
from usameter_quota.domain.limits import EnforcementMode, LimitPeriod
from usameter_quota.domain.quota_events import QuotaEvent, QuotaEventType
from usameter_quota.domain.webhooks import (
    ATTEMPTS_MAX,
    DueDelivery,
    WebhookEndpointId,
    message_body,
    message_id,
    pause_after,
    secret_text,
    signed_headers,
)

ENDPOINT_ID = WebhookEndpointId(UUID(int=1))
NOW = datetime(2026, 1, 15, 10, 30, tzinfo=UTC)
EVENT = QuotaEvent(
    position=7,
    type=QuotaEventType.GRACE_STARTED,
    tenant_id="acmé",
    event_type="e",
    occurred_at=NOW + timedelta(microseconds=5),
    limit_value=Decimal("1000"),
    enforcement_mode=EnforcementMode.SOFT,
    period=LimitPeriod.MONTHLY,
    soft_limit_percent=80,
    period_start=datetime(2026, 1, 1, tzinfo=UTC),
    period_end=datetime(2026, 2, 1, tzinfo=UTC),
    stored=Decimal("1000.50"),
    grace_ends_at=NOW + timedelta(days=1),
)


def test_a_signature_is_that_of_the_reference_implementation() -> None:
    """What `standardwebhooks` 1.1.0 (Python) says of the secret, id, time and body of its own tests."""
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed_headers(
        b'{"test": 2432232314}',
        message_id="msg_p5jXN8AQM9LWM0D4loKWxJek",
        secrets=[secret],
        sent_at=datetime.fromtimestamp(1614265330.9, UTC),
    )
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    assert secret_text(secret) == "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_a_message_says_what_the_quota_event_says() -> None:
    body = json.loads(message_body(EVENT))
    assert (body["type"], body["timestamp"]) == ("quota.grace_started", "2026-01-15T10:30:00.000005Z")
    assert body["data"] == {
        "position": 7,
        "type": "GRACE_STARTED",
        "tenant_id": "acmé",
        "event_type": "e",
        "occurred_at": "2026-01-15T10:30:00.000005Z",
        "limit_value": "1000",
        "enforcement_mode": "SOFT",
        "period": "MONTHLY",
        "soft_limit_percent": 80,
        "period_start": "2026-01-01T00:00:00Z",
        "period_end": "2026-02-01T00:00:00Z",
        "stored": "1000.5",
        "grace_ends_at": "2026-01-16T10:30:00Z",
    }


def test_an_id_is_of_one_message_and_cannot_be_split() -> None:
    assert message_id(ENDPOINT_ID, 12) == "msg_00000000000000000000000000000001_12"
    assert message_id(ENDPOINT_ID, 12) != message_id(WebhookEndpointId(UUID(int=2)), 12)


def test_pauses_grow_to_a_day_in_all_and_end() -> None:
    shortest = [pause_after(attempts, jitter=0) for attempts in range(1, ATTEMPTS_MAX)]
    longest = [pause_after(attempts, jitter=1) for attempts in range(1, ATTEMPTS_MAX)]
    assert shortest[0] == timedelta(seconds=7.5) and longest[0] == timedelta(seconds=12.5)
    assert all(later == 3 * earlier for earlier, later in pairwise(shortest) if later)
    total = [sum((pause for pause in pauses if pause), timedelta()) for pauses in (shortest, longest)]
    assert timedelta(hours=20) < total[0] < timedelta(hours=24) < total[1] < timedelta(hours=35)
    assert pause_after(ATTEMPTS_MAX, jitter=0) is None


def test_a_secret_is_not_printed_with_what_it_signs() -> None:
    due = DueDelivery(UUID(int=3), ENDPOINT_ID, "https://h/", (b"the-secret",), 0, EVENT)  # type: ignore[arg-type]
    assert "the-secret" not in repr(due)


@pytest.mark.parametrize("address", ["1.1.1.1", "203.0.114.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1"),
        *("169.254.169.254", "100.64.0.1", "192.0.0.8", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1"),
        *("240.0.0.1", "255.255.255.255", "168.63.129.16", "192.0.0.192"),
        *("::", "::1", "fe80::1", "fe80::1%1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "ff0e::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1"),
        *("64:ff9b:1::a00:1", "2001:db8::1", "2002:7f00:1::1", "2001:0:7f00:1::1", "100::1"),
    ],
)
def test_an_address_of_a_network_of_its_own_is_not_public(address: str) -> None:
    assert not is_public(address)

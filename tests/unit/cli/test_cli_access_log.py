"""Combined access logs as usage."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec
import pytest

from usameter_cli.errors import UsageError
from usameter_cli.importing.access_log import (
    DEFAULT_METRICS,
    Mapping,
    PerByte,
    PerRequest,
    TenantField,
    is_combined,
    metric_from_text,
    read_access_log,
)
from usameter_cli.importing.records import Record

LINE = (
    "192.0.2.7 - alice [17/May/2015:10:05:03 +0000] "
    '"GET /a/b?token=secret HTTP/1.1" 200 203023 "http://x/" "Mozilla/5.0"'
)


def mapping(*metrics: str, tenant_from: TenantField = TenantField.REMOTE_ADDR) -> Mapping:
    return Mapping("access.log", tenant_from, [metric_from_text(text) for text in metrics or DEFAULT_METRICS])


def read(text: str, how: Mapping | None = None) -> list[Record]:
    return list(read_access_log(text.encode().splitlines(keepends=True), how or mapping()))


def events(text: str, how: Mapping | None = None) -> list[dict[str, Any]]:
    return [msgspec.json.decode(event) for record in read(text, how) for event in record.events]


def fault(text: str, how: Mapping | None = None) -> str:
    (record,) = read(f"{text}\n", how)
    assert record.events == ()
    assert record.fault is not None
    return record.fault


def test_a_line_is_a_request_and_its_megabytes() -> None:
    shared = {
        "tenant_id": "192.0.2.7",
        "timestamp": "2015-05-17T10:05:03Z",
        "metadata": {"method": "GET", "path": "/a/b", "status": 200},
    }
    assert events(LINE) == [
        {"event_type": "api_request", "quantity": 1, "idempotency_key": "access.log:1:api_request", **shared},
        {
            "event_type": "egress_mb",
            "quantity_decimal": "0.203023",
            "idempotency_key": "access.log:1:egress_mb",
            **shared,
        },
    ]


def test_the_query_is_not_kept() -> None:
    assert b"secret" not in read(LINE)[0].events[0]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("1", {"quantity_decimal": "0.000001"}),
        ("999999", {"quantity_decimal": "0.999999"}),
        ("1000000", {"quantity": 1}),
        ("1500000", {"quantity_decimal": "1.5"}),
        ("12345678901234567", {"quantity_decimal": "12345678901.234567"}),
    ],
)
def test_megabytes_are_exact_to_the_byte(size: str, expected: dict[str, Any]) -> None:
    egress = events(LINE.replace("203023", size))[1]
    assert {name: egress[name] for name in egress if name.startswith("quantity")} == expected


@pytest.mark.parametrize("size", ["-", "0"])
def test_a_line_without_bytes_has_no_egress(size: str) -> None:
    assert [event["event_type"] for event in events(LINE.replace("203023", size))] == ["api_request"]


def test_equal_lines_are_different_events_and_blank_lines_keep_their_number() -> None:
    keys = [event["idempotency_key"] for event in events(f"{LINE}\n\n{LINE}\n", mapping("hit=1"))]
    assert keys == ["access.log:1:hit", "access.log:3:hit"]


def test_a_grown_log_keeps_the_keys_of_its_first_lines() -> None:
    assert events(f"{LINE}\n{LINE}\n")[:2] == events(f"{LINE}\n")


@pytest.mark.parametrize(
    ("local", "utc"),
    [
        # Central Europe put its clocks forward on 29 March 2015 and back on 25 October.
        ("29/Mar/2015:01:59:59 +0100", "2015-03-29T00:59:59Z"),
        ("29/Mar/2015:03:00:00 +0200", "2015-03-29T01:00:00Z"),
        ("25/Oct/2015:02:30:00 +0200", "2015-10-25T00:30:00Z"),
        ("25/Oct/2015:02:30:00 +0100", "2015-10-25T01:30:00Z"),
        ("31/Dec/2015:20:00:00 -0530", "2016-01-01T01:30:00Z"),
    ],
)
def test_local_times_become_utc_by_their_own_offset(local: str, utc: str) -> None:
    assert events(LINE.replace("17/May/2015:10:05:03 +0000", local))[0]["timestamp"] == utc


@pytest.mark.parametrize("time", ["17/Mai/2015:10:05:03 +0000", "31/Feb/2015:10:05:03 +0000", "2015-05-17T10:05:03Z"])
def test_a_time_that_does_not_exist_is_a_fault(time: str) -> None:
    assert time in fault(LINE.replace("17/May/2015:10:05:03 +0000", time))


@pytest.mark.parametrize(
    "agent",
    [
        '"Mozilla \\"quoted\\" agent"',
        '"Mozilla "unescaped" agent"',
        '"Mozilla, cut off by the ser',
        '""',
        '"\\""',
    ],
)
def test_the_user_agent_may_hold_anything(agent: str) -> None:
    assert len(events(LINE.replace('"Mozilla/5.0"', agent))) == 2


def test_a_request_cannot_pretend_to_be_the_rest_of_its_line() -> None:
    forged = LINE.replace("GET /a/b?token=secret HTTP/1.1", 'GET /\\" 200 9 \\"-\\" \\"-\\" HTTP/1.1')
    assert events(forged)[1]["quantity_decimal"] == "0.203023"


@pytest.mark.parametrize("request_line", ["-", "\\x16\\x03\\x01", ""])
def test_a_request_that_is_no_http_still_counts(request_line: str) -> None:
    event = events(LINE.replace("GET /a/b?token=secret HTTP/1.1", request_line))[0]
    assert event["metadata"] == {"status": 200}


def test_an_ipv6_address_is_a_tenant() -> None:
    assert events(LINE.replace("192.0.2.7", "2001:db8::1"))[0]["tenant_id"] == "2001:db8::1"


def test_the_user_can_be_the_tenant_also_with_spaces() -> None:
    by_user = mapping("hit=1", tenant_from=TenantField.REMOTE_USER)
    assert events(LINE, by_user)[0]["tenant_id"] == "alice"
    assert events(LINE.replace("alice", "alice b"), by_user)[0]["tenant_id"] == "alice b"
    assert fault(LINE.replace("alice", "-"), by_user) == "has no remote_user"


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        LINE.partition(' "http')[0],  # the common format, without referrer and agent
        LINE.replace("200 203023", "200 many"),
        "\x00\x00\x00",
    ],
)
def test_a_line_of_another_format_is_a_fault(line: str) -> None:
    assert not is_combined(line.encode())
    assert fault(line) == "has not the combined log format"


def test_bytes_that_are_not_utf8_are_a_fault() -> None:
    (record,) = read_access_log([LINE.encode().replace(b"/a/b", b"/\xff") + b"\n"], mapping())
    assert (record.events, record.fault) == ((), "is not UTF-8")


def test_a_long_path_is_cut() -> None:
    assert len(events(LINE.replace("/a/b", "/" + "a" * 9_000))[0]["metadata"]["path"]) == 500


def test_metrics_are_read() -> None:
    assert metric_from_text("hit=1") == PerRequest("hit", (1, None))
    assert metric_from_text("hit=0.50") == PerRequest("hit", (None, "0.5"))
    assert metric_from_text("egress_bytes=bytes") == PerByte("egress_bytes", 1)
    assert metric_from_text("egress_kb=bytes/1000") == PerByte("egress_kb", 1_000)


@pytest.mark.parametrize(
    "text",
    [
        "hit",
        "=1",
        "a b=1",
        "hit=",
        "hit=0",
        "hit=-1",
        "hit=x",
        "e=bytes/",
        "e=bytes/0",
        "e=bytes/1024",
        "e=bytes/2000000",
    ],
)
def test_a_metric_that_is_none_or_would_not_be_exact_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--metric"):
        metric_from_text(text)


def test_sums_over_many_lines_are_exact() -> None:
    sizes = range(1, 2_000)
    text = "\n".join(LINE.replace("203023", str(size)) for size in sizes)
    total = sum(Decimal(each.get("quantity_decimal", each.get("quantity"))) for each in events(text)[1::2])
    assert total == Decimal(sum(sizes)) / 1_000_000

"""Identifiers: in the order they were made, and of the form that RFC 9562 gives a UUIDv7."""

from __future__ import annotations

import time
from uuid import RFC_4122

import pytest

from usameter_core.ids import new_uuid

# 2026-03-10T12:00:00Z, in nanoseconds.
NOON = 1_773_144_000_000_000_000


def test_ids_made_within_a_millisecond_are_in_the_order_they_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = [NOON + step * 250 for step in range(4_000)]
    source = iter(moments)
    monkeypatch.setattr(time, "time_ns", lambda: next(source))
    made = [new_uuid() for _ in moments]
    assert made == sorted(made) and len(set(made)) == len(moments)


def test_an_id_says_its_version_and_its_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    for nanoseconds in (0, 1, 999_999):
        monkeypatch.setattr(time, "time_ns", lambda at=NOON + nanoseconds: at)
        made = new_uuid()
        assert (made.version, made.variant) == (7, RFC_4122)
        assert made.int >> 80 == NOON // 1_000_000
        assert made.int >> 64 & 0xFFF == nanoseconds * 4096 // 1_000_000


def test_ids_of_one_moment_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: NOON)
    assert len({new_uuid() for _ in range(1_000)}) == 1_000

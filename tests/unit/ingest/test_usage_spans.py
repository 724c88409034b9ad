"""How a span of time is split: into whole days, whole hours, and what is left."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usameter_core.period import Period
from usameter_ingest.store.usage import split_span

moments = st.datetimes(timezones=st.just(UTC))
near = st.builds(
    lambda hours, seconds: datetime(2026, 3, 1, tzinfo=UTC) + timedelta(hours=hours, seconds=seconds),
    st.integers(-60, 60),
    st.sampled_from((0, 0, 0, 1, 3_599)),
)


@given(
    bounds=st.one_of(st.tuples(moments, moments), st.tuples(near, near)).filter(lambda pair: pair[0] != pair[1]),
    by_day=st.booleans(),
)
def test_the_pieces_tile_the_span_and_are_few(bounds: tuple[datetime, datetime], by_day: bool) -> None:
    span = Period(min(bounds), max(bounds))
    split = split_span(span, by_day=by_day)
    pieces = sorted([*split.days, *split.hours, *split.moments], key=lambda piece: piece.start)
    assert [piece.start for piece in pieces] == [span.start, *(piece.end for piece in pieces[:-1])]
    assert pieces[-1].end == span.end
    assert all(piece.start < piece.end for piece in pieces)
    assert len(split.days) <= by_day
    assert len(split.hours) <= 2
    assert len(split.moments) <= 2
    for piece in split.days:
        assert all(bound.time() == datetime.min.time() for bound in (piece.start, piece.end))
    for piece in split.hours:
        assert piece.end - piece.start < timedelta(days=1) or not by_day or not split.days
        assert all((bound.minute, bound.second, bound.microsecond) == (0, 0, 0) for bound in (piece.start, piece.end))
    for piece in split.moments:
        assert piece.end - piece.start < timedelta(hours=2)


@pytest.mark.parametrize(
    ("start", "end", "days", "hours", "moments"),
    [
        ("2026-03-01T00:00", "2026-04-01T00:00", 1, 0, 0),
        ("2026-03-01T00:00", "2026-03-01T23:00", 0, 1, 0),
        ("2026-03-01T01:00", "2026-03-02T23:00", 0, 1, 0),
        ("2026-03-01T23:00", "2026-03-03T01:00", 1, 2, 0),
        ("2026-03-01T22:30", "2026-03-03T01:30", 1, 2, 2),
        ("2026-03-01T00:10", "2026-03-01T00:50", 0, 0, 1),
        ("2026-03-01T00:10", "2026-03-01T01:50", 0, 0, 1),
        ("2026-03-01T00:10", "2026-03-01T02:50", 0, 1, 2),
        ("9999-12-31T00:10", "9999-12-31T23:50", 0, 1, 2),
    ],
)
def test_a_piece_is_as_long_as_it_can_be(start: str, end: str, days: int, hours: int, moments: int) -> None:
    span = Period(datetime.fromisoformat(f"{start}Z"), datetime.fromisoformat(f"{end}Z"))
    split = split_span(span, by_day=True)
    assert (len(split.days), len(split.hours), len(split.moments)) == (days, hours, moments)


def test_days_are_those_of_utc() -> None:
    zone = timezone(timedelta(hours=2))
    span = Period(datetime(2026, 3, 1, tzinfo=zone), datetime(2026, 3, 3, tzinfo=zone))
    split = split_span(span, by_day=True)
    assert split.days == [Period(datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 3, 2, tzinfo=UTC))]
    assert [piece.end - piece.start for piece in split.hours] == [timedelta(hours=2), timedelta(hours=22)]

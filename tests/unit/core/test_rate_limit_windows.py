"""Sliding windows in memory, with time as an argument: what is never exceeded, and how much is refused early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usameter_core.ratelimit.policy import RateLimit, RatePolicy
from usameter_core.ratelimit.windows import PARTS, Counts, Decision, count_requests

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US


@dataclass
class Client:
    """Sends requests, and remembers when which were admitted."""

    limits: Sequence[RateLimit]
    counts: Counts = field(default_factory=dict)
    admitted_at_us: list[int] = field(default_factory=list)

    def send(self, now_us: int, requests: int = 1) -> Decision:
        decision = count_requests(self.counts, self.limits, requests, now_us=now_us)
        self.admitted_at_us += [now_us] * decision.admitted
        return decision

    def used(self, window_us: int, now_us: int) -> int:
        return sum(now_us - window_us < at <= now_us for at in self.admitted_at_us)


def per_minute(requests: int) -> tuple[RateLimit, ...]:
    return RatePolicy(requests_per_minute=requests).limits


# Steps from far below a part of the window to beyond the window.
STEPS_US = st.one_of(st.integers(0, 50_000), st.integers(0, 3 * SECOND_US), st.integers(0, 2 * MINUTE_US))


@given(
    policy=st.builds(
        RatePolicy,
        requests_per_second=st.none() | st.integers(1, 5),
        requests_per_minute=st.none() | st.integers(1, 20),
        requests_per_hour=st.none() | st.integers(1, 60),
    ),
    start_us=st.integers(0, 10**16),
    sends=st.lists(st.tuples(STEPS_US, st.integers(1, 8)), max_size=60),
)
def test_no_span_of_a_window_ever_holds_more_than_its_limit(
    policy: RatePolicy, start_us: int, sends: list[tuple[int, int]]
) -> None:
    client, now_us = Client(policy.limits), start_us
    for step_us, requests in sends:
        now_us += step_us
        decision = client.send(now_us, requests)
        for window in decision.windows:
            # The span that ends with an admitted request is the fullest one that it is in.
            assert client.used(window.limit.window_us, now_us) <= window.limit.requests
            assert 0 <= window.remaining <= window.limit.requests
            assert window.frees_at_us <= now_us + window.limit.window_us
        if decision.admitted < requests:
            # Not for nothing: with spans longer by a part, some limit is used up.
            assert any(
                client.used(limit.window_us + limit.window_us // PARTS, now_us) >= limit.requests
                for limit in policy.limits
            )
            # And all of what still fitted was admitted.
            assert any(window.remaining == 0 for window in decision.windows)


@given(
    requests=st.integers(1, 5),
    steps_us=st.lists(STEPS_US, min_size=1, max_size=40),
)
def test_a_refused_request_fits_at_the_moment_that_it_was_told_and_not_before(
    requests: int, steps_us: list[int]
) -> None:
    client, now_us = Client(RatePolicy(requests_per_second=requests, requests_per_minute=3 * requests).limits), 0
    for step_us in steps_us:
        now_us += step_us
        decision = client.send(now_us)
        if decision.admitted == 0:
            fits_at_us = max(window.frees_at_us for window in decision.windows if window.remaining == 0)
            assert fits_at_us > now_us
            assert client.send(fits_at_us - 1).admitted == 0
            assert client.send(fits_at_us).admitted == 1
            now_us = fits_at_us


def test_a_uniform_client_of_a_hundred_a_minute_gets_them_all_but_those_of_the_last_part() -> None:
    client = Client(per_minute(100))
    # Exactly the limit's rate, for ten minutes: a request each 600 ms.
    for number in range(1_000):
        client.send(number * 600_000)
    assert len(client.admitted_at_us) >= 1_000 * PARTS / (PARTS + 1)
    assert all(client.used(MINUTE_US, now_us) <= 100 for now_us in client.admitted_at_us)


def test_a_bursty_client_of_a_hundred_a_minute_gets_a_hundred_and_no_more_across_the_full_minute() -> None:
    client = Client(per_minute(100))
    # The classic failure of fixed windows: a burst at the end of one minute, another at the start of the next.
    assert client.send(59 * SECOND_US, 150).admitted == 100
    assert client.send(61 * SECOND_US, 150).admitted == 0
    assert client.send(59 * SECOND_US + MINUTE_US - 1, 150).admitted == 0
    assert client.send(59 * SECOND_US + MINUTE_US, 150).admitted == 100


def test_a_client_slower_than_a_part_is_refused_exactly() -> None:
    client = Client(RatePolicy(requests_per_hour=3).limits)
    hour_us, part_us = 60 * MINUTE_US, 60 * MINUTE_US // PARTS
    for number in range(3):
        assert client.send(number * part_us).admitted == 1
    for number in range(3):
        assert client.send(hour_us + number * part_us - 1).admitted == 0
        assert client.send(hour_us + number * part_us).admitted == 1


def test_a_refused_request_uses_up_nothing_in_any_window() -> None:
    client = Client(RatePolicy(requests_per_second=2, requests_per_minute=5).limits)
    assert client.send(0, 10).admitted == 2
    for _ in range(1_000):
        assert client.send(SECOND_US // 2).admitted == 0
    second, minute = client.send(SECOND_US).windows
    assert (second.remaining, minute.remaining) == (1, 2)


def test_the_requests_of_one_decision_are_admitted_as_far_as_they_fit() -> None:
    client = Client(RatePolicy(requests_per_second=10, requests_per_minute=4).limits)
    decision = client.send(0, 256)
    assert decision.admitted == 4
    assert [window.remaining for window in decision.windows] == [6, 0]


def test_a_lowered_limit_counts_what_was_used_and_frees_when_less_than_it_is_left() -> None:
    client = Client(per_minute(10))
    for at_us in (0, 20 * SECOND_US, 40 * SECOND_US):
        assert client.send(at_us, 3).admitted == 3
    client.limits = per_minute(4)
    (window,) = client.send(50 * SECOND_US).windows
    # Of 9, the 3 of the first second and the 3 of the twentieth must go before a fourth fits.
    assert (window.remaining, window.frees_at_us) == (0, 80 * SECOND_US)
    client.limits = per_minute(20)
    assert client.send(50 * SECOND_US, 20).admitted == 11


@given(st.lists(st.integers(0, 2 * MINUTE_US), max_size=400))
def test_counts_are_bounded_however_many_requests_come(moments_us: list[int]) -> None:
    client = Client(per_minute(10**9))
    for now_us in sorted(moments_us):
        client.send(now_us)
    assert all(len(counts) <= 2 * (PARTS + 1) for counts in client.counts.values())
    assert all(earlier < later for counts in client.counts.values() for earlier, later in pairwise(counts[::2]))


def test_a_clock_that_is_set_back_admits_nothing_too_early() -> None:
    client = Client(per_minute(2))
    client.send(10 * MINUTE_US, 2)
    assert client.send(9 * MINUTE_US).admitted == 0
    assert client.send(11 * MINUTE_US - 1).admitted == 0
    assert client.send(11 * MINUTE_US).admitted == 1


@pytest.mark.parametrize("window", [limit.window for limit in RatePolicy(1, 1, 1).limits])
def test_parts_are_whole_microseconds(window: timedelta) -> None:
    # Else the script, which has doubles, and this module would cut time at different places.
    assert (window // timedelta(microseconds=1)) % PARTS == 0

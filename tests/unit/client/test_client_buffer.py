"""The buffer's bound, and when a batch is due."""

from __future__ import annotations

import time

import pytest

from usameter_client import Options, RecorderClosed
from usameter_client.buffer import BATCH_BYTES_MAX, Buffer

NEVER = float("-inf")


class Told:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


def buffer_of(events_max: int, batch_events_max: int, told: Told | None = None) -> Buffer:
    return Buffer(events_max=events_max, batch_events_max=batch_events_max, on_ready=told or Told())


def test_events_under_way_take_room_until_they_are_settled() -> None:
    buffer = buffer_of(2, 2)
    assert buffer.put(b"a") and buffer.put(b"b")
    assert not buffer.put(b"c")
    batch = buffer.take(recorded_before=NEVER, through=0)
    assert not buffer.put(b"c")
    buffer.settle(batch[:1])
    assert buffer.put(b"c")
    assert not buffer.put(b"d")


def test_a_batch_is_due_when_it_is_full_or_old_or_asked_for() -> None:
    buffer = buffer_of(10, 2)
    buffer.put(b"a")
    assert not buffer.take(recorded_before=NEVER, through=0)
    buffer.put(b"b")
    buffer.put(b"c")
    assert [each.body for each in buffer.take(recorded_before=NEVER, through=0)] == [b"a", b"b"]
    assert not buffer.take(recorded_before=NEVER, through=2)
    assert [each.body for each in buffer.take(recorded_before=NEVER, through=3)] == [b"c"]
    buffer.put(b"d")
    assert [each.body for each in buffer.take(recorded_before=time.monotonic(), through=0)] == [b"d"]


def test_a_batch_stays_below_its_bytes() -> None:
    buffer = buffer_of(10, 10)
    half = b"x" * (BATCH_BYTES_MAX // 2)
    for _ in range(3):
        buffer.put(half)
    assert len(buffer.take(recorded_before=NEVER, through=0)) == 2
    assert not buffer.take(recorded_before=NEVER, through=0)


def test_the_sender_is_told_of_the_first_event_and_of_a_full_batch_only() -> None:
    told = Told()
    buffer = buffer_of(10, 3, told)
    counts = []
    for _ in range(5):
        buffer.put(b"a")
        counts.append(told.times)
    assert counts == [1, 1, 2, 2, 2]


def test_the_oldest_event_is_under_way_before_it_waits() -> None:
    buffer = buffer_of(10, 2)
    assert buffer.oldest() is None
    for body in (b"a", b"b", b"c"):
        buffer.put(body)
    batch = buffer.take(recorded_before=NEVER, through=0)
    buffer.settle([batch[0]])
    oldest = buffer.oldest()
    assert oldest is not None and oldest.body == b"b"
    assert buffer.unsettled() == [b"b", b"c"]


def test_a_closed_buffer_takes_nothing_and_says_the_first_reason() -> None:
    buffer = buffer_of(10, 2)
    buffer.put(b"a")
    buffer.close(RecorderClosed("first"))
    buffer.close(RecorderClosed("second"))
    with pytest.raises(RecorderClosed, match="first"):
        buffer.put(b"b")
    assert len(buffer.unsettled()) == 1


@pytest.mark.parametrize("batch_events_max", [0, 1_001])
def test_a_batch_has_1_to_1000_events(batch_events_max: int) -> None:
    with pytest.raises(ValueError, match="batch_events_max"):
        Options(batch_events_max=batch_events_max)
    assert Options(batch_events_max=1) and Options(batch_events_max=1_000)


def test_a_buffer_holds_at_least_one_batch() -> None:
    assert Options(events_max=5, batch_events_max=5)
    with pytest.raises(ValueError, match="events_max"):
        Options(events_max=4, batch_events_max=5)

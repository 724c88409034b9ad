"""Pages of lists: where they end."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from usameter_core.errors import InvalidArgument
from usameter_core.grpc.pages import PAGE_BYTES_MAX, fill_page
from usameter_core.pages import decode_page_token, encode_page_token


def sizes(rows: list[int], limit: int) -> tuple[list[int], bool]:
    items, goes_on = fill_page(rows, limit=limit, to_proto=lambda size: BytesValue(value=bytes(size)))
    return [len(item.value) for item in items], goes_on


def test_a_page_ends_at_its_limit() -> None:
    assert sizes([], 2) == ([], False)
    assert sizes([1, 2], 2) == ([1, 2], False)
    assert sizes([1, 2, 3], 2) == ([1, 2], True)


def test_a_page_ends_before_it_grows_too_large() -> None:
    # What a BytesValue of this size has beside its value.
    third = PAGE_BYTES_MAX // 3 - 5
    assert sizes([third] * 3, 9) == ([third] * 3, False)
    assert sizes([third] * 4, 9) == ([third] * 3, True)
    assert sizes([third, third, third + 20], 9) == ([third, third], True)


def test_a_page_has_at_least_one_item() -> None:
    assert sizes([PAGE_BYTES_MAX + 1, 1], 9) == ([PAGE_BYTES_MAX + 1], True)
    assert sizes([PAGE_BYTES_MAX + 1], 9) == ([PAGE_BYTES_MAX + 1], False)


@dataclass(frozen=True, slots=True)
class Place:
    epoch: int
    moment: datetime


def test_a_token_brings_back_the_key_that_it_was_made_of() -> None:
    key = (2**53, "é", Place(-(2**53), datetime(1, 1, 1, tzinfo=UTC)))
    assert decode_page_token(encode_page_token(key), tuple[int, str, Place]) == key
    assert decode_page_token("", tuple[int]) is None


@pytest.mark.parametrize("epoch", [2**53 + 1, -(2**53) - 1, 2**63, 10**40])
def test_no_integer_beyond_ours_comes_out_of_a_token(epoch: int) -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    for key, shape in (((epoch,), tuple[int]), ((Place(epoch, moment),), tuple[Place])):
        with pytest.raises(InvalidArgument):
            decode_page_token(encode_page_token(key), shape)


@pytest.mark.parametrize("moment", ["2026-01-01T00:00:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-01:00"])
def test_no_moment_without_a_place_in_utc_comes_out_of_a_token(moment: str) -> None:
    with pytest.raises(InvalidArgument):
        decode_page_token(encode_page_token([moment]), tuple[datetime])


def test_no_text_that_postgresql_cannot_hold_comes_out_of_a_token() -> None:
    with pytest.raises(InvalidArgument):
        decode_page_token(encode_page_token(["a\0b"]), tuple[str])

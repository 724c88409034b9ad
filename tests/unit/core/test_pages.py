"""Pages of lists: where they end."""

from __future__ import annotations

from google.protobuf.wrappers_pb2 import BytesValue

from usameter_core.grpc.pages import PAGE_BYTES_MAX, fill_page


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

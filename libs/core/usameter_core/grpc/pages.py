"""Pages of messages of any size: a page ends before it grows too large to be sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from google.protobuf.message import Message

Row = TypeVar("Row")
Item = TypeVar("Item", bound=Message)

# gRPC clients take answers of 4 MiB unless they are told otherwise, and one item has at most some 0.1 MiB.
PAGE_BYTES_MAX = 3 * 1024 * 1024


def fill_page(rows: Sequence[Row], *, limit: int, to_proto: Callable[[Row], Item]) -> tuple[list[Item], bool]:
    """The messages of the first rows, at most `limit`, and at least one where there is a row.

    Args:
        rows: One more than the page may hold, where there are so many.
        limit: The most that the caller wants.
        to_proto: A row's message.

    Returns:
        The messages, and whether there are rows behind theirs.
    """
    items: list[Item] = []
    size = 0
    for row in rows[:limit]:
        item = to_proto(row)
        size += item.ByteSize()
        if items and size > PAGE_BYTES_MAX:
            break
        items.append(item)
    return items, len(items) < len(rows)

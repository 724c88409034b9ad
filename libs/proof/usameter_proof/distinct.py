"""Ids that come more than once, or are lacking, among more of them than objects would fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

from usameter_core.decimals import CONTEXT

_ID_BYTES = 16
# Exact in millionths: a quantity of 24 digits and six places is below 10**30 of them, and that below 2**103.
_QUANTITY_BYTES = 13
_RECORD_BYTES = _ID_BYTES + _QUANTITY_BYTES


class DistinctIds:
    """Remembers ids of 16 bytes and the quantity of each, in 29 bytes: what comes twice is found at the end."""

    def __init__(self) -> None:
        # By last byte, which is as good as random in every kind of id: each part is then looked at by itself.
        self._parts = [bytearray() for _ in range(256)]

    def add(self, each: bytes, quantity: Decimal) -> None:
        """Remember one; its quantity has up to 24 digits and six places."""
        self._parts[each[-1]] += each + int(CONTEXT.scaleb(quantity, 6)).to_bytes(_QUANTITY_BYTES, "big", signed=True)

    def repeated(self) -> Iterator[bytes]:
        """Those that came before, once for each time."""
        for part in self._parts:
            seen: set[bytes] = set()
            for each, _ in _records_of(part):
                if each in seen:
                    yield each
                seen.add(each)

    def lacking(self, others: DistinctIds) -> Iterator[bytes]:
        """Those of `others` that never came here."""
        for ours, theirs in zip(self._parts, others._parts, strict=True):
            known = {each for each, _ in _records_of(ours)}
            yield from (each for each, _ in _records_of(theirs) if each not in known)

    def matched(self, others: DistinctIds) -> Iterator[tuple[bytes, Decimal, Decimal]]:
        """Those of `others` that came here as well, with the quantity here and the one there."""
        for ours, theirs in zip(self._parts, others._parts, strict=True):
            if not theirs:
                continue
            known = dict(_records_of(ours))
            for each, quantity in _records_of(theirs):
                if each in known:
                    yield each, _quantity(known[each]), _quantity(quantity)


def _records_of(part: bytearray) -> Iterator[tuple[bytes, bytes]]:
    for start in range(0, len(part), _RECORD_BYTES):
        middle = start + _ID_BYTES
        yield bytes(part[start:middle]), bytes(part[middle : start + _RECORD_BYTES])


def _quantity(packed: bytes) -> Decimal:
    return CONTEXT.scaleb(Decimal(int.from_bytes(packed, "big", signed=True)), -6)

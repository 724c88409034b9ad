"""Ids that come more than once, or are lacking, among more of them than objects would fit into memory."""

from __future__ import annotations

from collections.abc import Iterator

_ID_BYTES = 16


class DistinctIds:
    """Remembers ids of 16 bytes, in 16 bytes each: an id that comes twice is found at the end."""

    def __init__(self) -> None:
        # By last byte, which is as good as random in every kind of id: each part is then looked at by itself.
        self._parts = [bytearray() for _ in range(256)]

    def add(self, each: bytes) -> None:
        """Remember one."""
        self._parts[each[-1]] += each

    def repeated(self) -> Iterator[bytes]:
        """Those that came before, once for each time."""
        for part in self._parts:
            seen: set[bytes] = set()
            for each in _ids_of(part):
                if each in seen:
                    yield each
                seen.add(each)

    def lacking(self, others: DistinctIds) -> Iterator[bytes]:
        """Those of `others` that never came here."""
        for ours, theirs in zip(self._parts, others._parts, strict=True):
            known = set(_ids_of(ours))
            yield from (each for each in _ids_of(theirs) if each not in known)


def _ids_of(part: bytearray) -> Iterator[bytes]:
    for start in range(0, len(part), _ID_BYTES):
        yield bytes(part[start : start + _ID_BYTES])

"""What is wrong with a request, and where in it."""

from __future__ import annotations

from typing import NamedTuple, Self

# Enough to repair a request by; a batch of 1,000 misspelt events needs no 1,000 lines.
VIOLATIONS_MAX = 20

_NAME_CHARACTERS_MAX = 100


class Violation(NamedTuple):
    """What is wrong with one field; `field` is a path such as "events[3].quantity"."""

    field: str
    description: str


class Refused(Exception):
    """A value that its field does not take; false while it holds no violation.

    Paths are relative to the value, and whoever holds the value adds its place: so nobody builds
    a path on the way of a good request.
    """

    def __init__(self) -> None:
        super().__init__()
        self.violations: list[Violation] = []

    @classmethod
    def because(cls, description: str) -> Self:
        """The value itself is wrong."""
        refused = cls()
        refused.violations.append(Violation("", description))
        return refused

    def add(self, place: str | int, inner: Refused) -> None:
        """Take over what is wrong inside the value at `place`: a field's name or an index."""
        prefix = f"[{place}]" if isinstance(place, int) else _printable(place)
        for path, description in inner.violations:
            separator = "." if path and path[0] != "[" else ""
            self.violations.append(Violation(f"{prefix}{separator}{path}", description))

    @property
    def is_full(self) -> bool:
        """Whether there are as many violations as are ever told."""
        return len(self.violations) >= VIOLATIONS_MAX

    def __bool__(self) -> bool:
        return bool(self.violations)


def _printable(name: str) -> str:
    # The name is the client's: it may hold what no protobuf string holds, and be megabytes long.
    return name[:_NAME_CHARACTERS_MAX].encode("utf-8", "backslashreplace").decode()

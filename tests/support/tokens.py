"""Page tokens that nobody was given."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["int", "str", "date", "datetime", "uuid", "bool"]

_HARMLESS: dict[Part, Any] = {
    "int": 1,
    "str": "a",
    "date": "2026-01-10",
    "datetime": "2026-01-10T00:00:00Z",
    "uuid": "0" * 32,
    "bool": False,
}
# No list can have had these in a row.
_IMPOSSIBLE: dict[Part, list[Any]] = {
    "int": [2**63, 2**63 - 1, -(2**63) - 1, 10**30, 1e300, 0.5, "1", None],
    "str": ["\0", "a\0b", "\ud800", 1, None],
    "date": ["2026-02-30", "10000-01-01", "x"],
    "datetime": ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-01-10T00:00:00", "x", 1],
    "uuid": ["x", 1],
    "bool": [2, "x"],
}
# Odd, and for all that one can see what some list had.
_EXTREME: dict[Part, list[Any]] = {
    "int": [2**53, 0, -1, -(2**53)],
    "str": ["", "\uffff", "x" * 5_000],
    "date": ["0001-01-01", "9999-12-31"],
    "datetime": ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"],
    "uuid": ["f" * 32],
    "bool": [True],
}


@dataclass(frozen=True, slots=True)
class KeyShape:
    """What a list's tokens hold: its parts, and how they are put together."""

    parts: Sequence[Part]
    put: Callable[..., Any] = lambda *values: values

    def impossible_tokens(self) -> Iterator[str]:
        """Keys of the shape but for one part, and what is no key at all."""
        yield from self._tokens(_IMPOSSIBLE)
        for text in ("{}", "[]", "1", "[" * 5_000, '"', json.dumps([*self._key(), 1])):
            yield _encode(text)
        yield from ("!", "é", "a")

    def extreme_tokens(self) -> Iterator[str]:
        """Keys of the shape at the ends of what they may be."""
        yield from self._tokens(_EXTREME)

    def _tokens(self, values: dict[Part, list[Any]]) -> Iterator[str]:
        for number, part in enumerate(self.parts):
            for value in values[part]:
                yield _encode(json.dumps(self._key(number, value)))

    def _key(self, number: int = -1, value: Any = None) -> Any:
        harmless = (_HARMLESS[part] for part in self.parts)
        return self.put(*(value if place == number else each for place, each in enumerate(harmless)))


def _encode(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

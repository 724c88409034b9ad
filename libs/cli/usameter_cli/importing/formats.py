"""The formats that can be imported, and how they are told apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import assert_never

from usameter_cli.errors import UsageError
from usameter_cli.importing.access_log import Mapping, is_combined, read_access_log
from usameter_cli.importing.csv_rows import is_csv_header, read_csv
from usameter_cli.importing.jsonl import read_jsonl
from usameter_cli.importing.records import Record


class Format(StrEnum):
    """How the input is written; AUTO: as its first line looks."""

    AUTO = "auto"
    JSONL = "jsonl"
    CSV = "csv"
    COMBINED = "combined"


def read_records(lines: Iterable[bytes], format_: Format, mapping: Mapping) -> Iterator[Record]:
    """The records of an input, lazily. An empty input has none.

    Raises:
        UsageError: The first line looks like none of the formats, or like a CSV header that cannot be used.
    """
    remaining = iter(lines)
    blank: list[bytes] = []
    for line in remaining:
        if line.strip():
            # Blank lines are given back: line numbers count them.
            everything = itertools.chain(blank, [line], remaining)
            found = _detect(line) if format_ is Format.AUTO else format_
            if found is None:
                return iter([Record(len(blank) + 1, cut_off=True)])
            return _read(everything, found, mapping)
        blank.append(line)
    return iter(())


def _read(lines: Iterable[bytes], format_: Format, mapping: Mapping) -> Iterator[Record]:
    match format_:
        case Format.JSONL:
            return read_jsonl(lines, source=mapping.source)
        case Format.CSV:
            return read_csv(lines, source=mapping.source)
        case Format.COMBINED:
            return read_access_log(lines, mapping)
        case Format.AUTO:
            raise AssertionError("detected by now")
        case _:
            assert_never(format_)


def _detect(line: bytes) -> Format | None:
    """The format of an input with this first line; None where the line, not whole yet, does not show it."""
    if line.lstrip().startswith(b"{"):
        return Format.JSONL
    if is_combined(line):
        return Format.COMBINED
    if is_csv_header(line):
        return Format.CSV
    if not line.endswith(b"\n"):
        return None
    raise UsageError(
        "The first line is no JSON object, no CSV header with event_type and tenant_id, and no combined log line; "
        "say with --format what it is."
    )

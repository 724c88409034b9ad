"""CSV with a header: event_type, tenant_id, quantity, timestamp, idempotency_key, metadata or metadata.<name>."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from usameter_cli.errors import UsageError
from usameter_cli.importing.records import (
    EventBody,
    LineFault,
    Record,
    encode_event,
    idempotency_key,
    split_quantity,
    utc_timestamp,
)

_REQUIRED = ("event_type", "tenant_id")
_KNOWN = frozenset({*_REQUIRED, "quantity", "timestamp", "idempotency_key", "metadata"})
_METADATA_PREFIX = "metadata."


@dataclass(frozen=True, slots=True)
class Header:
    """The columns, in the order of the file."""

    columns: tuple[str, ...]


def is_csv_header(line: bytes) -> bool:
    """Whether the line names at least the columns that every event needs."""
    row = next(csv.reader([line.decode("utf-8", "replace")]), [])
    return set(_REQUIRED) <= {cell.strip() for cell in row}


def read_csv(lines: Iterable[bytes], *, source: str) -> Iterator[Record]:
    """A record for each row after the header. Empty cells are unset; metadata.<name> are strings.

    A row is whole once its last line has an end: "image,acme,12" may be about to become "image,acme,1234",
    and would be recorded with 12 for ever.

    Raises:
        UsageError: The header lacks a column that every event needs, or has one that means nothing.
    """
    text = _Lines(lines)
    reader = csv.reader(text, strict=True)
    header: Header | None = None
    while True:
        number = reader.line_num + 1
        fault = None
        try:
            row = next(reader, None)
        except csv.Error as error:
            row, fault = [], f"is not CSV: {error}"
        if text.is_cut_off:
            yield Record(number, cut_off=True)
            return
        if row is None:
            return
        if fault is not None:
            yield Record(number, fault=fault)
        if not row:
            continue
        if header is None:
            header = _header(row)
            continue
        try:
            yield Record(number, (_event(header, row, source=source, number=number),))
        except LineFault as fault:
            yield Record(number, fault=str(fault))


class _Lines:
    """Lines as text, for a reader that takes as many as a row has.

    Bytes that are not UTF-8 pass as surrogates, and are a fault of their row once it is encoded.
    """

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = iter(lines)
        # The last line that was taken has no end.
        self.is_cut_off = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.is_cut_off = not line.endswith(b"\n")
        return line.decode("utf-8", "surrogateescape")


def _header(row: list[str]) -> Header:
    columns = tuple(cell.strip() for cell in row)
    for name in _REQUIRED:
        if name not in columns:
            raise UsageError(f"The CSV header has no column {name}.")
    for name in columns:
        if name not in _KNOWN and not name.startswith(_METADATA_PREFIX):
            raise UsageError(
                f"The CSV header has a column {name!r}; known are {', '.join(sorted(_KNOWN))} and metadata.<name>."
            )
        if columns.count(name) > 1:
            raise UsageError(f"The CSV header has the column {name} twice.")
    if "metadata" in columns and any(name.startswith(_METADATA_PREFIX) for name in columns):
        raise UsageError("The CSV header has metadata and metadata.<name>; one of the two ways will do.")
    return Header(columns)


def _event(header: Header, row: list[str], *, source: str, number: int) -> bytes:
    if len(row) != len(header.columns):
        raise LineFault(f"has {len(row)} columns, the header {len(header.columns)}")
    cells = {name: cell for name, cell in zip(header.columns, row, strict=True) if cell}
    for name in _REQUIRED:
        if name not in cells:
            raise LineFault(f"has no {name}")
    quantity, quantity_decimal = split_quantity(cells["quantity"]) if "quantity" in cells else (None, None)
    return encode_event(
        EventBody(
            event_type=cells["event_type"],
            tenant_id=cells["tenant_id"],
            idempotency_key=cells.get("idempotency_key") or idempotency_key(source, number, cells["event_type"]),
            timestamp=utc_timestamp(cells["timestamp"]) if "timestamp" in cells else None,
            quantity=quantity,
            quantity_decimal=quantity_decimal,
            metadata=_metadata(cells),
        )
    )


def _metadata(cells: dict[str, str]) -> msgspec.Raw | None:
    try:
        if "metadata" in cells:
            text = cells["metadata"].encode()
            msgspec.json.decode(text, type=dict[str, msgspec.Raw])
            return msgspec.Raw(text)
        named = {
            name.removeprefix(_METADATA_PREFIX): cell
            for name, cell in cells.items()
            if name.startswith(_METADATA_PREFIX)
        }
        return msgspec.Raw(msgspec.json.encode(named)) if named else None
    except msgspec.DecodeError:
        raise LineFault("metadata is not a JSON object") from None
    except UnicodeEncodeError:
        raise LineFault("is not UTF-8") from None

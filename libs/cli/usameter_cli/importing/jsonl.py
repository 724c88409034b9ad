"""JSON lines: each line an event object as POST /api/v1/events takes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from usameter_cli.importing.records import LineFault, Record, idempotency_key, unreadable

# Raw: numbers travel as they were written, digit by digit.
_LINE = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NULL = b"null"


def read_jsonl(lines: Iterable[bytes], *, source: str) -> Iterator[Record]:
    """A record for each line that is not blank; an event without a key gets its line's.

    A line that cannot be read and has no end is cut off: an object that is whole can be read without one.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield Record(number, (_event(line, source=source, number=number),))
            except LineFault as fault:
                yield unreadable(number, line, fault)


def _event(line: bytes, *, source: str, number: int) -> bytes:
    try:
        # As text: what is inside a Raw is checked for JSON, but not for UTF-8.
        fields = _LINE.decode(line.decode())
    except msgspec.ValidationError:
        raise LineFault("is not a JSON object") from None
    except msgspec.DecodeError as error:
        raise LineFault(f"is not JSON: {error}") from None
    except UnicodeDecodeError:
        raise LineFault("is not UTF-8") from None
    event_type = _text(fields, "event_type")
    _text(fields, "tenant_id")
    # protobuf's JSON takes null for unset; so must we, or the event would have no key and be recorded twice.
    if bytes(fields.get("idempotency_key", _NULL)) == _NULL:
        fields["idempotency_key"] = msgspec.Raw(msgspec.json.encode(idempotency_key(source, number, event_type)))
    return msgspec.json.encode(fields)


def _text(fields: dict[str, msgspec.Raw], name: str) -> str:
    try:
        return msgspec.json.decode(fields[name], type=str)
    except KeyError:
        raise LineFault(f"has no {name}") from None
    except msgspec.DecodeError:
        raise LineFault(f"{name} is not a string") from None

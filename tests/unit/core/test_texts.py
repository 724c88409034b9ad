"""NUL in the texts of a request is found wherever it stands, and named."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from usameter.billing.v1 import credit_note_pb2
from usameter.ingest.v1 import event_pb2
from usameter_core.grpc.texts import nul_violations

NUL = "a\0b"


def struct_of(fields: dict[str, object]) -> Struct:
    struct = Struct()
    struct.update(fields)
    return struct


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (credit_note_pb2.CreateCreditNoteRequest(reason=NUL, amount="1"), ["reason"]),
        (credit_note_pb2.CreateCreditNoteRequest(reason="\0", idempotency_key=NUL), ["reason", "idempotency_key"]),
        (
            credit_note_pb2.CreateCreditNoteRequest(
                lines=[{"line_id": "a"}, {"line_id": NUL}, {"line_id": "b", "amount": NUL}]
            ),
            ["lines[1].line_id", "lines[2].amount"],
        ),
        (
            event_pb2.RecordManyRequest(items=[{"request": {"events": [{"tenant_id": NUL}]}}]),
            ["items[0].request.events[0].tenant_id"],
        ),
        (event_pb2.RecordOutcome(metadata={"x": "fine", "y": NUL}), ["metadata[y]"]),
        (event_pb2.RecordOutcome(metadata={NUL: "fine"}), ["metadata"]),
        (
            event_pb2.Event(metadata=struct_of({"a": {"b": NUL}})),
            ["metadata.fields[a].struct_value.fields[b].string_value"],
        ),
    ],
)
def test_every_text_with_nul_is_named_by_its_path(message: Message, fields: list[str]) -> None:
    assert [each.field for each in nul_violations(message)] == fields


@pytest.mark.parametrize(
    "message",
    [
        event_pb2.RecordEventsRequest(),
        event_pb2.RecordEventsRequest(tenant_id="", idempotency_key="\N{SYMBOL FOR NULL}\\0\\u0000", quantity=1.0),
        event_pb2.RecordOutcome(json=b"\0", status=b"\0\0"),
        event_pb2.RecordOutcome(metadata={"": ""}),
    ],
)
def test_zero_bytes_that_are_no_text_mean_nothing(message: Message) -> None:
    assert nul_violations(message) == []

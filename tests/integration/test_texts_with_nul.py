"""A text that PostgreSQL cannot store is the caller's fault, named by its field, in every method of every service."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import grpc.aio
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.protos import methods
from tests.support.services import Services, details_of, open_billing_beside, open_services
from usameter.common.v1 import error_pb2
from usameter.quota.v1 import reconciliation_pb2, reconciliation_pb2_grpc
from usameter_core.grpc.auth import access_of
from usameter_core.grpc.channels import open_channel

NUL = "a\0b"
NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
STRUCT = "google.protobuf.Struct"
# Of what is read field by field and not by the general validator: what else must be there to come to the text.
GOOD_EVENT = {"event_type": "e", "tenant_id": "t"}
GOOD = {"RecordEventsRequest": GOOD_EVENT, "EventInput": GOOD_EVENT}


def texts_of(message: Descriptor, outer: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every text of a message, at any depth: its path, and what a message is made from that has NUL there."""
    for field in message.fields:
        for suffix, value in values_of(field, (*outer, message.full_name)):
            beside = {} if field.name == "events" else GOOD.get(message.name, {})
            yield field.name + suffix, {**beside, field.name: value}


def values_of(field: FieldDescriptor, outer: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    inner = field.message_type
    found: Iterator[tuple[str, Any]]
    if field.type == FieldDescriptor.TYPE_STRING:
        found = iter([("", NUL)])
    elif inner is None or inner.full_name in outer:
        return
    elif inner.GetOptions().map_entry:
        yield from ((f"[a]{path}", {"a": value}) for path, value in values_of(inner.fields_by_name["value"], outer))
        return
    elif inner.full_name == STRUCT:
        found = iter([("", {"a": NUL})])
    else:
        found = ((f".{path}", value) for path, value in texts_of(inner, outer))
    for path, value in found:
        yield (f"[0]{path}", [value]) if field.is_repeated else (path, value)


def metadata_for(method: MethodDescriptor, services: Services) -> tuple[tuple[str, str], ...]:
    match access_of(method).WhichOneof("requirement"):
        case "scope":
            return services.metadata
        case "cron":
            return services.cron_metadata
    return services.service_metadata


async def fault_of(
    channel: grpc.aio.Channel, method: MethodDescriptor, content: dict[str, Any], metadata: Any
) -> grpc.aio.AioRpcError | None:
    request = GetMessageClass(method.input_type)(**content)
    open_call: Any = channel.unary_stream if method.server_streaming else channel.unary_unary
    call = open_call(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )(request, metadata=metadata, timeout=10)
    try:
        await (call.read() if method.server_streaming else call)
    except grpc.aio.AioRpcError as error:
        return error
    return None


def named_by(error: grpc.aio.AioRpcError | None) -> list[str]:
    """The fields that an INVALID_ARGUMENT names."""
    if error is None or error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
        return [f"no INVALID_ARGUMENT but {'OK' if error is None else error.code().name}"]
    return [each.field for each in details_of(error, error_pb2.ViolationDetails()).violations]


async def test_nul_in_any_text_of_any_request_is_an_invalid_argument_that_names_it(database: Database) -> None:
    clock = ManualClock(NOW)
    tried, wrong = 0, list[str]()
    async with (
        open_services(database, clock=clock) as services,
        open_billing_beside(database, services, clock=clock) as billing,
        open_channel(services.identity) as identity,
    ):
        channels = {"identity": identity, "quota": services.quota, "ingest": services.ingest, "billing": billing}
        for method in methods():
            # RecordMany answers each of its items, which are requests of RecordEvents; it stores no text of its own.
            if method.client_streaming or access_of(method).items:
                continue
            channel = channels[method.full_name.split(".")[1]]
            for path, content in texts_of(method.input_type):
                named = named_by(await fault_of(channel, method, content, metadata_for(method, services)))
                tried += 1
                if path not in named:
                    wrong.append(f"{method.full_name}: {path}: {named}")
    assert not wrong, "\n".join(wrong)
    assert tried > 100, f"only {tried} texts, and the contracts have more"


async def test_a_comparison_of_counters_names_it_too(database: Database) -> None:
    async with open_services(database, clock=ManualClock(NOW)) as services:
        stub: Any = reconciliation_pb2_grpc.ReconciliationServiceStub(services.quota)
        for path, content in texts_of(reconciliation_pb2.CompareCountersRequest.DESCRIPTOR):
            call = stub.CompareCounters(metadata=services.service_metadata, timeout=10)
            if path.startswith("stored"):
                begin = reconciliation_pb2.CompareBegin(org_id=str(services.org_id))
                await call.write(reconciliation_pb2.CompareCountersRequest(begin=begin))
                assert (await call.read()).WhichOneof("step") == "open"
            await call.write(reconciliation_pb2.CompareCountersRequest(**content))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert named_by(caught.value) == [path]


def test_what_is_left_out_is_left_out_by_name() -> None:
    """Of streams and items each is checked by itself: by what checks RecordEvents, or as above."""
    assert {method.name for method in methods() if method.client_streaming} == {"StreamEvents", "CompareCounters"}
    assert {method.name for method in methods() if access_of(method).items} == {"RecordMany"}

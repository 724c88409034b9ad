"""A message with a field of every kind that the edge carries."""

from __future__ import annotations

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from usameter.common.v1 import options_pb2

PACKAGE = "usameter_gateway_test"
SCALARS = {
    "text": Field.TYPE_STRING,
    "number": Field.TYPE_DOUBLE,
    "flag": Field.TYPE_BOOL,
    "int32": Field.TYPE_INT32,
    "int64": Field.TYPE_INT64,
    "uint32": Field.TYPE_UINT32,
    "uint64": Field.TYPE_UINT64,
    "data": Field.TYPE_BYTES,
    "shade": Field.TYPE_ENUM,
    "at": Field.TYPE_MESSAGE,
    "meta": Field.TYPE_MESSAGE,
    "inner": Field.TYPE_MESSAGE,
}
TYPES = {
    "shade": f".{PACKAGE}.Shade",
    "at": ".google.protobuf.Timestamp",
    "meta": ".google.protobuf.Struct",
    "inner": f".{PACKAGE}.Kinds",
}


@pytest.fixture(scope="session")
def kinds() -> Descriptor:
    """Each kind once (`text`), repeated (`texts`) and with presence (`maybe_text`), and null when unset."""
    file = FileDescriptorProto(
        name=f"{PACKAGE}/kinds.proto",
        package=PACKAGE,
        syntax="proto3",
        dependency=["google/protobuf/struct.proto", "google/protobuf/timestamp.proto"],
    )
    shade = file.enum_type.add(name="Shade")
    for number, name in enumerate(("SHADE_UNSPECIFIED", "DARK", "light")):
        shade.value.add(name=name, number=number)
    message = file.message_type.add(name="Kinds")
    for number, (name, kind) in enumerate(SCALARS.items(), start=1):
        shared = {"type": kind, "type_name": TYPES.get(name)}
        message.field.add(name=name, number=number, label=Field.LABEL_OPTIONAL, **shared)
        message.field.add(name=f"{name}s", number=100 + number, label=Field.LABEL_REPEATED, **shared)
    for number, (name, option) in enumerate(
        {
            "maybe_text": options_pb2.JSON_UNSET_UNSPECIFIED,
            "null_text": options_pb2.JSON_UNSET_NULL,
        }.items()
    ):
        field = message.field.add(
            name=name,
            number=200 + number,
            label=Field.LABEL_OPTIONAL,
            type=Field.TYPE_STRING,
            proto3_optional=True,
            oneof_index=number,
        )
        field.options.Extensions[options_pb2.json_unset] = option
        message.oneof_decl.add(name=f"_{name}")
    for number, (name, label) in enumerate(
        {"absent_text": Field.LABEL_OPTIONAL, "absent_texts": Field.LABEL_REPEATED}.items()
    ):
        field = message.field.add(name=name, number=300 + number, label=label, type=Field.TYPE_STRING)
        field.options.Extensions[options_pb2.json_unset] = options_pb2.JSON_UNSET_ABSENT
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindMessageTypeByName(f"{PACKAGE}.Kinds")

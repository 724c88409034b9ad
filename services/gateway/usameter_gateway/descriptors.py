"""The contract as the edge needs it: which methods have an HTTP route, and what they carry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, resources
from typing import cast

from google.api import annotations_pb2
from google.api.http_pb2 import HttpRule as AnnotatedRule
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message import Message

from usameter.common.v1 import options_pb2

TIMESTAMP = "google.protobuf.Timestamp"
STRUCT = "google.protobuf.Struct"
HTTP_BODY = "google.api.HttpBody"


@dataclass(frozen=True, slots=True)
class HttpRule:
    """One route of a method.

    `body` is "*" where the whole request is the body, a field's name where that field is, and empty
    where the request has none.
    """

    verb: str
    template: str
    body: str


@dataclass(frozen=True, slots=True)
class Method:
    """A gRPC method that REST clients can call."""

    full_name: str
    descriptor: MethodDescriptor
    request: Descriptor
    response: Descriptor
    access: options_pb2.Access
    rules: tuple[HttpRule, ...]

    @property
    def path(self) -> str:
        """The name gRPC calls it by, "/package.Service/Method"."""
        service, _, name = self.full_name.rpartition(".")
        return f"/{service}/{name}"

    @property
    def owner(self) -> str:
        """The service that answers: the second word of the package, e.g. "ingest"."""
        return self.full_name.split(".")[1]


def load_descriptor_set() -> FileDescriptorSet:
    """The compiled contracts with their comments, as they were generated beside the stubs."""
    # Importing a stub registers its file and the options it uses: without that, the options below
    # would parse as unknown fields and every method would seem to have no route.
    files = FileDescriptorSet.FromString(resources.files("usameter").joinpath("usameter.binpb").read_bytes())
    for file in files.file:
        if file.name.startswith("usameter/"):
            import_module(file.name.removesuffix(".proto").replace("/", ".") + "_pb2")
    return files


def load_methods() -> list[Method]:
    """The methods with a route, in the order of the contract."""
    pool = descriptor_pool.Default()
    return [method for file in load_descriptor_set().file for method in methods_of(pool.FindFileByName(file.name))]


def methods_of(file: FileDescriptor) -> Iterator[Method]:
    """The methods of one file that have a route."""
    for service in file.services_by_name.values():
        for descriptor in service.methods:
            options = descriptor.GetOptions()
            if options.HasExtension(annotations_pb2.http):
                yield Method(
                    full_name=descriptor.full_name,
                    descriptor=descriptor,
                    request=descriptor.input_type,
                    response=descriptor.output_type,
                    access=options.Extensions[options_pb2.access],
                    rules=tuple(_rules(options.Extensions[annotations_pb2.http])),
                )


def _rules(annotated: AnnotatedRule) -> Iterator[HttpRule]:
    verb = annotated.WhichOneof("pattern")
    if verb not in ("get", "put", "post", "delete", "patch"):
        raise ValueError(f"an HTTP rule needs one of the standard verbs, not {verb}")
    yield HttpRule(verb.upper(), getattr(annotated, verb), annotated.body)
    for additional in annotated.additional_bindings:
        yield from _rules(additional)


def message_class(descriptor: Descriptor) -> type[Message]:
    """The generated class of a message."""
    return message_factory.GetMessageClass(descriptor)


def message_type(field: FieldDescriptor) -> Descriptor | None:
    """The type of a field that holds messages; None for a scalar.

    Raises:
        TypeError: It is a map, which the contract does not use and REST JSON has no form for.
    """
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        raise TypeError(f"{field.full_name}: maps have no form in REST JSON")
    return message


def type_of(message: Message | type[Message]) -> Descriptor:
    """The type of a message, or of a generated class; their own attribute has a second, private name."""
    return cast(Descriptor, message.DESCRIPTOR)

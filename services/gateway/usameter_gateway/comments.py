"""The comments of the contract, by what they stand before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet

# The containers of descriptor.proto that matter here, by the field numbers that a source path names.
_CONTAINERS = {
    "FileDescriptorProto": {4: "message_type", 5: "enum_type", 6: "service"},
    "DescriptorProto": {2: "field", 3: "nested_type", 4: "enum_type"},
    "EnumDescriptorProto": {2: "value"},
    "ServiceDescriptorProto": {2: "method"},
}


def comments_of(files: FileDescriptorSet) -> dict[str, str]:
    """Comments by full name, e.g. "usameter.ingest.v1.EventInput.quantity"; lines joined to paragraphs.

    An enum value has its enum in its name, though protobuf leaves it out.
    """
    return {
        name: text
        for file in files.file
        for location in file.source_code_info.location
        if (text := _text(location.leading_comments))
        and (name := ".".join((file.package, *_names(file, list(location.path)))))
    }


def _names(element: Any, path: list[int]) -> Iterator[str]:
    while path:
        container = _CONTAINERS.get(element.DESCRIPTOR.name, {}).get(path[0])
        if container is None or len(path) < 2:
            # Inside an option or a type: the comment belongs to no element of ours.
            return
        element = getattr(element, container)[path[1]]
        path = path[2:]
        yield element.name


def _text(comment: str) -> str:
    paragraphs = comment.split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs).strip()

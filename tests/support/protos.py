"""Every method of every contract, by its descriptor."""

from __future__ import annotations

import importlib
from pathlib import Path

from google.protobuf.descriptor import FileDescriptor, MethodDescriptor

PROTOS = Path(__file__).parents[2] / "protos"
FILES = sorted(PROTOS.rglob("*.proto"))


def descriptor(path: Path) -> FileDescriptor:
    """Of one of `FILES`."""
    name = ".".join(path.relative_to(PROTOS).with_suffix("").parts) + "_pb2"
    found: FileDescriptor = importlib.import_module(name).DESCRIPTOR
    return found


def methods() -> list[MethodDescriptor]:
    """Of all services, in the order of the files."""
    return [
        method for path in FILES for service in descriptor(path).services_by_name.values() for method in service.methods
    ]

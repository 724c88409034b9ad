"""Writes the descriptor set that Envoy transcodes by: the contract's own, and the messages of errors.

    python deploy/envoy/descriptor_set.py <file>

Every error of a service carries a google.rpc.ErrorInfo. No contract imports its file, and without it
Envoy answers errors with an empty body.
"""

from __future__ import annotations

import sys
from pathlib import Path

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.rpc import error_details_pb2

CONTRACT = Path(__file__).parents[2] / "libs" / "protogen" / "usameter" / "usameter.binpb"


def descriptor_set() -> FileDescriptorSet:
    """The files of the contract, then those of google.rpc.ErrorInfo that it lacks, imported ones first."""
    files = FileDescriptorSet.FromString(CONTRACT.read_bytes())
    names = {file.name for file in files.file}
    for module in (any_pb2, duration_pb2, error_details_pb2):
        if module.DESCRIPTOR.name not in names:
            files.file.append(FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb))
    return files


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(descriptor_set().SerializeToString())

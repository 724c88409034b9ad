"""gRPC ignores an option whose name it does not know, without a word."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from usameter_core.grpc.channels import CHANNEL_OPTIONS
from usameter_core.grpc.server import SERVER_OPTIONS


@pytest.mark.parametrize("name", sorted({name for name, _ in (*SERVER_OPTIONS, *CHANNEL_OPTIONS)}))
def test_every_option_is_one_that_grpc_knows(name: str) -> None:
    assert name.encode() + b"\0" in Path(cygrpc.__file__).read_bytes()

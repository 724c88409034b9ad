"""One stack for all tests that do not break it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.proofs import Billed, Files, billed_march, fetch
from tests.support.stack import RunningStack
from usameter_devstack.ports import free_port


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    running = RunningStack.start(tmp_path_factory.mktemp("with spaces") / "stack home", http_port=free_port())
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def billed(stack: RunningStack) -> Billed:
    return billed_march(stack)


@pytest.fixture(scope="module")
def fetched(stack: RunningStack, billed: Billed, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The proof and the events of the true-up."""
    proof, events = fetch(stack, billed.true_up["id"], tmp_path_factory.mktemp("fetched"))
    return proof.read_bytes(), events.read_bytes()


@pytest.fixture
def files(fetched: tuple[bytes, bytes], tmp_path: Path) -> Files:
    proof, events = fetched
    return Files(json.loads(proof), [json.loads(line) for line in events.splitlines()], tmp_path)

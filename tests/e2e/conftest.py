"""One stack for all tests that do not break it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.stack import RunningStack
from usameter_devstack.ports import free_port


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    running = RunningStack.start(tmp_path_factory.mktemp("with spaces") / "stack home", http_port=free_port())
    yield running
    assert running.stop() == 0

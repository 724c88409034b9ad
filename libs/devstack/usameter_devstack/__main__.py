"""`python -m usameter_devstack`: the supervisor of a detached start, configured by the environment.

Events go to standard output as JSON lines until the platform is ready (somebody may read them: see
`control.start_detached`), and to standard error as sentences, always.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import msgspec

from usameter_devstack.config import StackConfig
from usameter_devstack.control import run_foreground
from usameter_devstack.errors import ConfigInvalid
from usameter_devstack.events import Event, StackReady, StartAborted, report_to_stderr


def main() -> int:
    """Run until stopped; the exit code of `run_foreground`."""
    try:
        config = StackConfig.from_environment()
    except ConfigInvalid as error:
        _report(StartAborted(str(error)))
        return 1
    return run_foreground(config, _report)


def _report(event: Event) -> None:
    report_to_stderr(event)
    # Whoever started us may be gone, and after the start nobody listens.
    with suppress(OSError):
        os.write(1, msgspec.json.encode(event) + b"\n")
    if isinstance(event, StackReady):
        os.dup2(2, 1)


if __name__ == "__main__":
    sys.exit(main())

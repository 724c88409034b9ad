"""What can go wrong, each one sentence for the person at the terminal.

CliError
├── UsageError       an option, a file or the environment cannot be used as given
├── Unreachable      no server answered, or none that is ready, for as long as we tried
└── Refused          the server said no; holds its code and details
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class CliError(Exception):
    """The command cannot go on; `str()` is shown, and the exit code is 1."""


class UsageError(CliError):
    """What was given cannot be used; the sentence says what can."""


class Unreachable(CliError):
    """Nobody answered. Everything this program sends is safe to send again."""


class Refused(CliError):
    """The server's answer was an error that trying again does not cure.

    `code` is one of the API's, e.g. "QUOTA_EXCEEDED"; empty where the answer was none of the API's.
    """

    def __init__(self, sentence: str, *, code: str = "", details: Mapping[str, Any] | None = None) -> None:
        self.code = code
        self.details: Mapping[str, Any] = details or {}
        super().__init__(sentence)

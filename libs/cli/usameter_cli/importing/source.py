"""Opens what is imported: a file or standard input, plain or gzip, as lines of bytes."""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import cast

from usameter_cli.errors import UsageError

STANDARD_INPUT = "-"
_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# With a line number and an event type of 100 characters a key stays within the 255 it may have.
_NAME_CHARACTERS_MAX = 120


@dataclass(frozen=True, slots=True)
class Source:
    """An open input.

    Args:
        name: First part of the keys of its lines: the same for the same data, whenever it is read.
        lines: Each with its line end, if it has one; reading may raise UsageError.
        size: In bytes as stored (compressed), None where nobody knows.
        position: How much of `size` has been read.
    """

    name: str
    lines: Iterator[bytes]
    size: int | None
    position: Callable[[], int]


@contextmanager
def open_source(path: str, *, name: str | None) -> Iterator[Source]:
    """Open a file, or standard input for "-"; gzip is known by its first bytes.

    Args:
        path: Of the file.
        name: The source's; default: the file's, without directory and ".gz". Standard input has none,
            and an invented one would make two inputs count as one.

    Raises:
        UsageError: There is no such file, it cannot be read, or the name cannot be used.
    """
    with ExitStack() as files:
        raw = _open_raw(path, files)
        size = Path(path).stat().st_size if path != STANDARD_INPUT and Path(path).is_file() else None
        yield Source(
            name=_checked_name(path, name),
            lines=_lines(raw, path),
            size=size,
            position=raw.tell if size is not None else lambda: 0,
        )


def _open_raw(path: str, files: ExitStack) -> BufferedReader:
    if path == STANDARD_INPUT:
        return cast(BufferedReader, sys.stdin.buffer)
    try:
        return files.enter_context(Path(path).open("rb"))
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from error


def _checked_name(path: str, name: str | None) -> str:
    if name is None:
        if path == STANDARD_INPUT:
            raise UsageError("Standard input has no name: say with --source what the keys begin with.")
        name = Path(path).name.removesuffix(".gz")
    if not 1 <= len(name) <= _NAME_CHARACTERS_MAX or not name.isprintable():
        raise UsageError(f"--source must be 1 to {_NAME_CHARACTERS_MAX} printable characters.")
    return name


def _lines(raw: BufferedReader, path: str) -> Iterator[bytes]:
    try:
        # `peek` returns what one read gives; no pipe hands out the first of two bytes alone.
        zipped = raw.peek(2).startswith(_GZIP_MAGIC)
        stream = gzip.GzipFile(fileobj=raw) if zipped else raw
        line = stream.readline()
        if line:
            yield line.removeprefix(_BYTE_ORDER_MARK)
        # A line without end is the last. The file may have grown since it was read, and the rest of the line
        # would come as a line of its own, with the number and the key of the next.
        while line.endswith(b"\n"):
            line = stream.readline()
            if line:
                yield line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{path} is a damaged gzip file: {error}.") from error
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror or error}.") from error

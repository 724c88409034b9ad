"""What people and scripts read: tables or JSON on standard output, everything else on standard error."""

from __future__ import annotations

import sys
from decimal import Decimal, InvalidOperation
from typing import Annotated

import msgspec
import typer
from rich.console import Console, JustifyMethod
from rich.table import Table

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON and nothing else; progress goes to standard error.")
]


# A pipe has no width, and the 80 columns that Rich takes it for would fold what `grep` looks for.
_PIPE_COLUMNS = 200


def people() -> Console:
    """Standard output. Nothing in a tenant's name is taken for markup."""
    width = None if sys.stdout.isatty() else _PIPE_COLUMNS
    return Console(markup=False, highlight=False, width=width)


def terminal() -> Console:
    """Standard error, for progress and remarks."""
    return Console(stderr=True, markup=False, highlight=False)


def print_json(value: object) -> None:
    """Print one JSON document."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def new_table(*columns: str, right: tuple[str, ...] = (), whole: tuple[str, ...] = ()) -> Table:
    """A table without frames; the columns of `right` are numbers.

    Where the terminal is too narrow, values fold and none is cut off; those of `whole` fold last.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify: JustifyMethod = "right" if column in right else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column in whole)
    return table


def grouped(number: str) -> str:
    """A decimal with its thousands apart, every digit kept: "1234567.50" → "1,234,567.50"."""
    try:
        return format(Decimal(number), ",f")
    except InvalidOperation:
        return number

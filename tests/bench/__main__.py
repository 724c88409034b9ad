"""`python -m tests.bench [--only ROW]… [--quick] [--json]`: measure, print the table, write build/bench.json."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console

from tests.bench.billing_generation import measure_invoices
from tests.bench.harness import Row, cpu_table, rows_table
from tests.bench.ingest import measure_batches, measure_resending
from tests.bench.limits import measure_hard_limit
from tests.bench.machine import ROOT, describe_machine, describe_servers
from tests.bench.platform import Platform, open_platform
from tests.bench.quota import measure_quota
from tests.bench.sealing import measure_sealing
from tests.bench.single import measure_single_events
from tests.bench.start import measure_start
from tests.bench.ten_million import measure_ten_million
from tests.bench.usage import measure_usage

_BUILD = ROOT / "build"
_REPETITIONS = 3
# Those that load much data come last: what a table holds slows what is written to it after.
_ON_PLATFORM: dict[str, Callable[[Platform, int], Awaitable[list[Row]]]] = {
    "single": measure_single_events,
    "batches": measure_batches,
    "resending": measure_resending,
    "limit": measure_hard_limit,
    "quota": measure_quota,
    "usage": measure_usage,
    "sealing": measure_sealing,
    "ten-million": measure_ten_million,
}
# After it has stopped: they start servers of their own.
_ALONE: dict[str, Callable[[Path, int], Awaitable[list[Row]]]] = {
    "start": measure_start,
    "invoices": measure_invoices,
}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure this machine.")
    parser.add_argument("--only", action="append", choices=[*_ON_PLATFORM, *_ALONE], help="only these rows")
    parser.add_argument("--quick", action="store_true", help="each run once, instead of the median of three")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    arguments = parser.parse_args()
    report = uvloop.run(
        _run(arguments.only or [*_ON_PLATFORM, *_ALONE], 1 if arguments.quick else _REPETITIONS, arguments.json)
    )
    (_BUILD / "bench.json").write_text(report)


async def _run(wanted: Sequence[str], repetitions: int, as_json: bool) -> str:
    """Measure, and print; returns the report as JSON."""
    progress = Console(stderr=True)
    machine: dict[str, Any] = describe_machine()
    rows: list[Row] = []
    _BUILD.mkdir(exist_ok=True)
    # Not in /tmp, which may be memory: a commit that costs nothing is no ceiling either.
    with tempfile.TemporaryDirectory(dir=_BUILD, prefix="bench-") as made:
        directory = Path(made)
        on_platform = [each for each in _ON_PLATFORM if each in wanted]
        if on_platform:
            async with open_platform(directory) as platform:
                machine |= await describe_servers(platform.database_url, platform.environment["USAMETER_REDIS_URL"])
                for name in on_platform:
                    await platform.checkpoint()
                    rows += _told(progress, await _ON_PLATFORM[name](platform, repetitions))
        for name in [each for each in _ALONE if each in wanted]:
            rows += _told(progress, await _ALONE[name](directory, repetitions))
    report = json.dumps({"machine": machine, "rows": [row.to_json() for row in rows]}, indent=2)
    _print(machine, rows, report if as_json else None)
    return report


def _told(progress: Console, rows: list[Row]) -> list[Row]:
    """Say what was measured as soon as it is: all of it takes ten minutes."""
    for row in rows:
        progress.print(row.summary, highlight=False, soft_wrap=True)
    return rows


def _print(machine: dict[str, Any], rows: Sequence[Row], report: str | None) -> None:
    if report is not None:
        sys.stdout.write(f"{report}\n")
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(rows_table(rows))
    if any(row.cpu for row in rows):
        console.print(cpu_table(rows))
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False)


if __name__ == "__main__":
    main()

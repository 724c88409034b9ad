"""`usameter events`: brings in what happened elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from usameter_cli.api import open_api
from usameter_cli.connection import API_KEY_VARIABLE, ApiKeyEnvOption, UrlOption, resolve_connection
from usameter_cli.importing.access_log import DEFAULT_METRICS, Mapping, TenantField, metric_from_text
from usameter_cli.importing.batches import REPORTED_FAULTS_MAX, Importer, ImportTotals
from usameter_cli.importing.formats import Format, read_records
from usameter_cli.importing.source import Source, open_source
from usameter_cli.output import JsonOption, new_table, people, print_json, terminal

app = typer.Typer(no_args_is_help=True, help="Usage events.")

# A server that is restarted, or fails over, is back by then; what was not sent can be sent another time.
_PATIENCE_SECONDS = 60.0


@app.callback()
def events() -> None:
    """Usage events."""
    # Without a callback Typer takes a group's only command for the group itself.


@app.command("import")
def import_events(
    *,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help='JSON lines, CSV or an access log; also gzip; "-": standard input.')
    ],
    format_: Annotated[Format, typer.Option("--format", help="How the input is written.")] = Format.AUTO,
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            help="What keys begin with, <source>:<line>:<event type>; default: the file's name without .gz. "
            "The same for the same data, another for other data, such as the next log after a rotation.",
        ),
    ] = None,
    tenant_from: Annotated[
        TenantField, typer.Option("--tenant-from", help="Access logs: the field that names the tenant.")
    ] = TenantField.REMOTE_ADDR,
    metric: Annotated[
        list[str],
        typer.Option(
            "--metric",
            metavar="EVENT_TYPE=1|EVENT_TYPE=bytes/N",
            help="Access logs: an event of each line; may be given several times, and replaces the default.",
        ),
    ] = list(DEFAULT_METRICS),  # noqa: B006 - typer copies it
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave out lines that are no events, instead of stopping.")
    ] = False,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """Record the events of a file. Safe to run again, also when the file has grown: each line counts once."""
    connection = resolve_connection(url, api_key_env)
    metrics = [metric_from_text(text) for text in metric]
    errors = terminal()
    began = time.monotonic()
    with open_source(file, name=source) as opened, _progress(opened, errors) as bar:
        mapping = Mapping(opened.name, tenant_from, metrics)
        with open_api(connection, patience_seconds=_PATIENCE_SECONDS, on_retry=bar.pause) as api:
            importer = Importer(api, skip_invalid=skip_invalid, position=opened.position, on_progress=bar.advance)
            try:
                importer.run(read_records(opened.lines, format_, mapping))
            except BaseException:
                totals = importer.totals
                errors.print(f"stopped after {totals.new} new events and {totals.duplicates} known ones")
                raise
    _report_faults(importer.totals, errors)
    _print_summary(importer.totals, seconds=time.monotonic() - began, as_json=as_json)


class _Bar:
    """The progress bar: bytes read, events recorded, their rate, and the time left."""

    def __init__(self, progress: Progress, source: Source) -> None:
        self._progress = progress
        self._task = progress.add_task(source.name, total=source.size, events=0)

    def advance(self, position: int, totals: ImportTotals) -> None:
        self._progress.update(self._task, completed=position, events=totals.events, description="recording events")

    def pause(self, problem: str) -> None:
        self._progress.update(self._task, description=f"trying again: {problem}")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        events = int(task.fields["events"])
        rate = events / task.elapsed if task.elapsed else 0.0
        return Text(f"{events:,} events  {rate:,.0f}/s")


@contextmanager
def _progress(source: Source, console: Console) -> Iterator[_Bar]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Bar(progress, source)


def _report_faults(totals: ImportTotals, console: Console) -> None:
    for fault in totals.faults:
        console.print(f"line {fault.line}: {fault.reason}")
    if totals.invalid > REPORTED_FAULTS_MAX:
        console.print(f"… and {totals.invalid - REPORTED_FAULTS_MAX} more invalid lines")
    if totals.cut_off_line is not None:
        # Not: add a line end. That makes a row of a CSV whole, and of half a line of a log a fault, which stops the
        # next import.
        console.print(
            f"line {totals.cut_off_line} breaks off without a line end and was left out; "
            "import the file again once the line is there to its end, line end included",
            soft_wrap=True,
        )


def _print_summary(totals: ImportTotals, *, seconds: float, as_json: bool) -> None:
    left_out = int(totals.cut_off_line is not None)
    rate = totals.events / seconds if seconds else 0.0
    if as_json:
        print_json(
            {
                "lines": totals.lines,
                "events": totals.events,
                "new": totals.new,
                "duplicates": totals.duplicates,
                "invalid": totals.invalid,
                "left_out": left_out,
                "warnings": totals.warnings,
                "seconds": round(seconds, 3),
                "events_per_second": round(rate),
            }
        )
        return
    table = new_table("lines", "events", "new", "duplicates", "invalid", "left out", "warnings", "seconds", "events/s")
    for column in table.columns:
        column.justify = "right"
    counts = (totals.lines, totals.events, totals.new, totals.duplicates, totals.invalid, left_out, totals.warnings)
    table.add_row(*(f"{count:,}" for count in counts), f"{seconds:.1f}", f"{rate:,.0f}")
    people().print(table)

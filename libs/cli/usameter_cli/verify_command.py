"""`usameter verify`: checks an invoice with nothing but its proof and its events, or an event with its own proof."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from usameter_cli.errors import UsageError
from usameter_cli.importing.source import Source, open_source
from usameter_cli.output import JsonOption, grouped, people, print_json, terminal
from usameter_proof.chain import NotedHead
from usameter_proof.documents import (
    Entry,
    EventProof,
    InvoiceProof,
    UnusableDocument,
    entry_from_json,
    event_proof_from_json,
    proof_from_json,
)
from usameter_proof.event_proofs import verify_event
from usameter_proof.findings import Finding
from usameter_proof.leaves import name_of_entry
from usameter_proof.verification import verify_invoice

Document = TypeVar("Document")

_FALSE, _UNUSABLE = 1, 2
# The bar moves once in so many entries.
_BAR_ENTRIES = 1_000
_SHOWN_MAX = 50
_HEAD = re.compile(r"(?P<epoch>[1-9][0-9]{0,14}):(?P<root>[0-9a-f]{64})", re.ASCII)


def verify(
    invoice: Annotated[
        str | None, typer.Argument(metavar="INVOICE.json", help="As `usameter invoices proof` prints it.")
    ] = None,
    events: Annotated[
        str | None,
        typer.Argument(
            metavar="EVENTS.jsonl", help='As `usameter invoices events` prints it; also gzip; "-": standard input.'
        ),
    ] = None,
    *,
    head: Annotated[
        str | None,
        typer.Option("--head", metavar="EPOCH:ROOT", help="A noted head of the ledger: the chain must hold it."),
    ] = None,
    event: Annotated[
        str | None,
        typer.Option("--event", metavar="PROOF.json", help="Instead: what GET /api/v1/events/{id}/proof answered."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check an invoice with nothing but its proof and its events, or one event with its proof: no server, no key.

    Says "true", or "false" and each place where something does not agree. Exit code 0 if true, 1 if false, 2 if a
    file cannot be used.
    """
    verdict = _Verdict()
    try:
        noted = None if head is None else _head_from_text(head)
        if event is not None and invoice is None:
            _verify_event(event, noted, verdict, as_json=as_json)
        elif invoice is not None and events is not None and event is None:
            _verify_invoice(invoice, events, noted, verdict, as_json=as_json)
        else:
            raise UsageError("verify takes INVOICE.json and EVENTS.jsonl, or --event PROOF.json.")
    except (UsageError, UnusableDocument) as error:
        terminal().print(f"usameter: {_printable(str(error))}", soft_wrap=True)
        raise typer.Exit(_UNUSABLE) from None
    if verdict.count:
        raise typer.Exit(_FALSE)


@dataclass(slots=True)
class _Verdict:
    """How many entries were read, and what was found: the first of it in full."""

    entries: int = 0
    count: int = 0
    shown: list[Finding] = field(default_factory=list)

    def advance(self) -> int:
        self.entries += 1
        return self.entries

    def add(self, finding: Finding) -> None:
        self.count += 1
        if len(self.shown) < _SHOWN_MAX:
            self.shown.append(finding)


def _verify_invoice(invoice: str, events: str, noted: NotedHead | None, verdict: _Verdict, *, as_json: bool) -> None:
    proof = _read(invoice, proof_from_json, "the proof of an invoice")
    with open_source(events, name="events") as source, _bar(source) as advance:
        entries = _read_entries(source.lines, events, lambda: advance(verdict.advance()))
        for finding in verify_invoice(proof, entries, noted=noted):
            verdict.add(finding)
    _print(proof, verdict, as_json=as_json)


def _verify_event(path: str, noted: NotedHead | None, verdict: _Verdict, *, as_json: bool) -> None:
    proof = _read(path, event_proof_from_json, "the proof of an event")
    for finding in verify_event(proof, noted=noted):
        verdict.add(finding)
    _print_event(proof, verdict, as_json=as_json)


def _head_from_text(text: str) -> NotedHead:
    match = _HEAD.fullmatch(text)
    if match is None:
        raise UsageError("--head must be an epoch and its root: a number, a colon and 64 lower-case hex digits.")
    return NotedHead(int(match["epoch"]), match["root"])


def _read(path: str, read: Callable[[bytes], Document], what: str) -> Document:
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from error
    try:
        return read(text)
    except UnusableDocument as error:
        raise UnusableDocument(f"{path} is not {what}: {error}") from None


def _read_entries(lines: Iterable[bytes], path: str, read: Callable[[], None]) -> Iterator[Entry]:
    for number, line in enumerate(lines, start=1):
        try:
            entry = entry_from_json(line)
        except UnusableDocument as error:
            raise UnusableDocument(f"{path}, line {number}, is not an entry of the ledger: {error}") from None
        read()
        yield entry


@contextmanager
def _bar(source: Source) -> Iterator[Callable[[int], None]]:
    console = terminal()
    columns = (
        TextColumn("checking"),
        BarColumn(),
        TextColumn("{task.fields[entries]:,} entries"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=source.size, entries=0)

        def advance(entries: int) -> None:
            if entries % _BAR_ENTRIES == 0:
                progress.update(task, completed=source.position(), entries=entries)

        yield advance


def _print(proof: InvoiceProof, verdict: _Verdict, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "valid": not verdict.count,
                "invoice_id": proof.invoice.id,
                "entries": verdict.entries,
                **_findings(verdict),
            }
        )
        return
    console = people()
    _print_verdict(console, verdict)
    invoice = proof.invoice
    console.print(
        f"{_printable(invoice.id)}: total {grouped(invoice.total)} {invoice.currency}; lines: {len(invoice.lines):,}, "
        f"snapshots: {len(proof.snapshots):,}, entries: {verdict.entries:,}, epochs: {len(proof.epochs):,}",
        soft_wrap=True,
    )
    # Without epochs nothing has shown that it is one.
    if proof.head is not None and proof.epochs:
        console.print(f"head of the ledger {proof.head.epoch}:{proof.head.root}", soft_wrap=True)


def _print_event(proof: EventProof, verdict: _Verdict, *, as_json: bool) -> None:
    parts = [part for part in (proof.event, proof.correction) if part is not None]
    if as_json:
        print_json(
            {
                "valid": not verdict.count,
                "org_id": proof.org_id,
                "event_id": proof.event.entry.event_id,
                "epochs": [{"epoch": part.epoch.epoch, "root": part.epoch.root} for part in parts],
                **_findings(verdict),
            }
        )
        return
    console = people()
    _print_verdict(console, verdict)
    console.print(f"ledger of organization {proof.org_id}", soft_wrap=True)
    for part in parts:
        entry, snapshot = part.entry, part.snapshot
        console.print(
            f"{name_of_entry(entry)}: {part.index + 1:,} of {snapshot.entry_count:,} in snapshot {snapshot.id}, "
            f"root of the ledger {part.epoch.epoch}:{part.epoch.root}",
            soft_wrap=True,
        )


def _print_verdict(console: Console, verdict: _Verdict) -> None:
    console.print("false" if verdict.count else "true")
    for finding in verdict.shown:
        console.print(_printable(str(finding)), soft_wrap=True)
    if verdict.count > len(verdict.shown):
        console.print(f"… and {verdict.count - len(verdict.shown):,} more")


def _findings(verdict: _Verdict) -> dict[str, Any]:
    return {
        "finding_count": verdict.count,
        "findings": [{"where": each.where, "what": each.what} for each in verdict.shown],
    }


def _printable(text: str) -> str:
    """Whoever wrote the document may not clear the screen and write "true" on it."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)

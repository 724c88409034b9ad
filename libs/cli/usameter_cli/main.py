"""The `usameter` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from usameter_cli import (
    credit_note_commands,
    document_commands,
    event_commands,
    invoice_commands,
    invoice_life_commands,
    plan_commands,
    proof_commands,
    quota_commands,
    snapshot_commands,
    stack_commands,
    subscription_commands,
)
from usameter_cli.audit_command import audit
from usameter_cli.errors import CliError
from usameter_cli.output import terminal
from usameter_cli.usage_commands import usage
from usameter_cli.verify_command import verify

_FAILED = 1

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Usage metering and billing: run the platform, bring in events, read usage, make invoices.",
)
app.command()(stack_commands.up)
app.command()(stack_commands.down)
app.command()(stack_commands.status)
app.command("migrate")(stack_commands.migrate_database)
app.command()(usage)
app.command()(verify)
app.command()(audit)
invoice_commands.app.command()(invoice_life_commands.void)
invoice_commands.app.command()(invoice_life_commands.mark_paid)
invoice_commands.app.command()(invoice_life_commands.mark_uncollectible)
invoice_commands.app.command()(invoice_life_commands.report)
app.add_typer(credit_note_commands.app, name="credit-notes")
invoice_commands.app.command()(document_commands.pdf)
invoice_commands.app.command()(document_commands.html)
invoice_commands.app.command()(document_commands.csv)
invoice_commands.app.command()(proof_commands.proof)
invoice_commands.app.command()(proof_commands.events)
app.add_typer(event_commands.app, name="events")
app.add_typer(invoice_commands.app, name="invoices")
app.add_typer(plan_commands.app, name="plans")
app.add_typer(quota_commands.app, name="quotas")
app.add_typer(snapshot_commands.app, name="snapshots")
app.add_typer(subscription_commands.app, name="subscriptions")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 done, 1 failed, 2 wrong options, 130 interrupted. Never a traceback.

    The last two, and a reader of our output that goes away, are Typer's to handle.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="usameter")
    except CliError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed: pip install 'usameter[embedded]'")
    except Exception as error:
        # The top: a fault of ours still gets one line, by which it can be reported.
        _fail(f"internal error: {type(error).__name__}: {error}")


def _fail(sentence: str) -> None:
    terminal().print(f"usameter: {sentence}", soft_wrap=True)
    sys.exit(_FAILED)

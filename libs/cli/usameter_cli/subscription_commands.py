"""`usameter subscriptions`: puts tenants on plans, changes and cancels that."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import typer
from rich.table import Table

from usameter_cli.api import Answer, ApiClient, open_api, read_as
from usameter_cli.connection import API_KEY_VARIABLE, ApiKeyEnvOption, UrlOption, resolve_connection
from usameter_cli.errors import CliError, UsageError
from usameter_cli.moments import moment_from_text
from usameter_cli.output import JsonOption, new_table, people, print_json
from usameter_cli.plan_values import Subscription, list_all_plans
from usameter_core.period import format_timestamp

app = typer.Typer(no_args_is_help=True, help="Subscriptions of tenants to plans.")

_PLAN_ID_PREFIX = "pln_"

IdArgument = Annotated[str, typer.Argument(metavar="ID", help='"sub_" and 32 hex digits.')]
PlanOption = Annotated[str, typer.Option(help="Its name, or its id.")]
AtOnceOption = Annotated[
    bool, typer.Option("--at-once", help="At the next UTC midnight; default: when the running interval ends.")
]
AtOption = Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="At this UTC midnight.")]


@app.command()
def create(
    *,
    tenant: Annotated[str, typer.Option(help="Who subscribes.")],
    plan: PlanOption,
    start: Annotated[
        str | None, typer.Option(metavar="YYYY-MM-DD", help="From this UTC midnight on; default: today's.")
    ] = None,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """Put a tenant on a plan. Run again, it answers with the same subscription."""
    start_at = _moment(start, option="--start")
    with open_api(resolve_connection(url, api_key_env)) as api:
        plan_id = _plan_id(api, plan)
        answer = api.post("/api/v1/subscriptions", {"tenant_id": tenant, "plan_id": plan_id, "start_at": start_at})
        _print(api, answer, as_json=as_json)


@app.command()
def show(
    subscription_id: IdArgument,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """Show a subscription with its plans over time."""
    with open_api(resolve_connection(url, api_key_env)) as api:
        _print(api, api.get(_path(subscription_id)), as_json=as_json)


@app.command()
def cancel(
    subscription_id: IdArgument,
    *,
    at_once: AtOnceOption = False,
    at: AtOption = None,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """End a subscription. Run again, it changes nothing: an end is never moved later."""
    moment = {"at_once": at_once, "at": _moment(at, option="--at")}
    with open_api(resolve_connection(url, api_key_env)) as api:
        _print(api, api.post(f"{_path(subscription_id)}:cancel", moment), as_json=as_json)


@app.command("change-plan")
def change_plan(
    subscription_id: IdArgument,
    *,
    plan: PlanOption,
    at_once: AtOnceOption = False,
    at: AtOption = None,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """Put the tenant on another plan, instead of whatever change was planned from then on."""
    moment = {"at_once": at_once, "at": _moment(at, option="--at")}
    with open_api(resolve_connection(url, api_key_env)) as api:
        body = {"plan_id": _plan_id(api, plan), **moment}
        _print(api, api.post(f"{_path(subscription_id)}:changePlan", body), as_json=as_json)


def _path(subscription_id: str) -> str:
    if not subscription_id.strip():
        raise UsageError("The subscription's ID is empty.")
    return f"/api/v1/subscriptions/{quote(subscription_id, safe='')}"


def _moment(text: str | None, *, option: str) -> str | None:
    return None if text is None else format_timestamp(moment_from_text(text, option=option))


def _plan_id(api: ApiClient, plan: str) -> str:
    if plan.startswith(_PLAN_ID_PREFIX):
        return plan
    known = {each.name: each.id for each in list_all_plans(api)}
    if plan not in known:
        raise CliError(f"No plan {plan!r}; there are: {', '.join(known)}.")
    return known[plan]


def _print(api: ApiClient, answer: Answer, *, as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    subscription = read_as(Subscription, answer)
    names = {each.id: each.name for each in list_all_plans(api)}
    head = Table.grid(padding=(0, 2))
    for name, value in {
        "subscription": subscription.id,
        "tenant": subscription.tenant_id,
        "plan": names.get(subscription.plan_id, subscription.plan_id),
        "from": subscription.start_at,
        "to": subscription.end_at,
    }.items():
        if value is not None:
            head.add_row(name, value)
    phases = new_table("from", "plan")
    for phase in subscription.phases:
        phases.add_row(phase.start_at, names.get(phase.plan_id, phase.plan_id))
    console = people()
    console.print(head)
    console.print()
    console.print(phases)

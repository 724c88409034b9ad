"""`usameter plans`: what tenants can subscribe to."""

from __future__ import annotations

import typer

from usameter_cli.api import open_api
from usameter_cli.connection import API_KEY_VARIABLE, ApiKeyEnvOption, UrlOption, resolve_connection
from usameter_cli.output import JsonOption, grouped, new_table, people, print_json
from usameter_cli.plan_values import list_all_plans

app = typer.Typer(no_args_is_help=True, help="Plans.")


# Without this Typer takes an only command for the whole program, and there is no `plans list`.
@app.callback()
def plans() -> None:
    """Plans."""


@app.command("list")
def list_plans(
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """List the plans by name, with the event types that they price."""
    with open_api(resolve_connection(url, api_key_env)) as api:
        found = list(list_all_plans(api))
    if as_json:
        print_json({"plans": found})
        return
    table = new_table("id", "name", "base fee", "", "interval", "prices", right=("base fee",), whole=("id",))
    for plan in found:
        prices = ", ".join(f"{each.event_type} ({each.price.model})" for each in plan.prices)
        table.add_row(plan.id, plan.name, grouped(plan.base_fee), plan.currency, plan.interval, prices)
    people().print(table)

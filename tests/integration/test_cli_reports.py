"""`usameter usage`, `invoices` and `status`: what people and scripts read, against a real HTTP server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from usameter_cli.main import main

Route = Callable[[dict[str, str], dict[str, Any]], Any]
MAY = {"period_start": "2015-05-01T00:00:00Z", "period_end": "2015-06-01T00:00:00Z"}
INVOICE: dict[str, Any] = {
    "id": "inv_1",
    "number": "7",
    "tenant_id": "acme [red]",
    "status": "open",
    "currency": "USD",
    **MAY,
    "through_epoch": "3",
    "subtotal": "84.94",
    "tax": "0.00",
    "total": "84.94",
    "amount_due": "84.94",
    "issued_at": "2015-06-01T00:10:00Z",
    "due_at": None,
    "paid_at": None,
    "lines": [
        {
            "id": "lin_1",
            "kind": "USAGE",
            "event_type": "image",
            **MAY,
            "price": {"id": "prc_1", "price": {"model": "graduated", "currency": "USD"}},
            "quantity": "5247",
            "rated_amount": "84.94",
            "breakdown": [
                {"up_to": "1000", "quantity": "1000", "unit_amount": "0", "flat_amount": "0", "amount": "0"},
                {"up_to": None, "quantity": "4247", "unit_amount": "0.02", "flat_amount": "0", "amount": "84.94"},
            ],
            "previously_billed": [],
            "amount": "84.94",
            "snapshots": [],
        }
    ],
}
NOTE = {
    "id": "crn_1",
    "number": "CN-1",
    "invoice_id": "inv_1",
    "tenant_id": "acme [red]",
    "currency": "USD",
    "lines": [],
    "subtotal": "4.50",
    "tax": "0.00",
    "total": "4.50",
    "amount_due_reduced": "4.50",
    "credit_granted": "0.00",
    "reason": "goodwill",
    "issued_at": "2015-06-02T00:00:00Z",
}


class Server:
    """Answers from `routes`, by method and path; a route gets the query and the body."""

    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
                name = f"{self.command} {parts.path}"
                server.asked.append(name)
                answer = server.routes[name](dict(parse_qsl(parts.query)), body)
                status, value = answer if isinstance(answer, tuple) else (200, answer)
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A server that the local platform's dev.env names; the environment names none."""
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name in ("USAMETER_URL", "USAMETER_API_KEY", "DATABASE_URL", "USAMETER_MIGRATE_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USAMETER_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "dev.env").write_text(
        f"USAMETER_URL=http://127.0.0.1:{made.http.server_port}\nUSAMETER_API_KEY=usa_test\n"
    )
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run_command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        output, errors = capsys.readouterr()
        return int(caught.value.code or 0), output, errors

    return run_command


Run = Callable[..., tuple[int, str, str]]


def test_usage_is_asked_for_by_month_and_shown_with_every_digit(server: Server, run: Run) -> None:
    queries: list[dict[str, str]] = []

    def usage(query: dict[str, str], _body: dict[str, Any]) -> Any:
        queries.append(query)
        groups = [{"tenant_id": "192.0.2.7", "total_quantity": "12345678.000001", "event_count": "10000"}]
        return {"usage": groups, "period": {"start": MAY["period_start"], "end": MAY["period_end"]}}

    server.routes["GET /api/v1/usage"] = usage
    code, output, _ = run("usage", "--month", "2015-05", "--group-by", "tenant", "--event-type", "image")
    assert code == 0
    assert queries == [
        {
            "group_by": "tenant",
            "start_date": MAY["period_start"],
            "end_date": MAY["period_end"],
            "event_type": "image",
        }
    ]
    assert "192.0.2.7" in output
    assert "12,345,678.000001" in output
    code, output, errors = run("usage", "--start", "2015-05-17", "--json")
    assert json.loads(output)["usage"][0]["total_quantity"] == "12345678.000001"
    assert (code, errors, queries[1]["start_date"]) == (0, "", "2015-05-17T00:00:00Z")


def test_a_month_and_a_start_exclude_each_other(server: Server, run: Run) -> None:
    code, _, errors = run("usage", "--month", "2015-05", "--start", "2015-05-01")
    assert (code, errors) == (1, "usameter: Give --month, or --start and --end.\n")


def test_a_missing_scope_is_named(server: Server, run: Run) -> None:
    refusal = {"error": "The API key lacks the scope usage:read", "code": "PERMISSION_DENIED", "details": {}}
    server.routes["GET /api/v1/usage"] = lambda _query, _body: (403, refusal)
    code, output, errors = run("usage", "--json")
    assert (code, output, errors) == (1, "", "usameter: The API key lacks the scope usage:read\n")


def test_an_answer_of_another_release_is_one_line(server: Server, run: Run) -> None:
    server.routes["GET /api/v1/usage"] = lambda _query, _body: {"usage": "none"}
    code, _, errors = run("usage")
    assert code == 1
    assert errors.count("\n") == 1
    assert "not what this release expects" in errors


def test_an_invoice_is_shown_with_its_tiers(server: Server, run: Run) -> None:
    server.routes["GET /api/v1/invoices/inv_1"] = lambda _query, _body: INVOICE
    code, output, _ = run("invoices", "show", "inv_1")
    assert code == 0
    for text in ("acme [red]", "5,247", "up to 1,000", "0.02", "84.94 USD", "graduated"):
        assert text in output
    assert json.loads(run("invoices", "show", "inv_1", "--json")[1]) == INVOICE


def test_generating_waits_for_the_job_and_adds_up_every_page(server: Server, run: Run) -> None:
    jobs = iter([{"done": "0"}, {"done": "1"}, {"done": "2", "state": "succeeded"}])
    bodies: list[dict[str, Any]] = []

    def start(_query: dict[str, str], body: dict[str, Any]) -> Any:
        bodies.append(body)
        return 202, {"id": "job_1", "state": "running", "done": "0", "total": "2"}

    def page(query: dict[str, str], _body: dict[str, Any]) -> Any:
        assert query["period_ends_after"] == MAY["period_start"]
        assert query["period_ends_by"] == MAY["period_end"]
        bare = {name: value for name, value in INVOICE.items() if name != "lines"}
        if "page_token" in query:
            return {"invoices": [bare | {"currency": "JPY", "total": "5", "status": "draft"}]}
        return {"invoices": [bare, bare], "next_page_token": "next"}

    server.routes |= {
        "POST /api/v1/invoices:bulkGenerate": start,
        "GET /api/v1/jobs/job_1": lambda _q, _b: {"id": "job_1", "state": "running", "total": "2", **next(jobs)},
        "GET /api/v1/invoices": page,
    }
    code, output, errors = run("invoices", "generate", "--period", "2015-05", "--finalize", "--json")
    assert (code, errors) == (0, "")
    assert json.loads(output) == {
        "job_id": "job_1",
        "problems": [],
        "invoices": {"draft": 1, "open": 2},
        "totals": {"JPY": "5", "USD": "169.88"},
    }
    assert bodies == [{**MAY, "finalize": True}]


def test_a_job_that_failed_says_why(server: Server, run: Run) -> None:
    server.routes["POST /api/v1/invoices:bulkGenerate"] = lambda _query, _body: {
        "id": "job_1",
        "state": "failed",
        "problems": ["acme: two currencies"],
    }
    code, _, errors = run("invoices", "generate", "--period", "2015-05")
    assert code == 1
    assert "acme: two currencies" in errors


def test_one_tenants_invoice_is_made_and_frozen(server: Server, run: Run) -> None:
    bodies: list[dict[str, Any]] = []

    def create(_query: dict[str, str], body: dict[str, Any]) -> Any:
        bodies.append(body)
        return INVOICE | {"status": "draft", "number": None}

    server.routes["POST /api/v1/invoices"] = create
    server.routes["POST /api/v1/invoices/inv_1:finalize"] = lambda _query, _body: INVOICE
    code, output, _ = run("invoices", "generate", "--period", "2015-05", "--tenant", "acme", "--json")
    assert (code, json.loads(output)["status"]) == (0, "draft")
    code, output, _ = run("invoices", "generate", "--period", "2015-05", "--tenant", "acme", "--finalize", "--json")
    assert (code, json.loads(output)["status"]) == (0, "open")
    assert bodies == [{"tenant_id": "acme", **MAY}] * 2


def test_one_tenants_billing_period_can_be_any(server: Server, run: Run) -> None:
    bodies: list[dict[str, Any]] = []

    def create(_query: dict[str, str], body: dict[str, Any]) -> Any:
        bodies.append(body)
        return INVOICE

    server.routes["POST /api/v1/invoices"] = create
    code, _, _ = run("invoices", "generate", "--period", "2015-01-15..2015-02-15", "--tenant", "acme")
    assert code == 0
    bounds = {"period_start": "2015-01-15T00:00:00Z", "period_end": "2015-02-15T00:00:00Z"}
    assert bodies == [{"tenant_id": "acme", **bounds}]
    code, _, errors = run("invoices", "generate", "--period", "2015-01-15..2015-02-15")
    assert (code, len(bodies)) == (1, 1)
    assert "say whose with --tenant" in errors


def test_a_list_ends_at_its_limit(server: Server, run: Run) -> None:
    page = {"invoices": [INVOICE] * 2, "next_page_token": "more"}
    server.routes["GET /api/v1/invoices"] = lambda _query, _body: page
    code, output, _ = run("invoices", "list", "--limit", "3", "--json")
    assert (code, len(json.loads(output)["invoices"]), len(server.asked)) == (0, 3, 2)


def test_a_server_that_is_away_for_a_moment_is_waited_for(server: Server, run: Run) -> None:
    away = {"error": "The billing service cannot be reached; try again", "code": "UNAVAILABLE", "details": {}}
    answers = iter([(503, away), (503, away), (200, INVOICE)])
    server.routes["GET /api/v1/invoices/inv_1"] = lambda _query, _body: next(answers)
    code, output, _ = run("invoices", "show", "inv_1", "--json")
    assert (code, json.loads(output)) == (0, INVOICE)


def test_what_becomes_of_an_invoice_is_asked_for_with_its_reason(server: Server, run: Run) -> None:
    bodies: list[dict[str, Any]] = []

    def change(_query: dict[str, str], body: dict[str, Any]) -> Any:
        bodies.append(body)
        return INVOICE

    for verb in ("void", "markPaid", "markUncollectible"):
        server.routes[f"POST /api/v1/invoices/inv_1:{verb}"] = change
    assert run("invoices", "void", "inv_1", "--reason", "wrong price")[0] == 0
    assert run("invoices", "mark-paid", "inv_1", "--reference", "wire 17", "--paid-at", "2015-06-02", "--json")[0] == 0
    assert run("invoices", "mark-paid", "inv_1")[0] == 0
    assert run("invoices", "mark-uncollectible", "inv_1", "--reason", "bankrupt")[0] == 0
    assert run("invoices", "void", "inv_1")[0] == 2
    assert bodies == [
        {"reason": "wrong price"},
        {"reference": "wire 17", "paid_at": "2015-06-02T00:00:00Z"},
        {},
        {"reason": "bankrupt"},
    ]


def test_a_credit_note_always_has_a_key_so_that_a_lost_answer_credits_once(server: Server, run: Run) -> None:
    bodies: list[dict[str, Any]] = []
    away = {"error": "The billing service cannot be reached; try again", "code": "UNAVAILABLE", "details": {}}

    def create(_query: dict[str, str], body: dict[str, Any]) -> Any:
        bodies.append(body)
        return (503, away) if len(bodies) == 1 else NOTE

    server.routes["POST /api/v1/credit-notes"] = create
    server.routes["GET /api/v1/credit-notes"] = lambda _query, _body: {"credit_notes": [NOTE]}
    server.routes["GET /api/v1/credit-notes/crn_1"] = lambda _query, _body: NOTE
    code, output, _ = run("credit-notes", "create", "inv_1", "--amount", "4.50", "--reason", "goodwill")
    assert (code, "CN-1" in output, "4.50" in output) == (0, True, True)
    assert bodies[0] == bodies[1]
    assert bodies[0]["idempotency_key"]
    run("credit-notes", "create", "inv_1", "--line", "lin_1=1", "--line", "lin_2=0.50", "--reason", "x", "--key", "k")
    assert bodies[2] == {
        "invoice_id": "inv_1",
        "reason": "x",
        "lines": [{"line_id": "lin_1", "amount": "1"}, {"line_id": "lin_2", "amount": "0.50"}],
        "idempotency_key": "k",
    }
    assert json.loads(run("credit-notes", "show", "crn_1", "--json")[1]) == NOTE
    assert "goodwill" in run("credit-notes", "list")[1]
    assert run("credit-notes", "create", "inv_1", "--line", "lin_1", "--reason", "x")[0] == 1


def test_the_billing_report_is_a_table_by_currency(server: Server, run: Run) -> None:
    names = ("billed", "paid", "pending", "overdue", "uncollectible", "credited", "credit_drawn", "void", "draft")
    sums = {name: {"amount": f"{place}000.00", "count": str(place)} for place, name in enumerate(names, start=1)}
    queries: list[dict[str, str]] = []

    def report(query: dict[str, str], _body: dict[str, Any]) -> Any:
        queries.append(query)
        return {**MAY, "currencies": [{"currency": "USD", **sums}]}

    server.routes["GET /api/v1/billing/report"] = report
    code, output, _ = run("invoices", "report", "--period", "2015-05")
    assert (code, queries) == (0, [MAY])
    assert ["billed", "1,000.00", "1"] in [row.split() for row in output.splitlines()]
    assert ["credit", "drawn", "7,000.00", "7"] in [row.split() for row in output.splitlines()]


@pytest.mark.parametrize("command", [("usage",), ("invoices", "list"), ("migrate",)])
def test_without_any_server_the_way_to_one_is_named(
    run: Run, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("USAMETER_URL", "USAMETER_API_KEY", "DATABASE_URL", "USAMETER_MIGRATE_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USAMETER_HOME", str(tmp_path / "empty"))
    code, output, errors = run(*command)
    assert (code, output) == (1, "")
    assert errors.count("\n") == 1
    assert "`usameter up`" in errors


def test_status_of_nothing_is_a_failure_that_scripts_can_read(server: Server, run: Run) -> None:
    code, output, _ = run("status", "--json")
    assert (code, json.loads(output)["ready"]) == (1, False)


def test_down_without_anything_running_is_fine(server: Server, run: Run) -> None:
    code, output, errors = run("down")
    assert (code, output) == (0, "")
    assert "Nothing runs" in errors


def test_a_wrong_port_is_named(server: Server, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USAMETER_HTTP_PORT", "many")
    code, _, errors = run("up")
    assert code == 1
    assert "USAMETER_HTTP_PORT" in errors


async def test_migrating_twice_applies_nothing_the_second_time(database: Any) -> None:
    from usameter_cli.migrations import SCHEMAS, migrate_all

    assert await migrate_all(database.admin_url, role_password=None) == dict.fromkeys(SCHEMAS, 0)


def test_a_seal_that_goes_on_is_waited_for(server: Server, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USAMETER_CRON_SECRET", "cron")
    states = [{"state": "running", "done": 5}, {"state": "succeeded", "done": 9}]

    def seal(query: dict[str, str], _: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        assert query == {"date": "2015-05-17"}
        return 202, {"sealed": [], "job": {"id": "job_1", "state": "running", "done": 0, "total": 9}}

    server.routes["POST /api/cron/snapshots"] = seal
    server.routes["GET /api/cron/jobs/job_1"] = lambda *_: {"id": "job_1", "total": 9, **states.pop(0)}
    assert run("snapshots", "seal", "--date", "2015-05-17") == (0, "sealed in job_1: 9 entries\n", "")
    assert states == []


def test_sealing_needs_the_schedulers_secret(server: Server, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("USAMETER_CRON_SECRET", raising=False)
    code, output, errors = run("snapshots", "seal")
    assert (code, output) == (1, "")
    assert "USAMETER_CRON_SECRET" in errors
    assert server.asked == []

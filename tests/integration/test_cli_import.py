"""`usameter events import` against a real HTTP server that refuses, loses answers and comes back."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from usameter_cli.main import main

Reply = tuple[int, dict[str, Any]]
LOG_LINE = '192.0.2.{n} - - [17/May/2015:10:05:03 +0000] "GET /{n} HTTP/1.1" 200 1500000 "-" "x"\n'
HINT = (
    "line {line} breaks off without a line end and was left out; "
    "import the file again once the line is there to its end, line end included\n"
)


class Ledger:
    """A server that records each key once, as the real one does; `before` may answer, or hang up, instead."""

    def __init__(self) -> None:
        self.stored: dict[str, dict[str, Any]] = {}
        self.batches: list[int] = []
        self.before: Callable[[list[dict[str, Any]], int], Reply | None] = lambda _events, _attempt: None
        self.hang_up_after_storing: set[int] = set()
        self._lock = threading.Lock()
        ledger = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers["authorization"] != "Bearer usa_test":
                    error = {
                        "error": "Missing, unknown or revoked credentials",
                        "code": "UNAUTHENTICATED",
                        "details": {},
                    }
                    reply: Reply | None = (401, error)
                else:
                    reply = ledger.record(json.loads(body)["events"])
                if reply is None:
                    self.close_connection = True
                    return
                content = json.dumps(reply[1]).encode()
                self.send_response(reply[0])
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def record(self, events: list[dict[str, Any]]) -> Reply | None:
        with self._lock:
            attempt = len(self.batches)
            self.batches.append(len(events))
            refusal = self.before(events, attempt)
            if refusal is not None:
                return refusal
            fresh = [event for event in events if event["idempotency_key"] not in self.stored]
            self.stored |= {event["idempotency_key"]: event for event in fresh}
            if attempt in self.hang_up_after_storing:
                return None
            counts = {"count": len(events), "new_events": len(fresh), "duplicate_events": len(events) - len(fresh)}
            return 200, {"success": True, **counts}


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("USAMETER_URL", made.url)
    monkeypatch.setenv("USAMETER_API_KEY", "usa_test")
    monkeypatch.setenv("USAMETER_HOME", str(tmp_path / "home"))
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Runs an import; the exit code, its summary, and what it said on standard error."""

    def run_import(*arguments: str) -> tuple[int, dict[str, Any], str]:
        with pytest.raises(SystemExit) as caught:
            main(["events", "import", "--json", *arguments])
        output, errors = capsys.readouterr()
        return int(caught.value.code or 0), json.loads(output) if output else {}, errors

    return run_import


Run = Callable[..., tuple[int, dict[str, Any], str]]


def write_log(path: Path, lines: int) -> str:
    path.write_bytes(gzip.compress("".join(LOG_LINE.format(n=number) for number in range(lines)).encode()))
    return str(path)


def error(code: str, sentence: str, **details: Any) -> dict[str, Any]:
    return {"error": sentence, "code": code, "details": details}


def counts(summary: dict[str, Any]) -> tuple[int, ...]:
    return tuple(summary[name] for name in ("lines", "events", "new", "duplicates", "invalid"))


def test_each_line_is_recorded_once_however_often_and_however_grown(ledger: Ledger, run: Run, tmp_path: Path) -> None:
    path = write_log(tmp_path / "access.log.gz", 1_700)
    code, summary, _ = run(path)
    assert (code, counts(summary)) == (0, (1_700, 3_400, 3_400, 0, 0))
    assert sorted(ledger.batches) == [400, 1_000, 1_000, 1_000]
    assert counts(run(path)[1]) == (1_700, 3_400, 0, 3_400, 0)
    write_log(tmp_path / "access.log.gz", 1_800)
    assert counts(run(path)[1]) == (1_800, 3_600, 200, 3_400, 0)
    assert ledger.stored["access.log:1800:egress_mb"]["quantity_decimal"] == "1.5"


def test_a_busy_server_is_asked_again_with_the_same_keys(ledger: Ledger, run: Run, tmp_path: Path) -> None:
    busy = (503, error("UNAVAILABLE", "The database cannot be reached; try again", retry_safe=True))
    ledger.before = lambda _events, attempt: busy if attempt in {0, 1, 4} else None
    code, summary, _ = run(write_log(tmp_path / "access.log.gz", 1_000))
    assert (code, summary["new"], len(ledger.stored)) == (0, 2_000, 2_000)


def test_a_lost_answer_costs_nothing_but_a_duplicate(ledger: Ledger, run: Run, tmp_path: Path) -> None:
    ledger.hang_up_after_storing = {0, 1}
    code, summary, _ = run(write_log(tmp_path / "access.log.gz", 1_000))
    assert (code, summary["events"], len(ledger.stored)) == (0, 2_000, 2_000)
    assert summary["duplicates"] >= 1_000


def test_a_malformed_line_stops_before_its_batch_is_sent(ledger: Ledger, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.write_text("".join(LOG_LINE.format(n=n) for n in range(600)) + "nonsense\n" + LOG_LINE.format(n=1))
    code, summary, errors = run(str(path))
    assert (code, summary) == (1, {})
    assert "Line 601: has not the combined log format." in errors
    assert ledger.batches == [1_000]


def test_malformed_lines_can_be_skipped_and_the_first_ten_are_named(ledger: Ledger, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.write_text(LOG_LINE.format(n=1) + "nonsense\n" * 12 + LOG_LINE.format(n=2))
    code, summary, errors = run("--skip-invalid", str(path))
    assert (code, counts(summary)) == (0, (14, 4, 4, 0, 12))
    assert "line 11:" in errors
    assert "line 12:" not in errors
    assert "and 2 more invalid lines" in errors


def test_the_last_row_of_a_csv_waits_for_its_line_end(ledger: Ledger, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "usage.csv"
    path.write_text("event_type,tenant_id,quantity\nimage,a,1\nimage,b,12")
    code, summary, errors = run(str(path))
    assert (code, counts(summary), summary["left_out"]) == (0, (2, 1, 1, 0, 0), 1)
    assert errors == HINT.format(line=3)
    path.write_text("event_type,tenant_id,quantity\nimage,a,1\nimage,b,1234\n")
    code, summary, errors = run(str(path))
    assert (code, counts(summary), summary["left_out"]) == (0, (2, 2, 1, 1, 0), 0)
    assert errors == ""
    assert ledger.stored["usage.csv:3:image"]["quantity"] == 1234


@pytest.mark.parametrize("line", ['{"event_type":"image","tenant_id":"a"}\n', LOG_LINE.format(n=2)])
def test_half_a_line_is_imported_when_the_rest_of_it_is_there(
    ledger: Ledger, run: Run, tmp_path: Path, line: str
) -> None:
    """A line end alone, which is what a row of a CSV may lack, would make a malformed line of it."""
    path = tmp_path / "usage"
    half = line * 2 + line[:30]
    path.write_text(half)
    code, summary, errors = run(str(path))
    assert (code, summary["left_out"], errors) == (0, 1, HINT.format(line=3))
    path.write_text(half + "\n")
    code, _, errors = run(str(path))
    assert code == 1 and "Line 3: " in errors
    path.write_text(line * 3)
    code, summary, errors = run(str(path))
    assert (code, summary["lines"], summary["left_out"], errors) == (0, 3, 0, "")


@pytest.mark.parametrize(
    ("head", "line", "counts_from"),
    [
        ("", '{"event_type":"image","tenant_id":"a"}\n', -1),
        ("", LOG_LINE.format(n=1), -3),
        ("event_type,tenant_id\n", "image,acme\n", 0),
    ],
    ids=["jsonl", "access log", "csv"],
)
@pytest.mark.parametrize("mode", [(), ("--skip-invalid",)])
def test_a_file_may_be_read_while_its_last_line_is_written(
    ledger: Ledger, run: Run, tmp_path: Path, head: str, line: str, counts_from: int, mode: tuple[str, ...]
) -> None:
    """What is whole is recorded at once and what was not when it is, each once, under its own line's key."""
    path = tmp_path / "usage"
    path.write_text(f"{head}{line * 2}")
    assert run(*mode, str(path))[0] == 0
    keys_of_two = list(ledger.stored)
    per_line = len(keys_of_two) // 2
    whole_at = len(line) + counts_from
    for length in (1, whole_at - 1, whole_at, len(line)):
        path.write_text(f"{head}{line * 3}{line[:length]}")
        code, summary, errors = run(*mode, str(path))
        left_out = int(length < whole_at)
        assert (code, counts(summary)[0], summary["invalid"], summary["left_out"]) == (0, 4, 0, left_out), errors
        assert ("was left out" in errors) == bool(left_out)
        assert len(ledger.stored) == (4 - left_out) * per_line
    assert list(ledger.stored)[: 2 * per_line] == keys_of_two
    first = 2 if head else 1
    assert {key.split(":")[1] for key in ledger.stored} == {str(first + n) for n in range(4)}


def test_what_only_the_server_finds_invalid_is_named_by_line_and_can_be_skipped(
    ledger: Ledger, run: Run, tmp_path: Path
) -> None:
    def judge(events: list[dict[str, Any]], _attempt: int) -> Reply | None:
        violations = [
            {"field": f"events[{index}].quantity", "description": "must be above 0"}
            for index, event in enumerate(events)
            if event.get("quantity") == 0
        ]
        return (400, error("INVALID_ARGUMENT", "…", violations=violations)) if violations else None

    ledger.before = judge
    path = tmp_path / "usage.csv"
    path.write_text("event_type,tenant_id,quantity\nimage,a,1\nimage,b,0\nimage,c,2\n")
    code, _, errors = run(str(path))
    assert code == 1
    assert "Line 3: quantity must be above 0." in errors
    assert ledger.stored == {}
    code, summary, errors = run("--skip-invalid", str(path))
    assert (code, counts(summary)) == (0, (3, 2, 2, 0, 1))
    assert "line 3: quantity must be above 0" in errors


def test_another_file_of_the_same_name_is_told_to_take_another_source(ledger: Ledger, run: Run, tmp_path: Path) -> None:
    conflict = error("IDEMPOTENCY_CONFLICT", "…", field="events[1]", idempotency_key="a.csv:3:image", event_id="evt_1")
    ledger.before = lambda _events, _attempt: (409, conflict)
    (tmp_path / "a.csv").write_text("event_type,tenant_id\nimage,a\nimage,b\n")
    code, _, errors = run("--skip-invalid", str(tmp_path / "a.csv"))
    assert code == 1
    assert "Line 3" in errors
    assert "--source" in errors


@pytest.mark.parametrize(
    ("status", "answer", "expected"),
    [
        (401, error("UNAUTHENTICATED", "Missing, unknown or revoked credentials"), "revoked credentials"),
        (403, error("PERMISSION_DENIED", "The API key lacks the scope events:write"), "scope events:write"),
        (
            403,
            error(
                "QUOTA_EXCEEDED",
                "Quota exceeded",
                violations=[{"tenant_id": "acme", "event_type": "image", "limit": 5, "current": 5}],
            ),
            "tenant acme, image, limit 5",
        ),
        (500, error("INTERNAL", "Internal error", request_id="abc"), "Internal error (request abc)"),
        (404, {"message": "not here"}, "answered 404, and not as a Usameter server does"),
    ],
)
def test_a_refusal_is_one_line_and_is_not_repeated(
    ledger: Ledger, run: Run, tmp_path: Path, status: int, answer: dict[str, Any], expected: str
) -> None:
    ledger.before = lambda _events, _attempt: (status, answer)
    (tmp_path / "a.csv").write_text("event_type,tenant_id\nimage,acme\n")
    code, summary, errors = run(str(tmp_path / "a.csv"))
    assert (code, summary, len(ledger.batches)) == (1, {}, 1)
    assert expected in errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("usameter: ")


def test_a_wrong_key_is_refused(ledger: Ledger, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", "usa_wrong")
    (tmp_path / "a.csv").write_text("event_type,tenant_id\nimage,acme\n")
    code, _, errors = run("--api-key-env", "OTHER_KEY", str(tmp_path / "a.csv"))
    assert code == 1
    assert "revoked credentials" in errors
    assert "usa_wrong" not in errors


def test_without_a_server_nothing_is_waited_for(run: Run, ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("event_type,tenant_id\nimage,acme\n")
    code, _, errors = run("--url", "http://127.0.0.1:9", str(tmp_path / "a.csv"))
    assert code == 1
    assert "No server answers at http://127.0.0.1:9" in errors


def test_large_events_make_smaller_batches(ledger: Ledger, run: Run, tmp_path: Path) -> None:
    note = "x" * 16_000
    lines = [json.dumps({"event_type": "image", "tenant_id": "a", "metadata": {"note": note}})] * 500
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    code, summary, _ = run(str(tmp_path / "a.jsonl"))
    assert (code, summary["new"]) == (0, 500)
    assert max(ledger.batches) * len(lines[0]) < 4 * 1024 * 1024


def test_standard_input_is_read_and_ctrl_c_ends_it_in_one_line(ledger: Ledger, tmp_path: Path) -> None:
    stored = threading.Event()

    def notice(_events: list[dict[str, Any]], _attempt: int) -> Reply | None:
        stored.set()
        return None

    ledger.before = notice
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            # A shell that runs tests in the background has SIGINT ignored, and children inherit that.
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
            "from usameter_cli.main import main; main()",
            "events",
            "import",
            "-",
            "--source",
            "pipe",
        ],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ,
    )
    assert process.stdin is not None and process.stderr is not None
    with suppress(BrokenPipeError):
        process.stdin.write("".join(LOG_LINE.format(n=number) for number in range(2_000)).encode())
        process.stdin.flush()
    assert stored.wait(20)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    errors = process.stderr.read().decode()
    process.stdin.close()
    process.stderr.close()
    assert errors.startswith("stopped after ")
    assert "Traceback" not in errors
    assert ledger.stored["pipe:1:api_request"]["tenant_id"] == "192.0.2.0"

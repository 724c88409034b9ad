"""`usameter invoices pdf`, `html` and `csv`, against a real HTTP server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

PDF = b"%PDF-1.7\r\n\x00\xff"
FILES = {
    "/api/v1/invoices/inv_7/pdf": PDF,
    "/api/v1/invoices/inv_7/html": "<p>é</p>".encode(),
    "/api/v1/invoices/inv_7/csv": b"line_id\r\n",
}
Run = Callable[..., tuple[int, str]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        content = FILES.get(self.path)
        if content is None or self.headers["authorization"] != "Bearer usa_test":
            self.send_response(404)
            content = json.dumps({"error": "No invoice inv_8", "code": "NOT_FOUND", "details": {}}).encode()
        else:
            self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def run() -> Iterator[Run]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server_named = {"USAMETER_URL": f"http://127.0.0.1:{server.server_port}", "USAMETER_API_KEY": "usa_test"}

    def run_command(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "usameter_cli", "invoices", *arguments]
        ended = subprocess.run(command, env=os.environ | server_named, capture_output=True, text=True, check=False)
        return ended.returncode, ended.stderr

    yield run_command
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_document_is_written_byte_by_byte(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "invoice"
    assert run("pdf", "inv_7", "-o", str(path)) == (0, "")
    assert path.read_bytes() == PDF
    assert run("html", "inv_7", "--output", str(path)) == (0, "")
    assert path.read_bytes() == "<p>é</p>".encode()
    assert run("csv", "inv_7", "-o", str(path)) == (0, "")
    assert path.read_bytes() == b"line_id\r\n"


def test_a_refusal_leaves_the_file_as_it_is(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "invoice.pdf"
    path.write_bytes(b"old")
    code, errors = run("pdf", "inv_8", "-o", str(path))
    assert (code, path.read_bytes()) == (1, b"old")
    assert "No invoice inv_8" in errors


def test_where_nothing_can_be_written_it_says_so(run: Run, tmp_path: Path) -> None:
    code, errors = run("pdf", "inv_7", "-o", str(tmp_path / "missing" / "invoice.pdf"))
    assert code != 0
    assert "cannot be written: No such file or directory" in " ".join(errors.split())
    assert run("pdf", " ", "-o", str(tmp_path / "x"))[0] != 0

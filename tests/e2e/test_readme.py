"""The tour in the README, run as it stands there: what it tells a stranger is what happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stack import RunningStack
from usameter_devstack.ports import free_port

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(sh|text|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_END = "\x1e"
# What differs from run to run: ids, moments, how fast it went, and the width of columns.
_VARYING = (
    # Of tenants that are invoiced together any may be numbered first.
    (re.compile(r"(inv_[0-9a-f]{32}) +\d+"), r"\1 number"),
    (re.compile(r"_[0-9a-f]{32}\b"), "_id"),
    (re.compile(r"\b[0-9a-f]{64}\b"), "hash"),
    (re.compile(r'"(org_id|root|\w+_at)":"[^"]+"'), r'"\1":"…"'),
    (re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d+Z"), "now"),
    (re.compile(r"\d+\.\d +[\d,]+$", re.MULTILINE), "seconds rate"),
    (re.compile(r" +"), " "),
    (re.compile(r" $", re.MULTILINE), ""),
)


def tour() -> list[tuple[str, str]]:
    """The README's blocks in order: language and text."""
    return [(match[1], match[2]) for match in _BLOCK.finditer((ROOT / "README.md").read_text())]


def steady(text: str) -> str:
    for pattern, replacement in _VARYING:
        text = pattern.sub(replacement, text)
    return text.strip()


def run_tour(directory: Path, blocks: list[tuple[str, str]]) -> list[str]:
    """What each `sh` block prints, all run by one shell; nothing may fail or complain."""
    script = "".join(f"{text}printf '\\036'\n" for language, text in blocks if language == "sh")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("USAMETER_", "COLUMNS"))}
    command = ["sh", "-eu", "-c", script]
    finished = subprocess.run(
        command, cwd=directory, env=environment, check=False, capture_output=True, text=True, timeout=120
    )
    assert (finished.returncode, finished.stderr) == (0, ""), finished.stdout
    return finished.stdout.split(_END)[:-1]


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Path]:
    """A fresh clone, as far as the tour sees it, in which `make run` runs."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    # Not the session's stack: the tour invoices everybody, and so whatever other tests have left unbilled.
    running = RunningStack.start(tmp_path / ".usameter", http_port=free_port())
    yield tmp_path
    assert running.stop() == 0


def test_the_tour_of_the_readme_prints_what_the_readme_shows(clone: Path) -> None:
    blocks = tour()
    outputs = iter(run_tour(clone, blocks))
    output = ""
    for language, text in blocks:
        if language == "sh":
            assert not output, "the README does not show what this prints"
            output = next(outputs)
        elif language == "text":
            assert steady(output) == steady(text)
            output = ""
    assert not output


def test_the_python_of_the_readme_is_the_file_that_the_tour_runs() -> None:
    assert [text for language, text in tour() if language == "python"] == [(ROOT / "docs" / "tour.py").read_text()]

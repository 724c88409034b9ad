"""The shape of the suite: who may import whom, and what every service has."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = ("identity", "ingest", "quota", "billing", "gateway")
STORING = ("identity", "ingest", "quota", "billing")

# What each package may import of ours, beside itself. A service never imports another service.
ALLOWED = {
    "usameter_core": {"usameter"},
    "usameter_proof": {"usameter_core"},
    "usameter_devstack": {"usameter_core"},
    "usameter_client": {"usameter_core", "usameter"},
    "usameter_cli": {"usameter_core", "usameter_proof", "usameter_devstack"},
    **{f"usameter_{service}": {"usameter_core", "usameter_proof", "usameter", "buf"} for service in SERVICES},
}


def sources(package: str) -> list[Path]:
    (found,) = (*ROOT.glob(f"libs/*/{package}"), *ROOT.glob(f"services/*/{package}"))
    files = sorted(found.rglob("*.py"))
    assert files, f"{package} has no modules"
    return files


def imported_packages(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_what_stands_below_it(package: str) -> None:
    for path in sources(package):
        ours = {name for name in imported_packages(path) if name == "buf" or name.startswith("usameter")}
        assert ours <= ALLOWED[package] | {package}, path


@pytest.mark.parametrize("service", STORING)
def test_every_storing_service_has_the_same_rooms(service: str) -> None:
    package = ROOT / "services" / service / f"usameter_{service}"
    names = {path.stem for path in package.iterdir()}
    assert {"__main__", "config", "server", "servicer", "service", "domain", "store", "migrations"} <= names
    assert (ROOT / "services" / service / "README.md").is_file()


PURE = ("libs/proof/usameter_proof", *(f"services/{service}/usameter_{service}/domain" for service in STORING))


@pytest.mark.parametrize("folder", PURE)
def test_domain_code_does_no_io_and_reads_no_clock(folder: str) -> None:
    forbidden = {"asyncpg", "grpc", "redis", "asyncio", "socket", "httpx", "time", "os"}
    domain = ROOT / folder
    files = list(domain.rglob("*.py"))
    assert files
    for path in files:
        assert not set(imported_packages(path)) & forbidden, path


def test_the_clock_is_read_in_one_place() -> None:
    readers = [
        path.relative_to(ROOT)
        for package in ALLOWED
        for path in sources(package)
        if any(call in path.read_text() for call in ("datetime.now(", "datetime.utcnow(", "date.today("))
    ]
    assert readers == [Path("libs/core/usameter_core/clock.py")]


@pytest.mark.parametrize("service", STORING)
def test_sql_is_in_stores_and_migrations_only(service: str) -> None:
    package = ROOT / "services" / service / f"usameter_{service}"
    for path in package.rglob("*.py"):
        inside = path.relative_to(package)
        if inside.parts[0] not in {"store", "store.py"}:
            assert "SELECT " not in path.read_text() and "INSERT INTO" not in path.read_text(), path


def test_money_is_summed_exactly() -> None:
    """A `sum` with a start is one of decimals; outside of `localcontext(CONTEXT)` it loses cents above 28 digits."""
    # The library of proofs enters the context at its door, and keeps its sums in functions below.
    for path in (path for package in ALLOWED if package != "usameter_proof" for path in sources(package)):
        tree = ast.parse(path.read_text())
        exact = {
            inner
            for block in ast.walk(tree)
            if isinstance(block, ast.With) and "localcontext(CONTEXT)" in ast.unparse(block.items[0])
            for inner in ast.walk(block)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "sum" and len(node.args) > 1:
                assert node in exact, f"{path}:{node.lineno}: use usameter_core.decimals.exact_sum"


def test_published_pages_name_no_host_of_a_registry() -> None:
    hosts = ["py" + "pi.org", "python" + "hosted", "npm" + "js", "debian" + ".org"]
    # Every file that is published, this one included: the names above are in pieces.
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    names = listed.split("\0")[:-1]
    assert {"README.md", "requirements.lock", "deploy/docker/requirements.lock"} <= set(names)
    for name in names:
        # A file that is deleted and not yet committed is still listed.
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        assert not any(host.encode() in content for host in hosts), name

"""`python -m usameter_gateway serve`."""

from __future__ import annotations

from usameter_core.main import run_service
from usameter_gateway.server import serve

if __name__ == "__main__":
    run_service("gateway", serve=serve)

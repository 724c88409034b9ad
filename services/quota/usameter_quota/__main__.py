"""`python -m usameter_quota serve | migrate`."""

from __future__ import annotations

from usameter_core.main import run_service
from usameter_quota.server import serve

if __name__ == "__main__":
    run_service("quota", serve=serve, schema="quota")

"""`python -m usameter_billing serve | migrate`."""

from __future__ import annotations

from usameter_billing.server import serve
from usameter_core.main import run_service

if __name__ == "__main__":
    run_service("billing", serve=serve, schema="billing")

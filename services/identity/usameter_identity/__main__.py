"""`python -m usameter_identity serve | migrate | bootstrap`."""

from __future__ import annotations

from usameter_core.main import CommandWithArguments, run_service
from usameter_identity import bootstrap
from usameter_identity.server import serve

if __name__ == "__main__":
    run_service(
        "identity",
        serve=serve,
        schema="identity",
        commands={"bootstrap": CommandWithArguments(bootstrap.add_arguments, bootstrap.run)},
    )

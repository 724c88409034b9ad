"""`python -m usameter_ingest serve | migrate`"""

from argparse import ArgumentParser

from usameter_core.main import CommandWithArguments, run_service
from usameter_ingest.server import serve, work


def _add_arguments(parser: ArgumentParser) -> None:
    parser.description = "One of the processes that `serve` keeps running; ends with its standard input."
    parser.add_argument("number", type=int)


if __name__ == "__main__":
    worker = CommandWithArguments(_add_arguments, work)
    run_service("ingest", serve=serve, schema="ingest", commands={"worker": worker})

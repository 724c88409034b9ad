"""`bootstrap`: makes an organization and a first API key, which nobody could ask for over the API."""

from __future__ import annotations

import argparse
import os
import sys

import msgspec

from usameter_core.api_key import hash_api_key, is_well_formed
from usameter_core.errors import Unauthenticated
from usameter_core.ids import OrgId
from usameter_core.postgres.pool import open_pool
from usameter_identity.config import BootstrapSettings
from usameter_identity.domain.scopes import ALL_SCOPES
from usameter_identity.service import IdentityService
from usameter_identity.store import IdentityStore

_KEY_NAME = "bootstrap"


class Bootstrapped(msgspec.Struct, frozen=True):
    """The one line of JSON that is printed. It holds a secret: whoever runs the command keeps it."""

    org_id: str
    api_key: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.description = (
        "Makes sure that an organization exists. Prints one line of JSON: its id, and an API key with all scopes."
    )
    parser.add_argument("--organization", required=True, metavar="NAME", help="made where it is missing")
    parser.add_argument(
        "--api-key-env",
        metavar="VARIABLE",
        help="a variable that may hold a key; it is kept where it is the organization's, is not revoked and has "
        "all scopes, else a new one is made",
    )


async def run(arguments: argparse.Namespace) -> None:
    """Make what is missing and print the line; run again with its own key, it changes nothing."""
    settings = BootstrapSettings.from_environment()
    presented = os.environ.get(arguments.api_key_env, "") if arguments.api_key_env else ""
    async with open_pool(
        settings.database_url.get_secret_value(), application_name="usameter_identity_bootstrap"
    ) as pool:
        service = IdentityService(store=IdentityStore(pool))
        result = await bootstrap(service, organization=arguments.organization, api_key=presented)
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")


async def bootstrap(service: IdentityService, *, organization: str, api_key: str) -> Bootstrapped:
    """The organization and a key of it with all scopes: `api_key` where it is one, else a new one."""
    org_id = (await service.ensure_organization(organization)).org_id
    if not await _is_kept(service, org_id, api_key):
        api_key = (await service.issue_api_key(org_id, name=_KEY_NAME, scopes=ALL_SCOPES)).secret
    return Bootstrapped(org_id=str(org_id), api_key=api_key)


async def _is_kept(service: IdentityService, org_id: OrgId, api_key: str) -> bool:
    if not is_well_formed(api_key):
        return False
    try:
        holder = await service.authenticate(hash_api_key(api_key))
    except Unauthenticated:
        return False
    # A key of an older release lacks the scopes that were added since, and scopes never change.
    return holder.org_id == org_id and holder.scopes >= ALL_SCOPES

"""`python -m usameter_identity bootstrap`, as the operator and the local stack run it."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import asyncpg
import msgspec
import pytest

from usameter_core.api_key import hash_api_key, new_api_key
from usameter_core.postgres.pool import open_pool
from usameter_identity.bootstrap import Bootstrapped, bootstrap
from usameter_identity.domain.scopes import ALL_SCOPES
from usameter_identity.service import IdentityService
from usameter_identity.store import IdentityStore


async def run_command(database_url: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "usameter_identity", "bootstrap", *arguments),
        env=os.environ | {"USAMETER_DATABASE_URL": database_url} | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


@pytest.fixture
async def service(database: Any) -> Any:
    async with open_pool(database.role_url("identity"), application_name="test") as pool:
        yield IdentityService(store=IdentityStore(pool))


async def test_the_command_prints_one_line_and_keeps_the_key_it_is_given(database: Any) -> None:
    url = database.role_url("identity")
    code, output, _ = await run_command(url, "--organization", "demo")
    assert code == 0
    assert output.count("\n") == 1
    first = msgspec.json.decode(output, type=Bootstrapped)
    assert set(msgspec.json.decode(output)) == {"org_id", "api_key"}

    _, output, _ = await run_command(url, "--organization", "demo", "--api-key-env", "SOME_KEY", SOME_KEY=first.api_key)
    assert msgspec.json.decode(output, type=Bootstrapped) == first


async def test_without_a_database_the_command_says_so_in_one_line() -> None:
    code, output, errors = await run_command("postgresql://nobody@127.0.0.1:1/none", "--organization", "demo")
    assert (code, output) == (1, "")
    assert errors == "usameter identity: The database cannot be reached; try again\n"


async def test_a_missing_argument_is_named() -> None:
    code, _, errors = await run_command("postgresql://nobody@127.0.0.1:1/none")
    assert code == 2
    assert "--organization" in errors


async def test_the_first_key_has_all_scopes(service: IdentityService) -> None:
    made = await bootstrap(service, organization="demo", api_key="")
    assert (await service.authenticate(hash_api_key(made.api_key))).scopes == ALL_SCOPES


async def test_the_same_organization_is_found_again_and_gets_another_key(service: IdentityService) -> None:
    first = await bootstrap(service, organization="demo", api_key="")
    second = await bootstrap(service, organization="demo", api_key="")
    assert second.org_id == first.org_id
    assert second.api_key != first.api_key


async def test_a_key_that_is_mistyped_unknown_or_anothers_is_not_kept(service: IdentityService) -> None:
    first = await bootstrap(service, organization="demo", api_key="")
    other = await bootstrap(service, organization="other", api_key="")
    for key in ("nonsense", first.api_key[:-1], new_api_key(), other.api_key):
        made = await bootstrap(service, organization="demo", api_key=key)
        assert made.org_id == first.org_id
        assert made.api_key != key


async def test_a_revoked_key_and_one_without_all_scopes_are_not_kept(service: IdentityService) -> None:
    first = await bootstrap(service, organization="demo", api_key="")
    holder = await service.authenticate(hash_api_key(first.api_key))
    narrow = await service.create_api_key(holder, name="narrow", scopes=["usage:read"])
    revoked = await service.create_api_key(holder, name="revoked", scopes=[])
    await service.revoke_api_key(holder.org_id, revoked.api_key.api_key_id)
    for issued in (narrow, revoked):
        made = await bootstrap(service, organization="demo", api_key=issued.secret)
        assert made.api_key not in {issued.secret, first.api_key}


async def test_two_at_once_make_one_organization(service: IdentityService) -> None:
    made = await asyncio.gather(*(bootstrap(service, organization="demo", api_key="") for _ in range(8)))
    assert len({each.org_id for each in made}) == 1


async def test_the_services_role_changes_nothing_but_the_moment_of_revocation(database: Any) -> None:
    connection = await asyncpg.connect(database.role_url("identity"))
    try:
        for statement in (
            "DELETE FROM identity.api_key",
            "DELETE FROM identity.tenant",
            "UPDATE identity.api_key SET scopes = '{usage:read}'",
            "UPDATE identity.organization SET name = 'mine'",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
    finally:
        await connection.close()

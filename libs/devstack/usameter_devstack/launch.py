"""How a child is started: which user it runs as, and what ends it when its parent is gone."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from usameter_devstack.errors import HomeUnusable

_SCRIPT = Path(__file__).with_name("unprivileged.py")
_UNPRIVILEGED_USER = "nobody"


@dataclass(frozen=True, slots=True)
class Account:
    """A user that servers run as when root starts them."""

    uid: int
    gid: int


def server_account() -> Account | None:
    """The user that PostgreSQL and Valkey must run as, or None for the current one.

    Only root changes user: PostgreSQL refuses uid 0, and a Valkey without a password is no place for it.
    """
    if os.geteuid() != 0:
        return None
    # initdb asks for the name of its user, so a uid without an entry would not do.
    entry = pwd.getpwnam(_UNPRIVILEGED_USER)
    return Account(uid=entry.pw_uid, gid=entry.pw_gid)


def launch_argv(
    argv: Sequence[str],
    *,
    death_signal: signal.Signals,
    account: Account | None = None,
    needs: Sequence[Path] = (),
) -> list[str]:
    """The vector that starts `argv` as a child of this process which cannot outlive it.

    Args:
        argv: Program by absolute path, and its arguments.
        death_signal: What the child gets when its parent dies, on Linux. The kernel ties this to the
            *thread* that starts the child: start children from a thread that lives as long as they do.
        account: Whom the child becomes; needs root.
        needs: What that user must be able to read, besides the program.
    """
    command = [sys.executable, "-I", "-S", str(_SCRIPT)]
    command += ["--parent", str(os.getpid()), "--death-signal", str(int(death_signal))]
    if account is not None:
        command += ["--user", f"{account.uid}:{account.gid}"]
    for path in needs:
        command += ["--needs", str(path)]
    return [*command, "--", *argv]


def make_private_directory(path: Path, account: Account | None = None) -> None:
    """Make `path` (its parent exists) with mode 0700, owned by `account`; an existing one is kept as it is.

    Raises:
        HomeUnusable: It cannot be made or given away.
    """
    try:
        if path.is_dir():
            return
        path.mkdir(mode=0o700)
        if account is not None:
            os.chown(path, account.uid, account.gid)
    except OSError as error:
        raise HomeUnusable(f"Cannot make the directory {path}: {error.strerror}.") from error


def prepare_home(home: Path) -> None:
    """Make the home, private to its user, and check that files can be made in it.

    Raises:
        HomeUnusable: It cannot be made or written to; the sentence names it.
    """
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        if not home.is_dir():
            # Root's servers run as another user and must get through; the files in it are 0600.
            home.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700)
        logs = home / "logs"
        logs.mkdir(mode=0o700, exist_ok=True)
        probe = home / f".writable-{os.getpid()}"
        probe.touch(mode=0o600)
        probe.unlink()
    except OSError as error:
        raise HomeUnusable(
            f"Cannot write to {home}: {error.strerror}. Set USAMETER_HOME to a directory that you can write to."
        ) from error


def remove_tree(path: Path) -> None:
    """Remove a directory of ours that is in nobody's use; what cannot be removed stays."""
    shutil.rmtree(path, ignore_errors=True)

"""Becomes another program: without root's rights, and never outliving the process that started it.

A script of its own, run as `python -I -S unprivileged.py [option value]… -- argv…`, so that it starts in
20 ms and imports nothing of ours. `usameter_devstack.launch` writes its arguments.

    --parent PID            whose child this must be; with another parent already, exit at once
    --death-signal NUMBER   what the kernel sends this process when its parent dies (Linux only)
    --user UID:GID          become this user, with no supplementary groups (root only)
    --needs PATH            repeatable: a path that user must be able to read

PostgreSQL refuses to run as root. Where root starts it, it becomes `nobody`; but a clone under /root, or in
a directory made by `mktemp -d`, cannot be entered by `nobody`. When, and only when, a needed path is out of
reach, the program keeps one capability, CAP_DAC_OVERRIDE, as an ambient one (it survives the exec).
"""

from __future__ import annotations

import ctypes
import os
import sys

EXIT_CANNOT_LAUNCH = 126

_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_SET_SECUREBITS = 28
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_CAP_DAC_OVERRIDE = 1
_CAP_SETPCAP = 8
_CAPABILITY_VERSION_3 = 0x20080522


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityWord(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def main(arguments: list[str]) -> None:
    """Exec the program after `--`; returns only by SystemExit, when that was not possible."""
    split = arguments.index("--")
    argv = arguments[split + 1 :]
    options = list(zip(arguments[:split:2], arguments[1:split:2], strict=True))
    single = dict(options)
    needs = [value for option, value in options if option == "--needs"]
    try:
        if "--user" in single:
            uid, gid = (int(part) for part in single["--user"].split(":"))
            _become(uid, gid, program=argv[0], needs=needs)
        # After the change of user: the kernel clears the signal when credentials change.
        if sys.platform == "linux" and "--death-signal" in single:
            _prctl(_PR_SET_PDEATHSIG, int(single["--death-signal"]))
        # The parent may have died before the line above: then no signal will ever come.
        if "--parent" in single and os.getppid() != int(single["--parent"]):
            raise SystemExit(EXIT_CANNOT_LAUNCH)
        os.execv(argv[0], argv)  # noqa: S606 - to become that program is the whole purpose
    except OSError as error:
        sys.stderr.write(f"cannot start {argv[0]}: {error}\n")
        raise SystemExit(EXIT_CANNOT_LAUNCH) from None


def _become(uid: int, gid: int, *, program: str, needs: list[str]) -> None:
    linux = sys.platform == "linux"
    if linux:
        _prctl(_PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    os.umask(0o077)
    if not linux:
        return
    # os.access asks with the new user's id and without capabilities: the question as it is meant.
    reachable = os.access(program, os.X_OK) and all(_readable(path) for path in needs)
    if reachable:
        _set_capabilities(0)
        return
    # access(2) otherwise ignores the capabilities of any user but root, and initdb asks it for its programs.
    _set_capabilities(1 << _CAP_DAC_OVERRIDE | 1 << _CAP_SETPCAP)
    _prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP)
    _set_capabilities(1 << _CAP_DAC_OVERRIDE)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_OVERRIDE)


def _readable(path: str) -> bool:
    enter = os.X_OK if os.path.isdir(path) else 0  # noqa: PTH112 - pathlib would double the start-up time
    return os.access(path, os.R_OK | enter)


def _set_capabilities(mask: int) -> None:
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    words = (_CapabilityWord * 2)(_CapabilityWord(mask, mask, mask), _CapabilityWord(0, 0, 0))
    _checked(_libc().capset(ctypes.byref(header), words), "capset")


def _prctl(option: int, argument: int, argument2: int = 0) -> None:
    zero = ctypes.c_ulong(0)
    result = _libc().prctl(option, ctypes.c_ulong(argument), ctypes.c_ulong(argument2), zero, zero)
    _checked(result, f"prctl({option})")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main(sys.argv[1:])

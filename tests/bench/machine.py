"""What the figures were measured on: without it a figure says nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import psutil
from redis.asyncio import Redis

ROOT = Path(__file__).parents[2]


def describe_machine() -> dict[str, Any]:
    """Hardware, system, Python, commit, and how busy the machine was already."""
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


async def describe_servers(database_url: str, redis_url: str) -> dict[str, str]:
    """Versions of the servers, as they say themselves."""
    connection = await asyncpg.connect(database_url)
    try:
        postgres = str(await connection.fetchval("SHOW server_version"))
    finally:
        await connection.close()
    client = Redis.from_url(redis_url)
    try:
        info = await client.info("server")
    finally:
        await client.aclose()
    return {"postgres": postgres, "valkey": str(info.get("valkey_version", info["redis_version"]))}


def _commit() -> str:
    """The commit, "+" where files differ from it, "unknown" outside a clone."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return f"{head}+" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    output = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return output.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())

"""Sealing: closing an epoch in milliseconds, then computing its snapshots and roots without a lock."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from uuid import UUID

from usameter_core.decimals import CONTEXT
from usameter_core.errors import Internal, Unavailable
from usameter_core.ids import OrgId
from usameter_core.logging import get_logger
from usameter_core.metrics import INVARIANT_VIOLATIONS
from usameter_ingest.metrics import SEAL_SECONDS
from usameter_ingest.store.epochs import DayTotal, EpochStore, NewSnapshot, SealProgress, SealStore, Snapshot
from usameter_proof.ledger_format import epoch_root, snapshot_id_of, snapshot_leaf
from usameter_proof.merkle import NODE_BYTES, MerkleRoot

log = get_logger()

_SNAPSHOTS_WRITTEN_AT_ONCE = 1_000
PROGRESS_SECONDS = 2.0


class SealingService:
    """Closes and seals epochs. Everything here can be cut off anywhere and done again."""

    def __init__(self, epochs: EpochStore) -> None:
        self._epochs = epochs

    async def close_all(self, *, ingested_before: datetime, job_id: UUID) -> None:
        """Close the open epoch of every organization that has an entry ingested before a moment in it.

        Raises:
            Internal, Unavailable: Some could not be closed; all the others are.
        """

        async def close(org_id: OrgId) -> None:
            epoch = await self._epochs.close(org_id, ingested_before=ingested_before, job_id=job_id)
            if epoch is not None:
                log.info("epoch_closed", org_id=str(org_id), epoch=epoch)

        await _for_each_organization(await self._epochs.list_open(), close)

    async def seal_closed(self) -> None:
        """Seal every closed epoch, of each organization in order.

        Raises:
            Internal, Unavailable: Those of some organizations could not be sealed; all the others' are.
        """
        closed: dict[OrgId, list[int]] = {}
        for org_id, epoch in await self._epochs.list_closed():
            closed.setdefault(org_id, []).append(epoch)

        async def seal(org_id: OrgId) -> None:
            for epoch in closed[org_id]:
                await self._seal(org_id, epoch)

        await _for_each_organization(closed, seal)

    async def progress(self, job_id: UUID) -> SealProgress:
        """How far a job has come; a job that closed nothing has nothing to do."""
        return await self._epochs.find_progress(job_id)

    async def _seal(self, org_id: OrgId, epoch: int) -> None:
        started = time.perf_counter()
        async with self._epochs.sealing(org_id, epoch) as store:
            if store is None:
                return
            entries, snapshots = await _write_snapshots(store, _Progress(self._epochs, store))
        seconds = time.perf_counter() - started
        SEAL_SECONDS.observe(seconds)
        log.info(
            "epoch_sealed",
            org_id=str(org_id),
            epoch=epoch,
            entries=entries,
            snapshots=snapshots,
            duration_ms=round(seconds * 1000, 1),
        )


class _Progress:
    """Tells how far the sealing of an epoch has come, in the log and for its job, every few seconds."""

    def __init__(self, epochs: EpochStore, store: SealStore) -> None:
        self._epochs = epochs
        self._store = store
        self._entries = 0
        self._tells_at = time.monotonic() + PROGRESS_SECONDS

    async def advance(self, entries: int) -> None:
        """So many more are hashed."""
        self._entries += entries
        if time.monotonic() < self._tells_at:
            return
        self._tells_at = time.monotonic() + PROGRESS_SECONDS
        org_id, epoch = self._store.org_id, self._store.epoch
        log.info("epoch_sealing", org_id=str(org_id), epoch=epoch, entries=self._entries)
        # On a connection of its own. Where there is none to be had the seal goes on untold.
        with suppress(Unavailable):
            await self._epochs.note_progress(org_id, epoch, entry_count=self._entries)


async def _for_each_organization(org_ids: Iterable[OrgId], work: Callable[[OrgId], Awaitable[None]]) -> None:
    """Do the work for each; one whose ledger is broken stops no other, and is told at the end."""
    failed: Exception | None = None
    for org_id in org_ids:
        try:
            await work(org_id)
        except Exception as error:
            # The top of an organization's work; the first error is raised once all have had their turn.
            log.error("sealing_failed", org_id=str(org_id), error=f"{type(error).__name__}: {error}")
            failed = failed or error
    if failed is not None:
        raise failed


async def _write_snapshots(store: SealStore, progress: _Progress) -> tuple[int, int]:
    """Write the snapshots and the root of an epoch; returns how many entries and snapshots it has."""
    tree = MerkleRoot()
    entries = 0
    written: list[NewSnapshot] = []
    async for snapshot in _snapshots(store, progress):
        entries += snapshot.entry_count
        leaf = snapshot_leaf(
            org_id=store.org_id,
            epoch=store.epoch,
            tenant_id=snapshot.tenant_id,
            event_type=snapshot.event_type,
            day=snapshot.day,
            entry_count=snapshot.entry_count,
            quantity=snapshot.quantity,
            root=snapshot.root,
        )
        written.append(NewSnapshot(snapshot, tree.count, leaf))
        tree.add(leaf)
        if len(written) == _SNAPSHOTS_WRITTEN_AT_ONCE:
            await store.add_snapshots(written)
            written = []
    if written:
        await store.add_snapshots(written)
    snapshots_root = tree.root()
    root = epoch_root(
        org_id=store.org_id, epoch=store.epoch, previous_root=store.previous_root, snapshots_root=snapshots_root
    )
    await store.finish(entry_count=entries, snapshot_count=tree.count, snapshots_root=snapshots_root, root=root)
    return entries, tree.count


async def _snapshots(store: SealStore, progress: _Progress) -> AsyncIterator[Snapshot]:
    """The epoch's snapshots: totals from the rollups, roots from the entries, walked side by side.

    Raises:
        Internal: Rollups and entries do not agree (invariant I2); the epoch stays closed.
    """
    pieces = aiter(store.leaf_pieces())
    piece = await anext(pieces, None)
    async for total in store.day_totals():
        tree = MerkleRoot()
        quantity = Decimal(0)
        while piece is not None and piece.number == total.number:
            tree.add(piece.leaves)
            quantity = CONTEXT.add(quantity, piece.quantity)
            await progress.advance(len(piece.leaves) // NODE_BYTES)
            piece = await anext(pieces, None)
        if (tree.count, quantity) != (total.entry_count, total.quantity):
            raise _disagreement(store, f"tenant {total.tenant_id}, {total.event_type}, {total.day}")
        yield _snapshot(store, total, tree.root())
    if piece is not None:
        raise _disagreement(store, "entries that no rollup counts")


def _snapshot(store: SealStore, total: DayTotal, root: bytes) -> Snapshot:
    snapshot_id = snapshot_id_of(
        org_id=store.org_id,
        epoch=store.epoch,
        tenant_id=total.tenant_id,
        event_type=total.event_type,
        day=total.day,
    )
    return Snapshot(
        snapshot_id=snapshot_id,
        epoch=store.epoch,
        tenant_id=total.tenant_id,
        event_type=total.event_type,
        day=total.day,
        entry_count=total.entry_count,
        quantity=total.quantity,
        root=root,
    )


def _disagreement(store: SealStore, where: str) -> Internal:
    INVARIANT_VIOLATIONS.labels("I2").inc()
    return Internal(f"rollups and entries disagree: organization {store.org_id}, epoch {store.epoch}, {where}")

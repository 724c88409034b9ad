"""SnapshotService: see usameter/ingest/v1/snapshot.proto."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime
from typing import Any
from uuid import UUID

import grpc.aio

from usameter.common.v1 import job_pb2
from usameter.ingest.v1 import snapshot_pb2, snapshot_pb2_grpc
from usameter_core.clock import Clock
from usameter_core.decimals import canonical
from usameter_core.errors import FieldViolation, InvalidArgument, NotFound
from usameter_core.grpc.context import remaining_seconds
from usameter_core.grpc.timestamps import datetime_in, timestamp_from_datetime
from usameter_core.ids import OrgId, format_id, new_uuid, parse_id
from usameter_core.pages import decode_page_token, encode_page_token
from usameter_core.period import day_period
from usameter_ingest.service.sealing import SealingService
from usameter_ingest.store.epochs import EpochStore, SealedEpoch, SealProgress, Snapshot, SnapshotMark

_END_OF_TIME = datetime.max.replace(tzinfo=UTC)
_SNAPSHOTS_A_PAGE = 5_000
# The caller's deadline, less what the answer takes; a scheduler without one waits this long.
_WAIT_SECONDS_MAX = 25.0


class SnapshotServicer(snapshot_pb2_grpc.SnapshotServiceServicer):
    """Seals epochs for the operator, and hands snapshots to billing."""

    def __init__(self, *, sealing: SealingService, epochs: EpochStore, clock: Clock) -> None:
        self._sealing = sealing
        self._epochs = epochs
        self._clock = clock

    async def SealEpochs(
        self, request: snapshot_pb2.SealEpochsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> snapshot_pb2.SealEpochsResponse:
        job_id = new_uuid()
        try:
            async with asyncio.timeout(remaining_seconds(_WAIT_SECONDS_MAX)):
                try:
                    await self._sealing.close_all(ingested_before=_end_of(request.date), job_id=job_id)
                finally:
                    await self._sealing.seal_closed()
        except TimeoutError:
            # The worker goes on with what is closed; the epoch that was being sealed starts again.
            progress = await self._sealing.progress(job_id)
            context.set_trailing_metadata((("usameter-http-status", "202"),))
            return snapshot_pb2.SealEpochsResponse(
                sealed=[sealed_epoch_to_proto(each) for each in progress.sealed], job=job_to_proto(progress)
            )
        progress = await self._sealing.progress(job_id)
        return snapshot_pb2.SealEpochsResponse(sealed=[sealed_epoch_to_proto(each) for each in progress.sealed])

    async def GetSealJob(
        self, request: snapshot_pb2.GetSealJobRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> job_pb2.Job:
        progress = await self._sealing.progress(parse_id("job", request.job_id, field="job_id"))
        if not progress.epoch_count:
            raise NotFound("job", request.job_id)
        return job_to_proto(progress)

    async def ListSnapshots(
        self, request: snapshot_pb2.ListSnapshotsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> snapshot_pb2.ListSnapshotsResponse:
        limit = request.limit if request.HasField("limit") else _SNAPSHOTS_A_PAGE
        snapshots, through_epoch = await self._epochs.list_snapshots(
            org_id_from_proto(request.org_id),
            after_epoch=request.after_epoch,
            after=decode_page_token(request.page_token, tuple[int, str, str, date]),
            limit=limit + 1,
        )
        page, more = snapshots[:limit], len(snapshots) > limit
        return snapshot_pb2.ListSnapshotsResponse(
            snapshots=[snapshot_to_proto(each) for each in page],
            next_page_token=(
                encode_page_token([page[-1].epoch, page[-1].tenant_id, page[-1].event_type, page[-1].day.isoformat()])
                if more
                else None
            ),
            through_epoch=through_epoch,
        )

    async def MarkSnapshots(
        self, request: snapshot_pb2.MarkSnapshotsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> snapshot_pb2.MarkSnapshotsResponse:
        marks = {mark.snapshot_id: mark_from_proto(mark) for mark in sorted(request.marks, key=lambda m: m.version)}
        await self._epochs.mark(org_id_from_proto(request.org_id), list(marks.values()))
        return snapshot_pb2.MarkSnapshotsResponse()


def _end_of(day: str) -> datetime:
    """The end of a day, or of time where none is given."""
    last = date.max if not day else day_from_proto(day)
    return _END_OF_TIME if last == date.max else day_period(last).end


def org_id_from_proto(text: str) -> OrgId:
    """The organization another service speaks of.

    Raises:
        InvalidArgument: It is no UUID.
    """
    try:
        return OrgId(UUID(text))
    except ValueError:
        raise InvalidArgument([FieldViolation("org_id", "must be a UUID")]) from None


def day_from_proto(text: str) -> date:
    """A day of the calendar.

    Raises:
        InvalidArgument: There is no such day.
    """
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise InvalidArgument([FieldViolation("date", "must be a day, such as 2026-01-15")]) from None


def mark_from_proto(mark: snapshot_pb2.SnapshotMark) -> SnapshotMark:
    """Which invoice covers a snapshot."""
    return SnapshotMark(
        snapshot_id=parse_id("snp", mark.snapshot_id, field="marks.snapshot_id"),
        invoice_id=mark.invoice_id if mark.HasField("invoice_id") else None,
        billed_at=datetime_in(mark, "billed_at"),
        version=mark.version,
    )


def snapshot_to_proto(snapshot: Snapshot) -> snapshot_pb2.Snapshot:
    """A snapshot as billing pulls it."""
    return snapshot_pb2.Snapshot(
        id=format_id("snp", snapshot.snapshot_id),
        epoch=snapshot.epoch,
        tenant_id=snapshot.tenant_id,
        event_type=snapshot.event_type,
        day=snapshot.day.isoformat(),
        entry_count=snapshot.entry_count,
        total=canonical(snapshot.quantity),
        root=snapshot.root,
    )


def sealed_epoch_to_proto(epoch: SealedEpoch) -> snapshot_pb2.SealedEpoch:
    """A sealed epoch as the operator sees it."""
    return snapshot_pb2.SealedEpoch(
        org_id=str(epoch.org_id),
        epoch=epoch.epoch,
        entry_count=epoch.entry_count,
        snapshot_count=epoch.snapshot_count,
        root=epoch.root.hex(),
        sealed_at=timestamp_from_datetime(epoch.sealed_at),
    )


def job_to_proto(progress: SealProgress) -> job_pb2.Job:
    """How far sealing has come, in entries."""
    finished = len(progress.sealed) == progress.epoch_count
    return job_pb2.Job(
        id=format_id("job", progress.job_id),
        state=job_pb2.succeeded if finished else job_pb2.running,
        done=progress.hashed_count,
        total=progress.entry_count,
    )

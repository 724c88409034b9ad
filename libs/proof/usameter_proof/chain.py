"""Checks of the sealed ledger: that snapshots are in their epochs, and epochs in one chain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from uuid import UUID

from usameter_proof.documents import Epoch, Head, InvoiceProof, Snapshot, UnusableDocument
from usameter_proof.findings import Finding
from usameter_proof.inclusion import root_of_path
from usameter_proof.ledger_format import ZERO_ROOT, epoch_root, snapshot_id_of, snapshot_leaf


@dataclass(frozen=True, slots=True)
class NotedHead:
    """The root of the chain up to an epoch, as somebody has noted it."""

    epoch: int
    root: str


def check_ledger(proof: InvoiceProof, *, noted: NotedHead | None) -> Iterator[Finding]:
    """What is wrong with the document's snapshots and epochs, and where they are not those of a noted head.

    Raises:
        UnusableDocument: It has snapshots or epochs and no head, or no epoch to compare with the noted one.
    """
    if proof.snapshots or proof.epochs:
        if proof.head is None:
            raise UnusableDocument("`$.head` is missing")
        org_id = UUID(proof.head.org_id)
        yield from _check_chain(org_id, proof.epochs, proof.head)
        yield from _check_snapshots(org_id, proof)
    if noted is not None:
        yield from _compare(proof.epochs, noted)


def faults_of_epoch(org_id: UUID, link: Epoch) -> Iterator[Finding]:
    """What is wrong with a link by itself."""
    root = epoch_root(
        org_id=org_id,
        epoch=link.epoch,
        previous_root=bytes.fromhex(link.previous_root),
        snapshots_root=bytes.fromhex(link.snapshots_root),
    )
    if root.hex() != link.root:
        what = f"its snapshots_root and previous_root make the root {root.hex()}, not {link.root}"
        yield Finding(f"epoch {link.epoch}", what)


def faults_of_snapshot(org_id: UUID, snapshot: Snapshot, link: Epoch | None) -> Iterator[Finding]:
    """What is wrong with a snapshot and its way to the tree of its epoch; None where that is not in the chain."""
    what = _fault_of(org_id, snapshot, link)
    if what:
        yield Finding(f"snapshot {snapshot.id}", what)


def _check_chain(org_id: UUID, epochs: Sequence[Epoch], head: Head) -> Iterator[Finding]:
    previous: Epoch | None = None
    for link in epochs:
        where = f"epoch {link.epoch}"
        if previous is None:
            if link.epoch == 1 and link.previous_root != ZERO_ROOT.hex():
                yield Finding(where, "is the first, and its previous_root is not zero")
        elif link.epoch != previous.epoch + 1:
            yield Finding(f"epoch {previous.epoch + 1}", f"is missing: epoch {link.epoch} comes after {previous.epoch}")
        elif link.previous_root != previous.root:
            yield Finding(where, f"its previous_root is not the root of epoch {previous.epoch}")
        yield from faults_of_epoch(org_id, link)
        previous = link
    if previous is None or previous.epoch != head.epoch:
        yield Finding(f"epoch {head.epoch}", "is the head, and the chain does not end with it")
    elif previous.root != head.root:
        yield Finding(
            f"epoch {head.epoch}", f"is the head with the root {head.root}, in the chain it has {previous.root}"
        )


def _check_snapshots(org_id: UUID, proof: InvoiceProof) -> Iterator[Finding]:
    links = {link.epoch: link for link in proof.epochs}
    previous: Snapshot | None = None
    for snapshot in proof.snapshots:
        if previous is not None and _key(snapshot) <= _key(previous):
            yield Finding(
                f"snapshot {snapshot.id}", f"does not come after snapshot {previous.id} in the ledger's order"
            )
        previous = snapshot
        yield from faults_of_snapshot(org_id, snapshot, links.get(snapshot.epoch))


def _fault_of(org_id: UUID, snapshot: Snapshot, link: Epoch | None) -> str | None:
    snapshot_id = snapshot_id_of(
        org_id=org_id,
        epoch=snapshot.epoch,
        tenant_id=snapshot.tenant_id,
        event_type=snapshot.event_type,
        day=snapshot.day,
    )
    if snapshot.id != f"snp_{snapshot_id.hex}":
        return "is not the id of its epoch, tenant, event type and day"
    if link is None:
        return f"its epoch {snapshot.epoch} is not in the chain"
    leaf = snapshot_leaf(
        org_id=org_id,
        epoch=snapshot.epoch,
        tenant_id=snapshot.tenant_id,
        event_type=snapshot.event_type,
        day=snapshot.day,
        entry_count=snapshot.entry_count,
        quantity=Decimal(snapshot.total),
        root=bytes.fromhex(snapshot.root),
    )
    path = [bytes.fromhex(each) for each in snapshot.path]
    root = root_of_path(leaf, index=snapshot.index, size=link.snapshot_count, path=path)
    if root is None or root.hex() != link.snapshots_root:
        return f"its fields and its path do not lead to the snapshots_root of epoch {snapshot.epoch}"
    return None


def _key(snapshot: Snapshot) -> tuple[int, bytes, bytes, str]:
    return snapshot.epoch, snapshot.tenant_id.encode(), snapshot.event_type.encode(), snapshot.day.isoformat()


def _compare(epochs: Sequence[Epoch], noted: NotedHead) -> Iterator[Finding]:
    roots = {link.epoch: link.root for link in epochs}
    if epochs:
        roots.setdefault(epochs[0].epoch - 1, epochs[0].previous_root)
    if noted.epoch not in roots:
        chain = f"its chain goes from epoch {min(roots)} to {max(roots)}" if roots else "it has no chain"
        raise UnusableDocument(f"cannot be compared with the head of epoch {noted.epoch}: {chain}")
    if roots[noted.epoch] != noted.root:
        yield Finding(f"epoch {noted.epoch}", f"has the root {roots[noted.epoch]}, and {noted.root} was noted")

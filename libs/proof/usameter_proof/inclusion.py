"""Inclusion proofs (RFC 6962, section 2.1.1): that a leaf stands at its place in a tree, without the other leaves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256

from usameter_proof.merkle import NODE_BYTES, MerkleRoot


class AuditPaths(MerkleRoot):
    """The audit paths of some leaves, in one pass over all leaves of their tree.

    Holds what `MerkleRoot` holds and the nodes of the paths: for each leaf one for each binary digit of the size.

    Args:
        indices: Places of the leaves, from 0, each below `size`.
        size: How many leaves will be added.
    """

    __slots__ = ("_nodes", "_passed", "_size")

    def __init__(self, indices: Iterable[int], *, size: int) -> None:
        super().__init__()
        self._size = size
        # By height: nodes that have passed, and by place those that are kept (empty until they come).
        self._passed: list[int] = []
        self._nodes: list[dict[int, bytes]] = [{} for _ in range(size.bit_length())]
        for index in indices:
            for height, sibling in _siblings(index, size):
                self._nodes[height][sibling] = b""

    def path(self, index: int) -> list[bytes]:
        """The siblings on the way from a leaf of `indices` to the root, once all leaves were added."""
        return [self._node(height, sibling) for height, sibling in _siblings(index, self._size)]

    def _arrived(self, height: int, nodes: bytes) -> None:
        if height == len(self._passed):
            self._passed.append(0)
        first = self._passed[height]
        self._passed[height] += len(nodes) // NODE_BYTES
        kept = self._nodes[height]
        for place in kept:
            if first <= place < self._passed[height]:
                start = (place - first) * NODE_BYTES
                kept[place] = nodes[start : start + NODE_BYTES]

    def _node(self, height: int, place: int) -> bytes:
        # At the right edge a sibling may be no complete subtree.
        return self._nodes[height][place] or self._edge(height)


def root_of_path(leaf: bytes, *, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """The root of the tree of `size` leaves in which this leaf stands at `index`, if its siblings are `path`.

    None where no path of that length leads from there to a root. The algorithm of RFC 9162, section 2.1.3.2.
    """
    if not 0 <= index < size:
        return None
    node, last = leaf, size - 1
    for sibling in path:
        if not last:
            return None
        if index & 1 or index == last:
            node = sha256(b"\x01" + sibling + node).digest()
            while index and not index & 1:
                index, last = index >> 1, last >> 1
        else:
            node = sha256(b"\x01" + node + sibling).digest()
        index, last = index >> 1, last >> 1
    return None if last else node


def _siblings(index: int, size: int) -> list[tuple[int, int]]:
    """Height and place of each sibling on the way up; a node without one is its own parent."""
    siblings = []
    height, width = 0, size
    while width > 1:
        sibling = index ^ 1
        if sibling < width:
            siblings.append((height, sibling))
        index, width, height = index >> 1, (width + 1) >> 1, height + 1
    return siblings

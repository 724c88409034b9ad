"""Merkle tree roots (RFC 6962, section 2.1), in one pass and in memory that grows with the logarithm."""

from __future__ import annotations

from hashlib import sha256
from struct import Struct

NODE_BYTES = 32
_PAIR = Struct("64s")


class MerkleRoot:
    """The root over leaf hashes that are added left to right, one or many at a time.

    Holds at most one node for each binary digit of the count: the root of a complete subtree of that
    height, which waits for its sibling to the right.
    """

    __slots__ = ("_count", "_waiting")

    def __init__(self) -> None:
        self._count = 0
        # By height, from the leaves up; empty where none waits.
        self._waiting: list[bytes] = []

    @property
    def count(self) -> int:
        """Leaves added so far."""
        return self._count

    def add(self, leaves: bytes) -> None:
        """Append leaf hashes, packed: 32 bytes each."""
        self._count += len(leaves) // NODE_BYTES
        nodes = leaves
        height = 0
        # Level by level: a loop over many nodes costs half of what climbing the tree with each leaf does.
        while nodes:
            if height == len(self._waiting):
                self._waiting.append(b"")
            self._arrived(height, nodes)
            nodes = self._waiting[height] + nodes
            paired = len(nodes) - len(nodes) % _PAIR.size
            self._waiting[height] = nodes[paired:]
            nodes = b"".join([sha256(b"\x01" + pair).digest() for (pair,) in _PAIR.iter_unpack(nodes[:paired])])
            height += 1

    def root(self) -> bytes:
        """The root over what was added; SHA-256 of nothing for the empty tree."""
        return self._edge(len(self._waiting)) or sha256(b"").digest()

    def _arrived(self, height: int, nodes: bytes) -> None:
        """Nothing here: for who keeps some of the nodes. Called with the next complete nodes of a height, packed."""

    def _edge(self, height: int) -> bytes:
        """The node over the leaves that fill no complete subtree of this height; empty where there are none."""
        node = b""
        for waiting in self._waiting[:height]:
            if waiting:
                node = sha256(b"\x01" + waiting + node).digest() if node else waiting
        return node

"""Audit paths: those of RFC 6962, for every leaf of every small tree, and none that was touched."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usameter_proof.inclusion import AuditPaths, root_of_path
from usameter_proof.merkle import MerkleRoot

SIZES = range(1, 71)


def leaf(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(4, "big")).digest()


def leaves(size: int) -> list[bytes]:
    return [leaf(number) for number in range(size)]


def tree_of(size: int) -> AuditPaths:
    tree = AuditPaths(range(size), size=size)
    tree.add(b"".join(leaves(size)))
    return tree


def rfc_path(index: int, hashes: list[bytes]) -> list[bytes]:
    """PATH(m, D[n]) of RFC 6962, section 2.1.1, as it is written there."""
    if len(hashes) <= 1:
        return []
    split = 1
    while split * 2 < len(hashes):
        split *= 2
    left, right = hashes[:split], hashes[split:]
    if index < split:
        return [*rfc_path(index, left), root_of(right)]
    return [*rfc_path(index - split, right), root_of(left)]


def root_of(hashes: list[bytes]) -> bytes:
    tree = MerkleRoot()
    tree.add(b"".join(hashes))
    return tree.root()


@pytest.mark.parametrize("size", SIZES)
def test_every_leaf_has_the_path_of_the_rfc_and_leads_to_the_root(size: int) -> None:
    tree = tree_of(size)
    assert tree.root() == root_of(leaves(size))
    for index, each in enumerate(leaves(size)):
        path = tree.path(index)
        assert path == rfc_path(index, leaves(size))
        assert root_of_path(each, index=index, size=size, path=path) == tree.root()


@pytest.mark.parametrize("size", SIZES)
def test_a_leaf_is_proven_nowhere_else(size: int) -> None:
    tree = tree_of(size)
    for index in range(size):
        path = tree.path(index)
        for other in range(-1, size + 1):
            if other != index:
                assert root_of_path(leaf(index), index=other, size=size, path=path) != tree.root()


@pytest.mark.parametrize("size", SIZES)
def test_a_path_that_is_longer_or_shorter_leads_nowhere(size: int) -> None:
    tree = tree_of(size)
    for index in range(size):
        path = tree.path(index)
        longer = [*path, leaf(size)]
        assert root_of_path(leaf(index), index=index, size=size, path=longer) is None
        if path:
            assert root_of_path(leaf(index), index=index, size=size, path=path[:-1]) is None


@given(st.data())
def test_any_flipped_bit_of_leaf_or_path_leads_to_another_root(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from(SIZES))
    index = data.draw(st.integers(0, size - 1))
    tree = tree_of(size)
    nodes = [leaf(index), *tree.path(index)]
    touched = data.draw(st.integers(0, len(nodes) - 1))
    bit = data.draw(st.integers(0, 255))
    nodes[touched] = (int.from_bytes(nodes[touched], "big") ^ 1 << bit).to_bytes(32, "big")
    assert root_of_path(nodes[0], index=index, size=size, path=nodes[1:]) != tree.root()


@given(st.data())
def test_paths_do_not_depend_on_how_leaves_arrive_or_which_others_are_asked_for(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 1_000))
    indices = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=8))
    cuts = sorted(data.draw(st.sets(st.integers(0, size), max_size=8)) | {0, size})
    hashes = leaves(size)
    tree = AuditPaths(indices, size=size)
    for start, end in pairwise(cuts):
        tree.add(b"".join(hashes[start:end]))
    for index in indices:
        assert root_of_path(hashes[index], index=index, size=size, path=tree.path(index)) == root_of(hashes)

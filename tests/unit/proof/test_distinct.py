"""Ids that come more than once, or not at all."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from usameter_proof.distinct import DistinctIds


@given(st.lists(st.integers(0, 600).map(lambda number: number.to_bytes(16, "big")), max_size=80))
def test_every_repetition_is_found_and_nothing_else(ids: list[bytes]) -> None:
    distinct = DistinctIds()
    for each in ids:
        distinct.add(each)
    expected = Counter(ids) - Counter(set(ids))
    assert Counter(distinct.repeated()) == expected


@given(*2 * [st.sets(st.integers(0, 600).map(lambda number: number.to_bytes(16, "big")), max_size=80)])
def test_what_only_the_others_have_is_lacking(ours: set[bytes], theirs: set[bytes]) -> None:
    known, others = DistinctIds(), DistinctIds()
    for distinct, ids in ((known, ours), (others, theirs)):
        for each in ids:
            distinct.add(each)
    assert Counter(known.lacking(others)) == Counter(theirs - ours)

"""Ids that come more than once, or not at all."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from usameter_proof.distinct import DistinctIds


@given(st.lists(st.integers(0, 600).map(lambda number: number.to_bytes(16, "big")), max_size=80))
def test_every_repetition_is_found_and_nothing_else(ids: list[bytes]) -> None:
    distinct = DistinctIds()
    for each in ids:
        distinct.add(each, Decimal(1))
    expected = Counter(ids) - Counter(set(ids))
    assert Counter(distinct.repeated()) == expected


@given(*2 * [st.sets(st.integers(0, 600).map(lambda number: number.to_bytes(16, "big")), max_size=80)])
def test_what_only_the_others_have_is_lacking(ours: set[bytes], theirs: set[bytes]) -> None:
    known, others = DistinctIds(), DistinctIds()
    for distinct, ids in ((known, ours), (others, theirs)):
        for each in ids:
            distinct.add(each, Decimal(1))
    assert Counter(known.lacking(others)) == Counter(theirs - ours)


ids_and_quantities = st.dictionaries(
    st.integers(0, 600).map(lambda number: number.to_bytes(16, "big")),
    st.decimals(min_value=-(10**24) + 1, max_value=10**24 - 1, places=6),
    max_size=80,
)


@given(ids_and_quantities, ids_and_quantities)
def test_quantities_of_what_both_have_come_back_to_the_last_digit(
    ours: dict[bytes, Decimal], theirs: dict[bytes, Decimal]
) -> None:
    known, others = DistinctIds(), DistinctIds()
    for distinct, quantities in ((known, ours), (others, theirs)):
        for each, quantity in quantities.items():
            distinct.add(each, quantity)
    both = {each: (ours[each], theirs[each]) for each in ours.keys() & theirs.keys()}
    assert {each: quantities for each, *quantities in known.matched(others)} == {
        each: list(quantities) for each, quantities in both.items()
    }

"""Names of tenants, keys and organizations."""

from __future__ import annotations

import pytest

from usameter_identity.domain.values import is_name, is_tenant_id


@pytest.mark.parametrize("text", ["a", "a" * 100, "Zürich 東京 😀", "a b", "2001:db8::1", "\u00a0"])
def test_printable_text_of_1_to_100_characters_is_a_name(text: str) -> None:
    assert is_name(text)
    assert is_tenant_id(text)


@pytest.mark.parametrize("text", ["", "a" * 101, "a\x00b", "a\nb", "a\x7f", "a\u0085", "a\u2028b", "a\u2029b"])
def test_empty_long_or_unprintable_text_is_not(text: str) -> None:
    assert not is_name(text)
    assert not is_tenant_id(text)


@pytest.mark.parametrize("character", ["\u202a", "\u202e", "\u2066", "\u2069"])
def test_a_name_cannot_turn_the_text_behind_it_and_a_tenant_is_called_as_its_events_call_it(character: str) -> None:
    assert not is_name(f"a{character}b")
    assert is_tenant_id(f"a{character}b")


@pytest.mark.parametrize("character", ["\u202f", "\u2065", "\u206a", "\u200e", "\u200f", "\u061c"])
def test_marks_of_direction_and_what_stands_beside_the_overrides_are_part_of_names(character: str) -> None:
    assert is_name(f"a{character}b")

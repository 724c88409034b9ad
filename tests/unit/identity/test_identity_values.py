"""Names of tenants, keys and organizations."""

from __future__ import annotations

import pytest

from usameter_identity.domain.values import is_name


@pytest.mark.parametrize("text", ["a", "a" * 100, "Zürich 東京 😀", "a b", "2001:db8::1", "\u00a0"])
def test_printable_text_of_1_to_100_characters_is_a_name(text: str) -> None:
    assert is_name(text)


@pytest.mark.parametrize("text", ["", "a" * 101, "a\x00b", "a\nb", "a\x7f", "a\u0085", "a\u2028b", "a\u2029b"])
def test_empty_long_or_unprintable_text_is_not(text: str) -> None:
    assert not is_name(text)

"""Files, gzip, and what the keys begin with."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from usameter_cli.errors import UsageError
from usameter_cli.importing.source import open_source


def lines_of(path: Path) -> list[bytes]:
    with open_source(str(path), name=None) as source:
        return list(source.lines)


def test_gzip_is_known_by_its_content(tmp_path: Path) -> None:
    for name, content in (("a", b"one\ntwo\n"), ("b", gzip.compress(b"one\ntwo\n"))):
        (tmp_path / name).write_bytes(content)
        assert lines_of(tmp_path / name) == [b"one\n", b"two\n"]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\n")
    assert lines_of(tmp_path / "a") == [b"one\n"]


def test_what_is_written_behind_a_half_line_while_it_is_read_is_left_for_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one\ntw")
    with open_source(str(path), name=None) as source:
        seen = [next(source.lines), next(source.lines)]
        path.write_bytes(b"one\ntwo\nthree\n")
        assert [*seen, *source.lines] == [b"one\n", b"tw"]
    assert lines_of(path) == [b"one\n", b"two\n", b"three\n"]


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert lines_of(tmp_path / "a") == []


@pytest.mark.parametrize("name", ["access.log", "access.log.gz"])
def test_a_source_is_named_after_its_file_zipped_or_not(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x\n")
    with open_source(str(tmp_path / name), name=None) as source:
        assert (source.name, source.size) == ("access.log", 2)


def test_standard_input_must_be_named() -> None:
    with pytest.raises(UsageError, match="--source"), open_source("-", name=None):
        pass


@pytest.mark.parametrize("name", ["", "a" * 121, "a\nb"])
def test_a_name_that_would_not_fit_a_key_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(UsageError, match="--source"), open_source(str(tmp_path / "a"), name=name):
        pass


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UsageError, match=str(path)), open_source(str(path), name=None):
            pass


def test_a_gzip_file_that_ends_too_early_is_an_error_after_its_whole_lines(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b"%d\n" % number for number in range(10_000)))
    (tmp_path / "a").write_bytes(whole[: len(whole) // 2])
    seen: list[bytes] = []
    with (
        pytest.raises(UsageError, match="damaged gzip"),
        open_source(str(tmp_path / "a"), name=None) as source,
    ):
        seen.extend(source.lines)
    assert all(line.endswith(b"\n") for line in seen)

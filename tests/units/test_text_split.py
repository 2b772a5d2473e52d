"""No document is both calibrated on and measured on, however the two texts are given; what is left out is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from regauge.errors import TextError
from regauge.text.corpora import Where
from regauge.text.split import Reader, Sizes, Texts, prepare
from tests import tiny

SIZES = Sizes(calibration=1024, search=256, evaluation=512)
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def a_document(number: int) -> str:
    """A page of text that no other number gives, in lines of less than 80 characters."""
    return "\n".join(f"Line {line} of page {number}: {WORDS[number % 10]} and {number * line}." for line in range(16))


def cut(calibration: Where | None, evaluation: Where | None) -> Texts:
    reader = Reader(tiny.tokenizer(), 64, lambda _: pytest.fail("nothing is sampled where a text is given"))
    return prepare(reader, calibration, evaluation, SIZES, seed=1)


def as_files(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    for place, text in enumerate(texts):
        (folder / f"{place:02}.txt").write_text(text, encoding="utf-8")
    return folder


def as_list(_: Path, texts: list[str]) -> list[str]:
    return texts


def a_copy(_: Path, texts: list[str]) -> list[str]:
    return [f"\n{text}  \n\n" for text in texts]  # with other blanks around it


@pytest.mark.parametrize("first", [as_files, as_list, a_copy])
@pytest.mark.parametrize("second", [as_files, as_list, a_copy])
def test_documents_of_both_texts_are_measured_on_and_not_calibrated_on(
    first: Callable[[Path, list[str]], Where], second: Callable[[Path, list[str]], Where], tmp_path: Path
) -> None:
    own, both = [a_document(i) for i in range(20)], [a_document(i) for i in range(20, 24)]
    found = cut(first(tmp_path / "a", own + both), second(tmp_path / "b", both))
    assert any("4 of 24 documents of --calibration are in --eval too" in note for note in found.notes)
    assert not any(f"of page {i}:" in text for i in range(20, 24) for text in found.calibration)
    alone = cut(own, both)
    assert alone.notes == ()
    assert sorted(text.strip() for text in alone.calibration) == sorted(text.strip() for text in found.calibration)


def test_nothing_left_to_calibrate_on_is_refused() -> None:
    both = [a_document(i) for i in range(12)]
    with pytest.raises(TextError, match="every document of --calibration is in --eval too"):
        cut(both[:8], both)


def test_long_lines_that_stand_in_both_texts_are_told() -> None:
    """What was copied into another document is seen by its lines; short ones may be alike by chance."""
    lines = [f"{place:02} " * 40 for place in range(30)]
    own = [a_document(i) for i in range(20)]
    found = cut([*own, "\n".join(["begun otherwise", *lines[:7]])], [a_document(i) for i in range(30, 36)] + lines)
    assert any("7 of 30 lines of 80 or more characters of --eval stand in" in note for note in found.notes)
    assert cut(own, [a_document(i) for i in range(30, 36)] + lines).notes == ()


def test_a_text_that_repeats_itself_is_read_once() -> None:
    own = [a_document(i) for i in range(24)]
    found = cut(own * 2, None)
    assert any("24 of 48 stretches of the text repeat others" in note for note in found.notes)
    assert len(set(found.calibration)) == len(found.calibration)

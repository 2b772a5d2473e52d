"""Calibration text: every way to give it, every way in which it is unusable, and the windows cut from it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from regauge.errors import TextError
from regauge.text.calibration import Calibration, draw, images
from regauge.text.corpora import Document, corpus
from regauge.text.tokens import frame
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return tiny.tokenizer()


def test_a_directory_is_read_in_order_and_says_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "deep" / "c.md").write_text("third")
    (tmp_path / ".hidden").write_text("never")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    found = corpus(tmp_path)
    assert found.texts() == ["first", "second", "third"]
    assert found.notes == ("left out of the text: picture.png is binary",)
    assert "3 documents, 16 bytes" in found.description


def test_lists_and_jsonl_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps("one") + "\n\n" + json.dumps({"text": "two", "id": 3}) + "\n")
    assert corpus(path).texts() == corpus(["one", "two", "  "]).texts() == ["one", "two"]
    assert corpus(path).sha256 == corpus(["one", "two"]).sha256 != corpus(["onet", "wo"]).sha256
    whole = tmp_path / "rows.json"
    whole.write_text(json.dumps(["one", "two"]))
    assert corpus(whole).texts() == ["one", "two"]
    assert corpus([path, whole]).texts() == ["one", "two", "one", "two"]


def test_a_list_file_names_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    listed = tmp_path / "list.txt"
    listed.write_text("b.txt\n\na.txt\n")
    assert corpus(f"@{listed}").texts() == ["second", "first"]
    listed.write_text("b.txt\nmissing.txt\n")
    with pytest.raises(TextError, match=r"no text at .*missing\.txt"):
        corpus(f"@{listed}")
    listed.write_text("\n")
    with pytest.raises(TextError, match="is empty; name one file a line"):
        corpus(f"@{listed}")
    with pytest.raises(TextError, match="cannot be read"):
        corpus(f"@{tmp_path / 'none.txt'}")


def test_lines_of_json_end_at_newlines_only(tmp_path: Path) -> None:
    """Strings of JSON may hold every other line break of Unicode; files of some editors begin with a mark."""
    path = tmp_path / "rows.jsonl"
    said = ["one\u2028still one", "two\x85\x0b\x0c\x1c two", "three"]
    rows = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in said)
    path.write_bytes(("\ufeff" + rows).encode())
    assert corpus(path).texts() == said
    plain = tmp_path / "plain.txt"
    plain.write_bytes("\ufeffwords".encode())
    assert corpus(plain).texts() == ["words"]


def test_a_bad_row_is_told_by_its_line_and_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('"one"\n\n"two"\n{"text": \n"five"\n', encoding="utf-8")
    with pytest.raises(TextError, match=r"rows\.jsonl, line 4 is not JSON: Expecting value\.$"):
        corpus(path)
    for row, message in (
        ('{"prompt": "a", "completion": "b"}', "line 2 has no 'text'; its fields are 'prompt', 'completion'; give"),
        ('{"text": 7}', "line 2 has a 'text' that is a int"),
        ("{}", "line 2 is an empty mapping"),
        ("[1]", "line 2 is a list, not a text"),
        ("[" * 100_000, "line 2 is not JSON"),
    ):
        path.write_text(f'"one"\n{row}\n', encoding="utf-8")
        with pytest.raises(TextError, match=re.escape(message)):
            corpus(path)
    path.write_text('"\\ud800 half a pair"', encoding="utf-8")
    assert corpus(path).texts() == ["? half a pair"]


def test_a_list_names_files_whatever_their_names_hold(tmp_path: Path) -> None:
    names = ["a\u2028b.txt", "blank.txt ", "plain.txt"]
    for name in names:
        (tmp_path / name).write_text(name, encoding="utf-8")
    listed = tmp_path / "list"
    listed.write_text("\ufeff" + "\n".join(names[:2]) + "\n  plain.txt \r\n", encoding="utf-8")
    assert corpus(f"@{listed}").texts() == names


def test_a_document_is_read_in_parts_whatever_the_cut_splits(tmp_path: Path) -> None:
    path = tmp_path / "umlaut.txt"
    path.write_text("aäb", encoding="utf-8")
    document = Document("umlaut", 4, path=path)
    assert [document.read(0, 2), document.read(1, 3), document.read(2, 4)] == ["a", "ä", "b"]


UNUSABLE = {
    "missing": (None, "there is no text at"),
    "empty": (b" \n\t ", "is empty"),
    "binary": (b"text\0more", "is binary"),
    "latin-1": ("caf\u00e9".encode("latin-1"), "is not UTF-8 (byte 0xe9)"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_unusable_text_is_one_clear_sentence(tmp_path: Path, what: str) -> None:
    content, message = UNUSABLE[what]
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError, match=re.escape(message)) as caught:
        corpus(path)
    assert str(path) in str(caught.value)


def test_unusable_collections(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no files"):
        corpus(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"\0")
    with pytest.raises(TextError, match=re.escape("1 files, none of them text (x.bin is binary)")):
        corpus(tmp_path)
    with pytest.raises(TextError, match="list of 1 texts holds no text"):
        corpus([" "])
    for content, message in (("{broken", "is not JSON"), ("[1]", "entry 1"), ('{"text": "x"}', "holds no list")):
        path = tmp_path / "rows.json"
        path.write_text(content)
        with pytest.raises(TextError, match=message):
            corpus(path)


def test_a_dataset_needs_the_extra_and_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(TextError, match=re.escape("pip install 'regauge[datasets]'")):
        corpus("datasets:wikitext:text")
    with pytest.raises(TextError, match="names no column"):
        corpus("datasets:wikitext")


def test_windows_by_hand(tokenizer: object) -> None:
    """Six bytes in windows of four with <s> in front: three bytes each; one token a byte."""
    found = draw(corpus(["abcdef"]), tokenizer, tokens=8, length=4)
    assert frame(tokenizer) == ([256], [])
    letters = ["".join(tokenizer.decode(row[1:])) for row in found.inputs.tolist()]
    assert sorted(letters) == ["abc", "def"]
    assert (found.inputs[:, 0] == 256).all()
    assert found.tokens == 8


def test_encoders_get_both_ends() -> None:
    framed = tiny.tokenizer(frame=True)
    found = draw(corpus(["abcdef"]), framed, tokens=8, length=5)
    assert frame(framed) == ([256], [257])
    assert found.inputs.shape == (2, 5)
    assert (found.inputs[:, -1] == 257).all()


def test_windows_do_not_span_documents_while_there_is_text(tokenizer: object) -> None:
    documents = [letter * 40 for letter in "abcdefgh"]
    found = draw(corpus(documents), tokenizer, tokens=8 * 33, length=33)
    assert all(len(set(row[1:].tolist())) == 1 for row in found.inputs)
    assert len({int(row[1]) for row in found.inputs}) == 8


def test_short_ends_are_joined_only_where_the_text_would_not_suffice(tokenizer: object) -> None:
    documents = [letter * 20 for letter in "abcdefgh"]
    found = draw(corpus(documents), tokenizer, tokens=160, length=33)
    assert found.inputs.shape == (5, 33)
    assert any(len(set(row[1:].tolist())) > 1 for row in found.inputs)


def test_the_seed_decides_which_text_is_read_and_the_same_seed_decides_the_same(tokenizer: object) -> None:
    text = corpus([" ".join(str(n) for n in range(20000))])
    one, same, other = (draw(text, tokenizer, 640, 64, seed=seed) for seed in (0, 0, 1))
    assert one.sha256 == same.sha256 != other.sha256
    assert torch.equal(one.inputs, same.inputs)


def test_too_little_text_says_the_numbers(tokenizer: object) -> None:
    with pytest.raises(TextError, match=r"has 5 tokens, too few .* at least 256"):
        draw(corpus(["short"]), tokenizer, tokens=4096, length=64)
    with pytest.raises(TextError, match=r"gives 15 windows of 64 tokens \(1,000 tokens in all\), and 64 were asked"):
        draw(corpus(["x" * 1000]), tokenizer, tokens=4096, length=64, exact=True)
    with pytest.raises(TextError, match="no room"):
        draw(corpus(["x" * 1000]), tokenizer, tokens=4096, length=1)
    short = draw(corpus(["x" * 1000]), tokenizer, tokens=4096, length=64)
    assert short.notes == ("the text gave 960 calibration tokens of the 4,096 that the recipe asks for",)


def test_only_as_much_is_tokenised_as_is_needed(tokenizer: object) -> None:
    read = []

    class Counting:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            read.append(len(text))
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)  # type: ignore[attr-defined]  # the fixture

        def decode(self, ids: list[int]) -> str:
            raise AssertionError("nothing is decoded")

    draw(corpus(["word " * 200_000]), Counting(), tokens=512, length=64)
    assert sum(read) < 20_000


def test_batches_keep_order_and_bounds() -> None:
    found = Calibration(torch.arange(60).view(10, 6), "by hand")
    parts = found.batches(13)
    assert [len(part) for part in parts] == [2] * 5
    assert torch.equal(torch.cat(parts), found.inputs)
    assert [len(part) for part in found.batches(1)] == [1] * 10


HALF = ((0.5,) * 3, (0.5,) * 3)


def test_images_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=np.full((3, 2, 2, 3), 255, dtype=np.uint8))
    found = images(path, 2, (3, 2), HALF)
    assert found.inputs.shape == (2, 3, 2, 2)
    assert torch.equal(found.inputs, torch.ones(2, 3, 2, 2))
    assert found.tokens == 2
    assert images(path, 2, (3, 5), HALF).inputs.shape == (2, 3, 5, 5)
    np.savez(path.with_name("grey.npz"), x_train=np.full((3, 2, 2), 255, np.uint8))
    grey = images(path.with_name("grey.npz"), 2, (1, 2), ((0.5,), (0.5,))).inputs
    assert torch.equal(grey, torch.ones(2, 1, 2, 2))


def test_images_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, y=np.zeros(3))
    with pytest.raises(TextError, match="holds no images"):
        images(path, 2, (3, 2), HALF)
    np.savez(path, x=np.zeros((3, 2, 2, 1), dtype=np.uint8))
    with pytest.raises(TextError, match=re.escape("has shape (3, 2, 2, 1)")):
        images(path, 2, (3, 2), HALF)

"""Text for calibration and evaluation: where it lies, whether it can be used, and what identifies it.

A `Corpus` is a list of documents that are read on demand: a directory of novels is hashed and checked once, in
pieces, and never held in memory. Windows of tokens are cut from it in `windows.py`.

    corpus("novels/")            every text file below, in order of path
    corpus("notes.txt")          one document; .jsonl and .json: one document an entry (a string, or its "text")
    corpus(["one", "two"])       the texts themselves; a list of `Path` names files
    corpus("@list.txt")                files named one a line, relative to the list
    corpus("datasets:wikitext:text")   a column of a Hugging Face dataset (split `train`, or a third `:split`)
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regauge.errors import TextError

PIECE = 1 << 20  # bytes read at a time
BOM = "\ufeff"  # a byte-order mark, which some editors put before a text in UTF-8


@dataclass(frozen=True)
class Document:
    """One text in UTF-8, in memory or in a file.

    Attributes:
        name: path or running number, for messages.
        size: bytes.
        content: the text, where it is not in a file.
        path: the file, where it is.
    """

    name: str
    size: int
    content: bytes | None = None
    path: Path | None = None

    def read(self, start: int = 0, stop: int | None = None) -> str:
        """Bytes start … stop as text; a character that the cut splits is left out."""
        if self.path is None:
            data = (self.content or b"")[start:stop]
        else:
            with open(self.path, "rb") as file:
                file.seek(start)
                data = file.read(-1 if stop is None else stop - start)
        text = data.decode("utf-8", errors="ignore")
        return text.removeprefix(BOM) if start == 0 else text

    def pieces(self) -> Iterator[bytes]:
        """All bytes, a piece at a time."""
        if self.path is None:
            yield self.content or b""
            return
        with open(self.path, "rb") as file:
            while data := file.read(PIECE):
                yield data


@dataclass(frozen=True)
class Corpus:
    """Documents with a description for people and a hash for machines.

    Attributes:
        documents: in a fixed order, none empty.
        description: `novels/ (55 documents, 43,100,000 bytes)`.
        sha256: over every document's bytes.
        notes: what was left out, a sentence each.
    """

    documents: tuple[Document, ...]
    description: str
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all documents."""
        return sum(document.size for document in self.documents)

    def texts(self) -> list[str]:
        """Every document whole; for text that is known to be small."""
        return [document.read() for document in self.documents]


Where = str | Path | Sequence[str] | Sequence[Path]
"""What a user may give as text."""


def corpus(where: Where) -> Corpus:
    """Opens and checks a text.

    Raises:
        TextError: it is missing, empty, binary or not UTF-8.
    """
    if not isinstance(where, str | Path):
        return _from_list(where)
    if str(where).startswith("datasets:"):
        return _from_dataset(str(where))
    if str(where).startswith("@"):
        return _from_names(Path(str(where)[1:]).expanduser())
    path = Path(where).expanduser()
    if path.is_dir():
        return _from_directory(path)
    if not path.exists():
        raise TextError(
            f"there is no text at {str(where)!r}; give a file, a directory, a list of texts, or datasets:NAME:COLUMN."
        )
    if path.suffix in (".jsonl", ".json"):
        return _made(_entries(path), str(where))
    reason = unusable(Document(str(path), path.stat().st_size, path=path))
    if reason:
        raise TextError(f"{where} {reason}; give plain text in UTF-8.")
    return _made([Document(path.name, path.stat().st_size, path=path)], str(where))


def unusable(document: Document) -> str:
    """Why a document is no text, or nothing: it is empty, binary (a NUL byte) or not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    blank = True
    try:
        for data in document.pieces():
            if b"\0" in data:
                return "is binary"
            blank = blank and not decoder.decode(data).strip()
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.object[error.start]:#04x})"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "is empty" if blank else ""


def _from_list(items: Sequence[str] | Sequence[Path]) -> Corpus:
    documents = []
    for index, item in enumerate(items):
        if isinstance(item, Path):
            documents += list(corpus(item).documents)
        else:
            text = str(item)
            document = Document(f"text {index}", len(text.encode()), text.encode())
            if text.strip():
                documents.append(document)
    if not documents:
        raise TextError(f"the list of {len(items)} texts holds no text; give at least one that is not blank.")
    return _made(documents, "a list")


def _from_names(path: Path) -> Corpus:
    try:
        names = [line for line in _lines(path.read_text(encoding="utf-8-sig")) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"the list {path} cannot be read: {error}; name one file a line.") from error
    if not names:
        raise TextError(f"the list {path} is empty; name one file a line.")
    found = [corpus(_named(path.parent, name)) for name in names]
    documents = [document for each in found for document in each.documents]
    return _made(documents, f"@{path}", tuple(note for each in found for note in each.notes))


def _from_directory(path: Path) -> Corpus:
    documents, skipped = [], []
    for file in sorted(path.rglob("*")):
        inner = file.relative_to(path)
        if not file.is_file() or any(part.startswith(".") for part in inner.parts):
            continue
        document = Document(str(inner), file.stat().st_size, path=file)
        reason = unusable(document)
        if reason:
            skipped.append(f"{inner} {reason}")
        else:
            documents.append(document)
    if not documents:
        seen = f"{len(skipped)} files, none of them text ({skipped[0]})" if skipped else "no files"
        raise TextError(f"the directory {path} has {seen}; give one with plain text in UTF-8.")
    notes = (f"left out of the text: {'; '.join(skipped[:3])}" + (" …" if len(skipped) > 3 else ""),)
    return _made(documents, str(path), notes if skipped else ())


def _entries(path: Path) -> list[Document]:
    """Entries of a JSON list, or lines of JSON: strings, or mappings with a `text`."""
    reason = unusable(Document(str(path), path.stat().st_size, path=path))
    if reason:
        raise TextError(f"{path} {reason}; give a list of texts in JSON.")
    raw = path.read_text(encoding="utf-8-sig")
    items = _of_list(path, raw) if path.suffix == ".json" else _of_lines(path, raw)
    documents = []
    for place, number, item in items:
        text = item.get("text") if isinstance(item, dict) else item
        if not isinstance(text, str):
            raise TextError(f"{path}, {place} {number} {_strange(item)}; give texts, or mappings with a 'text'.")
        if text.strip():
            # a lone half of a surrogate pair, which JSON can write and UTF-8 cannot
            data = text.encode("utf-8", errors="replace")
            documents.append(Document(f"{path.name}:{number}", len(data), data))
    if not documents:
        raise TextError(f"{path} holds {len(items)} entries and no text; give at least one that is not blank.")
    return documents


def _of_list(path: Path, raw: str) -> list[tuple[str, int, Any]]:
    try:
        items = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{path} is not JSON: {error}.") from error
    if not isinstance(items, list):
        raise TextError(f"{path} holds no list; give a list of texts, or of mappings with a 'text'.")
    return [("entry", number, item) for number, item in enumerate(items, 1)]


def _of_lines(path: Path, raw: str) -> list[tuple[str, int, Any]]:
    items = []
    for number, line in enumerate(_lines(raw), 1):
        if line.strip():
            try:
                items.append(("line", number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                told = getattr(error, "msg", str(error))
                raise TextError(f"{path}, line {number} is not JSON: {told}.") from error
    return items


def _lines(text: str) -> list[str]:
    """Lines as files have them: JSON and names may hold the other characters at which `str.splitlines` cuts."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def _named(folder: Path, name: str) -> Path:
    """A file of a list; blanks around its name count only where there is a file of just that name."""
    return folder / name if (folder / name).exists() else folder / name.strip()


def _strange(item: object) -> str:
    """What an entry is that is no text."""
    if not isinstance(item, dict):
        return f"is a {type(item).__name__}, not a text"
    if "text" in item:
        return f"has a 'text' that is a {type(item['text']).__name__}"
    fields = ", ".join(repr(str(name)) for name in list(item)[:6])
    return f"has no 'text'; its fields are {fields}" if fields else "is an empty mapping"


def _from_dataset(spec: str) -> Corpus:
    _, name, column, *rest = [*spec.split(":"), ""]
    split = rest[0] or "train" if rest else "train"
    if not name or not column:
        raise TextError(f"{spec!r} names no column; write datasets:NAME:COLUMN or datasets:NAME:COLUMN:SPLIT.")
    try:
        import datasets
    except ImportError as error:
        raise TextError(
            f"{spec!r} needs the datasets package, which is not installed; run: pip install 'regauge[datasets]'."
        ) from error
    try:
        table: Any = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise TextError(f"the dataset {name!r} (split {split!r}) cannot be loaded: {error}.") from error
    if column not in table.column_names:
        raise TextError(f"the dataset {name!r} has no column {column!r}; it has {', '.join(table.column_names)}.")
    texts = [row for row in table[column] if isinstance(row, str) and row.strip()]
    if not texts:
        raise TextError(f"column {column!r} of the dataset {name!r} holds no text.")
    return _made([Document(f"row {i}", len(t.encode()), t.encode()) for i, t in enumerate(texts)], spec)


def _made(documents: Sequence[Document], where: str, notes: tuple[str, ...] = ()) -> Corpus:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.size}:".encode())
        for data in document.pieces():
            digest.update(data)
    size = sum(document.size for document in documents)
    count = f"{len(documents)} document{'s' if len(documents) > 1 else ''}, {size:,} bytes"
    return Corpus(tuple(documents), f"{where} ({count})", digest.hexdigest(), notes)

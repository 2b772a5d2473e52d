"""The demo's text: the standard library of the interpreter that runs this.

Every machine that runs Regauge already has this text, so nothing is
downloaded. ``stdlib_files`` finds it, leaves out what is not written by hand,
and splits whole modules by a hash of their dotted name, so the split is the
same on every machine and in every order of listing:

=========  =======  =====================================================
split      share    use
=========  =======  =====================================================
train      ~90 %    the bundled model's weights, tokenizer and 5-gram
watch      ~2 %     looked at while training (stopping, settings)
heldout    ~8 %     looked at once, by ``evaluate_bundled.py``
=========  =======  =====================================================

Left out, by rule:

* directories named in ``SKIPPED_DIRS`` (tests, idlelib, pydoc_data, installed
  packages, wheels inside ensurepip, the build's own ``config-*``), at any
  depth;
* files whose first 1,500 characters say that a program generated them
  (``GENERATED``: the charmap codecs, ``_sysconfigdata*``, token, keyword);
* tables: files where more than half of the lines that are not blank begin
  with a literal (``TABLE_ROW``), such as html.entities;
* files that are not UTF-8, and files of under 200 bytes.

Only the standard library is imported. One call takes about a second.

    python scripts/stdlib_text.py OUT_DIR [--limit-bytes N]
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "watch", "heldout")
SKIPPED_DIRS = frozenset(
    {
        "test", "tests", "idle_test", "idlelib", "pydoc_data", "site-packages",
        "dist-packages", "ensurepip", "_bundled", "__pycache__", "lib-dynload",
    }
)  # fmt: skip
GENERATED = re.compile(
    r"generated from ['\"]|generated and used by|file is generated|auto(?:matically)?[- ]generated",
    re.IGNORECASE,
)
TABLE_ROW = re.compile(r"""\s*[\[({]*\s*(?:[bBrRuU]{0,2}['"](?!["'])|-?\d)""")
HEAD_CHARS = 1500
MIN_BYTES = 200
HELDOUT_PERCENT = 8
WATCH_PERCENT = 2


@dataclass(frozen=True)
class StdlibFile:
    """One module's source: where it is, what it hashes to, where it belongs."""

    module: str
    split: str
    sha256: str
    text: str

    @property
    def n_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode("utf-8"))


def split_of(module: str) -> str:
    """The split of a dotted module name; a function of the name alone."""
    bucket = int(hashlib.sha256(module.encode("utf-8")).hexdigest()[:8], 16) % 100
    if bucket < HELDOUT_PERCENT:
        return "heldout"
    return "watch" if bucket < HELDOUT_PERCENT + WATCH_PERCENT else "train"


def module_name(relative: Path) -> str:
    """``xml/dom/__init__.py`` is ``xml.dom``; ``xml/dom/minidom.py`` is ``xml.dom.minidom``."""
    parts = list(relative.with_suffix("").parts)
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def is_skipped_dir(relative: Path) -> bool:
    """Whether any directory above the file is one that the text leaves out."""
    return any(part in SKIPPED_DIRS or part.startswith("config-") for part in relative.parts[:-1])


def is_generated(text: str) -> bool:
    """Whether the head of the file says that a program wrote it."""
    return GENERATED.search(text[:HEAD_CHARS]) is not None


def is_table(text: str) -> bool:
    """Whether more than half of the lines that are not blank begin with a literal."""
    lines = [line for line in text.splitlines() if line.strip()]
    return 2 * sum(TABLE_ROW.match(line) is not None for line in lines) > len(lines)


def stdlib_files(root: Path | None = None) -> list[StdlibFile]:
    """All source files that belong to the text, sorted by module name.

    ``root`` defaults to the running interpreter's standard library. Newlines
    are made ``\\n``; the hash is of the text as returned, in UTF-8.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if is_skipped_dir(relative):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        data = text.encode("utf-8")
        if len(data) < MIN_BYTES or is_generated(text) or is_table(text):
            continue
        module = module_name(relative)
        found.append(StdlibFile(module, split_of(module), hashlib.sha256(data).hexdigest(), text))
    return sorted(found, key=lambda file: file.module)


def of_split(files: list[StdlibFile], split: str) -> list[StdlibFile]:
    """The files of one split, in the order given."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    return [file for file in files if file.split == split]


def write_text(out: Path, limit_bytes: int | None = None) -> dict[str, tuple[int, int]]:
    """Write ``OUT/<split>/<module>.py.txt``; return files and bytes per split.

    ``limit_bytes`` stops each split at that many bytes, whole files only, and
    at least one file; files are taken in the order of their hash, so that a
    small sample is not all from the letter a.
    """
    files, written = stdlib_files(), {}
    for split in SPLITS:
        chosen = of_split(files, split)
        if limit_bytes is not None:
            chosen = _up_to(sorted(chosen, key=lambda file: file.sha256), limit_bytes)
        folder = out / split
        folder.mkdir(parents=True, exist_ok=True)
        for file in chosen:
            (folder / f"{file.module}.py.txt").write_bytes(file.text.encode("utf-8"))
        written[split] = (len(chosen), sum(file.n_bytes for file in chosen))
    return written


def _up_to(files: list[StdlibFile], limit_bytes: int) -> list[StdlibFile]:
    chosen: list[StdlibFile] = []
    total = 0
    for file in files:
        if total + file.n_bytes <= limit_bytes:
            chosen.append(file)
            total += file.n_bytes
    return chosen or files[:1]


def main() -> None:
    """Command line; prints what was written."""
    parser = argparse.ArgumentParser(description="Write the standard library as text, split by module.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--limit-bytes", type=int, metavar="N", help="at most N bytes per split")
    args = parser.parse_args()
    for split, (n_files, n_bytes) in write_text(args.out, args.limit_bytes).items():
        print(f"{split:8} {n_files:5d} files {n_bytes:10,d} bytes  {args.out / split}")


if __name__ == "__main__":
    main()

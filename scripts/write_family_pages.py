"""Writes docs/families/: a page an architecture, read off its table on the smallest model of its config, and an index.

    python scripts/write_family_pages.py            # write them
    python scripts/write_family_pages.py --check    # exit 1 where they are stale

The models are those of tests/architectures.yaml, without weights. A test holds the pages against the tables.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.architectures import config_of, listed  # noqa: E402

from regauge.anatomy.model import Anatomy  # noqa: E402
from regauge.errors import RegaugeError  # noqa: E402
from regauge.hosts.transformers import tables  # noqa: E402
from regauge.hosts.transformers.columns import Table  # noqa: E402
from regauge.hosts.transformers.settings import why_together  # noqa: E402
from regauge.hosts.transformers.skeleton import skeleton  # noqa: E402
from regauge.hosts.transformers.table import anatomy_of  # noqa: E402
from regauge.rewrites import FoldNorm, LayerNormToRMS, RotateHadamard  # noqa: E402

TARGET = ROOT / "docs" / "families"
INDEX = """# Every family

Written by `scripts/write_family_pages.py` from the tables: what each of them lets be done. All of them are inspected,
streamed, rounded, loaded and run by the tests. A "no" has its reason on the family's page.

| family | rotation | smoothing | neurons | heads | calibration text | native decode |
|---|---|---|---|---|---|---|
"""


def pages() -> dict[str, str]:
    """File → text."""
    found, rows = {}, []
    for kind in sorted({row["type"] for row in listed().values()}):
        name = kind if kind in listed() else next(name for name, row in listed().items() if row["type"] == kind)
        cells, text = _page(kind, name)
        found[f"{kind}.md"] = text
        rows.append(f"| [{kind}]({kind}.md) | " + " | ".join("yes" if not why else "no" for why in cells) + " |")
    return {"README.md": INDEX + "\n".join(rows) + "\n"} | found


def _page(kind: str, name: str) -> tuple[list[str], str]:
    """(why not, of each column of the index; "" where it can be done), and the page."""
    config = config_of(name)
    config._experts_implementation = "eager"
    model = skeleton(config)
    table, anatomy = tables.table_for(config), anatomy_of(config, model)
    wrapped = f", around a `{getattr(config, table.part).model_type}`" if table.part else ""
    native = "" if listed()[name].get("native") else _why_not_native(table, anatomy)
    reads = table.reads or [model.main_input_name]
    fed = why_together(table, config) if len(reads) == 1 else f"it reads {' and '.join(reads)}"
    fed = "" if reads == ["input_ids", "decoder_input_ids"] else fed
    cells = [_rotated(anatomy), _smoothed(anatomy), _cut(anatomy, "ffn"), _cut(anatomy, "heads"), fed, native]
    lines = [f"# {kind}", "", _said(tables.known().files[kind], kind), ""]
    lines += [f"The table is in `families/{tables.known().files[kind].name}`{wrapped}.", ""]
    names = (
        "Rotation",
        "Smoothing",
        "Pruning of neurons",
        "Pruning of heads",
        "Calibration data",
        "Native decode step",
    )
    lines += ["| | |", "|---|---|"]
    lines += [f"| {what} | {'yes' if not why else f'no: {why}'} |" for what, why in zip(names, cells, strict=True)]
    lines += ["", "Sites of a block: " + _sites(anatomy) + "."]
    if anatomy.notes:
        kept = (re.sub(r" is no site: .*", "", note) for note in anatomy.notes)
        lines += ["", "Stays as it is:", "", *(f"- {note}" for note in kept)]
    if table.stops:
        lines += ["", "Moves that it does not admit:", ""]
        lines += [
            f"- {', '.join(stop.moves) or 'any'} of {', '.join(stop.streams)}{_when(stop.when)}: {stop.why}"
            for stop in table.stops
        ]
    if table.refuse:
        lines += ["", "Settings that it does not describe:", ""]
        lines += [
            f"- `{one.attribute}` other than `{one.must_match or one.must_be}`: {one.why}" for one in table.refuse
        ]
    return cells, "\n".join(lines) + "\n"


def _said(file: Path, kind: str) -> str:
    """What the comment above a table says."""
    for document in re.split(r"^---$", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
        types = re.search(r"^types: \[(.*)\]$", document, re.MULTILINE)
        if types and kind in types[1].split(", "):
            told = [line.removeprefix("#").strip() for line in document.splitlines() if line.startswith("#")]
            return " ".join(told) or "Likewise."
    return ""


def _rotated(anatomy: Anatomy) -> str:
    try:
        for rewrite in (LayerNormToRMS(), FoldNorm(), RotateHadamard(seed=0)):
            anatomy, _ = rewrite(anatomy, {}, {})
    except RegaugeError as error:
        return _numberless(str(error))  # in the words of the refusal that a recipe gets
    return ""


def _smoothed(anatomy: Anatomy) -> str:
    norms = [stream for stream in anatomy.streams if stream.kind == "norm" and stream.block is not None]
    why = [stream.stops["scale"] for stream in norms if "scale" not in stream.admits]
    return _numberless(why[0]) if why else "" if norms else "no norm stands in front of what is read"


def _cut(anatomy: Anatomy, kind: str) -> str:
    streams = [stream for stream in anatomy.streams if stream.kind == kind]
    why = [stream.stops.get("select", "") for stream in streams if "select" not in stream.admits]
    what = "attention" if kind == "heads" else "feed-forward layer"
    return why[0] if why else "" if streams else f"no {what} is described head by head or neuron by neuron"


def _why_not_native(table: Table, anatomy: Anatomy) -> str:
    if isinstance(table.step, str):
        return table.step
    return "it does not make text token by token" if not anatomy.causal else "the model has no head"


def _sites(anatomy: Anatomy) -> str:
    found = dict.fromkeys(
        ".".join("*" if word.isdigit() else word for word in site.name.split(".")[2:])
        for site in anatomy.sites
        if site.block is not None
    )
    return ", ".join(f"`{name}`" for name in found)


def _numberless(text: str) -> str:
    return re.sub(r"blocks\.\d+\.", "blocks.N.", text)


def _when(when: dict[str, Any]) -> str:
    return f" (with {', '.join(f'`{name}: {value}`' for name, value in when.items())})" if when else ""


def main(arguments: list[str]) -> int:
    """Writes the pages, or says which are stale."""
    found = pages()
    if "--check" in arguments:
        have = {path.name: path.read_text(encoding="utf-8") for path in TARGET.glob("*.md")}
        stale = sorted(name for name in {*found, *have} if found.get(name) != have.get(name))
        print("\n".join(stale))
        return int(bool(stale))
    TARGET.mkdir(exist_ok=True)
    for path in TARGET.glob("*.md"):
        path.unlink()
    for name, text in found.items():
        (TARGET / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

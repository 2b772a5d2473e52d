"""Puts what the benchmarks measured into docs/speed.md, with its pictures, so that no figure is typed by hand.

    python benchmarks/decode.py && python scripts/write_speed.py
    python scripts/write_speed.py --results out/bench         # where the JSON files lie

A benchmark without a result keeps what the page has. Beside the pictures, out/bench/speed.html holds the same rows as
interactive rooflines.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import plots, records, table  # noqa: E402

PAGE = ROOT / "docs" / "speed.md"
BENCHES = ("linear", "decode", "prefill")


def marked(name: str, body: str, text: str) -> str:
    """`text` with everything between the marks of `name` replaced by `body`."""
    found = re.compile(rf"<!-- {re.escape(name)} -->\n.*?<!-- end -->", re.DOTALL)
    if not found.search(text):
        raise SystemExit(f"docs/speed.md has no marks <!-- {name} --> … <!-- end -->")
    return found.sub(lambda _: f"<!-- {name} -->\n\n{body.strip()}\n\n<!-- end -->", text, count=1)


def works(result: records.Result) -> list[tuple[str, int]]:
    """(model or shape, batch) of every picture, in the order of the rows."""
    return list(dict.fromkeys((row.model, row.batch) for row in result.rows if row.seconds))


def picture(bench: str, model: str, batch: int) -> str:
    """File name of a picture; the batch is part of it where a model has more than one."""
    return f"speed-{bench}-{model}{f'-{batch}' if bench == 'linear' else ''}.svg"


def body(result: records.Result, docs: Path) -> str:
    """The part of a benchmark, its pictures written beside the page."""
    lines = [table.whole(result), ""]
    if result.peaks is None:
        return "\n".join(lines)
    for model, batch in works(result):
        if batch != 1 and result.bench == "linear":
            continue  # the tables have them; one picture a shape is enough
        name = picture(result.bench, model, batch)
        (docs / name).write_text(plots.waterline(result, model, batch), encoding="utf-8")
        lines.append(f"![{result.bench} of {model}: achieved under attainable]({name})\n")
    return "\n".join(lines)


def page(results: list[records.Result]) -> str:
    """Interactive rooflines of every model and batch."""
    figures = [plots.gaps(result, *work) for result in results if result.peaks for work in works(result)]
    drawn = [
        figure.to_html(full_html=False, include_plotlyjs=not number)  # the library once
        for number, figure in enumerate(figures)
    ]
    return f"<!doctype html><meta charset=utf-8><title>Speed</title>{''.join(drawn)}\n"


def main(arguments: list[str]) -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--results", type=Path, default=ROOT / "out" / "bench")
    words.add_argument("--page", type=Path, default=PAGE)
    given = words.parse_args(arguments)
    text, found = given.page.read_text(encoding="utf-8"), []
    for bench in BENCHES:
        path = given.results / f"{bench}.json"
        if not path.exists():
            print(f"{bench}: no {path.name}; the page keeps what it has")
            continue
        found.append(records.read(path))
        text = marked(f"benchmarks/{bench}.py", body(found[-1], given.page.parent), text)
    given.page.write_text(text, encoding="utf-8")
    if found:
        (given.results / "speed.html").write_text(page(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

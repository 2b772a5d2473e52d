"""Writes docs/reference.md (every command and option, every public name of Python) and docs/choose.md (every preset by
what it was measured to lose), both read off the code.

    python scripts/write_reference.py            # write them
    python scripts/write_reference.py --check    # exit 1 where they are stale
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

import regauge as rg
from regauge.cli.app import app
from regauge.parts import SHAPE, WEIGHTS
from regauge.plan import load, presets
from regauge.report.methods import OF_CACHE, PRESET, Method, kept, methods

DOCS = Path(__file__).resolve().parents[1] / "docs"
CHOOSE = """# Which should I take?

**Not sure, and there is text of your kind:** `regauge fit MODEL --budget memory=0.30x --calibration TEXT -o OUT`. It
spends bits where they matter and tells what it measured. `--time 5m` ends in five minutes.

**A preset, because another runtime must read it:** `regauge methods --bits 4 --loads-in vllm` lists those that do.
`gptq-w4g128` with text, `rtn-w8` without; `--embed int8` where the vocabulary is a large part of the model.

**It must fit in so much memory:** `regauge inspect MODEL --memory 8GB --context 32k` says which do, cache included.

**Activations in 8 bits too** (throughput on hardware with integer products): `smoothquant`.

What each loses, smallest files first: KL to the original in nats a token (0 is the original), with its 95 % interval,
and beside it nearest rounding at the same bits. {how}. `{command}` prints it.{missing}

| preset | bits a weight | KL | nearest, same bits | verdict | others read it | reads text |
|---|---|---|---|---|---|---|
"""
REFERENCE = """# Reference

Every command with its options, as `--help` has them, and every public name of `import regauge as rg`. Options have the
same names in Python, where amounts are strings too: `rg.fit(MODEL, OUT, budget="memory=0.30x", time="5m")`.

"""


def choose() -> str:
    """The presets, by bits."""
    told = kept()
    measurable = [name for name in presets() if load(name).of(WEIGHTS) or load(name).of(SHAPE)]
    found = {name: row for name, row in told["rows"].items() if name in measurable}  # caches: docs/cache.md
    rows = sorted(found.items(), key=lambda item: (item[1]["bits"], item[1]["kl"][0]))
    owner = {name: method for method in methods() if method.kind in (PRESET, OF_CACHE) for name in method.names}
    stock = {name for method in methods(loads_in="vllm") for name in method.names}
    how = f"Measured on {told['model']}: {told['text']}"
    missing = len(measurable) - len(rows)
    left = f" {missing} of {len(measurable)} presets have no figure yet." if missing else ""
    lines = [CHOOSE.format(how=how, command=told["command"], missing=left)]
    lines += [_row(name, row, owner.get(name), name in stock) for name, row in rows]
    return "\n".join([lines[0] + lines[1], *lines[2:], ""])


def _row(name: str, row: dict[str, Any], method: Method | None, stock: bool) -> str:
    kl, low, high = row["kl"]
    beside = f"{row['null_kl'][0]:.2g}" if "null_kl" in row else "–"
    reads = method is not None and "reads no text" not in method.cost
    told = f"{kl:.2g} [{low:.2g}, {high:.2g}]" + (f"; {row['as']}" if "as" in row else "")
    yes = ["no", "yes"]
    cells = (f"`{name}`", f"{row['bits']:.2f}", told, beside, row.get("verdict", "–"), yes[stock], yes[reads])
    return "| " + " | ".join(cells) + " |"


def reference() -> str:
    """Commands, then names."""
    command: Any = typer.main.get_command(app)
    return REFERENCE + "\n".join(["## Commands", "", *_commands(command, "regauge"), "## Python", "", *_names(), ""])


def _commands(command: Any, path: str) -> Iterator[str]:
    for name, one in sorted(command.commands.items()):
        if hasattr(one, "commands"):
            yield from _commands(one, f"{path} {name}")
            continue
        words = [param.metavar or param.name.upper() for param in one.params if param.param_type_name == "argument"]
        yield from (f"### `{' '.join([path, name, *words])}`", "", str(one.help or "").strip(), "")
        yield from ("| option | what it does |", "|---|---|")
        for param in one.params:
            flags = (
                [f"`{flag}`" for flag in param.opts] if param.param_type_name == "option" else [f"`{param.metavar}`"]
            )
            told = str(getattr(param, "help", "") or "").replace("|", "\\|")
            if told and "--help" not in param.opts:
                yield f"| {', '.join(flags)} | {told} |"
        yield ""


def _names() -> Iterator[str]:
    for name in rg.__all__:
        found = getattr(rg, name) if name not in ("measure", "report") else getattr(rg.api, name)
        if not callable(found):
            continue
        told = (inspect.getdoc(found) or "").split("\n\n")[0].replace("\n", " ")
        given = "" if inspect.isclass(found) else _signature(found)
        yield from (f"### `rg.{name}{given}`", "", told, "")


def _signature(found: Any) -> str:
    """`(model, out, budget=…)`."""
    given = inspect.signature(found).parameters.values()
    return f"({', '.join(p.name + ('=…' if p.default is not p.empty else '') for p in given)})"


def main(arguments: list[str]) -> int:
    stale = []
    for path, text in ((DOCS / "reference.md", reference()), (DOCS / "choose.md", choose())):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if "--check" not in arguments:
                path.write_text(text, encoding="utf-8")
    print(f"{len(stale)} pages {'stale' if '--check' in arguments else 'written'}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The options that commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regauge import amounts
from regauge.errors import BudgetError

MODEL = Annotated[str, typer.Argument(metavar="MODEL", help="A transformers directory or a hub id; safetensors only.")]
OUT = Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="Where the artifact goes; must not exist yet.")]
CALIBRATION = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Text that methods read: a file, a directory, a list of files (@LIST), or datasets:NAME:COLUMN; for "
        "models of images an .npz. Without it the model samples its own.",
    ),
]
EVAL = Annotated[
    str | None,
    typer.Option(
        "--eval",
        metavar="TEXT",
        help="Text, or images as .npz, that the final figures are measured on; never searched on.",
    ),
]
BUDGETS = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="NAME=AMOUNT",
        help="memory=0.30x, memory=2GB, memory@32k=4GB, decode=1.5x; may be repeated.",
    ),
]
FLOOR = Annotated[str | None, typer.Option(metavar="kl=0.05", help="Lose no more than this.")]
SEED = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Two runs with one seed give the same bytes.")]
REVISION = Annotated[str | None, typer.Option(help="Pins a hub model to a branch, tag or commit.")]
FAMILY = Annotated[
    Path | None, typer.Option("--family", metavar="FILE", help="A family table of your own (docs/families.md).")
]
FORCE = Annotated[bool, typer.Option("--force", help="Replace an OUT that exists.")]
DRY_RUN = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done and what it would cost; write nothing.")
]
TIME = Annotated[
    str | None,
    typer.Option(
        "--time",
        metavar="30m",
        help="The command ends in this time, with the best that it has: 90s, 30m, 2h; or it refuses before any work.",
    ),
]
FOR = Annotated[
    str | None,
    typer.Option("--for", metavar="RUNTIME", help="Choose only what this loads: transformers, vllm or sglang."),
]
MEMBERS = Annotated[
    bool,
    typer.Option("--members", help="One artifact with a member for each budget, chosen when it is loaded or runs."),
]
METHODS = Annotated[
    str | None,
    typer.Option(metavar="NAME,NAME", help="Choose only from what these presets make of a matrix: gptq-w4g128,rtn-w8."),
]
RECOVER = Annotated[
    str | None,
    typer.Option(
        "--recover",
        metavar="20m",
        help="Then train what stays in full precision towards the original for so long, beyond --time.",
    ),
]
DRAFTS = Annotated[
    str | None,
    typer.Option(
        metavar="lookup",
        help="What may draft, with the same text: any, none, lookup or a member; any where a budget is of decode.",
    ),
]
TOKENS = Annotated[int | None, typer.Option(min=1, help="Calibration tokens; without it as many as help.")]
LENGTH = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of a window of text; else as the recipe or the model's size has it."),
]
MAX_MEMORY = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="6GB",
        help="The most that this process may take. Less is done at once where it is short; the bytes are the same.",
    ),
]
CACHE = Annotated[
    str | None,
    typer.Option(
        metavar="RECIPE",
        help="What is kept of the past: a preset (kivi-4), several (snapkv+kivi-4), a recipe file, or none.",
    ),
]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
QUIET = Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no remarks; errors are told.")]
VERBOSE = Annotated[bool, typer.Option("-v", "--verbose", help="Also say how long each stage took.")]
THREADS = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Threads to compute with; as many as there are cores without it.")
]
DEVICE = Annotated[
    str, typer.Option(metavar="cpu|cuda", help="Where it computes: the CPU; a GPU runs artifacts and makes none yet.")
]
TRAINED = Annotated[str, typer.Option("--device", metavar="cpu|cuda", help="Where members are trained.")]
DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def memory(text: str | None) -> int | None:
    """`6GB` → bytes.

    Raises:
        BudgetError: it is no amount of memory.
    """
    return None if text is None else amounts.memory(text, f"--max-memory {text}")


def told_memory(text: str | None, tokens: str) -> tuple[int, int] | None:
    """`8GB` and `32k` → (bytes, tokens).

    Raises:
        BudgetError: one is no such amount.
    """
    held = amounts.context(tokens, f"--context {tokens}")
    return None if text is None else (amounts.memory(text, f"--memory {text}"), held)


def tell_parents(out: Path) -> None:
    """Says which folders above OUT will be made: a mistyped path is seen before hours of work."""
    parent = out.expanduser().absolute().parent
    if not parent.exists():
        typer.echo(f"{parent} does not exist and will be made.", err=True)


def spent() -> float:
    """Seconds since the process began: a length of time begins with the command, not with the work."""
    import time

    import psutil

    return float(max(0.0, time.time() - psutil.Process().create_time()))


def seconds(text: str | None, option: str = "--time") -> float | None:
    """`30m`, `1h30m`, `90` (seconds) → seconds."""
    if text is None:
        return None
    try:
        return amounts.length(text, f"{option} {text!r}")
    except BudgetError as error:
        raise typer.BadParameter(str(error)) from error

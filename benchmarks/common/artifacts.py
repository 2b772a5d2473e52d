"""What the runners load: our artifacts by recipe, and GGUF files, made once from the random checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.shapes import SHAPES, Shape, checkpoint

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "out" / "bench" / "models"
GGUF = Path(__file__).resolve().parents[1] / "peers" / "gguf_files.py"

BODY = {
    "int8 channel": "{grid: int8, grain: channel, ranger: absmax, scale: bf16, rounder: nearest}",
    "int6 g32": "{grid: int6, grain: group:32, ranger: absmax, scale: f16, rounder: nearest}",
    "int4 g32": "{grid: int4, grain: group:32, ranger: absmax, scale: f16, rounder: nearest}",
    "int4-asym g128": "{grid: int4-asym, grain: group:128 else group:64, ranger: minmax, scale: f16, rounder: nearest}",
    "int3-asym g64": "{grid: int3-asym, grain: group:64, ranger: minmax, scale: f16, rounder: nearest}",
    "int2-asym g64": "{grid: int2-asym, grain: group:64, ranger: minmax, scale: f16, rounder: nearest}",
    "int8 x int8": "{grid: int8, grain: channel, ranger: absmax, scale: f32, rounder: nearest}",
}
"""Coordinates of the matrices of all blocks."""

INPUTS = {"int8 x int8": "{grid: int8, grain: token}"}
"""How the taps of all blocks are read, where they are rounded."""

TABLES = {
    "int8 channel": "int8 channel",
    "int6 g32": "int6 g32",
    "int4 g32": "int6 g32",
    "int4-asym g128": "int4-asym g128",
    "int3-asym g64": "int6 g32",
    "int2-asym g64": "int6 g32",
    "int8 x int8": "int8 channel",
}
"""What the head and the embedding take: 6 bits beside 4, 3 and 2, as llama.cpp's files do for the head."""


def recipe(variant: str, shape: Shape) -> str:
    """The recipe of a variant as YAML."""
    tables = ("embed",) if shape.tied else ("embed", "head")
    rules = [f"  blocks.*: {BODY[variant]}", *(f"  {name}: {BODY[TABLES[variant]]}" for name in tables)]
    inputs = ["inputs:", f"  blocks.*: {INPUTS[variant]}"] if variant in INPUTS else []
    return "\n".join([f"name: {slug(variant)}", "weights:", *rules, *inputs]) + "\n"


def slug(variant: str) -> str:
    return variant.replace(" ", "-")


def source(name: str) -> Path:
    """The bf16 checkpoint of a shape."""
    return checkpoint(SHAPES[name], MODELS / name / "bf16")


def artifact(name: str, variant: str) -> Path:
    """Our artifact, made where it is missing or was made by another recipe."""
    import regauge as rg
    from regauge.plan import digest, load

    shape, out = SHAPES[name], MODELS / name / slug(variant)
    written = MODELS / name / f"{slug(variant)}.yaml"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(recipe(variant, shape), encoding="utf-8")
    if not out.exists() or _receipt(out)["plan_hash"] != digest(load(written)):
        rg.apply(written, source(name), out, force=out.exists())
    return out


def _receipt(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "regauge" / "receipt.json").read_text(encoding="utf-8"))
    return found


def read_bytes(path: Path, tied: bool) -> tuple[int, float]:
    """(bytes of weights that one token reads, bits a weight of them): all sites but a table that is only looked up."""
    read = [site for site in _receipt(path)["sites"] if tied or site["kind"] != "embed"]
    size = sum(site["bytes_after"] for site in read)
    return size, 8 * size / sum(site["shape"][0] * site["shape"][1] for site in read)


def gguf(name: str, kind: str, python: Path) -> Path:
    """A GGUF file of a shape, made where it is missing by llama.cpp's own quantiser; `python` has it installed."""
    out = MODELS / name / f"{kind}.gguf"
    if not out.exists():
        command = [str(python), str(GGUF), str(source(name)), str(out), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
            raise RuntimeError(f"{out.name} could not be made: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return out

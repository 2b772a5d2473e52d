"""Families of pico models for tests: every dimension, in the formats whose members lie differently in memory."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.engine import apply
from regauge.plan import Plan, parse
from tests import tiny

IDS = torch.arange(3, 30)[None].repeat(2, 1)
FAMILY = (
    "family: {depth: [3, 2], ffn: [0.75, 0.5], heads: [2, 1], width: [48], cache: [kv8], "
    "members: {small: 'depth=2,ffn=0.5'}}\n"
)
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 96, "head_dim": 16, "intermediate_size": 128},
    "gpt_neox": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128},
}
ROW = "{grid: %s, grain: %s, ranger: absmax, scale: %s, rounder: nearest}"
WEIGHTS = {
    "plain": "",
    "int8": f"weights: {{blocks.*: {ROW % ('int8', 'channel', 'bf16')}}}\n",
    "int4": f"weights: {{blocks.*: {ROW % ('int4', 'group:16', 'f16')}, embed: {ROW % ('int8', 'channel', 'bf16')}}}\n",
    "asym": f"weights: {{blocks.*: {ROW % ('int4-asym', 'group:16', 'f32')}}}\n",
    "mixed": f"weights: {{blocks.*.attn.*: {ROW % ('int6', 'group:16', 'f16')}}}\n",
    "w8a8": f"weights: {{blocks.*: {ROW % ('int8', 'channel', 'bf16')}}}\n"
    "inputs: {blocks.*: {grid: int8, grain: token}}\n",
    "low-rank": "weights: {blocks.*: {grid: int4, grain: group:16, ranger: absmax, scale: f16, rounder: nearest, "
    "compensator: lorc:2}}\n",
}
SINGLE = ("depth=2", "depth=1/3", "ffn=0.5", "ffn=1/0.5/0.75/0.5", "heads=1", "heads=2/1/2/1", "width=48")
PAIRED = ("depth=3", "ffn=0.75", "heads=2", "width=48")
PAIRS = tuple(",".join(pair) for pair in combinations(PAIRED, 2))


def recipe(weights: str = "plain", family: str = FAMILY) -> Plan:
    return parse(f"name: members\n{family}{WEIGHTS.get(weights, weights)}")


def made(where: Path, name: str = "llama", weights: str = "plain", **changes: Any) -> Path:
    """A family of a pico model of four blocks, sorted on a little text."""
    sizes = {"num_hidden_layers": 4} | SIZES[name] | changes
    source = tiny.folder(where / "model", name, **sizes)
    text = tiny.text(where, 6000)
    apply(recipe(weights), source, where / "out", calibration=text, tokens=512, length=32)
    return where / "out"


def given(model: Any, ids: Tensor = IDS) -> list[Tensor]:
    """What a model gives for a text at once, and then token by token behind its beginning."""
    with torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :9], use_cache=True)
        found = [whole, out.logits]
        for at in (9, 10):
            out = model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return found


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

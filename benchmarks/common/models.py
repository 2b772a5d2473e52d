"""Entries for whole models: what each runner is asked to load. Files are made when the entry's turn to load comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers.setup import python

from common import artifacts
from common.records import Row
from common.rounds import Entry
from common.shapes import Shape

LLAMA = "llama.cpp"
WAYS = {"bf16": "transformers", "torch": "torch in transformers", "torchao": "torchao in transformers"}
INTERPRETERS: dict[str, Path] = {
    "llama": python("llama"),
    "cache_llama": python("llama"),
    "cache_torch": python("caches"),
    "cache_kvpress": python("kvpress"),
    "cache_openvino": python("openvino"),
} | dict.fromkeys(("torchao_model", "linear_torchao", "linear_onnx", "linear_openvino"), python("runtimes"))


def regauge(shape: Shape, variant: str, options: dict[str, Any]) -> Entry:
    """Our artifact, through `rg.load`."""
    row = Row(model=shape.name, runner="regauge", variant=variant, route=options["route"])

    def make() -> dict[str, Any]:
        path = artifacts.artifact(shape.name, variant)
        size, bits = artifacts.read_bytes(path, shape.tied)
        return {**options, "path": str(path), "bytes": size, "bits": bits}

    return Entry(row, "regauge_model", make, memory=int(shape.weights() * 1.2))


def transformers(shape: Shape, variant: str, options: dict[str, Any]) -> Entry:
    """transformers in bf16, or with packed linear layers of torch or torchao."""
    first, _, rest = variant.partition(" ")
    row = Row(model=shape.name, runner=WAYS[first], variant=f"{rest} g32" if rest == "int4" else rest or "bf16")

    def make() -> dict[str, Any]:
        return {**options, "path": str(artifacts.source(shape.name)), "variant": variant, "group": 32}

    peer = "torchao_model" if first == "torchao" else "transformers_model"
    return Entry(row, peer, make, memory=int(shape.weights() * 2.2 + 2 * shape.vocabulary * shape.hidden))


def llama(shape: Shape, variant: str, options: dict[str, Any]) -> Entry:
    """A GGUF file through llama.cpp."""
    row = Row(model=shape.name, runner=LLAMA, variant=variant)

    def make() -> dict[str, Any]:
        return {**options, "path": str(artifacts.gguf(shape.name, variant, INTERPRETERS["llama"]))}

    return Entry(row, "llama", make, memory=int(shape.weights() * (2.1 if variant == "BF16" else 1.1)))

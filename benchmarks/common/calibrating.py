"""Peers that calibrate, beside ours: the same model, the same text, as many tokens in windows as long.

Each runs through its adaptor in `peers/`, in an environment of its own (`peers/setup.py`). One that is not installed,
or that fails, is a row that says so.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from peers.setup import python, tool

from common.watched import Watched, watched

PEERS = Path(__file__).resolve().parent.parent / "peers"


@dataclass(frozen=True)
class Peer:
    """How a row is had.

    Attributes:
        script: the adaptor in `peers/`.
        venv: the environment that it runs in.
        apart: a phase that is no part of the comparison; its seconds are told beside.
        whole: it runs on all blocks; else on the first few, and the rest is counted from those.
    """

    script: str
    venv: str
    apart: str = ""
    whole: bool = True


KNOWN = {
    "llama.cpp Q4_K_M": Peer("calibrate_llama", "imatrix", apart="convert"),
    "llm-compressor GPTQ": Peer("calibrate_llmcompressor", "llmcompressor"),
    "auto-round": Peer("calibrate_autoround", "autoround", whole=False),
}


@dataclass(frozen=True)
class Told:
    """What a peer took: seconds (of the whole model), what was watched, seconds by phase, what to say below the row."""

    seconds: float
    ran: Watched
    tokens: int
    phases: dict[str, float]
    note: str


def missing(peer: Peer) -> str:
    """Why a peer cannot run here, or nothing."""
    needs = [python(peer.venv), *([tool("imatrix"), tool("quantize")] if peer.venv == "imatrix" else [])]
    absent = not all(path.exists() for path in needs)
    return f"not installed: python benchmarks/peers/setup.py {peer.venv}" if absent else ""


def shortened(model: Path, out: Path, blocks: int) -> Path:
    """The same checkpoint with its first blocks only: links to its shards, and a config and an index of its own."""
    out.mkdir()
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}), encoding="utf-8")
    index = json.loads((model / "model.safetensors.index.json").read_text(encoding="utf-8"))
    kept = {
        name: shard
        for name, shard in index["weight_map"].items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < blocks
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": kept}), encoding="utf-8")
    for name in {*kept.values(), "tokenizer.json", "tokenizer_config.json"}:
        os.symlink((model / name).resolve(), out / name)
    return out


def run(
    name: str, model: Path, out: Path, text: Path, shape: tuple[int, int, int], limit: float | None = None
) -> Told | str:
    """One peer, watched; a sentence where it cannot run, failed, or did not end in `limit` seconds.

    Args:
        shape: windows, tokens in each, and of how many blocks a peer that is too slow for all is timed (0: of all).
    """
    peer = KNOWN[name]
    if why := missing(peer):
        return why
    count, length, few = shape
    blocks = int(json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])
    times = 1.0
    if few and not peer.whole and few < blocks:
        model, times = shortened(model, out.with_name(out.name + ".model"), few), blocks / few
    script = PEERS / f"{peer.script}.py"
    command = [str(python(peer.venv)), str(script), str(model), str(out), str(text), str(count * length), str(length)]
    ran = watched(command, [out], limit)
    if limit is not None and ran.code < 0 and ran.wall >= limit:
        return (
            f"stopped after {ran.wall:.0f} s without an end, {ran.cpu:.0f} CPU s and {ran.peak / 1e9:.2f} GB anonymous"
        )
    lines = [line for line in ran.printed.splitlines() if line.startswith('{"seconds"')]
    if ran.code or not lines:
        last = [line for line in ran.complaints.splitlines() if line.strip()][-1:]
        return f"ended with {ran.code}: {' '.join(last)[:200]}"
    told = json.loads(lines[-1])
    phases: dict[str, float] = told["phases"]
    seconds = ran.wall - phases.get(peer.apart, 0.0) + (times - 1) * phases.get("blocks", 0.0)
    versions = ", ".join(f"{package} {version}" for package, version in told["versions"].items())
    notes = [versions, ", ".join(f"{phase} {value:.1f} s" for phase, value in phases.items())]
    notes += [f"from {told['source']}"] if "source" in told else []
    notes += [f"without {peer.apart}"] if peer.apart else []
    notes += [f"groups of {told['group']}"] if "group" in told else []
    if times > 1:
        notes.append(
            f"timed on {few} of {blocks} blocks in {ran.wall:.1f} s, the time of the blocks counted {times:g} times; "
            "CPU, memory and disk are those of the few"
        )
    return Told(seconds, ran, told["tokens"], phases, "; ".join(notes))

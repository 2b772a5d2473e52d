"""Writes docs/sizes.md, memory and time to expect by the size of a model, from the measured figures in docs/sizes.json.

    python scripts/write_sizes.py            # write it
    python scripts/write_sizes.py --check    # exit 1 where it is stale

Nothing is measured here: figures of the JSON come from the commands that stand beside them, and everything else is
scaled from those by the rules that the page states.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from scale import Shape  # noqa: E402

PAGE, FIGURES = ROOT / "docs" / "sizes.md", ROOT / "docs" / "sizes.json"
SIZES = ("1.1B", "7B", "30B")
HEAD = """# Memory and time to expect

Of models of 1B, 7B and 30B, on two cores and without a GPU. **Bold figures were measured**; the others are scaled from
them by the rules below, and no run of that size stands behind them. A dry run (`--dry-run`) tells the figures of your
model on your machine, counted at rates taken there. `python scripts/write_sizes.py` makes this page from
`docs/sizes.json`.

"""


RULES = """## What was measured, and how it is scaled

On {machine}.
The two runs of `apply` had error feedback in Python still; it is C++ since, and faster.

- **`apply`, 1.1B**: `{small[command]}`, {tokens:,} tokens, whole:
  {took}, which is {here:.1f} times the floor that the command counts (two passes of the blocks, XᵀX, error feedback).
- **`apply`, 8B**: `{large[command]}`, {large[blocks]} of 32 blocks: {large[seconds]} s, {large[seconds_a_block]} s a
  block, so {whole} with all, {there:.1f} times its floor; {held} of memory. Times of other sizes are their floor times
  {there:.1f}; memory lies on the line through the two by the weights of one block, since a block is what is held; disk
  is the artifact and the hidden states between two blocks, both counted.
- **`fit`, 1.1B**: `{search[command]}`, whole. Time and disk of other sizes grow with the weights of the blocks; from 2B
  on the search itself tries less, so they should be less. Memory is that of the backward pass, measured alone at 1.1B
  and 8B, on the line through the two: the least that a search takes. No search of a model larger than 1.1B was run to
  its end.
- **Decoding, 1.1B**: `{decode[command]}`, {decode[what]}: {decode[tokens_a_second]} tokens a second,
  {decode[of_the_probe]:.0%} of the bandwidth of the same minute. A token reads the blocks and the head once, so other
  sizes take that share of it; twice the bandwidth, twice the tokens. At the start of a context: behind 4k of tokens the
  cache is read too.
- **Memory to run**: bytes of the codes and steps, which are held as they are stored, and the cache in bf16, from
  shapes. Python with torch and transformers is beside that. With less memory: [models larger than
  memory](offload.md).
"""


class Size(NamedTuple):
    """What the rules count of a shape: weights of a block, of all blocks, and of the embedding (or head)."""

    config: dict[str, Any]

    @property
    def shape(self) -> Shape:
        return Shape.of(self.config)

    @property
    def block(self) -> int:
        return sum(outputs * inputs for outputs, inputs in self.shape.sites)

    @property
    def blocks(self) -> int:
        return self.block * int(self.config["num_hidden_layers"])

    @property
    def table(self) -> int:
        return int(self.config["vocab_size"] * self.config["hidden_size"])

    @property
    def cache(self) -> int:
        """Bytes of keys and values in bf16, a token."""
        head = self.config["hidden_size"] // self.config["num_attention_heads"]
        return int(4 * head * self.config["num_key_value_heads"] * self.config["num_hidden_layers"])


def floor(size: Size, told: dict[str, Any]) -> float:
    """Seconds of what `gptq` must compute, as benchmarks/scale.py counts them."""
    return sum(size.shape.floor(told["tokens"], told["rates"]["bf16"], told["rates"]["float32"]).values())


def line(points: list[tuple[float, float]], at: float) -> float:
    """The line through two points."""
    (x, y), (u, v) = points
    return y + (v - y) / (u - x) * (at - x)


def page(told: dict[str, Any]) -> str:
    sizes = {name: Size(config) for name, config in told["shapes"].items()}
    small, large = told["apply"]
    whole = large["seconds"] + large["seconds_a_block"] * (sizes["8B"].config["num_hidden_layers"] - large["blocks"])
    times = {"1.1B": small["seconds"] / floor(sizes["1.1B"], told), "8B": whole / floor(sizes["8B"], told)}
    lines = [HEAD.strip(), ""]
    lines += _making(told, sizes, times["8B"])
    lines += _running(told, sizes)
    return "\n".join([*lines, _rules(told, times, whole)])


def _making(told: dict[str, Any], sizes: dict[str, Size], times: float) -> list[str]:
    small, large = told["apply"]
    search = told["fit"]
    lines = [
        "## Making it",
        "",
        "`python benchmarks/scale.py --sizes 1.1b --recipes gptq-w4g128 fit` prints what is bold.",
        "",
        "| | shape | command | time | memory | disk beside the source |",
        "|---|---|---|---|---|---|",
    ]
    held = [(float(sizes[one["shape"]].block), float(one["memory"])) for one in (small, large)]
    behind = [(float(sizes[one["shape"]].block), float(one["memory"])) for one in search["backward"]]
    for name in SIZES:
        size, here = sizes[name], name == small["shape"]
        took = _bold(_span(small["seconds"])) if here else _span(times * floor(size, told))
        memory = _bold(_gb(small["memory"])) if here else _gb(line(held, size.block))
        disk = (
            _bold(_gb(small["disk"]))
            if here
            else _gb(_stored(size, told) + told["tokens"] * 2 * size.config["hidden_size"])
        )
        lines.append(f"| {name} | {size.config['like']} | `apply gptq-w4g128` | {took} | {memory} | {disk} |")
    base = sizes[search["shape"]]
    for name in SIZES:
        size, here = sizes[name], name == search["shape"]
        took = _bold(_span(search["seconds"])) if here else _span(search["seconds"] * size.blocks / base.blocks)
        memory = _bold(_gb(search["memory"])) if here else f"{_gb(line(behind, size.block))} or more"
        disk = _bold(_gb(search["disk"])) if here else _gb(search["disk"] * size.blocks / base.blocks)
        lines.append(f"| {name} | {size.config['like']} | `fit` | {took} | {memory} | {disk} |")
    return [
        *lines,
        "",
        "`fit --time 30m` ends in half an hour, with less tried, or says before any work that it is too little.",
        "",
    ]


def _running(told: dict[str, Any], sizes: dict[str, Size]) -> list[str]:
    decode = told["decode"]
    lines = [
        "## Running it",
        "",
        "Blocks and head in 4 bits, groups of 128, the embedding in 8 (`--embed int8 --head int4-asym-g128`);",
        "counted by `python scripts/write_sizes.py`.",
        "",
        "| | in bf16 | weights | with 4k of context | with 32k | tokens/s, memory read at "
        f"{decode['probe'] / 1e9:.0f} GB/s |",
        "|---|---|---|---|---|---|",
    ]
    for name in SIZES:
        size = sizes[name]
        read = (size.blocks + size.table) * told["bits"] / 8
        weights = read + size.table
        rate = decode["of_the_probe"] * decode["probe"] / read
        shown = _bold(f"{decode['tokens_a_second']:.0f}") if name == decode["shape"] else f"{rate:.1f}"
        grown = [_gb(weights + tokens * size.cache) for tokens in (4096, 32768)]
        whole = 2 * (size.blocks + 2 * size.table)
        lines.append(f"| {name} | {_gb(whole)} | {_gb(weights)} | {' | '.join(grown)} | {shown} |")
    return [*lines, ""]


def _rules(told: dict[str, Any], times: dict[str, float], whole: float) -> str:
    small, large = told["apply"]
    return RULES.format(
        machine=told["machine"], small=small, large=large, search=told["fit"], decode=told["decode"],
        tokens=told["tokens"], took=_span(small["seconds"]), whole=_span(whole), held=_gb(large["memory"]),
        here=times["1.1B"], there=times["8B"],
    )  # fmt: skip


def _stored(size: Size, told: dict[str, Any]) -> float:
    """Bytes of a `gptq-w4g128` artifact: embedding and head stay in bf16."""
    return size.blocks * told["bits"] / 8 + 4 * size.table


def _span(seconds: float) -> str:
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count < 10e9 else f"{count / 1e9:.0f} GB"


def _bold(text: str) -> str:
    return f"**{text}**"


def main(words: list[str]) -> int:
    made = page(json.loads(FIGURES.read_text(encoding="utf-8")))
    if words == ["--check"]:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

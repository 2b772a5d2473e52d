"""Puts what the commands print into the README, so that its figures are never typed by hand.

    make demo && python scripts/write_readme.py
    python scripts/write_readme.py --explain       # only the output of `explain`, which needs no run

The table comes from the run record that `make demo` left in out/demo.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import regauge as rg
from regauge.measure.cost import Costs, verdict
from regauge.measure.quality import Quality
from regauge.search.record import Run, read

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RUN = ROOT / "out" / "demo"


def marked(name: str, body: str, text: str) -> str:
    """`text` with everything between the marks of `name` replaced by `body`."""
    block = f"<!-- {name} -->\n\n{body.strip()}\n\n<!-- end -->"
    found = re.compile(rf"<!-- {re.escape(name)} -->\n.*?<!-- end -->", re.DOTALL)
    if not found.search(text):
        raise SystemExit(f"README.md has no marks <!-- {name} --> … <!-- end -->")
    return found.sub(lambda _: block, text, count=1)


def quality(found: Quality | None) -> tuple[str, str, str]:
    if found is None:
        return "–", "–", "–"
    kl, agree = found.kl, found.agreement
    return (
        f"{found.bits_per_byte.value:.3f}",
        f"{kl.value:.4f} [{kl.low:.4f}, {kl.high:.4f}]" if kl.value else "0",
        f"{100 * agree.value:.1f} %",
    )


def speed(costs: Costs | None) -> str:
    return "–" if costs is None or costs.decode is None else f"{costs.decode.median:.0f}"


def table(run: Run) -> str:
    """The run as one table: the original, the uniform presets, what the search built."""
    rows = ["| | bytes | of bf16 | bits a byte | KL to the original | same next token | decode, tokens/s |"]
    rows.append("|---|---|---|---|---|---|---|")

    def row(name: str, size: int, found: Quality | None, rate: str) -> None:
        cells = (name, f"{size:,}", f"{size / run.bytes_bf16:.3f}×", *quality(found), rate)
        rows.append("| " + " | ".join(cells) + " |")

    row("original, bf16", run.bytes_bf16, run.original, speed(run.costs.get("original")))
    for point in run.uniforms:
        row(f"`{point.name}`, every site alike", point.bytes_measured or point.bytes_predicted, point.measured, "–")
    chosen = run.point
    built = chosen.bytes_measured or chosen.bytes_predicted
    row("**`fit`, memory=0.30x**", built, run.quality, speed(run.costs.get("compressed")))
    told = [
        "",
        f"{run.quality.tokens:,} tokens of {run.quality.documents} held-out documents; 95 % bootstrap intervals over "
        "documents in brackets."
        if run.quality
        else "",
    ]
    old, new = run.costs.get("original"), run.costs.get("compressed")
    if old and new and old.decode and new.decode:
        told.append(f"Decoding against bf16, turn about in one run: {verdict(new.decode, old.decode)}.")
    for name, paired in run.against_uniform.items():
        gap = paired.difference
        told.append(f"KL of `fit` less that of `{name}`: {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}].")
    machine = run.machine.get("cpu") or run.machine.get("model") or ""
    told.append(f"Machine: {machine}; {sum(run.seconds.values()):.0f} s in all. Printed by `make demo`.")
    return "\n".join(rows + told)


def main(arguments: list[str]) -> int:
    text = README.read_text(encoding="utf-8")
    explained = "```text\n$ regauge explain gptq-w4g128\n" + rg.explain("gptq-w4g128").rstrip() + "\n```"
    text = marked("explain: regauge explain gptq-w4g128", explained, text)
    if "--explain" not in arguments:
        text = marked("table: what `make demo` printed", table(read(RUN)), text)
    README.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
